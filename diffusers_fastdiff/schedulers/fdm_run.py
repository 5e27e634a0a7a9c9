"""Runs of the EDM family's samplers: churn in any method, and singlestep DPM-Solver++ in the form a `SolverDriver` takes.

Sources: Karras et al., arXiv 2206.00364, algorithm 2 (churn); Lu et al., arXiv 2211.01095 (DPM-Solver++).
"""

from collections.abc import Callable

import torch

from ..numerics.singlestep import SinglestepRun
from ..numerics.solver_methods import Solver
from ..numerics.solvers import SolverRun
from ..numerics.stochastic import Churn

Draw = Callable[[torch.Tensor], torch.Tensor]
"""Standard normal noise of the shape, device and dtype of a state."""


class ChurnedRun(SolverRun):
    """A `SolverRun` that puts noise back at the beginning of each interval, once the step before it is done.

    The state that is handed out already lies at the raised level, so the network is told the level of what it sees. The first
    state of a run must lie there as well.

    Args:
        solver, sigmas: see `SolverRun`.
        churn: how much noise.
        draw: where it comes from.
    """

    def __init__(self, solver: Solver, sigmas: list[float], churn: Churn, draw: Draw):
        super().__init__(solver, sigmas)
        self.churn, self._draw, self._idles = churn, draw, False
        self.sigma = self._raised(0)

    def _raised(self, interval: int) -> float:
        return self.churn.raised(self.sigmas[interval], len(self.sigmas) - 1)

    def seek(self, evaluation: int) -> None:
        """Begin at a later evaluation. The second one of Heun's method corrects a step that such a run has not taken: nothing
        happens in it."""
        super().seek(evaluation)
        self._idles = self.solver.name == "heun" and evaluation % 2 == 1
        if not self._idles:
            self.sigma = self._raised(self.interval)

    def follow(self, x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        if not self._idles:
            x = super().follow(x, slope)
        self._idles = False
        if self.is_second_half or self.is_done:
            return x
        raised = self._raised(self.interval)
        return self.raise_noise(x, raised, self.churn.noise_scale * self._draw(x)) if raised > self.sigma else x


class SinglestepDriverRun(SinglestepRun):
    """Singlestep DPM-Solver++ for a `SolverDriver`.

    Args:
        sigmas: ends of the intervals. A last one of 0 is reached by taking the denoised sample of the level before it.
        orders: evaluations in each interval.
    """

    rescales_slope = False

    def seek(self, evaluation: int) -> None:
        """Begin at a later evaluation; inside an interval, the rest of it becomes an interval of a lower order."""
        self.orders, inside = list(self.orders), evaluation
        while inside >= self.orders[self.interval]:
            inside -= self.orders[self.interval]
            self.interval += 1
        start, end, order = *self.sigmas[self.interval : self.interval + 2], self.orders[self.interval]
        self.sigma = start
        if inside:
            self.orders[self.interval] = order - inside
            self.sigma = start ** (1 - inside / order) * end ** (inside / order)

    def follow(self, x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        """Take the slope `(x - D(x, sigma)) / sigma` and go on to the state of the next evaluation."""
        denoised = x - self.sigma * slope
        if self.sigmas[self.interval + 1] > 0:
            return self.advance(x, denoised)
        self.interval += 1
        self.sigma = 0.0
        return denoised
