"""What a denoiser's encoder hands to its decoder: recorded at key steps, handed out again at the others.

One `EncoderFeatures` belongs to one hooked model and holds everything that is kept between its calls. The hooks on the modules
of the encoder are thin: what they hand out is computed before the model is called, so that modules may be compiled.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.hooks import ModelHook

from ..numerics.propagation import forecast_weights
from .attachment import attach_hook, detach_hook
from .encoder_cut import EncoderCut

OFF, RECORD, REPLAY = "off", "record", "replay"


def map_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Apply a function to all tensors in nested tuples, lists and dictionaries."""
    if torch.is_tensor(value):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)([map_tensors(function, item) for item in value])
    return value


class Recording:
    """Output of one module: its tensors, each once, and how they are nested.

    An encoder block may return a tensor twice, and what is then added to it in place (as by a T2I-Adapter) is meant for both
    places. So equal tensors stay one tensor.
    """

    def __init__(self, value: Any):
        originals: list[torch.Tensor] = []

        def place(tensor: torch.Tensor) -> int:
            for index, known in enumerate(originals):
                if known is tensor:
                    return index
            originals.append(tensor)
            return len(originals) - 1

        self._layout = _places(place, value)
        self.tensors = [tensor.clone() for tensor in originals]  # later in-place changes are not part of the feature

    def rebuild(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The output with other tensors in the places of its own."""
        return _fill(self._layout, tensors)


class EncoderFeatures:
    """Features of the last key steps of one model.

    Args:
        cut: the encoder.
        depth: key steps to remember: 1 to hold a feature, more to forecast it.
    """

    def __init__(self, cut: EncoderCut, depth: int):
        self._cut, self._depth = cut, depth
        self._modules = [*cut.encoder_modules, *([] if cut.resumed is None else [cut.resumed])]
        self.mode = OFF
        self.num_rows = 0
        """Rows of the batch at the key step."""
        self.num_steps = 1
        """Steps that the decoder computes in the present call."""
        self.key_steps: list[int] = []
        """Steps of the recordings, the newest first."""
        self._recordings: list[dict[int, Recording]] = []
        self._current: dict[int, Recording] = {}
        self._ready: dict[int, Any] = {}

    def attach(self, name: str) -> None:
        """Hook the modules of the cut."""
        for index, module in enumerate(self._modules):
            is_resumed = module is self._cut.resumed
            attach_hook(module, _ResumedHook(self, index) if is_resumed else _EncoderHook(self, index), name)

    def detach(self, name: str) -> None:
        """Undo `attach`."""
        for module in self._modules:
            detach_hook(module, name)

    def clear(self) -> None:
        """Forget everything."""
        self.mode, self.num_steps, self.key_steps = OFF, 1, []
        self._recordings, self._current, self._ready = [], {}, {}

    def newest(self) -> list[torch.Tensor]:
        """Everything stored at the last key step."""
        return [tensor for recording in self._recordings[0].values() for tensor in recording.tensors]

    def nbytes(self) -> int:
        """Memory of what is stored."""
        recordings = [recording for step in self._recordings for recording in step.values()]
        return sum(tensor.nbytes for recording in recordings for tensor in recording.tensors)

    def current_nbytes(self) -> int:
        """Memory of what the present call has recorded, for as many key steps as are remembered."""
        tensors = [tensor for recording in self._current.values() for tensor in recording.tensors]
        return sum(tensor.nbytes for tensor in tensors) * self._depth

    def begin_recording(self, num_rows: int, num_steps: int) -> None:
        """The next call is a key step, whose decoder also computes the `num_steps - 1` steps after it."""
        self.mode, self.num_rows, self.num_steps, self._current = RECORD, num_rows, num_steps, {}

    def end_recording(self, step: int) -> None:
        """Keep what the call recorded."""
        self._recordings = [self._current, *self._recordings][: self._depth]
        self.key_steps = [step, *self.key_steps][: self._depth]
        self._current = {}
        self.end()

    def begin_replay(self, steps: Sequence[int]) -> None:
        """The next call decodes `steps` at once."""
        self.mode, self.num_steps = REPLAY, len(steps)
        weights = [forecast_weights(self.key_steps, step) for step in steps]
        for index, newest in self._recordings[0].items():
            if not all(index in recordings for recordings in self._recordings):
                continue  # somebody began to listen to this module in mid-run
            past = [recordings[index].tensors for recordings in self._recordings]
            tensors = [_forecast([tensors[place] for tensors in past], weights) for place in range(len(newest.tensors))]
            self._ready[index] = newest.rebuild(tensors)

    def end(self) -> None:
        """The call is over, well or not."""
        self.mode, self.num_steps, self._ready, self._current = OFF, 1, {}, {}

    def resumed_feature(self) -> torch.Tensor:
        """What the first module of the decoder is going to get."""
        return self._ready[len(self._modules) - 1]

    def is_read(self, module: torch.nn.Module) -> bool:
        """Whether the decoder reads the output of an encoder module, or somebody listens to it (as a learned solver does to
        the bottleneck): then it is stored, for a module that is skipped has no other answer."""
        return module in self._cut.stored or bool(module._forward_hooks)

    def has(self, index: int) -> bool:
        """Whether the output of a module was stored at the key step."""
        return index in self._ready

    def first_rows(self, arguments: Any) -> Any:
        """Of arguments that hold each row once for every step of the present call, those of the key step."""
        if self.num_steps == 1:
            return arguments
        expanded = self.num_rows * self.num_steps

        def first(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[:: self.num_steps] if tensor.ndim > 0 and tensor.shape[0] == expanded else tensor

        return map_tensors(first, arguments)

    def record(self, index: int, value: Any) -> Any:
        """Store a module's output, and hand it out with each row once for every step of the present call."""
        recording = Recording(value)
        self._current[index] = recording
        if self.num_steps == 1:
            return value
        return recording.rebuild([tensor.repeat_interleave(self.num_steps, dim=0) for tensor in recording.tensors])

    def recall(self, index: int) -> Any:
        """What a module is to return instead of computing it."""
        return self._ready[index]


class _EncoderHook(ModelHook):
    def __init__(self, features: EncoderFeatures, index: int):
        super().__init__()
        self.features, self.index = features, index

    def new_forward(self, module: torch.nn.Module, *args, **kwargs):
        features = self.features
        if features.mode == OFF:
            return self.fn_ref.original_forward(*args, **kwargs)
        if features.mode == REPLAY:
            if features.has(self.index):
                return features.recall(self.index)
            return args[0] if args else next(iter(kwargs.values()))
        args, kwargs = features.first_rows(args), features.first_rows(kwargs)
        output = self.fn_ref.original_forward(*args, **kwargs)
        return features.record(self.index, output) if features.is_read(module) else output


class _ResumedHook(ModelHook):
    def __init__(self, features: EncoderFeatures, index: int):
        super().__init__()
        self.features, self.index = features, index

    def new_forward(self, module: torch.nn.Module, *args, **kwargs):
        if self.features.mode == OFF:
            return self.fn_ref.original_forward(*args, **kwargs)
        name = None if args else next(iter(kwargs))
        feature = args[0] if args else kwargs[name]
        if self.features.mode == RECORD:
            feature = self.features.record(self.index, feature)
        else:
            feature = self.features.recall(self.index)
        if args:
            return self.fn_ref.original_forward(feature, *args[1:], **kwargs)
        return self.fn_ref.original_forward(**(kwargs | {name: feature}))


def _forecast(past: Sequence[torch.Tensor], weights: Sequence[Sequence[float]]) -> torch.Tensor:
    """The feature at several steps: row b of step s is row `b * len(weights) + s`. As newest + differences, which loses least
    in half precision."""
    newest = past[0]
    forecasts = []
    for row in weights:
        forecast = newest.clone()
        for older, weight in zip(past[1:], row[1:], strict=True):
            if weight != 0 and newest.is_floating_point():
                forecast.add_(older - newest, alpha=weight)
        forecasts.append(forecast)
    return forecasts[0] if len(forecasts) == 1 else torch.stack(forecasts, dim=1).flatten(0, 1)


def _places(place: Callable[[torch.Tensor], int], value: Any) -> Any:
    return map_tensors(lambda tensor: _Place(place(tensor)), value)


def _fill(layout: Any, tensors: Sequence[torch.Tensor]) -> Any:
    if isinstance(layout, _Place):
        return tensors[layout.index]
    if isinstance(layout, dict):
        return {key: _fill(item, tensors) for key, item in layout.items()}
    if isinstance(layout, tuple | list):
        return type(layout)([_fill(item, tensors) for item in layout])
    return layout


class _Place:
    """Where a tensor stood."""

    def __init__(self, index: int):
        self.index = index
