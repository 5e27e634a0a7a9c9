"""Grids of noise levels, float64 from noise to data. A grid of N + 1 points has N intervals.

Sources: Karras et al., arXiv 2206.00364, eq. (5) (polynomial) and appendix C.1 (uniform in VP time); Zhou et al., arXiv
2312.00094 (the four kinds). Difference from the published program: its "discrete" grid leaves the exponent off the first
time, so that it is meaningful for `rho = 1` only; here it is applied to both ends.
"""

import math

import torch

from .noise_levels import DiscreteNoiseLevels
from .time_grids import power_grid

GRIDS = ("polynomial", "logsnr", "time_uniform", "discrete")


def polynomial_grid(num_points: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> torch.Tensor:
    """Even in `sigma^(1 / rho)`, (num_points,)."""
    _check(num_points, sigma_min, sigma_max, rho)
    return power_grid(sigma_max, sigma_min, num_points - 1, rho)


def logsnr_grid(num_points: int, sigma_min: float, sigma_max: float) -> torch.Tensor:
    """Even in `log sigma`, (num_points,)."""
    _check(num_points, sigma_min, sigma_max)
    ends = torch.tensor([sigma_max, sigma_min], dtype=torch.float64).log()
    return torch.lerp(ends[0], ends[1], torch.linspace(0, 1, num_points, dtype=torch.float64)).exp()


def time_uniform_grid(num_points: int, sigma_min: float, sigma_max: float, rho: float = 1.0) -> torch.Tensor:
    """Even in `t^(1 / rho)` of the VP process that spans the range, (num_points,)."""
    _check(num_points, sigma_min, sigma_max, rho)
    epsilon_t = 1e-3
    beta_d, beta_min = fit_vp_rates(sigma_min, sigma_max, epsilon_t)
    time = power_grid(1.0, epsilon_t, num_points - 1, rho)
    return torch.expm1(beta_d * time**2 / 2 + beta_min * time).sqrt()


def fit_vp_rates(sigma_min: float, sigma_max: float, epsilon_t: float = 1e-3) -> tuple[float, float]:
    """`beta_d, beta_min` for which the VP noise level `sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)` spans the given range.

    The smallest level is at `t = epsilon_t`, the largest at `t = 1`. Karras et al., arXiv 2206.00364, appendix C.1.
    """
    low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (low / epsilon_t - high) / (epsilon_t - 1)
    return beta_d, high - beta_d / 2


def discrete_grid(
    num_points: int, levels: DiscreteNoiseLevels, sigma_min: float, sigma_max: float, rho: float = 1.0
) -> torch.Tensor:
    """Even in `t^(1 / rho)`, t being the position in the model's own table of timesteps, (num_points,)."""
    _check(num_points, sigma_min, sigma_max, rho)
    last, first = levels.timestep(sigma_min) + 1, levels.timestep(sigma_max) + 1
    return levels.sigma(power_grid(float(first), float(last), num_points - 1, rho) - 1)


def make_grid(
    kind: str,
    num_points: int,
    sigma_min: float,
    sigma_max: float,
    rho: float | None = None,
    levels: DiscreteNoiseLevels | None = None,
) -> torch.Tensor:
    """A grid by name, see `GRIDS`; `rho` defaults to 7 for the polynomial one and to 1 for the others.

    Raises:
        ValueError: for an unknown kind, a range that is none, or a discrete grid without a table.
    """
    match kind:
        case "polynomial":
            return polynomial_grid(num_points, sigma_min, sigma_max, 7.0 if rho is None else rho)
        case "logsnr":
            return logsnr_grid(num_points, sigma_min, sigma_max)
        case "time_uniform":
            return time_uniform_grid(num_points, sigma_min, sigma_max, 1.0 if rho is None else rho)
        case "discrete" if levels is not None:
            return discrete_grid(num_points, levels, sigma_min, sigma_max, 1.0 if rho is None else rho)
        case "discrete":
            raise ValueError("The 'discrete' grid needs a model with a table of timesteps; take another grid.")
    raise ValueError(f"The grid must be one of {GRIDS}, got {kind!r}.")


def check_grid(sigmas: torch.Tensor | list[float], name: str = "sigmas") -> torch.Tensor:
    """A given grid as float64, (num_points,).

    Raises:
        ValueError: unless it falls strictly from a positive level to one that is at least 0.
    """
    grid = torch.as_tensor(sigmas, dtype=torch.float64).flatten()
    if len(grid) < 2 or not bool(grid.isfinite().all()) or float(grid[-1]) < 0:
        raise ValueError(f"`{name}` must hold at least two finite noise levels >= 0, got {grid.tolist()}.")
    falling = grid[1:] < grid[:-1]
    if not bool(falling.all()):
        where = int((~falling).nonzero()[0])
        now, following = grid[where : where + 2].tolist()
        raise ValueError(f"`{name}` must fall strictly, but entry {where} is {now:.6g} and the next {following:.6g}.")
    return grid


def _check(num_points: int, sigma_min: float, sigma_max: float, rho: float = 1.0) -> None:
    if num_points < 2:
        raise ValueError(f"`num_points` must be at least 2, got {num_points}.")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"`sigma_min` and `sigma_max` must satisfy 0 < sigma_min < sigma_max, got {sigma_min}, {sigma_max}.")
    if not rho > 0:
        raise ValueError(f"`rho` must be positive, got {rho}.")
