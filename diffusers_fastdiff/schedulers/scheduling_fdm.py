"""Samplers of the EDM family, with the momentum of the Fast Diffusion Model or without it.

Sources: Karras et al., arXiv 2206.00364 (formulations, Heun's method, churn); Wu et al., arXiv 2306.06991 (momentum); Lu et
al., arXiv 2211.01095 (DPM-Solver++). The network is a raw one, `F(c_in x; c_noise)`: `scale_model_input` multiplies by `c_in`,
`timesteps` are values of `c_noise`, and `step` takes the output of F. Differences from the published program:

* `num_inference_steps` counts model evaluations, so Heun's method with N intervals that ends at 0 has 2 N - 1;
* churn of the first interval is part of the initial noise, `init_noise_sigma`, which is the same distribution;
* states keep the precision of the caller's sample, at least float32 inside a step (float64 samples give a float64 run);
* the multiplier of the momentum also counts in VE, where the published program ignores it.
"""

from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from ..numerics.noise_levels import PreconditionedModel
from ..numerics.preconditioning import Preconditioning
from ..numerics.sigma_grids import check_grid, make_grid
from ..numerics.singlestep import singlestep_orders
from ..numerics.solver_methods import Solver
from ..numerics.stochastic import Churn
from .driven import DrivenSchedulerMixin
from .fdm_run import ChurnedRun, Draw, SinglestepDriverRun
from .model_config import GRID_NAMES
from .run_index import RunIndex
from .solver_driver import SolverDriver

SOLVERS = ("heun", "euler", "dpmpp_multistep", "dpmpp_singlestep", "ipndm")
_ORDERS = {"heun": 2, "euler": 1, "dpmpp_multistep": 2, "dpmpp_singlestep": 3, "ipndm": 4}


class _FDMScheduler(DrivenSchedulerMixin, SchedulerMixin, ConfigMixin):
    """What the three formulations share; see [`FDMEDMScheduler`]."""

    _compatibles = ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"]
    _kind: str
    order = 1

    @register_to_config
    def __init__(
        self,
        *,  # diffusers takes positional ones for defaults when it copies a config
        multiplier: float | None = 1.0,
        solver: str = "heun",
        solver_order: int | None = None,
        sigma_schedule: str | None = None,
        rho: float | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        final_sigmas_type: str = "zero",
        s_churn: float = 0.0,
        s_min: float = 0.0,
        s_max: float | None = None,
        s_noise: float = 1.0,
        network_sigma_min: float | None = None,
        network_sigma_max: float | None = None,
        sigma_data: float = 0.5,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        epsilon_t: float = 1e-5,
        num_train_timesteps: int = 1000,
        noise_input_scale: float = 1.0,
        prediction_type: str = "epsilon",
    ):
        _check_options(solver, solver_order, final_sigmas_type, s_churn, prediction_type)
        self.register_to_config(_formulation=self._kind)  # for other schedulers that are made from this config
        self._preconditioning = Preconditioning(
            self._kind,
            multiplier,
            sigma_min=network_sigma_min,
            sigma_max=network_sigma_max,
            sigma_data=sigma_data,
            beta_d=beta_d,
            beta_min=beta_min,
            epsilon_t=epsilon_t,
            num_timesteps=num_train_timesteps,
            noise_input_scale=noise_input_scale,
        )
        self._churn = Churn(s_churn, s_min, float("inf") if s_max is None else s_max, s_noise)
        if solver != "dpmpp_singlestep":
            name = "dpmpp" if solver == "dpmpp_multistep" else solver
            self._solver = Solver(name, _ORDERS[solver] if solver_order is None else solver_order)
        self._model = PreconditionedModel(self._preconditioning)
        self._generator: torch.Generator | list[torch.Generator] | None = None
        self._index = RunIndex()
        low, high = self._grid_range()
        self.init_noise_sigma = high
        """Standard deviation of the initial noise; `set_timesteps` adds what churn does in the first interval."""
        self.num_inference_steps: int | None = None
        self.sigmas = make_grid(self._grid_kind(), num_train_timesteps, low, high, self.config.rho).float()
        self.timesteps = self._model.timestep(self.sigmas.double()).float()

    @classmethod
    def from_config(cls, config: FrozenDict | dict[str, Any] | None = None, **kwargs):
        """From the config of this or one of diffusers' EDM schedulers, whose options keep their meaning and which have no
        momentum.

        Raises:
            ValueError: for a config of another formulation or another kind of model, or the stochastic algorithm of
                `EDMDPMSolverMultistepScheduler`.
        """
        given = config if isinstance(config, dict) else {}
        theirs = given.get("_formulation", cls._kind)
        if theirs != cls._kind:
            raise ValueError(
                f"`config` is for networks in the formulation {theirs!r}, those of {cls.__name__} are in {cls._kind!r}."
            )
        if "_formulation" not in given and not {"beta_start", "shift", "process"}.isdisjoint(given):
            raise ValueError(
                f"`config` is of a scheduler for discrete timesteps, flow matching or another process, whose models are no raw "
                f"networks of the EDM family. {cls.__name__} drives those of `EDMPipeline`."
            )
        if "sigma_data" in given and "_formulation" not in given:
            if str(config.get("algorithm_type", "dpmsolver++")) != "dpmsolver++":
                raise ValueError(f"`algorithm_type` must be 'dpmsolver++', got {config['algorithm_type']!r}.")
            solver = "dpmpp_multistep" if "algorithm_type" in config else "euler"
            kwargs = {"multiplier": None, "solver": solver, **kwargs}
        return super().from_config(config, **kwargs)

    @property
    def preconditioning(self) -> Preconditioning:
        """The formulation, as the training loss takes it."""
        return self._preconditioning

    # -- runs -------------------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
    ) -> None:
        """Prepare a run.

        Args:
            num_inference_steps: model evaluations; not needed with `sigmas`. Heun's method takes two for each interval, one for
                an interval that ends at 0.
            device: of `timesteps`.
            sigmas: noise levels where intervals begin, falling, and optionally 0 (or the last level) behind them.

        Raises:
            ValueError: for a number of evaluations that the solver cannot have, or a list that does not fall.
        """
        if self.config.solver == "dpmpp_singlestep":
            if sigmas is not None:
                raise ValueError("`sigmas` cannot be chosen with 'dpmpp_singlestep': take another `sigma_schedule` or solver.")
            run = plan = partial(SinglestepDriverRun, *self._singlestep_plan(num_inference_steps))
        else:
            grid = self._grid(num_inference_steps, sigmas)
            run = partial(ChurnedRun, self._solver, grid, self._churn, self._draw)
            plan = partial(ChurnedRun, self._solver, grid, self._churn, torch.zeros_like)
        driver = SolverDriver(self._model, run, plan_run=plan)
        self._begin_run(driver, device)
        level, raised = driver.run.sigmas[0], driver.evaluations[0].sigma
        self.init_noise_sigma = (level**2 + self.config.s_noise**2 * (raised**2 - level**2)) ** 0.5

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """Go on to the next evaluation.

        Args:
            model_output: of the raw network, (B, C, H, W), guided or not.
            timestep: element of `timesteps`.
            sample: current sample, (B, C, H, W), or what `scale_model_input` made of it.
            generator: of the noise of churn; a list has one for each image.
            return_dict: return a [`SchedulerOutput`] instead of a tuple.

        Raises:
            ValueError: before `set_timesteps`, for a timestep of another run, or after the last one.
        """
        self._generator = generator
        return super().step(model_output, timestep, sample, return_dict=return_dict)

    @property
    def _draw(self) -> Draw:
        def draw(x: torch.Tensor) -> torch.Tensor:
            return randn_tensor(x.shape, generator=self._generator, device=x.device, dtype=x.dtype)

        return draw

    # -- grids ------------------------------------------------------------------------------------------------------------

    def _grid_range(self) -> tuple[float, float]:
        """Ends of the grid: as given, or the published 0.002 and 80 as far as the network has seen them."""
        low, high = self._preconditioning.sigma_range
        low = max(low, 0.002) if self.config.sigma_min is None else self.config.sigma_min
        high = min(high, 80.0) if self.config.sigma_max is None else self.config.sigma_max
        if not 0 < low < high:
            raise ValueError(f"`sigma_min` must lie between 0 and `sigma_max`, got {low} and {high}.")
        return low, high

    def _grid_kind(self) -> str:
        name = self.config.sigma_schedule
        if name is None:
            return "logsnr" if self.config.solver == "dpmpp_singlestep" else "polynomial"
        return GRID_NAMES.get(name, name)

    def _grid(self, num_inference_steps: int | None, sigmas: list[float] | None) -> list[float]:
        ends_at_zero = self.config.final_sigmas_type == "zero"
        if sigmas is not None:
            levels = list(map(float, sigmas))
            if ends_at_zero and levels and levels[-1] != 0:
                levels.append(0.0)
            return check_grid(levels).tolist()
        intervals = self._num_intervals(num_inference_steps)
        low, high = self._grid_range()
        if not ends_at_zero:
            return make_grid(self._grid_kind(), intervals + 1, low, high, self.config.rho).tolist()
        if intervals == 1:
            return [high, 0.0]
        return [*make_grid(self._grid_kind(), intervals, low, high, self.config.rho).tolist(), 0.0]

    def _num_intervals(self, num_inference_steps: int | None) -> int:
        ends_at_zero, count = self.config.final_sigmas_type == "zero", num_inference_steps
        if count is None or count < 1:
            raise ValueError(f"`num_inference_steps` must be at least 1, got {count}.")
        if self.config.solver != "heun":
            return count
        if count % 2 != ends_at_zero:
            parity = "odd: two for each interval but the last one, which ends at 0" if ends_at_zero else "even"
            raise ValueError(
                f"`num_inference_steps` counts model evaluations, which are {parity} with Heun's method; got {count}. Take "
                f"{count + 1}, or another `solver`."
            )
        return (count + ends_at_zero) // 2

    def _singlestep_plan(self, num_inference_steps: int | None) -> tuple[list[float], list[int]]:
        ends_at_zero, count = self.config.final_sigmas_type == "zero", num_inference_steps
        if count is None or count < 1:
            raise ValueError(f"`num_inference_steps` must be at least 1, got {count}.")
        low, high = self._grid_range()
        if ends_at_zero and count == 1:
            return [high, 0.0], [1]
        orders = singlestep_orders(count - ends_at_zero)
        grid = make_grid(self._grid_kind(), len(orders) + 1, low, high, self.config.rho).tolist()
        return ([*grid, 0.0], [*orders, 1]) if ends_at_zero else (grid, orders)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_driver": None, "_generator": None, "_index": RunIndex()}  # a copy begins its own runs


class FDMEDMScheduler(_FDMScheduler):
    r"""Samplers for networks in the EDM formulation, with momentum (EDM-FDM) or, with `multiplier=None`, without (EDM).

    The number of evaluations of Heun's method is odd: two for each interval but the last one, which ends at 0.

    Args:
        multiplier: of the momentum the network was trained with; None or 0 for a network without.
        solver: "heun", "euler", "dpmpp_multistep", "dpmpp_singlestep" or "ipndm".
        solver_order: of "dpmpp_multistep" (1 to 3, by default 2) and "ipndm" (1 to 4, by default 4).
        sigma_schedule: "polynomial" ("karras"), "logsnr" ("exponential") or "time_uniform"; by default "logsnr" for
            "dpmpp_singlestep" and "polynomial" for the others.
        rho: exponent of the grid, by default 7 for "polynomial" and 1 for the others.
        sigma_min, sigma_max: ends of the grid; by default 0.002 and 80 as far as the network has seen them.
        final_sigmas_type: where a run ends: "zero" or "sigma_min".
        s_churn, s_min, s_max, s_noise: how much noise is put back, between which levels, and its size ("heun", "euler").
        network_sigma_min, network_sigma_max: range of noise levels that the momentum was defined on, by default the published
            one: 0.002 to 80 in EDM, 0.02 to 100 in VE, sigma(epsilon_t) to sigma(1) in VP.
        sigma_data: standard deviation of the training data (EDM).
        beta_d, beta_min, epsilon_t: of the noise levels that VP trains on (VP).
        num_train_timesteps: scale of the time that a VP network is told (VP).
        noise_input_scale: factor of the noise level that the network is told.
        prediction_type: only "epsilon", as diffusers calls the output of such networks.
    """

    _kind = "edm"


class FDMVPScheduler(_FDMScheduler):
    """Samplers for networks in the VP formulation (DDPM++ of score-based models), with momentum or without.

    Arguments are those of [`FDMEDMScheduler`].
    """

    _kind = "vp"


class FDMVEScheduler(_FDMScheduler):
    """Samplers for networks in the VE formulation (NCSN++ of score-based models), with momentum or without.

    Arguments are those of [`FDMEDMScheduler`].
    """

    _kind = "ve"


def _check_options(solver: str, solver_order: int | None, final_sigmas_type: str, s_churn: float, prediction_type: str) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"`solver` must be one of {SOLVERS}, got {solver!r}.")
    if solver in ("heun", "euler", "dpmpp_singlestep") and solver_order not in (None, _ORDERS[solver]):
        raise ValueError(f"`solver_order` of {solver!r} is {_ORDERS[solver]}; leave it out, got {solver_order}.")
    if final_sigmas_type not in ("zero", "sigma_min"):
        raise ValueError(f"`final_sigmas_type` must be 'zero' or 'sigma_min', got {final_sigmas_type!r}.")
    if prediction_type != "epsilon":
        raise ValueError(
            f"`prediction_type` must be 'epsilon', got {prediction_type!r}: the formulation says what the network predicts."
        )
    if s_churn and solver not in ("heun", "euler"):
        raise ValueError(f"`s_churn` needs the solver 'heun' or 'euler', which have no memory; got {solver!r}.")
