"""Prior noise injection: late in sampling, a little of the initial noise is added to the latents after each update.

Source: arXiv 2312.09608, section 3.4. It gives back texture that propagated features smooth away. Latents live between two
calls of the scheduler, in every pipeline, so the scheduler's `step` is wrapped, on that one object and until removed. The
published programs lose the noise in some steps and modes; here it is added at every step below the threshold.
"""

import functools
from typing import Any

import torch

from .key_step_run import locate
from .sampling_run import SamplingRun

CORRECTORS = ("UniPCMultistepScheduler", "SASolverScheduler")
"""Schedulers that compute each latent a second time from a state they keep: what was added in between would be lost."""


class NoiseInjection:
    """Wraps `step` of one scheduler at a time.

    Args:
        strength: factor of the initial latents (published: 0.003).
        below: inject while the timestep is below this share of the training timesteps (published: 0.3 for DiT, 0.5 for Stable
            Diffusion).
    """

    def __init__(self, strength: float, below: float):
        self.strength, self.below = strength, below
        self._scheduler: Any = None
        self._wrapped: Any = None
        self._replaced: Any = None
        self._initial: torch.Tensor | None = None
        self._is_below: list[bool] = []

    def attach(self, scheduler: Any) -> None:
        """Wrap `scheduler.step`, and leave the scheduler that was wrapped before; does nothing if it is the same one.

        Raises:
            ValueError: for schedulers that would drop the noise, or whose timesteps have another scale than the training.
        """
        if scheduler is self._scheduler and scheduler.__dict__.get("step") is self._wrapped:
            return
        self.detach()
        if type(scheduler).__name__ in CORRECTORS:
            raise ValueError(
                f"`noise_injection` has no effect with {type(scheduler).__name__}, which corrects latents from a state of its "
                "own. Set it to 0, or use another scheduler."
            )
        step, run = scheduler.step, SamplingRun(scheduler)

        @functools.wraps(step)
        def inject(model_output, timestep, sample, *args, **kwargs):
            place = run.advance()
            if place.is_first:
                self._begin_run(scheduler, timestep, sample)
            output = step(model_output, timestep, sample, *args, **kwargs)
            is_complete = getattr(scheduler, "state_in_first_order", True)  # order two: not between the two calls of a step
            return self._add(output) if self._is_below[place.index] and is_complete else output

        self._scheduler, self._wrapped, self._replaced = scheduler, inject, scheduler.__dict__.get("step")
        scheduler.step = inject

    def detach(self) -> None:
        """Undo `attach`."""
        if self._scheduler is not None and self._scheduler.__dict__.get("step") is self._wrapped:
            del self._scheduler.step
            if self._replaced is not None:
                self._scheduler.step = self._replaced
        self._scheduler = self._wrapped = self._replaced = self._initial = None

    def release(self) -> None:
        """Forget the initial noise."""
        self._initial = None

    def _begin_run(self, scheduler: Any, timestep: torch.Tensor | float, sample: torch.Tensor) -> None:
        timesteps = scheduler.timesteps.tolist()
        if min(timesteps) < 0:
            raise ValueError(
                f"`noise_injection` needs timesteps of the training schedule; those of {type(scheduler).__name__} are negative."
            )
        begin = getattr(scheduler, "begin_index", None)
        begin = (locate(scheduler.timesteps, timestep) or 0) if begin is None else begin
        limit = self.below * getattr(scheduler.config, "num_train_timesteps", 1000)
        self._is_below = [value < limit for value in timesteps[begin:]] + [False] * begin
        self._initial = sample

    def _add(self, output: Any) -> Any:
        previous = output[0] if isinstance(output, tuple) else output.prev_sample
        injected = previous + self.strength * self._initial.to(previous)
        if isinstance(output, tuple):
            return (injected, *output[1:])
        output.prev_sample = injected
        return output
