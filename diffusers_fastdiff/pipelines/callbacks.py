"""What a user's function may see and change between two steps, as in the pipelines of diffusers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

StepCallback = Callable[..., dict[str, Any]]
"""`callback(pipe, step, timestep, tensors)` returns the tensors, changed or not."""


class StepCallbackMixin:
    """`callback_on_step_end` and interruption for a pipeline whose only state is its latents."""

    _callback_tensor_inputs = ("latents",)
    _interrupt = False
    _guidance_scale = 1.0
    _num_timesteps = 0

    @property
    def guidance_scale(self) -> float:
        """Of the current run; a callback may change `pipe._guidance_scale` for the steps to come."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Steps of the current or last run."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `pipe._interrupt`, which ends the run after its step."""
        return self._interrupt

    def _begin_callbacks(self, names: Sequence[str], guidance_scale: float) -> None:
        """Raises ValueError for names of tensors that the pipeline does not have."""
        unknown = [name for name in names if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be in {list(self._callback_tensor_inputs)}, got {unknown}."
            )
        self._interrupt, self._guidance_scale = False, guidance_scale

    def _call_back(
        self,
        callback: Callable[..., dict[str, Any]] | None,
        names: Sequence[str],
        step: int,
        timestep: Any,
        latents: torch.Tensor,
    ) -> torch.Tensor:
        """The latents that go on."""
        if callback is None:
            return latents
        return callback(self, step, timestep, {"latents": latents} if "latents" in names else {}).pop("latents", latents)
