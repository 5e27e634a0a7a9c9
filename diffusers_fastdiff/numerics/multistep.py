"""Weights of multistep solvers: `x' = decay * x + sum_j weights[j] * value[j]`, newest value first.

Sources: Liu et al., arXiv 2202.09778 (iPNDM: Adams-Bashforth with constant steps); Zhang and Chen, arXiv 2204.13902 (the same
with the true steps); Lu et al., arXiv 2211.01095 (DPM-Solver++; here for `alpha = 1`, so `lambda = -log sigma`).

`sigmas` are the levels the values belong to, newest first; they and `sigma_next` are numbers or (B, 1, 1, 1) tensors.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from .noise_levels import Sigma

MAX_ORDER = {"ipndm": 4, "ipndm_v": 4, "dpmpp": 3}


class StepWeights(NamedTuple):
    """One linear step."""

    decay: Sigma
    weights: tuple[Sigma, ...]

    def apply(self, x: torch.Tensor, values: list[torch.Tensor], scale: Sigma = 1.0) -> torch.Tensor:
        """`decay * x + scale * sum(weights * values)` in the dtype of `x`."""
        result = _like(self.decay, x) * x
        for weight, value in zip(self.weights, values, strict=False):
            result = result + _like(scale * weight, x) * value
        return result


@lru_cache
def adams_bashforth(order: int) -> tuple[float, ...]:
    """Weights of the last `order` slopes for a step of the size of the steps before; exact for polynomials below `order`."""
    j = torch.arange(order, dtype=torch.float64)
    return tuple(torch.linalg.solve((-j) ** j[:, None], 1 / (j + 1)).tolist())


def ipndm_weights(sigmas: list[Sigma], sigma_next: Sigma, order: int) -> StepWeights:
    """iPNDM: weights of constant steps, whatever the steps are."""
    step = sigma_next - sigmas[0]
    return StepWeights(1.0, tuple(step * weight for weight in adams_bashforth(order)))


def ipndm_v_weights(sigmas: list[Sigma], sigma_next: Sigma, order: int) -> StepWeights:
    """iPNDM with the steps as they are: integrals of the Lagrange polynomials over `[sigmas[0], sigma_next]`."""
    step = sigma_next - sigmas[0]
    nodes = [(sigma - sigmas[0]) / step for sigma in sigmas[:order]]  # in units of the step; the newest is at 0
    weights = []
    for j, node in enumerate(nodes):
        polynomial: list[Sigma] = [1.0]  # coefficients of prod (u - other) / (node - other), constant first
        for other in nodes[:j] + nodes[j + 1 :]:
            shifted = [0.0, *polynomial]
            lowered = [*(-other * c for c in polynomial), 0.0]
            polynomial = [(a + b) / (node - other) for a, b in zip(shifted, lowered, strict=True)]
        weights.append(step * sum(c / (k + 1) for k, c in enumerate(polynomial)))
    return StepWeights(1.0, tuple(weights))


def dpmpp_weights(
    sigmas: list[Sigma], sigma_next: Sigma, order: int, data_prediction: bool = True, true_third_order: bool = False
) -> StepWeights:
    """DPM-Solver++ of order 1 to 3 on denoised samples, or with `data_prediction=False` on slopes.

    As published, order 3 takes half of the second derivative, which leaves it with an error of second order;
    `true_third_order` takes all of it.
    """
    if order == 1:  # exact also for sigma_next = 0
        ratio = sigma_next / sigmas[0]
        return StepWeights(ratio, (1 - ratio,)) if data_prediction else StepWeights(1.0, (sigma_next - sigmas[0],))
    levels = [-_tensor(sigma).log() for sigma in (sigma_next, *sigmas[:order])]
    h, steps = levels[0] - levels[1], [levels[k] - levels[k + 1] for k in range(1, order)]
    sign = 1.0 if data_prediction else -1.0
    phi_1 = torch.expm1(-sign * h)
    # Derivatives as combinations of values: rows of weights on (m_0, m_1, m_2).
    r_0 = steps[0] / h
    if order == 2:
        first, second = [1 / r_0, -1 / r_0], None
        parts = [(phi_1, [1.0, 0.0]), (phi_1 / 2, first)]
    else:
        r_1 = steps[1] / h
        newer, older = [1 / r_0, -1 / r_0, 0.0], [0.0, 1 / r_1, -1 / r_1]
        share = r_0 / (r_0 + r_1)
        first = [(1 + share) * a - share * b for a, b in zip(newer, older, strict=True)]
        second = [(2 if true_third_order else 1) * (a - b) / (r_0 + r_1) for a, b in zip(newer, older, strict=True)]
        phi_2 = phi_1 / h + sign
        phi_3 = phi_2 / h - 0.5
        parts = [(phi_1, [1.0, 0.0, 0.0]), (-sign * phi_2, first), (phi_3, second)]
    outer = -1.0 if data_prediction else -_tensor(sigma_next)
    weights = tuple(outer * sum(factor * row[j] for factor, row in parts) for j in range(order))
    return StepWeights(_tensor(sigma_next) / sigmas[0] if data_prediction else 1.0, weights)


def dpmpp_order(substep: int, num_substeps: int, max_order: int, lower_order_final: bool) -> int:
    """Order of a step of DPM-Solver++: growing at the start and, with `lower_order_final`, falling to 1 at the end.

    Args:
        substep: 0 for the first step.
        num_substeps: steps of the whole run.
    """
    if substep + 1 < max_order:
        return substep + 1
    return min(max_order, num_substeps - substep) if lower_order_final else max_order


def _tensor(value: Sigma) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _like(value: Sigma, x: torch.Tensor) -> Sigma:
    return value.to(x.dtype) if isinstance(value, torch.Tensor) else value
