"""Training losses of diffusion models with epsilon, velocity or rectified-flow prediction and an optional learned variance.

Sources: Ho et al., arXiv 2006.11239 (epsilon); Nichol and Dhariwal, arXiv 2102.09672 (hybrid loss); Salimans and Ho,
arXiv 2202.00512 (velocity and its weightings); Liu et al., arXiv 2209.03003 (rectified flow). Differences from the published
FPDM program: the flow target is `noise - data`, the sign of diffusers' "flow_prediction", where the program learns
`data - noise`; and velocity losses are computed from the velocity error, which is exact at zero terminal SNR, too.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..numerics.gaussian_diffusion import DiffusionSchedule, posterior_mean, reverse_distribution
from ..numerics.parametrization import prediction_target

VELOCITY_WEIGHTINGS = ("p2", "snr", "sqrt_snr", "truncated_snr", "snr+1")


class DiffusionLoss(NamedTuple):
    """Terms of a loss, one number per sample, (B,)."""

    total: torch.Tensor
    mse: torch.Tensor
    variational_bound: torch.Tensor | None


def diffusion_loss(
    output: torch.Tensor,
    clean: torch.Tensor,
    noise: torch.Tensor,
    timestep: torch.Tensor,
    schedule: DiffusionSchedule,
    prediction_type: str = "epsilon",
    velocity_weighting: str = "p2",
) -> DiffusionLoss:
    """Loss of a network that saw `schedule.add_noise(clean, noise, timestep)`.

    Args:
        output: (B, C, H, W); with (B, 2C, H, W) the second half is a learned range variance and the variational bound is
            added, computed with the mean part detached (the hybrid loss).
        clean: data, (B, C, H, W).
        noise: standard normal, as `clean`.
        timestep: index into the schedule, (B,) integers.
        prediction_type: "epsilon" or "v_prediction".
        velocity_weighting: weight of the squared data error for velocity models: the published "p2" is
            `SNR * sqrt(1 - alphas_cumprod)`; "snr+1" is the plain squared velocity error.
    """
    prediction, has_variance = output[:, : clean.shape[1]], output.shape[1] == 2 * clean.shape[1]
    alpha, sigma = schedule.at("alpha", timestep, clean), schedule.at("sigma", timestep, clean)
    error = prediction - prediction_target(clean, noise, alpha, sigma, prediction_type)
    mse = error.square().flatten(1).mean(1)
    if prediction_type == "v_prediction":
        mse = mse * velocity_weight(schedule, velocity_weighting)[timestep].to(mse)
    if not has_variance:
        return DiffusionLoss(mse, mse, None)
    detached = torch.cat([prediction.detach(), output[:, clean.shape[1] :]], dim=1)
    noisy = alpha * clean + sigma * noise
    bound = variational_bound(detached, clean, noisy, timestep, schedule, prediction_type)
    return DiffusionLoss(mse + bound, mse, bound)


def rectified_flow_loss(output: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor) -> DiffusionLoss:
    """Squared error of the velocity `noise - clean` along `rectified_flow_noise`; no learned variance."""
    mse = (output - (noise - clean)).square().flatten(1).mean(1)
    return DiffusionLoss(mse, mse, None)


def rectified_flow_noise(
    clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor, num_timesteps: int = 1000
) -> torch.Tensor:
    """`(1 - tau) clean + tau noise`, `tau = timestep / num_timesteps`."""
    tau = (timestep.double() / num_timesteps).to(clean).reshape(-1, *[1] * (clean.ndim - 1))
    return (1 - tau) * clean + tau * noise


def velocity_weight(schedule: DiffusionSchedule, weighting: str) -> torch.Tensor:
    """Weight of the squared velocity error, float64, (T,): that of the squared data error times `1 - alphas_cumprod`."""
    signal, noise = schedule.alphas_cumprod, 1 - schedule.alphas_cumprod
    match weighting:
        case "p2":
            return signal * noise.sqrt()
        case "snr":
            return signal
        case "sqrt_snr":
            return (signal * noise).sqrt()
        case "truncated_snr":
            return torch.maximum(signal, noise)
        case "snr+1":
            return torch.ones_like(signal)
    raise ValueError(f"`velocity_weighting` must be one of {VELOCITY_WEIGHTINGS}, got {weighting!r}.")


def variational_bound(
    output: torch.Tensor,
    clean: torch.Tensor,
    noisy: torch.Tensor,
    timestep: torch.Tensor,
    schedule: DiffusionSchedule,
    prediction_type: str,
) -> torch.Tensor:
    """One term of the variational bound in bits per dimension, (B,): a KL divergence, at t = 0 a discretised likelihood."""
    mean, log_variance, _ = reverse_distribution(schedule, output, noisy, timestep, prediction_type)
    true_mean = posterior_mean(schedule, clean, noisy, timestep)
    true_log_variance = schedule.at("posterior_log_variance_clipped", timestep, noisy)
    divergence = 0.5 * (
        log_variance
        - true_log_variance
        - 1
        + (true_log_variance - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
    )
    likelihood = discretized_gaussian_log_likelihood(clean, mean, 0.5 * log_variance)
    nats = torch.where((timestep == 0).reshape(-1, 1, 1, 1), -likelihood, divergence)
    return nats.flatten(1).mean(1) / math.log(2)


def discretized_gaussian_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """Log-probability of 8-bit data in [-1, 1] under a Gaussian integrated over each bin, elementwise."""
    inverse_scale = (-log_scale).exp()
    above = _approximate_normal_cdf((x - mean + 1 / 255) * inverse_scale)
    below = _approximate_normal_cdf((x - mean - 1 / 255) * inverse_scale)
    probability = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return probability.clamp_min(1e-12).log()


def _approximate_normal_cdf(x: torch.Tensor) -> torch.Tensor:
    """The tanh form of the published losses; off by up to 3e-4 from the error function."""
    return 0.5 * (1 + F.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
