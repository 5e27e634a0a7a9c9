"""Training loss of gDDIM networks: eps of critically damped Langevin (CLD), blurring or variance-preserving diffusion.

Source: Zhang et al., arXiv 2206.05564; Dockhorn et al., arXiv 2112.07068 (mixed score, and the velocity that is drawn inside
the covariance). A training step draws its random numbers itself and hands them in.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..models.time_input import network_time
from ..numerics.linear_sde import LinearProcess, add_noise
from ..numerics.phase_space import CLDProcess, mixed_score_offset

SMALLEST_TIME = 1e-5


class GDDIMLoss(NamedTuple):
    """Terms of a loss, one number per sample, (B,)."""

    total: torch.Tensor
    """Mean over all entries of the state: the mean of the parts."""
    parts: tuple[torch.Tensor, ...]
    """Means over position and velocity, or over all there is."""


def training_times(uniform: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in [0, 1) -> times in [1e-5, 1), float64 on the CPU, where the coefficients are computed."""
    return SMALLEST_TIME + (1 - SMALLEST_TIME) * uniform.double().cpu()


def gddim_loss(
    network: Callable[..., Any],
    clean: torch.Tensor,
    noise: torch.Tensor,
    time: torch.Tensor,
    timestep: torch.Tensor,
    process: LinearProcess,
    *,
    parametrization: str = "R",
    mixed_score: bool = False,
    embedding_type: str = "positional",
    **conditions: Any,
) -> GDDIMLoss:
    """Squared error of eps at `Psi(t, 0) u_0 + K_t eps`, without weights.

    Args:
        network: `(sample, timestep, **conditions)` -> object with `.sample`, as the models of diffusers.
        clean: data, (B, C, H, W).
        noise: standard normal, (B, kC, H, W).
        time: of the process, (B,), see `GDDIMScheduler.time_of`.
        timestep: `999 t`, (B,).
        process: what the data undergoes.
        parametrization: K, "R" or "L".
        mixed_score: the network leaves `K^-1 (0, v)` out of its eps (CLD only).
        embedding_type: of the network, see `network_time`.
        conditions: `class_labels` and whatever else the network takes.
    """
    noisy = add_noise(process, clean, noise, time, parametrization)
    label = network_time(timestep.to(clean.device, torch.float32), embedding_type)
    eps = network(noisy, label, **conditions).sample.float()
    if mixed_score:
        assert isinstance(process, CLDProcess)  # which the scheduler has checked
        eps = eps + mixed_score_offset(process, noisy, time, parametrization)
    errors = (eps - noise).square().flatten(2).mean(2).chunk(process.block, dim=1)
    parts = tuple(error.mean(1) for error in errors)
    return GDDIMLoss(torch.stack(parts).mean(0), parts)
