"""Iteration counts of stochastic Jacobian-free backpropagation (arXiv 2401.08741, section 3.3)."""

import torch

from .randomness import derive_seed


def draw_iterations(
    seed: int, step: int, no_grad_range: tuple[int, int] = (0, 10), grad_range: tuple[int, int] = (1, 12)
) -> tuple[int, int]:
    """Iterations without and with gradient of one training step, uniform in the two ranges, both ends included.

    The draw depends on seed and step only, so all processes do the same work and none waits for another. (The published
    program draws on each process by itself.)

    Raises:
        ValueError: if a range is empty or lets a step have no iteration with gradient, which would train nothing before the
            last blocks.
    """
    check_iteration_ranges(no_grad_range, grad_range)
    generator = torch.Generator().manual_seed(derive_seed(seed, step, "iterations"))
    draws = [int(torch.randint(low, high + 1, (), generator=generator)) for low, high in (no_grad_range, grad_range)]
    return draws[0], draws[1]


def check_iteration_ranges(no_grad_range: tuple[int, int], grad_range: tuple[int, int]) -> None:
    for name, (low, high), least in (("no_grad_range", no_grad_range, 0), ("grad_range", grad_range, 1)):
        if not least <= low <= high:
            raise ValueError(f"`{name}` must be two integers {least} <= low <= high, got {(low, high)}.")
