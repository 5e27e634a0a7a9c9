"""ODE solvers driven by evaluations: the sampling loop, the schedulers and the distillation all take the same steps.

A `SolverRun` says at which noise level the model is wanted next; `advance` takes the denoised sample of that evaluation and
returns the state of the next one. Differences from the published AMED program (arXiv 2312.00094): coefficients are a named
triple with neutral values 1, iPNDM of order 1 is Euler, and dynamic thresholding is an option.
"""

from collections.abc import Callable

import torch

from .noise_levels import Sigma
from .solver_methods import TWO_STAGE, AMEDCoefficients, Solver, like


class SolverRun:
    """State of one trajectory.

    Args:
        solver: the method.
        sigmas: grid of noise levels, N + 1 numbers.
        coefficients: for methods with two evaluations in each interval: the coefficients of interval i, from a list or a
            function. None is one evaluation in each interval (or two with r = 1/2, for DPM-Solver-2 and AMED).
    """

    def __init__(
        self,
        solver: Solver,
        sigmas: list[float],
        coefficients: list[AMEDCoefficients] | Callable[[int], AMEDCoefficients] | None = None,
    ):
        self.solver, self.sigmas = solver, sigmas
        if coefficients is None and solver.name in ("dpm2", "amed"):
            coefficients = [AMEDCoefficients()] * (len(sigmas) - 1)
        self._coefficients = coefficients.__getitem__ if isinstance(coefficients, list) else coefficients
        self.interval = 0
        self.is_second_half = False
        self.sigma: Sigma = sigmas[0]
        """Noise level of the state that is to be evaluated next."""
        self._current: AMEDCoefficients | None = None
        self._start: tuple[torch.Tensor, torch.Tensor, Sigma] | None = None  # state, slope and level where the interval began
        self._values: list[torch.Tensor] = []  # newest first
        self._value_sigmas: list[Sigma] = []

    def seek(self, evaluation: int) -> None:
        """Begin at a later evaluation of the run, for a sample that already lies at its noise level.

        A run that begins in the middle of an interval takes the rest of that interval in one step.
        """
        halves = 1 if self._coefficients is None and self.solver.name != "heun" else 2
        self.interval, half = divmod(evaluation, halves)
        self.sigma = self.sigmas[self.interval]
        if half and self._coefficients is not None:
            self._current, self.is_second_half = self._coefficients(self.interval), True
            self.sigma = self.sigmas[self.interval + 1] ** self._current.r * self.sigma ** (1 - self._current.r)
        elif half:  # Heun's second evaluation is where the next interval begins
            self.interval += 1
            self.sigma = self.sigmas[self.interval]

    @property
    def is_done(self) -> bool:
        return self.interval == len(self.sigmas) - 1

    @property
    def rescales_slope(self) -> bool:
        """Whether the slope is taken at the level of the state although the network was told another one."""
        return self.is_second_half

    @property
    def network_sigma(self) -> Sigma:
        """Noise level that the network is told at the next evaluation."""
        return self._current.scale_time * self.sigma if self.is_second_half and self._current is not None else self.sigma

    def raise_noise(self, x: torch.Tensor, sigma: float, noise: torch.Tensor) -> torch.Tensor:
        """Churn: add noise at the beginning of an interval, up to the level `sigma`. `noise` has its standard deviation."""
        added = (sigma**2 - self.sigma**2) ** 0.5
        self.sigma = sigma
        return x + added * noise

    def skip_evaluation(self, x: torch.Tensor) -> torch.Tensor:
        """The analytical first step: at the start `x` is nearly noise alone, which is then the slope."""
        return self.follow(x, x / (1 + self.sigma**2) ** 0.5)

    def advance(self, x: torch.Tensor, denoised: torch.Tensor) -> torch.Tensor:
        """Take the evaluation `D(x, network_sigma)` and go on to the state of the next one."""
        return self.follow(x, (x - denoised) / like(self.sigma, x))

    def follow(self, x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        """As `advance`, with the slope `(x - D(x, network_sigma)) / sigma`."""
        self._remember(self.solver.value(x, slope, self.sigma))
        sigma_next = self.sigmas[self.interval + 1]
        if self.is_second_half:
            x = self._second_half(x, slope, sigma_next)
        elif self._coefficients is not None:
            self._current, self._start = self._coefficients(self.interval), (x, slope, self.sigma)
            r = self._current.r
            midpoint = sigma_next**r * self.sigma ** (1 - r)
            x = self._step(x, slope, midpoint)
            self.sigma, self.is_second_half = midpoint, True
            return x
        elif self.solver.name == "heun" and sigma_next > 0:
            self._start = (x, slope, self.sigma)
            x = x + like(sigma_next - self.sigma, x) * slope
            self.sigma, self.is_second_half = sigma_next, True
            return x
        else:
            x = self._step(x, slope, sigma_next)
        self.interval += 1
        self.sigma, self.is_second_half, self._current, self._start = sigma_next, False, None, None
        return x

    def _second_half(self, x: torch.Tensor, slope: torch.Tensor, sigma_next: float) -> torch.Tensor:
        if self.solver.name not in TWO_STAGE or self._start is None:
            return self._step(x, slope, sigma_next, self._current.scale_dir)
        start, first_slope, first_sigma = self._start
        step = like(sigma_next - first_sigma, x)
        if self.solver.name == "heun":
            return start + step * (first_slope + slope) / 2
        r, scale = self._current.r, like(self._current.scale_dir, x)
        if self.solver.name == "amed":
            return start + scale * step * slope
        half = like(1 / (2 * r), x)
        return start + scale * step * (half * slope + (1 - half) * first_slope)

    def _step(self, x: torch.Tensor, slope: torch.Tensor, sigma_next: Sigma, scale: Sigma = 1.0) -> torch.Tensor:
        if not self.solver.has_memory:
            return x + like(scale * (sigma_next - self.sigma), x) * slope
        halves = 1 if self._coefficients is None else 2
        substep = halves * self.interval + int(self.is_second_half)
        num_substeps = halves * (len(self.sigmas) - 1)
        weights = self.solver.weights(self._value_sigmas, sigma_next, substep, num_substeps)
        return weights.apply(x, self._values, scale)

    def _remember(self, value: torch.Tensor) -> None:
        if self.solver.has_memory:
            self._values = [value, *self._values][: self.solver.order]
            self._value_sigmas = [self.sigma, *self._value_sigmas][: self.solver.order]

    def detach(self) -> None:
        """Cut the memory from the graph, between intervals of a distillation."""
        self._values = [value.detach() for value in self._values]
        self._value_sigmas = [s.detach() if isinstance(s, torch.Tensor) else s for s in self._value_sigmas]


def solve(
    denoiser: Callable[[torch.Tensor, Sigma], torch.Tensor],
    x: torch.Tensor,
    sigmas: list[float],
    solver: Solver,
    coefficients: list[AMEDCoefficients] | Callable[[int], AMEDCoefficients] | None = None,
    analytical_first_step: bool = False,
    callback: Callable[[int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Follow the probability flow over a grid.

    Args:
        denoiser: `D(x, sigma)`; sigma is a number or (B, 1, 1, 1).
        x: state at `sigmas[0]`, (B, C, H, W).
        sigmas: grid, N + 1 numbers.
        solver: the method.
        coefficients: see `SolverRun`.
        analytical_first_step: replace the first evaluation, see `SolverRun.skip_evaluation`.
        callback: called with i and the state at grid point i, for i = 0 .. N.
    """
    run = SolverRun(solver, sigmas, coefficients)
    reached = -1
    while True:
        if callback is not None and run.interval > reached and not run.is_second_half:
            reached = run.interval
            callback(reached, x)
        if run.is_done:
            return x
        is_first = run.interval == 0 and not run.is_second_half
        if is_first and analytical_first_step:
            x = run.skip_evaluation(x)
        else:
            x = run.advance(x, denoiser(x, run.network_sigma))
