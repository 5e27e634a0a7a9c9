"""gDDIM: exponential multistep integrators of the reverse process, deterministic and stochastic.

Sources: Zhang et al., arXiv 2206.05564 (predictor, corrector, stochastic steps); Zhang and Chen, arXiv 2204.13902 (DEIS). The
stochastic multistep method is ours.

A step from time s to t < s replaces `eps` by the polynomial through its last values, `eps(tau) = sum_j l_j(tau) eps_j`:

    u_t = Psi(t, s) u_s + sum_j C_j eps_j,    C_j = int_s^t Psi(t, tau) (G G^T / 2) K^-T l_j(tau) dtau.

For K = R the kernel is `d/dtau [Psi(t, tau) R_tau]`, so that integration by parts leaves no G and no inverse, and order 0 is
exactly `R_t - Psi(t, s) R_s`.

With stochasticity lambda the reverse process is `du = (F + (1 + lambda^2) / 2 G G^T Sigma^-1) u + ...`, whose transition is
`R_t W(t, s) R_s^-1` with `dW/dtau = lambda^2 / 2 R^-1 G G^T R^-T W`. On point-mass data its eps obeys exactly

    eps_t = W eps_s + (1 - W W^T)^(1/2) z,    u_t = Psi(t, s) u_s + (R_t W - Psi(t, s) R_s) eps_s + R_t (1 - W W^T)^(1/2) z.

The stochastic multistep method therefore carries every older eps along with the first formula, by the z of the step, and
interpolates the carried values: point masses stay exact at any order, and lambda = 0 is the deterministic method.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from .linear_sde import LinearProcess, check_parametrization
from .quadrature import gauss_legendre, interval, lagrange, lagrange_slope, solve_linear_ode

MAX_ORDER = 5


@dataclass(frozen=True)
class StepCoefficients:
    """Matrices of a run of N steps, (N, ..., *cells, k, k). Shared by all runs with the same settings: not to be written to.

    `u_next = transition[i] u + sum_j predictor[i, j] eps_j + noise[i] z`, where eps_0 is the newest; with stochasticity, then
    `eps_j = carry[i] eps_j + carry_noise[i] z` for every eps that is kept.
    """

    times: tuple[float, ...]
    """N + 1, decreasing."""
    transition: torch.Tensor
    predictor: torch.Tensor
    """(N, order + 1, ...), zero where the history is shorter. Integrals of all kinds are exact to about 1e-13."""
    corrector: torch.Tensor | None
    """(N, corrector_order + 1, ...): replaces the predictor once eps at the new time is known, which it takes first."""
    noise: torch.Tensor
    carry: torch.Tensor
    carry_noise: torch.Tensor


def step_orders(num_steps: int, order: int, lower_order_final: bool = False) -> tuple[int, ...]:
    """Degree of the polynomial in each step: grows with the history and, if asked for, falls again to 0 at the end."""
    return tuple(min(i, order, num_steps - 1 - i) if lower_order_final else min(i, order) for i in range(num_steps))


def step_coefficients(
    process: LinearProcess,
    times: Sequence[float] | torch.Tensor,
    order: int,
    *,
    corrector_order: int | None = None,
    stochasticity: float = 0.0,
    parametrization: str = "R",
    lower_order_final: bool = False,
    noiseless_last: bool = True,
    num_nodes: int | None = None,
) -> StepCoefficients:
    """All matrices of a sampling run. Cached.

    Args:
        process: what is reversed.
        times: N + 1 decreasing times from noise to data. A run that ends at the data itself ends with a step of order 0.
        order: degree of the polynomial, from 0 (DDIM) to N - 1; the first steps use what history there is.
        corrector_order: degree of the polynomial through the new eps, at least 1; None for no corrector.
        stochasticity: lambda >= 0; 0 is the probability flow, 1 the reverse of the forward process.
        parametrization: "R", or "L" for the Cholesky baseline.
        lower_order_final: also lower the order over the last steps.
        noiseless_last: the last step draws no noise, though its exact covariance is not zero.
        num_nodes: quadrature nodes of each step; None for more of them in fewer steps, enough for 1e-10.
    """
    times = tuple(float(t) for t in times)
    num_steps = len(times) - 1
    if num_steps < 1 or not all(a > b for a, b in itertools.pairwise(times)):
        raise ValueError(f"`times` must be at least two decreasing times, from noise to data, got {times}.")
    if times[0] == float("inf") or times[-1] < process.origin:
        raise ValueError(f"`times` must be finite at the noise and not below {process.origin}, got {times[0]} .. {times[-1]}.")
    for name, value in (("order", order), ("corrector_order", corrector_order)):
        low = int(name == "corrector_order")
        if value is None:
            continue
        if not low <= value <= MAX_ORDER:
            raise ValueError(f"`{name}` must be between {low} and {MAX_ORDER}, got {value}.")
        if value > num_steps - 1 + low:
            raise ValueError(
                f"`{name}` ({value}) needs {value + 1 - low} evaluations, but a run of {num_steps} steps has no more than "
                f"{num_steps}. Lower it to {num_steps - 1 + low} or take more steps."
            )
    if not 0 <= stochasticity < float("inf"):
        raise ValueError(f"`stochasticity` (lambda) must be at least 0, got {stochasticity}.")
    check_parametrization(parametrization)
    if stochasticity and (corrector_order is not None or (parametrization == "L" and process.block > 1)):
        raise ValueError(
            f"`stochasticity` ({stochasticity}) needs `parametrization='R'` and no corrector. Set it to 0, or set "
            "`corrector_order` to None and `parametrization` to 'R'."
        )
    orders = step_orders(num_steps, order, lower_order_final)
    nodes = num_nodes or max(48, min(256, 1024 // num_steps))
    return _coefficients(process, times, orders, corrector_order, stochasticity, parametrization, noiseless_last, nodes)


@lru_cache(maxsize=8)
def _coefficients(process, times, orders, corrector_order, stochasticity, parametrization, noiseless_last, num_nodes):
    steps, predictors, correctors = [], [], []
    for i, (start, end) in enumerate(itertools.pairwise(times)):
        step = _Step(process, start, end, stochasticity, parametrization, num_nodes)
        steps.append(step)
        at_data = math.isinf(end)  # no polynomial reaches there, and no network is evaluated there
        order = 0 if at_data else orders[i]
        predictors.append(_pad(step.integrals(times[i - order : i + 1][::-1]), max(orders) + 1))
        if corrector_order is not None:
            degree = min(i + 1, corrector_order)
            first = predictors[-1][:1]
            integrals = torch.cat([0 * first, first]) if at_data else step.integrals(times[i + 1 - degree : i + 2][::-1])
            correctors.append(_pad(integrals, corrector_order + 1))
    carry = torch.stack([step.carry for step in steps])
    carry_noise = _complement(carry)
    if noiseless_last:
        carry_noise[-1] = 0
    return StepCoefficients(
        times=times,
        transition=torch.stack([step.transition for step in steps]),
        predictor=torch.stack(predictors),
        corrector=torch.stack(correctors) if correctors else None,
        noise=torch.stack([step.factor for step in steps]) @ carry_noise,
        carry=carry,
        carry_noise=carry_noise,
    )


class _Step:
    """What the integrals over one step need."""

    def __init__(self, process, start, end, stochasticity, parametrization, num_nodes):
        rule = gauss_legendre(num_nodes)
        self.start, self.end = start, end
        self.by_parts = parametrization == "R" or process.block == 1
        self.nodes, speed = interval(start, end, process.origin, rule)
        self.weights = rule.weights * speed
        self.transition, self.factor = process.transition(end, start), process.factor(end)
        carries, self.carry = _carries(process, self.nodes, speed, start, end, stochasticity, rule)
        to_end = process.transition(end, self.nodes)
        if self.by_parts:
            self.kernel = to_end @ process.factor(self.nodes) @ carries
            self.at_start, self.at_end = self.transition @ process.factor(start), self.factor @ self.carry
        else:
            self.kernel = to_end @ process.noise_drift(self.nodes, parametrization) / 2

    def integrals(self, points: tuple[float, ...]) -> torch.Tensor:
        """C_j for the polynomial through eps at `points`, (len(points), *cells, k, k)."""
        if not self.by_parts:
            return torch.einsum("jn,n...->j...", lagrange(points, self.nodes) * self.weights, self.kernel)
        if len(points) == 1:
            return (self.at_end - self.at_start)[None]
        ends = lagrange(points, torch.tensor([self.start, self.end], dtype=torch.float64))
        inside = torch.einsum("jn,n...->j...", lagrange_slope(points, self.nodes) * self.weights, self.kernel)
        shape = (-1, *[1] * self.at_end.ndim)
        return ends[:, 1].reshape(shape) * self.at_end - ends[:, 0].reshape(shape) * self.at_start - inside


def _carries(process, nodes, speed, start, end, stochasticity, rule):
    """W(tau, start) at the nodes and at the end."""
    if stochasticity == 0:
        one = torch.eye(process.block, dtype=torch.float64)
        return one, one.expand(*process.cells, -1, -1)
    if process.block == 1:
        at_start = process.factor(start)
        decay = (process.factor(tau) / (process.transition(tau, start) * at_start) for tau in (nodes, end))
        return tuple(ratio ** (stochasticity**2) for ratio in decay)
    rates = torch.linalg.solve(process.factor(nodes), process.noise_drift(nodes))
    return solve_linear_ode(stochasticity**2 / 2 * speed[:, None, None] * rates, rule)


def _complement(carry: torch.Tensor) -> torch.Tensor:
    """`(1 - W W^T)^(1/2)`, symmetric."""
    gap = torch.eye(carry.shape[-1], dtype=torch.float64) - carry @ carry.mT
    if carry.shape[-1] == 1:
        return gap.clamp_min(0).sqrt()
    values, vectors = torch.linalg.eigh(gap)
    return vectors * values.clamp_min(0).sqrt()[..., None, :] @ vectors.mT


def _pad(integrals: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat([integrals, integrals.new_zeros(count - len(integrals), *integrals.shape[1:])])
