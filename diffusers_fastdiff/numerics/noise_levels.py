"""Noise levels of the models solvers run on: which `sigma` there are, and what the network is told about them.

Solvers work on `x = x_0 + sigma * noise` (variance-exploding coordinates), where the probability flow is
`dx / dsigma = (x - D(x, sigma)) / sigma`. A variance-preserving model sees `alpha x` with `alpha = 1 / sqrt(1 + sigma^2)`. A
rectified flow, `x = (1 - t) x_0 + t noise`, obeys the same equation in its own coordinates with `sigma = t`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeAlias

import torch

from .parametrization import to_epsilon
from .preconditioning import Preconditioning

Sigma: TypeAlias = float | torch.Tensor
"""A noise level: a number, or one for each sample as (B, 1, 1, 1)."""


class NoiseModel(Protocol):
    """How the state `x` of a solver becomes the input of a network, and its output a slope."""

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Smallest and largest noise level the network has seen."""
        ...

    def state_scale(self, sigma: Sigma) -> torch.Tensor:
        """What a pipeline calls the sample is `state_scale * x`."""

    def initial_scale(self, sigma: Sigma) -> torch.Tensor:
        """Size of the sample a pipeline starts with at `sigma`, relative to standard normal noise."""
        ...

    def input_scale(self, sigma: Sigma) -> torch.Tensor:
        """The network sees `input_scale * x`."""
        ...

    def timestep(self, sigma: Sigma) -> torch.Tensor:
        """What the network is conditioned on."""
        ...

    def sigma(self, timestep: Sigma) -> torch.Tensor:
        """Inverse of `timestep`."""
        ...

    def slope(self, output: torch.Tensor, x: torch.Tensor, sigma: Sigma) -> torch.Tensor:
        """`dx / dsigma = (x - D(x, sigma)) / sigma` from the network's output."""
        ...

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, sigma: Sigma) -> torch.Tensor:
        """What a pipeline calls a sample at `sigma`, made from data and standard normal noise."""
        ...


@dataclass(frozen=True, eq=False)
class DiscreteNoiseLevels:
    """The noise levels of a discrete variance-preserving schedule, continued between its timesteps.

    Args:
        alphas_cumprod: signal levels squared, (T,) float64; entry k belongs to timestep k.
        interpolation: what is linear in the timestep: "log_sigma" as in diffusers, or "log_alpha". Outside the table the last
            piece goes on.
    """

    alphas_cumprod: torch.Tensor
    interpolation: str = "log_sigma"

    @cached_property
    def _knots(self) -> torch.Tensor:
        """The interpolated quantity at timesteps 0, 1, ..., T - 1; increasing."""
        log_alpha = self.alphas_cumprod.double().log() / 2
        if self.interpolation == "log_alpha":
            return -log_alpha
        return (1 - self.alphas_cumprod.double()).log() / 2 - log_alpha

    @property
    def sigma_range(self) -> tuple[float, float]:
        last = len(self.alphas_cumprod) - 1
        return float(self.sigma(0.0)), float(self.sigma(float(last)))

    def sigma(self, timestep: Sigma) -> torch.Tensor:
        """`sqrt(1 - alphas_cumprod) / sqrt(alphas_cumprod)`, continued."""
        timestep = torch.as_tensor(timestep, dtype=torch.float64)
        knots = self._knots.to(timestep.device)
        left = timestep.detach().floor().long().clamp(0, len(knots) - 2)
        value = knots[left] + (timestep - left) * (knots[left + 1] - knots[left])
        return torch.expm1(2 * value).sqrt() if self.interpolation == "log_alpha" else value.exp()

    def timestep(self, sigma: Sigma) -> torch.Tensor:
        """Inverse of `sigma`; differentiable, not rounded."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        value = torch.log1p(sigma**2) / 2 if self.interpolation == "log_alpha" else sigma.log()
        knots = self._knots.to(value.device)
        left = (torch.searchsorted(knots, value.detach().contiguous()) - 1).clamp(0, len(knots) - 2)
        return left + (value - knots[left]) / (knots[left + 1] - knots[left])


@dataclass(frozen=True, eq=False)
class VariancePreservingModel:
    """Models of diffusers with a table of `alphas_cumprod`: DiT, Stable Diffusion, most U-Nets."""

    levels: DiscreteNoiseLevels
    prediction_type: str = "epsilon"

    @property
    def sigma_range(self) -> tuple[float, float]:
        return self.levels.sigma_range

    def state_scale(self, sigma: Sigma) -> torch.Tensor:
        return (1 + torch.as_tensor(sigma, dtype=torch.float64) ** 2).rsqrt()

    input_scale = state_scale

    def initial_scale(self, sigma: Sigma) -> torch.Tensor:
        return torch.ones_like(torch.as_tensor(sigma, dtype=torch.float64))

    def timestep(self, sigma: Sigma) -> torch.Tensor:
        return self.levels.timestep(sigma)

    def sigma(self, timestep: Sigma) -> torch.Tensor:
        return self.levels.sigma(timestep)

    def slope(self, output: torch.Tensor, x: torch.Tensor, sigma: Sigma) -> torch.Tensor:
        if self.prediction_type == "epsilon":
            return output
        alpha = self.state_scale(sigma)
        noise_level = alpha * sigma
        alpha, noise_level = alpha.to(x.dtype), noise_level.to(x.dtype)
        return to_epsilon(output, alpha * x, alpha, noise_level, self.prediction_type)

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, sigma: Sigma) -> torch.Tensor:
        alpha = self.state_scale(sigma)
        return alpha.to(clean.dtype) * clean + (alpha * sigma).to(clean.dtype) * noise


@dataclass(frozen=True)
class RectifiedFlowModel:
    """Flow-matching models, `x = (1 - t) x_0 + t noise`; here `sigma` is t."""

    num_train_timesteps: int = 1000

    @property
    def sigma_range(self) -> tuple[float, float]:
        return 1 / self.num_train_timesteps, 1.0

    def state_scale(self, sigma: Sigma) -> torch.Tensor:
        return torch.ones_like(torch.as_tensor(sigma, dtype=torch.float64))

    input_scale = initial_scale = state_scale

    def timestep(self, sigma: Sigma) -> torch.Tensor:
        return self.num_train_timesteps * torch.as_tensor(sigma, dtype=torch.float64)

    def sigma(self, timestep: Sigma) -> torch.Tensor:
        return torch.as_tensor(timestep, dtype=torch.float64) / self.num_train_timesteps

    def slope(self, output: torch.Tensor, x: torch.Tensor, sigma: Sigma) -> torch.Tensor:
        del x, sigma
        return output

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, sigma: Sigma) -> torch.Tensor:
        sigma = torch.as_tensor(sigma, dtype=torch.float64).to(clean.dtype)
        return (1 - sigma) * clean + sigma * noise


@dataclass(frozen=True)
class PreconditionedModel:
    """Raw networks of the EDM family, with their preconditioning."""

    preconditioning: Preconditioning

    @property
    def sigma_range(self) -> tuple[float, float]:
        return self.preconditioning.sigma_range

    def state_scale(self, sigma: Sigma) -> torch.Tensor:
        return torch.ones_like(torch.as_tensor(sigma, dtype=torch.float64))

    def initial_scale(self, sigma: Sigma) -> torch.Tensor:
        return torch.as_tensor(sigma, dtype=torch.float64)

    def input_scale(self, sigma: Sigma) -> torch.Tensor:
        return self.preconditioning.at(torch.as_tensor(sigma, dtype=torch.float64)).c_in

    def timestep(self, sigma: Sigma) -> torch.Tensor:
        return self.preconditioning.at(torch.as_tensor(sigma, dtype=torch.float64)).c_noise

    def sigma(self, timestep: Sigma) -> torch.Tensor:
        return self.preconditioning.sigma(timestep)

    def slope(self, output: torch.Tensor, x: torch.Tensor, sigma: Sigma) -> torch.Tensor:
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        coefficients = self.preconditioning.at(sigma)
        share, gain = (1 - coefficients.c_skip) / sigma, -coefficients.c_out / sigma
        return share.to(x.dtype) * x + gain.to(x.dtype) * output

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, sigma: Sigma) -> torch.Tensor:
        return clean + torch.as_tensor(sigma, dtype=torch.float64).to(clean.dtype) * noise
