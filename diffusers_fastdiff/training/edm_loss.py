"""Training loss of preconditioned denoisers: EDM, VP and VE, each with or without the momentum of FDM.

Sources: Karras et al., arXiv 2206.00364, section 5; Wu et al., arXiv 2306.06991 (momentum, warm-up of the weights). A training
step draws its random numbers itself and hands them in:

    sigma = preconditioning.training_sigma(draws)
    loss = edm_loss(model, clean, sigma, noise, preconditioning, max_weight=warmup_clamp(step, warmup_steps)).total.mean()
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..numerics.preconditioning import Coefficients, Preconditioning, Sigma


class EDMLoss(NamedTuple):
    """Terms of a loss, one number per sample, (B,)."""

    total: torch.Tensor
    mse: torch.Tensor
    weight: torch.Tensor


def edm_loss(
    network: Callable[..., Any],
    clean: torch.Tensor,
    sigma: torch.Tensor,
    noise: torch.Tensor,
    preconditioning: Preconditioning,
    max_weight: float | None = None,
    **conditions: Any,
) -> EDMLoss:
    """Weighted squared error of the denoiser at `clean + sigma noise`.

    Args:
        network: raw network, see `denoise`.
        clean: data in units where the preconditioning's `sigma_data` holds, (B, ...).
        sigma: noise level of each sample, (B,).
        noise: standard normal, as `clean`.
        preconditioning: the formulation.
        max_weight: bound on the weights, see `warmup_clamp`; None for none.
        conditions: `class_labels`, `augment_labels` and whatever else the network takes.

    Returns:
        The terms; `total` is weight times the mean over the elements of a sample. The published programs take the sum, which
        is C * H * W times as much; Adam hardly notices.
    """
    noisy = clean + per_sample(sigma, clean) * noise
    denoised = denoise(network, noisy, sigma, preconditioning, **conditions)
    mse = (denoised - clean).square().flatten(1).mean(1)
    weight = preconditioning.loss_weight(sigma).to(mse)
    if max_weight is not None:
        weight = weight.clamp_max(max_weight)
    return EDMLoss(weight * mse, mse, weight)


def denoise(
    network: Callable[..., Any], noisy: torch.Tensor, sigma: Sigma, preconditioning: Preconditioning, **conditions: Any
) -> torch.Tensor:
    """`D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)`, in the dtype of `noisy` whatever that of the network.

    Args:
        network: `(sample, timestep, **conditions)` -> object with `.sample`, as the models of diffusers.
        noisy: x, (B, ...).
        sigma: number, or noise level of each sample, (B,).
        preconditioning: the formulation.
        conditions: passed on to the network.
    """
    coefficients = preconditioning.at(sigma)
    c_skip, c_out, c_in, _ = Coefficients(*(per_sample(c, noisy) for c in coefficients))
    output = network(c_in * noisy, coefficients.c_noise, **conditions).sample
    return c_skip * noisy + c_out * output.to(noisy.dtype)


def per_sample(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """() or (B,) -> () or (B, 1, ...), on the device and in the dtype of `like`, (B, ...)."""
    value = value.to(like)
    return value.reshape(-1, *[1] * (like.ndim - 1)) if value.ndim else value
