"""Learned linear multistep solvers: every explicit solver with K evaluations is of this form.

With slopes `d_j` of the evaluations so far, `x_{k+1} = decay_k x_0 + sum_{j<=k} weights_kj d_j`, where `d_k` is the slope at
`x_k`, of level `sigmas_k`, when the network is told the level `network_sigmas_k`; `x_K` is the result. Euler, iPNDM,
DPM-Solver++, and their analytical first steps are special cases; `as_linear_solver` finds their numbers.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .sigma_grids import check_grid
from .solvers import SolverRun


@dataclass(frozen=True)
class LinearSolver:
    """The numbers of a solver, all in the coordinates of `noise_levels`."""

    sigmas: list[float]
    """Levels of the states that are evaluated, (K,), falling."""
    network_sigmas: list[float]
    """Levels that the network is told, (K,)."""
    decay: list[float]
    """Weight of the initial state in the state after each evaluation, (K,)."""
    weights: list[list[float]]
    """Row k holds the weights of the slopes 0 .. k in the state after evaluation k."""

    def __post_init__(self):
        count = len(self.sigmas)
        check_grid([*self.sigmas, 0.0])
        if not len(self.network_sigmas) == len(self.decay) == len(self.weights) == count:
            raise ValueError(
                f"A linear solver with {count} levels needs as many `network_sigmas`, `decay` and `weights`, got "
                f"{len(self.network_sigmas)}, {len(self.decay)} and {len(self.weights)}."
            )
        for k, row in enumerate(self.weights):
            if len(row) != k + 1:
                raise ValueError(f"Row {k} of `weights` must hold {k + 1} numbers, got {len(row)}.")
        if not all(level > 0 for level in self.network_sigmas):
            raise ValueError(f"`network_sigmas` must be positive, got {self.network_sigmas}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for a config."""
        return asdict(self)


class LinearRun:
    """State of one trajectory; driven like `solvers.SolverRun`."""

    rescales_slope = False  # the weights are those of slopes as the network gives them

    def __init__(self, solver: LinearSolver):
        self.solver = solver
        self.sigmas = [*solver.sigmas, 0.0]
        self.evaluation = 0
        self._start: torch.Tensor | None = None
        self._slopes: list[torch.Tensor] = []

    @property
    def is_done(self) -> bool:
        return self.evaluation == len(self.solver.sigmas)

    @property
    def sigma(self) -> float:
        """Noise level of the state that is to be evaluated next."""
        return self.sigmas[self.evaluation]

    @property
    def network_sigma(self) -> float:
        return self.solver.network_sigmas[self.evaluation]

    def seek(self, evaluation: int) -> None:
        """See `SolverRun.seek`. The weights assume the whole run, so a later beginning is not possible.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"A learned linear solver starts from pure noise and cannot begin at evaluation {evaluation}. Use another one for "
            "image-to-image."
        )

    def follow(self, x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        """Take the slope at `x` and return the state of the next evaluation."""
        if self._start is None:
            self._start = x
        self._slopes.append(slope)
        result = self.solver.decay[self.evaluation] * self._start
        for weight, past in zip(self.solver.weights[self.evaluation], self._slopes, strict=True):
            result = torch.add(result, past, alpha=weight)
        self.evaluation += 1
        return result


def as_linear_solver(make_run: Callable[[], SolverRun]) -> LinearSolver:
    """The numbers of any solver without nonlinear options, found by running it on unit vectors.

    Args:
        make_run: makes a fresh run that evaluates once in every interval and ends at 0.
    """
    run = make_run()
    count = len(run.sigmas) - 1
    x = torch.eye(1, count + 1, dtype=torch.float64).reshape(1, 1, 1, -1)
    sigmas, rows = [], []
    while not run.is_done:
        sigmas.append(float(run.sigma))
        slope = torch.zeros_like(x)
        slope[..., len(sigmas)] = 1.0
        x = run.follow(x, slope)
        rows.append(x.flatten().tolist())
    weights = [row[1 : k + 2] for k, row in enumerate(rows)]
    return LinearSolver(sigmas, list(sigmas), [row[0] for row in rows], weights)
