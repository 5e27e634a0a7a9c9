"""Samples of a model in training."""

from collections.abc import Callable

import torch
from diffusers import SchedulerMixin

from .randomness import derive_seed


@torch.no_grad()
def sample_latents(
    denoise: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    scheduler: SchedulerMixin,
    shape: tuple[int, ...],
    condition: torch.Tensor,
    null_condition: torch.Tensor,
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    seed: int = 0,
) -> torch.Tensor:
    """Sample with any condition (labels or vectors), guided or not.

    Args:
        denoise: `(latents, timestep, condition) -> output`; channels behind those of the latents are ignored.
        scheduler: one whose initial noise is standard normal.
        shape: (B, C, H, W).
        condition: (B, ...), and `null_condition` of the same shape for guidance.
        seed: image k depends on seed and k only, not on the batch.
    """
    device = condition.device
    noise = [
        torch.randn(shape[1:], generator=torch.Generator().manual_seed(derive_seed(seed, "image", index)))
        for index in range(shape[0])
    ]
    latents = torch.stack(noise).to(device)
    scheduler.set_timesteps(num_inference_steps)
    for timestep in scheduler.timesteps:
        output = denoise(latents, timestep, condition)[:, : shape[1]]
        if guidance_scale != 1:
            null_output = denoise(latents, timestep, null_condition)[:, : shape[1]]
            output = null_output + guidance_scale * (output - null_output)
        latents = scheduler.step(output, timestep, latents).prev_sample
    return latents
