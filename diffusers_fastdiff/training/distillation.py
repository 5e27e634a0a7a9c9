"""Distillation of learned solvers: a teacher with more evaluations shows where each interval should end.

Source: Zhou et al., arXiv 2312.00094, section 3.3 and algorithm 1. Difference from the published program: a trajectory owns
its history, so that gradient accumulation does not push it twice.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch

from ..numerics.noise_levels import Sigma
from ..numerics.solver_methods import AMEDCoefficients, Solver
from ..numerics.solvers import SolverRun, solve

Denoiser = Callable[[torch.Tensor, Sigma], torch.Tensor]


def refine_grid(sigmas: list[float], points_between: int) -> list[float]:
    """Put `points_between` levels into every interval, even in `log sigma`; into one that ends at 0, even in `sigma`."""
    refined = [sigmas[0]]
    for start, stop in pairwise(sigmas):
        for k in range(1, points_between + 2):
            u = k / (points_between + 1)
            refined.append(start ** (1 - u) * stop**u if stop > 0 else start * (1 - u))
        refined[-1] = stop
    return refined


@torch.no_grad()
def teacher_states(
    denoiser: Denoiser, start: torch.Tensor, teacher_sigmas: list[float], teacher: Solver, stride: int
) -> list[torch.Tensor]:
    """States of the teacher at the ends of the student's intervals.

    Args:
        denoiser: `D(x, sigma)`.
        start: state at `teacher_sigmas[0]`, (B, C, H, W).
        teacher_sigmas: the student's grid with `stride - 1` points more in every interval.
        teacher: the method.
        stride: teacher intervals in one interval of the student.
    """
    states: list[torch.Tensor] = []
    solve(denoiser, start, teacher_sigmas, teacher, callback=lambda i, x: states.append(x) if i and i % stride == 0 else None)
    return states


class IntervalResult(NamedTuple):
    """One interval of the student, to be back-propagated before the next one is asked for."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    start: torch.Tensor
    end: torch.Tensor
    squared_error: torch.Tensor
    """Squared error to the teacher, elementwise."""


def student_intervals(
    denoiser: Denoiser,
    start: torch.Tensor,
    sigmas: list[float],
    student: Solver,
    coefficients: Callable[[int], AMEDCoefficients],
    targets: list[torch.Tensor],
    analytical_first_step: bool = False,
) -> Iterator[IntervalResult]:
    """Run the student interval by interval; gradients reach the coefficients of the current interval only.

    Methods without memory begin every interval at the teacher's state, the others at their own.

    Args:
        denoiser: `D(x, sigma)`, differentiable in both.
        start: state at `sigmas[0]`.
        sigmas: the student's grid.
        student: the method.
        coefficients: called with the interval after its first evaluation.
        targets: from `teacher_states`.
        analytical_first_step: see `SolverRun.skip_evaluation`.
    """
    run, x = SolverRun(student, sigmas, coefficients), start
    for index, target in enumerate(targets):
        begin = x
        if index == 0 and analytical_first_step:
            middle = run.skip_evaluation(x)
        else:
            with torch.no_grad():
                denoised = denoiser(x, run.sigma)
            middle = run.advance(x, denoised)
        end = run.advance(middle, denoiser(middle, run.network_sigma))
        yield IntervalResult(index, begin, end.detach(), (end - target).square())
        run.detach()
        x = end.detach() if student.has_memory else target
