"""What a learned solver sees of the denoiser, and what it tells it: bottleneck features out, a timestep per sample in."""

import inspect
import weakref
from typing import Any

import torch
from diffusers.hooks import ModelHook

from ..models.class_labels import DIT_PIPELINE_NULL_LABEL
from .attachment import attach_hook, detach_hook
from .bottleneck import bottleneck_features, bottleneck_of

_HOOK_NAME = "learned_solver"


class DenoiserTap(ModelHook):
    """Taps the denoiser of a pipeline for one scheduler. State lives until the next model call.

    Args:
        model: the denoiser.
        timesteps_for: called with a batch size; the timesteps of the samples, (B,), or None to leave the pipeline's own.
    """

    def __init__(self, model: torch.nn.Module, timesteps_for: Any):
        super().__init__()
        self._model = weakref.ref(model)
        self._timesteps_for = timesteps_for
        self._null_label = getattr(model, "null_label", None)
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        self._label_place = names.index("class_labels") if "class_labels" in names else len(names)
        self._conditional_first: bool | None = None
        self.output: torch.Tensor | None = None
        """Raw output of the last model call."""
        self.calls = 0
        """Model calls since `forget`."""
        self._bottleneck: torch.Tensor | None = None
        self._handle = bottleneck_of(model).register_forward_hook(self._capture)
        attach_hook(model, self, _HOOK_NAME)

    def _capture(self, module: torch.nn.Module, inputs: tuple, output: Any) -> None:
        del module, inputs
        self._bottleneck = bottleneck_features(output)

    def new_forward(self, module: torch.nn.Module, *args, **kwargs):
        sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        timesteps = self._timesteps_for(sample.shape[0])
        if timesteps is not None:
            timesteps = timesteps.to(sample.device)
            if "timestep" in kwargs:
                kwargs["timestep"] = timesteps
            else:
                args = (args[0], timesteps, *args[2:])
        if self._conditional_first is None:
            given = args[self._label_place] if len(args) > self._label_place else kwargs.get("class_labels")
            self._conditional_first = self._is_guided_by_labels(given)
        output = self.fn_ref.original_forward(*args, **kwargs)
        self.output = output[0] if isinstance(output, tuple) else output.sample
        self.calls += 1
        return output

    def _is_guided_by_labels(self, labels: torch.Tensor | None) -> bool:
        """Whether the second half of the batch is the unlabelled copy of the first, as in DiTPipeline. Reads the labels once
        in a run."""
        if labels is None or labels.ndim != 1 or labels.shape[0] % 2:
            return False
        nulls = labels == DIT_PIPELINE_NULL_LABEL
        if self._null_label is not None:
            nulls = nulls | (labels == self._null_label)
        first, second = nulls.chunk(2)
        return bool(second.all()) and not bool(first.all())

    def conditional(self, values: torch.Tensor, batch_size: int) -> torch.Tensor:
        """The part of a batched value that belongs to the condition, one row for each image.

        Args:
            values: (B, ...), as the model saw them.
            batch_size: rows of the sample that the pipeline steps.
        """
        if self._conditional_first:
            return values.chunk(2)[0]
        return values.chunk(2)[1] if values.shape[0] == 2 * batch_size else values

    def unconditional(self, values: torch.Tensor, batch_size: int) -> torch.Tensor | None:
        """The other part, None without guidance."""
        if self._conditional_first:
            return values.chunk(2)[1]
        return values.chunk(2)[0] if values.shape[0] == 2 * batch_size else None

    def features(self, batch_size: int) -> torch.Tensor:
        """Bottleneck features of the last model call for the condition, (B, 8, 8)."""
        return self.conditional(self._bottleneck, batch_size)

    def measured_guidance(self, guided: torch.Tensor, batch_size: int) -> float:
        """The guidance scale that leads from the raw outputs to the one the pipeline steps with; 1 without guidance."""
        raw = self.output[:, : guided.shape[1]].float()
        null = self.unconditional(raw, batch_size)
        if null is None:
            return 1.0
        direction = self.conditional(raw, batch_size) - null
        change = guided[: len(null)].float() - null
        return float((change * direction).sum() / direction.square().sum().clamp_min(1e-12))

    def forget(self) -> None:
        """A new evaluation begins."""
        self.calls, self.output, self._bottleneck = 0, None, None

    def begin_run(self) -> None:
        self.forget()
        self._conditional_first = None

    def remove(self) -> None:
        """Leave the denoiser as it was."""
        self._handle.remove()
        model = self._model()
        if model is not None:
            detach_hook(model, _HOOK_NAME)
