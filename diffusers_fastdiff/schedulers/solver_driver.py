"""A `SolverRun` inside a scheduler: between the sample of a pipeline and the state of a solver.

Pipelines differ in what they hand to `step`: most the sample they keep, `DiTPipeline` what `scale_model_input` returned. The
driver recognises the tensor it handed out, so both give the same numbers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch

from ..numerics.noise_levels import NoiseModel, Sigma
from ..numerics.solver_methods import like

Run: TypeAlias = Any
"""A `SolverRun`, or what behaves like one: `LinearRun`, `SinglestepDriverRun`."""


class Evaluation(NamedTuple):
    """One model evaluation of a run, as far as it is known in advance."""

    sigma: float
    """Noise level of the state."""
    network_sigma: float
    """Noise level that the network is told."""


class SolverDriver:
    """State of one sampling run; a scheduler makes one in `set_timesteps`.

    Args:
        model: coordinates and conditioning of the network.
        make_run: makes a fresh run.
        analytical_first_step: the first evaluation of the solver is replaced by the slope of Gaussian data.
        plan_run: makes the run that the plan is drawn up with, where the levels of `make_run` are not known in advance.
    """

    def __init__(
        self,
        model: NoiseModel,
        make_run: Callable[[], Run],
        analytical_first_step: bool = False,
        plan_run: Callable[[], Run] | None = None,
    ):
        self.model, self._make_run = model, make_run
        self.analytical_first_step = analytical_first_step
        self.evaluations = self._plan(plan_run or make_run)
        self._input: torch.Tensor | None = None
        self._sample: torch.Tensor | None = None
        self.begin(0)

    def _plan(self, make_run: Callable[[], Run]) -> list[Evaluation]:
        """Walk through a run with a state of no size."""
        run, x, evaluations = make_run(), torch.zeros(1, 1, 1, 1, dtype=torch.float64), []
        if self.analytical_first_step:
            x = run.skip_evaluation(x)
        while not run.is_done:
            evaluations.append(Evaluation(_number(run.sigma), _number(run.network_sigma)))
            x = run.follow(x, x)
        return evaluations

    def begin(self, evaluation: int) -> None:
        """Start a fresh run, at its first evaluation or, for a sample made by `add_noise`, at a later one."""
        self.run = self._make_run()
        self._skips = self.analytical_first_step and evaluation == 0
        if evaluation > 0:
            self.run.seek(evaluation + int(self.analytical_first_step))

    def timesteps(self) -> torch.Tensor:
        """What the network is conditioned on at each evaluation, float64."""
        return torch.stack([self.model.timestep(evaluation.network_sigma) for evaluation in self.evaluations])

    def scale_input(self, sample: torch.Tensor) -> torch.Tensor:
        """The network's input for a sample; the sample itself where nothing has to be scaled."""
        factor = self._input_factor(sample)
        if isinstance(factor, float) and factor == 1.0:
            return sample
        self._sample, self._input = sample, (sample * like(factor, sample)).to(sample.dtype)
        return self._input

    def _input_factor(self, sample: torch.Tensor) -> Sigma:
        run, factor = self.run, 1.0
        if self._skips:  # the analytical first step of the initial noise is a change of its size
            run, sigma = self._make_run(), self.run.sigma
            step = float(run.skip_evaluation(torch.ones((), dtype=torch.float64)))
            factor = step * _number(self.model.state_scale(run.sigma) / self.model.state_scale(sigma))
        sigma, network_sigma = run.sigma, run.network_sigma
        if isinstance(sigma, torch.Tensor):  # one level for each sample, and perhaps a batch doubled by guidance
            scale = self.model.input_scale(network_sigma) / self.model.state_scale(sigma)
            return scale.repeat(sample.shape[0] // scale.shape[0], 1, 1, 1)
        return factor * _number(self.model.input_scale(network_sigma)) / _number(self.model.state_scale(sigma))

    def step(self, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """Take an evaluation of the network and return the next sample, in the dtype of `sample`."""
        if sample is self._input:
            sample = self._sample
        self._input = self._sample = None
        dtype = torch.promote_types(sample.dtype, torch.float32)
        x = sample.to(dtype) / self._scale(self.run.sigma, dtype)
        if self._skips:
            x, self._skips = self.run.skip_evaluation(x), False
        sigma, network_sigma = self.run.sigma, self.run.network_sigma
        slope = self.model.slope(output.to(dtype), x, network_sigma)
        if self.run.rescales_slope:
            slope = slope * like(network_sigma / sigma, x)
        x = self.run.follow(x, slope)
        return (x * self._scale(self.run.sigma, dtype)).to(sample.dtype)

    def _scale(self, sigma: Sigma, dtype: torch.dtype) -> Sigma:
        scale = self.model.state_scale(sigma)
        return scale.to(dtype) if isinstance(sigma, torch.Tensor) and sigma.ndim else float(scale)


def _number(value: Sigma) -> float:
    """A number that is known on the host; per-sample levels of a plan are neutral and equal."""
    return float(value.flatten()[0]) if isinstance(value, torch.Tensor) else float(value)
