"""Several sampling steps as one batch of a denoiser, and its answers, kept until their steps come.

Row `b * count + s` of the batch is row b of the pipeline at step s. So what splits a batch into halves, as guidance inside a
model does, splits this one into the same halves.
"""

from typing import Any

import torch

from .encoder_features import map_tensors
from .key_step_run import KeyStep, KeyStepRun, has_one_value


class StepBatch:
    """Outputs of coming steps, and what they were computed from.

    Args:
        sample_name: argument of the model with the latents.
    """

    def __init__(self, sample_name: str):
        self._sample_name = sample_name
        self.is_off = False
        """Whether this run decodes step by step from here on: its conditions change along the way."""
        self.clear()

    def clear(self) -> None:
        """Forget the outputs; a new run begins, or this one has ended."""
        self._outputs: dict[int, Any] = {}
        self._conditions: list[Any] = []
        self._timesteps_version: int | None = None
        self.is_off = False

    def check(self, run: KeyStepRun, step: KeyStep, timestep: torch.Tensor | float) -> None:
        """Make sure that the timesteps of coming steps can be known.

        Raises:
            ValueError: if they are not those of the scheduler, are not the same for all samples, or change during the run.
        """
        is_known = run.is_located and self._is_shared(timestep)
        if is_known and torch.is_tensor(timestep) and timestep.device.type == run.timesteps.device.type == "cpu":
            is_known = float(timestep.reshape(-1)[0]) == float(run.timesteps[run.begin + step.index])
        if self._outputs and self._timesteps_version != _version(run.timesteps):
            is_known = False
        if not is_known:
            raise ValueError(
                "`batched` needs to know the coming timesteps, but the model is called with others than the scheduler "
                "announced, or with one for each sample. Set `batched` to False."
            )

    def expand(self, arguments: dict[str, Any], timesteps: torch.Tensor) -> dict[str, Any]:
        """Arguments with every row once for each of `timesteps`."""
        num_rows, count = arguments[self._sample_name].shape[0], len(timesteps)
        expanded = map_tensors(lambda tensor: self._expand_rows(tensor, num_rows, count), arguments)
        given = arguments["timestep"]
        if torch.is_tensor(given):
            timesteps = timesteps.to(given.device, given.dtype)
        return expanded | {"timestep": timesteps.to(arguments[self._sample_name].device).repeat(num_rows)}

    def split(self, output: Any, index: int, count: int, conditions: dict[str, Any], timesteps: torch.Tensor) -> Any:
        """Keep the outputs of the steps behind `index`, and return that of `index`.

        Args:
            output: of the model, for `count` steps.
            index: step of the present call.
            conditions: what the outputs depend on beside features and timesteps.
            timesteps: of the scheduler.
        """
        num_rows = output[0].shape[0] // count
        steps = [_map_output(lambda tensor, s=s: _rows_of_step(tensor, s, count, num_rows), output) for s in range(count)]
        self._outputs = {index + s: step for s, step in enumerate(steps) if s > 0}
        self._conditions = _watched(conditions)
        self._timesteps_version = _version(timesteps)
        return steps[0]

    def take(self, index: int, conditions: dict[str, Any]) -> Any | None:
        """The output of step `index` if it is there and its conditions are still those it was computed from. When they are not,
        the rest of the run is decoded step by step, for a pipeline that changes them once mostly does so again."""
        output = self._outputs.pop(index, None)
        if output is None:
            return None
        watched = _watched(conditions)
        is_same = len(watched) == len(self._conditions) and all(map(_is_same, watched, self._conditions))
        if not is_same:
            self._outputs, self.is_off = {}, True
        return output if is_same else None

    @staticmethod
    def _expand_rows(tensor: torch.Tensor, num_rows: int, count: int) -> torch.Tensor:
        return tensor.repeat_interleave(count, dim=0) if tensor.ndim > 0 and tensor.shape[0] == num_rows else tensor

    @staticmethod
    def _is_shared(timestep: torch.Tensor | float) -> bool:
        if has_one_value(timestep):
            return True
        return timestep.device.type == "cpu" and bool((timestep == timestep.reshape(-1)[0]).all())


def _rows_of_step(tensor: torch.Tensor, step: int, count: int, num_rows: int) -> torch.Tensor:
    return tensor[step::count] if tensor.ndim > 0 and tensor.shape[0] == count * num_rows else tensor


def _map_output(function: Any, output: Any) -> Any:
    if isinstance(output, dict):  # the output classes of diffusers
        return type(output)(**map_tensors(function, dict(output)))
    return map_tensors(function, output)


def _watched(conditions: dict[str, Any]) -> list[tuple[Any, int | None]]:
    return [(leaf, _version(leaf) if torch.is_tensor(leaf) else None) for leaf in _leaves(conditions)]


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for key in value for leaf in _leaves(value[key])]
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _is_same(one: tuple[Any, int | None], other: tuple[Any, int | None]) -> bool:
    if torch.is_tensor(one[0]) or torch.is_tensor(other[0]):
        return one[0] is other[0] and one[1] == other[1]
    return bool(one[0] == other[0])


def _version(tensor: torch.Tensor) -> int:
    """Counts in-place changes; tensors made in inference mode do not count them."""
    return 0 if tensor.is_inference() else tensor._version
