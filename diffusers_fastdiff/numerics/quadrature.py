"""Gauss-Legendre quadrature on smooth clocks, linear ODEs by collocation at its nodes, Lagrange polynomials. All float64."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch


class Rule(NamedTuple):
    """Nodes in (0, 1), increasing, and what integrates a polynomial that is known there. Exact to degree 2n - 1 at the end."""

    nodes: torch.Tensor
    """(n,)"""
    weights: torch.Tensor
    """(n,): the integral from 0 to 1."""
    partial: torch.Tensor
    """(n, n): row m integrates from 0 to node m."""


@lru_cache(maxsize=8)
def gauss_legendre(num_nodes: int) -> Rule:
    """The rule with `num_nodes` nodes."""
    x, w = np.polynomial.legendre.leggauss(num_nodes)
    p = np.polynomial.legendre.legvander(x, num_nodes)  # P_k(x_m), k = 0 .. n
    k = np.arange(num_nodes)
    to_series = (p[:, :-1] * w[:, None]).T * (2 * k[:, None] + 1) / 2
    integrals = np.empty((num_nodes, num_nodes))  # int_{-1}^{x_m} P_k
    integrals[:, 0] = x + 1
    integrals[:, 1:] = (p[:, 2:] - p[:, :-2]) / (2 * k[1:] + 1)
    return Rule(*(torch.from_numpy(a) for a in ((x + 1) / 2, w / 2, integrals @ to_series / 2)))


def interval(start: float, end: float, origin: float, rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes between two times and `dt / dx` there, x in (0, 1).

    The nodes are those of `sqrt(t - origin)`, in which the matrices of a process are smooth at its data; of t where the data
    lies at infinity.
    """
    if math.isinf(origin):
        return start + (end - start) * rule.nodes, torch.full_like(rule.nodes, end - start)
    low, high = math.sqrt(start - origin), math.sqrt(end - origin)
    root = low + (high - low) * rule.nodes
    return origin + root**2, 2 * root * (high - low)


def solve_linear_ode(matrices: torch.Tensor, rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
    """`dW/dx = A(x) W`, `W(0) = 1` on [0, 1], by collocation at the nodes of `rule`.

    Args:
        matrices: A at the nodes, (n, k, k).

    Returns:
        W at the nodes, (n, k, k), and W(1), (k, k).
    """
    n, k, _ = matrices.shape
    eye = torch.eye(k, dtype=torch.float64)
    system = torch.eye(n * k, dtype=torch.float64) - torch.einsum("mp,pij->mipj", rule.partial, matrices).reshape(n * k, n * k)
    solution = torch.linalg.solve(system, eye.repeat(n, 1)).reshape(n, k, k)
    return solution, eye + torch.einsum("p,pij,pjl->il", rule.weights, matrices, solution)


def cumulative_integral(
    rate: Callable[[torch.Tensor], torch.Tensor], end: float, scale: float, num_nodes: int = 20
) -> Callable[[torch.Tensor], torch.Tensor]:
    """`t -> int_0^t rate` for t in [0, end], with nodes even in `asinh(t / scale)`: fine near 0, where `rate` is sharp.

    Args:
        rate: integrand, of tensors of any shape.
        scale: distance from 0 to the nearest singularity of `rate` in the complex plane.
    """
    rule = gauss_legendre(num_nodes)
    width = math.asinh(end / scale)
    edges = torch.linspace(0, width, 2 * math.ceil(width) + 1, dtype=torch.float64)

    def between(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        y = low[..., None] + (high - low)[..., None] * rule.nodes
        return (rate(scale * y.sinh()) * scale * y.cosh() @ rule.weights) * (high - low)

    sums = torch.cat([torch.zeros(1, dtype=torch.float64), between(edges[:-1], edges[1:]).cumsum(0)])

    def integral(t: torch.Tensor) -> torch.Tensor:
        y = (t / scale).asinh()
        panel = (torch.searchsorted(edges, y.contiguous(), right=True) - 1).clamp(0, len(edges) - 2)
        return sums[panel] + between(edges[panel], y)

    return integral


def lagrange(points: Sequence[float], at: torch.Tensor) -> torch.Tensor:
    """Basis polynomials: 1 at one of `points` and 0 at the others. Values (len(points), len(at))."""
    p = torch.tensor(points, dtype=torch.float64)
    gaps = p[:, None] - p + torch.eye(len(p), dtype=torch.float64)
    factors = (at - p[:, None]) / gaps[..., None]
    factors[range(len(p)), range(len(p))] = 1
    return factors.prod(1)


def lagrange_slope(points: Sequence[float], at: torch.Tensor) -> torch.Tensor:
    """Derivatives of `lagrange`, where `at` meets none of `points`."""
    inverse = 1 / (at - torch.tensor(points, dtype=torch.float64)[:, None])
    return lagrange(points, at) * (inverse.sum(0) - inverse)
