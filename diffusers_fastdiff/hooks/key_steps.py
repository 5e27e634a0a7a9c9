"""Which steps of a sampling run are key steps, those at which the encoder runs.

Sources: arXiv 2312.09608 and its published programs. A step is a place in `scheduler.timesteps`, 0 first, never a timestep
value: one call of the model. Schedulers of order two call the model twice for one of their steps, and each call counts. Step 0
is always a key step, and so is the first step of a run that starts in the middle (image to image).
"""

import json
import operator
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


def check_key_steps(key_steps: Iterable[int], num_steps: int | None = None) -> tuple[int, ...]:
    """The steps in increasing order, each once.

    Raises:
        ValueError: if they are not whole numbers, 0 is not among them, or one is not a step of the run.
    """
    try:
        steps = tuple(operator.index(step) for step in key_steps)
    except TypeError:
        raise ValueError(f"Key steps must be a list of whole numbers, got {key_steps!r}.") from None
    if any(step < 0 for step in steps):
        raise ValueError(f"Key steps count from 0, got {list(steps)}.")
    if 0 not in steps:
        raise ValueError(f"Key steps must contain 0, for nothing is stored before the first step; got {list(steps)}.")
    if num_steps is not None and max(steps) >= num_steps:
        raise ValueError(
            f"Key step {max(steps)} is not a step of a run of {num_steps} (they count from 0). For runs of any length use "
            "`every`, the name of a preset, or `KeySchedule(num_steps, key_steps)`, which is scaled."
        )
    return tuple(sorted(set(steps)))


@dataclass(frozen=True)
class KeySchedule:
    """Key steps of a run of a given length, to be used at any other length."""

    num_steps: int
    """Steps of the run this schedule was made for."""
    key_steps: tuple[int, ...]
    """Increasing, 0 first, all below `num_steps`."""

    def __post_init__(self):
        object.__setattr__(self, "key_steps", check_key_steps(self.key_steps, self.num_steps))

    def scaled(self, num_steps: int) -> tuple[int, ...]:
        """Key steps of a run of another length: each goes to the first step that is not earlier in its run. So no step is
        farther from its key step, as a share of the run, than the schedule has it, and a shorter run has a larger share of key
        steps."""
        steps = (-(-step * num_steps // self.num_steps) for step in self.key_steps)
        return tuple(sorted({step for step in steps if step < num_steps}))

    def save(self, path: str | Path) -> None:
        """Write the schedule as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "KeySchedule":
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is something else.
        """
        try:
            content = json.loads(Path(path).read_text())
            return cls(num_steps=content["num_steps"], key_steps=tuple(content["key_steps"]))
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{str(path)!r} is not a saved `KeySchedule` ({error!r}).") from error


KeySteps = Iterable[int] | str | KeySchedule | Callable[[int], Iterable[int]]


def _steps(num_steps: int, is_key: Callable[[int], bool]) -> KeySchedule:
    return KeySchedule(num_steps, tuple(step for step in range(num_steps) if is_key(step)))


PRESETS: dict[str, KeySchedule] = {
    "dit-250": _steps(250, lambda n: not (1 <= n <= 229 and n % 10 < 6)),
    "sd-50": KeySchedule(50, (0, 1, 2, 3, 5, 10, 15, 25, 35)),
    "sd-50-middle": KeySchedule(50, (0, 10, 11, 12, 15, 20, 25, 30, 35, 45)),
    "sd-50-late": KeySchedule(50, (0, 20, 25, 30, 35, 45, 46, 47, 48, 49)),
    "sd-50-spread": KeySchedule(50, (0, 9, 13, 14, 15, 28, 29, 32, 36, 45)),
    "sd-75": _steps(75, lambda n: n < 10 or n > 65 or n % 5 == 0),
    "sd-100": _steps(100, lambda n: n < 10 or n > 85 or n % 5 == 0),
    "if-50": KeySchedule(50, (0, 1, 2, 3, 5, 10, 15, 25, 35, 40)),
    "if-75": KeySchedule(75, (0, 1, 2, 3, 5, 10, 15, 25, 35, 45, 55, 65)),
    "if-upscale-50": _steps(50, lambda n: n < 20 or n > 40 or n % 2 == 0),
    "growing-50": _steps(50, lambda n: n in {m * (m + 3) // 2 for m in range(10)}),
}
"""The published schedules, each for the number of steps in its name: 113 key steps of 250 for DiT; for Stable Diffusion the
list behind its published numbers ("sd-50"), three that were compared with it, and those of longer runs; for DeepFloyd-IF and
the upscaler ("growing-50": the gaps grow by one)."""


def resolve_key_steps(key_steps: KeySteps | None, every: int | None, num_steps: int) -> tuple[int, ...]:
    """Key steps of a run of `num_steps` model calls.

    Args:
        key_steps: the steps; or the name of a preset or a `KeySchedule`, scaled to the run; or a function of `num_steps`.
        every: every `every`-th step instead.
        num_steps: length of the whole schedule, also for runs that start in the middle of it.

    Raises:
        ValueError: if the steps do not begin with 0, or do not fit the run.
    """
    if every is not None:
        return tuple(range(0, num_steps, every))
    if isinstance(key_steps, str):
        key_steps = read_preset(key_steps)
    if isinstance(key_steps, KeySchedule):
        return key_steps.scaled(num_steps)
    if callable(key_steps):
        key_steps = key_steps(num_steps)
    return check_key_steps(key_steps, num_steps)


def read_preset(name: str) -> KeySchedule:
    """A published schedule.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"`key_steps` must be one of {list(PRESETS)} when it is a name, got {name!r}.")
    return PRESETS[name]
