"""A sampling run as Faster Diffusion sees it: which model call is a key step, and which timesteps come after it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .sampling_run import SamplingRun


class KeyStep(NamedTuple):
    """Position of one model call."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    """Model call of this run, 0 first."""
    is_first: bool
    """Whether a new run begins here."""
    is_last: bool
    """Whether this run ends here, if it goes to the end of the schedule."""
    is_key: bool
    """Whether the encoder has to run."""
    num_coming: int
    """Steps from here up to the next key step, this one counted."""


class KeyStepRun:
    """Counts model calls, as `SamplingRun` does, and knows where in the scheduler's timesteps the run began.

    Args:
        source: a pipeline or a scheduler.
        key_steps: places of the key steps in a schedule with the given number of timesteps.
    """

    def __init__(self, source: Any, key_steps: Callable[[int], tuple[int, ...]]):
        self._run, self._key_steps = SamplingRun(source), key_steps
        self.timesteps: torch.Tensor | None = None
        """Of the scheduler, for the whole schedule."""
        self.begin = 0
        """Place in `timesteps` of the first model call."""
        self.is_located = False
        """Whether the model is called with the timesteps of the scheduler, as far as the first call shows."""
        self.keys: tuple[int, ...] = ()
        """Key steps of this run, counted from its first model call."""
        self.num_steps = 0
        """Model calls up to the end of the schedule."""

    @property
    def scheduler(self) -> Any:
        return self._run.scheduler

    def advance(self, timestep: torch.Tensor | float) -> KeyStep:
        """Register a model call."""
        index, _, is_first = self._run.advance()
        if is_first:
            self._begin_run(timestep)
        place = place_in_memory(self.timesteps, timestep)
        if index >= self.num_steps or (place is not None and place != self.begin + index):
            raise RuntimeError(
                f"Call {index} of the model in this run was expected to be for step {self.begin + index} of the "
                f"{len(self.timesteps)} of the scheduler{'' if place is None else f', but is for step {place}'}. Faster "
                "Diffusion needs one model call for each of the scheduler's timesteps, in their order."
            )
        following = next((key for key in self.keys if key > index), self.num_steps)
        is_last = index >= self.num_steps - 1
        return KeyStep(index, is_first, is_last, index in self.keys, max(following - index, 1))

    def reset(self) -> None:
        """Forget the run; the next call begins a new one."""
        self._run.reset()

    def coming_timesteps(self, index: int, count: int) -> torch.Tensor:
        """Timesteps of `count` model calls from call `index` on."""
        return self.timesteps[self.begin + index : self.begin + index + count]

    def _begin_run(self, timestep: torch.Tensor | float) -> None:
        scheduler = self.scheduler
        self.timesteps = torch.as_tensor(scheduler.timesteps)
        begin = getattr(scheduler, "begin_index", None)
        place = locate(self.timesteps, timestep, begin)
        self.is_located = place is not None
        self.begin = place if begin is None and place is not None else begin or 0
        self.num_steps = len(self.timesteps) - self.begin
        keys = self._key_steps(len(self.timesteps))
        self.keys = (0, *(key - self.begin for key in keys if key > self.begin))


def locate(timesteps: torch.Tensor, timestep: torch.Tensor | float, expected: int | None = None) -> int | None:
    """Place of a timestep in a schedule, None if it is not there or differs from sample to sample.

    Where the timestep is not an element of the schedule in memory, values are compared, which on an accelerator waits for the
    device: for the first call of a run only. Of equal timesteps the `expected` one is taken, or the first.
    """
    place = place_in_memory(timesteps, timestep)
    if place is not None:
        return place
    values = timestep.detach().reshape(-1).tolist() if torch.is_tensor(timestep) else [timestep]
    places = [place for place, value in enumerate(timesteps.tolist()) if value == values[0]]
    if not places or any(value != values[0] for value in values):
        return None
    return expected if expected in places else places[0]


def place_in_memory(timesteps: torch.Tensor, timestep: torch.Tensor | float) -> int | None:
    """Place of a timestep that is an element of the schedule itself, as pipelines pass it, expanded or not; else None."""
    if not torch.is_tensor(timestep) or timestep.device != timesteps.device or not has_one_value(timestep):
        return None
    if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    return (timestep.storage_offset() - timesteps.storage_offset()) // max(timesteps.stride(0), 1)


def has_one_value(timestep: torch.Tensor | float) -> bool:
    """Whether all samples have the same timestep by construction: a number, or one that was expanded."""
    return not torch.is_tensor(timestep) or timestep.numel() == 1 or (timestep.ndim == 1 and timestep.stride(0) == 0)
