"""Where in a sampling run a model call is.

Pipelines hand a denoiser nothing but a timestep. Their scheduler knows the rest: `set_timesteps` makes a new tensor of
timesteps for every run, one entry for each model call, and begins anew. A run is therefore identified by that tensor, so two
runs can never be confused, whatever their timesteps, and whether or not the first one ended.
"""

import weakref
from typing import Any, NamedTuple

import torch


class SamplingStep(NamedTuple):
    """Position of one model call."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    """Model call of this run, 0 first."""
    num_steps: int
    """Model calls that this run will make."""
    is_first: bool
    """Whether a new run begins here."""


class SamplingRun:
    """Counts the model calls of each run of a pipeline.

    Args:
        source: a pipeline (anything with a `scheduler`; the scheduler may be swapped later), or a scheduler. Held weakly.
    """

    def __init__(self, source: Any):
        self._source = weakref.ref(source)
        self._timesteps: torch.Tensor | None = None
        self._begin = 0
        self._index = -1

    @property
    def scheduler(self) -> Any:
        source = self._source()
        if source is None:
            raise RuntimeError(
                "The pipeline this model was prepared for no longer exists. Apply the hook again, to the pipeline in use."
            )
        return getattr(source, "scheduler", source)

    def advance(self) -> SamplingStep:
        """Register a model call.

        Raises:
            RuntimeError: if the pipeline is gone, its scheduler has no timesteps yet, or more calls come than it announced.
        """
        scheduler = self.scheduler
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or scheduler.num_inference_steps is None:
            raise RuntimeError("The model was called before `scheduler.set_timesteps`.")
        is_first = timesteps is not self._timesteps
        if is_first:
            self._timesteps = timesteps
            self._begin = getattr(scheduler, "begin_index", None) or 0
            self._index = -1
        self._index += 1
        num_steps = len(timesteps) - self._begin
        if self._index >= num_steps:
            raise RuntimeError(
                f"The model was called {self._index + 1} times in a run of {num_steps} steps. The hook follows the scheduler "
                "of its pipeline: call the model from that pipeline, or call `scheduler.set_timesteps` before each run."
            )
        return SamplingStep(self._index, num_steps, is_first)

    def reset(self) -> None:
        """Forget the run; the next call begins a new one."""
        self._timesteps = None
