"""Times that a sampling run visits, float64 from noise to data, (N + 1,)."""

import torch


def power_grid(start: float, end: float, num_steps: int, exponent: float = 2.0) -> torch.Tensor:
    """Even in `t^(1 / exponent)`: 1 is uniform, larger exponents visit the data end more often.

    Args:
        start: first time, > end.
        end: last time, >= 0.
        num_steps: N.
        exponent: > 0; the paper takes 2.
    """
    _check(start, end, num_steps)
    if not exponent > 0:
        raise ValueError(f"`exponent` must be positive, got {exponent}.")
    u = torch.linspace(start ** (1 / exponent), end ** (1 / exponent), num_steps + 1, dtype=torch.float64)
    grid = u**exponent
    grid[0], grid[-1] = start, end
    return grid


def hybrid_grid(
    start: float, end: float, num_steps: int, exponent: float = 2.0, noise_share: float = 0.2, switch: float = 0.4
) -> torch.Tensor:
    """Uniform from `start` down to `switch * start` in a share of the steps, then `power_grid` down to `end`.

    The defaults have a smaller error than `power_grid` on CLD mixtures with 10 to 50 steps, up to a factor of 4.

    Args:
        start: first time, > end.
        end: last time, >= 0.
        num_steps: N, at least 2.
        exponent: of the second part.
        noise_share: share of the steps in the first part, inside (0, 1); either part gets at least one step.
        switch: where the first part ends, as a fraction of `start`, inside (end / start, 1).
    """
    _check(start, end, num_steps)
    if num_steps < 2:
        raise ValueError(f"`num_steps` must be at least 2 for two parts, got {num_steps}. Take `power_grid` for one step.")
    if not 0 < noise_share < 1:
        raise ValueError(f"`noise_share` must be inside (0, 1), got {noise_share}.")
    if not end / start < switch < 1:
        raise ValueError(f"`switch` must be inside ({end / start:.3g}, 1), between the ends of the grid, got {switch}.")
    first = min(max(round(noise_share * num_steps), 1), num_steps - 1)
    middle = switch * start
    return torch.cat([power_grid(start, middle, first, 1.0)[:-1], power_grid(middle, end, num_steps - first, exponent)])


def _check(start: float, end: float, num_steps: int) -> None:
    if not 0 <= end < start:
        raise ValueError(f"`start` and `end` must satisfy 0 <= end < start, got {start} and {end}.")
    if num_steps < 1:
        raise ValueError(f"`num_steps` must be at least 1, got {num_steps}.")
