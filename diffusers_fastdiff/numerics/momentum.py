"""Momentum in the diffusion process: the input scale and the loss-weight warm-up of the Fast Diffusion Model.

Source: Wu et al., "Fast Diffusion Model", arXiv 2306.06991. A critically damped oscillator in the forward process leaves two
traces in the algorithm: the scale of the network's input and a cap on the loss weights early in training.

| symbol | meaning |
|---|---|
| u | noise level on a linear scale, 0 at `sigma_min` and 1 at `sigma_max`; not clamped outside |
| b | `beta_min u + beta_d u^2 / 2`, 19.9 and 0.1 as in the VP process |
| m | multiplier; 0 is no momentum |
| s | `exp(-m b) (1 + m b)`, the input scale |
"""

import torch


def momentum_scale(
    sigma: torch.Tensor,
    sigma_min: float,
    sigma_max: float,
    multiplier: float = 1.0,
    beta_d: float = 19.9,
    beta_min: float = 0.1,
) -> torch.Tensor:
    """Input scale s, of the shape and dtype of `sigma` (in units of the data)."""
    u = (sigma - sigma_min) / (sigma_max - sigma_min)
    damping = multiplier * (beta_min * u + 0.5 * beta_d * u**2)
    return torch.exp(-damping) * (1 + damping)


def warmup_clamp(step: int, warmup_steps: float | None, start: float = 5.0, end: float = 500.0) -> float | None:
    """Upper bound on the loss weights in optimiser step `step` (from 0): geometric from `start` to `end`, then none.

    A function of the optimiser step, not of the loss calls: accumulation does not speed it up, resuming does not restart it.

    Args:
        step: number of optimiser steps done.
        warmup_steps: length of the warm-up; None or 0 for none.
        start: bound in step 0.
        end: bound that would be reached at `warmup_steps`, from where on weights are not bounded at all.

    Returns:
        The bound, or None once (or if) there is none.
    """
    if not warmup_steps or step >= warmup_steps:
        return None
    return start * (end / start) ** (step / warmup_steps)
