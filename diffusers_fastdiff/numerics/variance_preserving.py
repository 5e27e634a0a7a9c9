"""Variance-preserving processes, `x_t = alpha x_0 + sigma eps` with `alpha^2 + sigma^2 = 1`: on them gDDIM is DDIM and DEIS.

Sources: Song et al., arXiv 2011.13456 (the process); Zhang and Chen, arXiv 2204.13902 (DEIS, and its polynomials in log-SNR).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from .linear_sde import LinearProcess, Time, as_time


@dataclass(frozen=True)
class VPProcess(LinearProcess):
    """`F = -beta / 2` and `G^2 = beta` with `beta` linear in t: `alpha^2 = exp(-int beta)`, `R^2 = 1 - alpha^2`."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self):
        if not 0 < self.beta_min <= self.beta_max:
            raise ValueError(f"`beta_min` and `beta_max` must satisfy 0 < beta_min <= beta_max, got {self}.")

    def _beta_integral(self, t: Time) -> torch.Tensor:
        t = as_time(t)
        return self.beta_min * t + (self.beta_max - self.beta_min) * t**2 / 2

    def drift(self, t: Time) -> torch.Tensor:
        return -self.diffusion(t) / 2

    def diffusion(self, t: Time) -> torch.Tensor:
        return (self.beta_min + (self.beta_max - self.beta_min) * as_time(t))[..., None, None]

    def transition(self, t: Time, s: Time) -> torch.Tensor:
        return ((self._beta_integral(s) - self._beta_integral(t)) / 2).exp()[..., None, None]

    def factor(self, t: Time) -> torch.Tensor:
        return (-torch.expm1(-self._beta_integral(t))).sqrt()[..., None, None]

    def log_noise_to_signal(self, t: Time) -> torch.Tensor:
        """`log(sigma / alpha)`, the time of the same process as a `LogNoiseVPProcess`."""
        return torch.expm1(self._beta_integral(t)).log() / 2


@dataclass(frozen=True)
class LogNoiseVPProcess(LinearProcess):
    """Any variance-preserving process, with `t = log(sigma / alpha)`; its schedule is only in the times that are visited.

    Discrete diffusers schedules are exact at their table entries (`log_noise_to_signal`). Polynomials in this time are those
    of DEIS in diffusers. The data lies at `-inf`, and a run may end there.
    """

    origin: ClassVar[float] = -math.inf
    start_time: ClassVar[float] = math.inf
    end_time: ClassVar[float] = -math.inf

    def drift(self, t: Time) -> torch.Tensor:
        return -(self.factor(t) ** 2)

    def diffusion(self, t: Time) -> torch.Tensor:
        return 2 * self.factor(t) ** 2

    def transition(self, t: Time, s: Time) -> torch.Tensor:
        softplus = torch.nn.functional.softplus
        return ((softplus(2 * as_time(s)) - softplus(2 * as_time(t))) / 2).exp()[..., None, None]

    def factor(self, t: Time) -> torch.Tensor:
        return torch.sigmoid(2 * as_time(t)).sqrt()[..., None, None]


def log_noise_to_signal(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """`log(sigma / alpha)` of a discrete schedule, (N,); exact at integer timesteps, linear in between.

    Args:
        alphas_cumprod: `alpha^2` of the schedule, (T,), inside (0, 1).
        timesteps: (N,), within [0, T - 1].
    """
    table, timesteps = as_time(alphas_cumprod), as_time(timesteps)
    if timesteps.min() < 0 or timesteps.max() > len(table) - 1:
        raise ValueError(
            f"`timesteps` must lie in [0, {len(table) - 1}], the range of `alphas_cumprod`, got {timesteps.tolist()}."
        )
    levels = (torch.log1p(-table) - table.log()) / 2
    below = timesteps.floor()
    result = torch.lerp(levels[below.long()], levels[timesteps.ceil().long()], timesteps - below)
    if not result.isfinite().all():
        raise ValueError(
            "`alphas_cumprod` must be inside (0, 1) at the visited timesteps: where it is 0, eps says nothing about the data. "
            "Visit only earlier timesteps, or take the first step with a sample or v prediction."
        )
    return result
