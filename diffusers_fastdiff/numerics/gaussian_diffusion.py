"""Discrete-time Gaussian diffusion: schedules, posteriors, and reverse steps with a learned variance.

Sources: Ho et al., arXiv 2006.11239 (posterior, eq. 6 and 7); Nichol and Dhariwal, arXiv 2102.09672 (learned range variance,
eq. 15, and respacing); Lin et al., arXiv 2305.08891 (zero terminal SNR, algorithm 1); Song et al., arXiv 2010.02502 (DDIM).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from .parametrization import to_denoised, to_epsilon


def linear_betas(num_timesteps: int = 1000, start: float = 1e-4, end: float = 0.02) -> torch.Tensor:
    """Noise variances that grow linearly, float64, (T,)."""
    return torch.linspace(start, end, num_timesteps, dtype=torch.float64)


def rescale_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Shift and scale the signal level so that the last step is pure noise; the first one stays. Float64, (T,)."""
    alpha = (1 - betas.double()).cumprod(0).sqrt()
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    return DiffusionSchedule(alpha**2).betas


@dataclass(frozen=True)
class DiffusionSchedule:
    """Coefficients of a variance-preserving chain, all float64 of shape (T,) and index 0 at the data."""

    alphas_cumprod: torch.Tensor
    """`alpha_t^2`, from nearly 1 down to nearly (or exactly) 0."""

    @classmethod
    def from_betas(cls, betas: torch.Tensor) -> "DiffusionSchedule":
        return cls((1 - betas.double()).cumprod(0))

    def to(self, device: torch.device | str) -> "DiffusionSchedule":
        return DiffusionSchedule(self.alphas_cumprod.to(device))

    def respaced(self, timesteps: torch.Tensor) -> "DiffusionSchedule":
        """The chain that visits only `timesteps` (increasing integers); its index counts the visited steps."""
        return DiffusionSchedule(self.alphas_cumprod[timesteps])

    @cached_property
    def alphas_cumprod_prev(self) -> torch.Tensor:
        return torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod[:-1]])

    @cached_property
    def betas(self) -> torch.Tensor:
        return 1 - self.alphas_cumprod / self.alphas_cumprod_prev

    @cached_property
    def alpha(self) -> torch.Tensor:
        """Signal level, `sqrt(alphas_cumprod)`."""
        return self.alphas_cumprod.sqrt()

    @cached_property
    def sigma(self) -> torch.Tensor:
        """Noise level, `sqrt(1 - alphas_cumprod)`."""
        return (1 - self.alphas_cumprod).sqrt()

    @cached_property
    def snr(self) -> torch.Tensor:
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_variance(self) -> torch.Tensor:
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance_clipped(self) -> torch.Tensor:
        """The variance of the very first step is 0; its logarithm is replaced by that of the second one."""
        return torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]]).log()

    @cached_property
    def posterior_mean_clean(self) -> torch.Tensor:
        """Weight of `x_0` in the mean of `q(x_{t-1} | x_t, x_0)`."""
        return self.betas * self.alphas_cumprod_prev.sqrt() / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_noisy(self) -> torch.Tensor:
        """Weight of `x_t` in the same mean."""
        return (1 - self.alphas_cumprod_prev) * (1 - self.betas).sqrt() / (1 - self.alphas_cumprod)

    def at(self, name: str, index: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Coefficient `name` at `index` (B,), shaped and typed to broadcast against `like` (B, ...)."""
        values = getattr(self, name)[index].to(like.device, like.dtype)
        return values.reshape(-1, *[1] * (like.ndim - 1))

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return self.at("alpha", index, clean) * clean + self.at("sigma", index, clean) * noise


class ReverseDistribution(NamedTuple):
    """`p(x_{t-1} | x_t)` and the clean sample it was made from; all (B, C, H, W)."""

    mean: torch.Tensor
    log_variance: torch.Tensor
    denoised: torch.Tensor


def reverse_distribution(
    schedule: DiffusionSchedule, output: torch.Tensor, noisy: torch.Tensor, index: torch.Tensor, prediction_type: str
) -> ReverseDistribution:
    """The reverse step a network output stands for.

    Args:
        output: (B, C, H, W), or (B, 2C, H, W) when the network also predicts where between the two bounds, `beta_t` and the
            posterior variance, the log-variance lies (learned range); without it the variance is the upper bound.
        noisy: `x_t`, (B, C, H, W).
        index: step of the schedule, (B,) integers.
    """
    upper = schedule.betas.log() if output.shape[1] == 2 * noisy.shape[1] else _fixed_large_log_variance(schedule)
    log_variance = upper[index].to(noisy.device, noisy.dtype).reshape(-1, 1, 1, 1)
    if output.shape[1] == 2 * noisy.shape[1]:
        output, fraction = output.chunk(2, dim=1)
        fraction = (fraction + 1) / 2
        lower = schedule.at("posterior_log_variance_clipped", index, noisy)
        log_variance = fraction * log_variance + (1 - fraction) * lower
    alpha, sigma = schedule.at("alpha", index, noisy), schedule.at("sigma", index, noisy)
    denoised = to_denoised(output, noisy, alpha, sigma, prediction_type)
    return ReverseDistribution(posterior_mean(schedule, denoised, noisy, index), log_variance.expand_as(denoised), denoised)


def posterior_mean(schedule: DiffusionSchedule, clean: torch.Tensor, noisy: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Mean of `q(x_{t-1} | x_t, x_0)`."""
    weight_clean = schedule.at("posterior_mean_clean", index, noisy)
    return weight_clean * clean + schedule.at("posterior_mean_noisy", index, noisy) * noisy


def ancestral_step(
    schedule: DiffusionSchedule,
    output: torch.Tensor,
    noisy: torch.Tensor,
    index: torch.Tensor,
    noise: torch.Tensor,
    prediction_type: str,
) -> torch.Tensor:
    """Draw `x_{t-1}`; the last step (index 0) adds no noise. Arguments as in `reverse_distribution`."""
    mean, log_variance, _ = reverse_distribution(schedule, output, noisy, index, prediction_type)
    is_noisy = (index > 0).to(mean).reshape(-1, 1, 1, 1)
    return mean + is_noisy * (0.5 * log_variance).exp() * noise


def ddim_step(
    schedule: DiffusionSchedule, output: torch.Tensor, noisy: torch.Tensor, index: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """Deterministic DDIM step (eta 0). Arguments as in `reverse_distribution`; a learned variance is ignored."""
    output = output[:, : noisy.shape[1]]
    alpha, sigma = schedule.at("alpha", index, noisy), schedule.at("sigma", index, noisy)
    denoised = to_denoised(output, noisy, alpha, sigma, prediction_type)
    epsilon = to_epsilon(output, noisy, alpha, sigma, prediction_type)
    previous = schedule.at("alphas_cumprod_prev", index, noisy)
    return previous.sqrt() * denoised + (1 - previous).sqrt() * epsilon


def _fixed_large_log_variance(schedule: DiffusionSchedule) -> torch.Tensor:
    return torch.cat([schedule.posterior_variance[1:2], schedule.betas[1:]]).log()
