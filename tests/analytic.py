"""Data whose denoiser and probability flow are known exactly.

Gaussian data of standard deviation `std` in variance-exploding coordinates, `x = x_0 + sigma * noise`.
"""

import torch


def gaussian_denoiser(x: torch.Tensor, sigma: float, std: float = 0.5) -> torch.Tensor:
    """`E[x_0 | x]`."""
    return x * std**2 / (std**2 + sigma**2)


def gaussian_flow(x: torch.Tensor, sigma: float, sigma_next: float, std: float = 0.5) -> torch.Tensor:
    """The probability flow from `sigma` to `sigma_next`."""
    return x * ((sigma_next**2 + std**2) / (sigma**2 + std**2)) ** 0.5


def mixture_denoiser(means: torch.Tensor, std: float):
    """`D(x, sigma) = E[x_0 | x]` for an equal-weight mixture of isotropic Gaussians.

    Args:
        means: (K, C, H, W).
        std: of every component.

    Returns:
        A function of `x` (B, C, H, W) and `sigma`, a number or (B, 1, 1, 1); everything in the dtype of `x`.
    """

    def denoiser(x: torch.Tensor, sigma) -> torch.Tensor:
        sigma = torch.as_tensor(sigma, dtype=x.dtype)
        centers = means.to(x.dtype)
        total = std**2 + sigma**2
        distances = (x[:, None] - centers).square().flatten(2).sum(-1)
        weights = torch.softmax(-distances / (2 * total.reshape(-1, 1)), dim=1)
        return (std**2 * x + sigma**2 * torch.einsum("bk,kchw->bchw", weights, centers)) / total

    return denoiser
