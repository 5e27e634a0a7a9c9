"""iPNDM on any grid and for any model of diffusers.

Source: Liu et al., arXiv 2202.09778, as used in Zhang and Chen, arXiv 2204.13902 (iPNDM), and Zhou et al., arXiv 2312.00094.
diffusers has an unrelated `IPNDMScheduler` with a schedule of its own, which no DiT or Stable Diffusion model was trained on.
"""

from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..numerics.solver_methods import Solver
from ..numerics.solvers import SolverRun
from .driven import DrivenSchedulerMixin
from .model_config import COMPATIBLES, custom_grid, make_sigmas, with_model_family
from .solver_driver import SolverDriver


class IPNDMMultistepScheduler(DrivenSchedulerMixin, SchedulerMixin, ConfigMixin):
    r"""Improved pseudo numerical method: Adams-Bashforth on the slope of the probability flow, order 1 (Euler, DDIM) to 4.

    `num_inference_steps` is the number of model evaluations.

    Args:
        num_train_timesteps: timesteps of the training schedule.
        beta_start, beta_end, beta_schedule, trained_betas: that schedule, as in the schedulers of diffusers.
        rescale_betas_zero_snr: whether it was rescaled to end in pure noise.
        prediction_type: "epsilon", "v_prediction", "sample" or "flow_prediction".
        preconditioning: of raw networks of the EDM family, the arguments of [`Preconditioning`]; then the entries above do not
            count. `from_config` of EDM schedulers sets it.
        solver_order: highest order, 1 to 4; the first steps have lower orders.
        variable_step: weights for the steps as they are, instead of for equal steps (iPNDM_v).
        sigmas: noise levels of the evaluations, a searched grid for pipelines that cannot pass one to `set_timesteps`; it fixes
            the number of evaluations.
        sigma_schedule: "polynomial", "logsnr", "time_uniform" or "discrete" for a grid of that kind between `sigma_min` and
            `sigma_max`; None spaces the timesteps as `timestep_spacing` says.
        rho: exponent of the grid, by default 7 for "polynomial" and 1 for the others.
        sigma_min, sigma_max: ends of the grid, by default those of the training schedule.
        timestep_spacing: "linspace", "leading" or "trailing", as in diffusers.
        steps_offset: offset of the "leading" spacing.
        final_sigmas_type: where a run ends: "zero" or "sigma_min".
        use_karras_sigmas, use_exponential_sigmas, use_lu_lambdas: other names for the grids "polynomial", "logsnr" and
            "logsnr", so that configs of diffusers keep their meaning.
        use_beta_sigmas: refused when on.
        flow_shift: shift of the grid of flow models.
        use_dynamic_shifting: take the shift of flow models from `mu` in `set_timesteps`.
    """

    _compatibles = COMPATIBLES
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        preconditioning: dict[str, Any] | None = None,
        solver_order: int = 4,
        variable_step: bool = False,
        sigmas: list[float] | None = None,
        sigma_schedule: str | None = None,
        rho: float | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        final_sigmas_type: str = "zero",
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_beta_sigmas: bool = False,
        flow_shift: float = 1.0,
        use_dynamic_shifting: bool = False,
    ):
        self._solver = Solver("ipndm_v" if variable_step else "ipndm", solver_order)
        self._set_up_table()
        if sigmas is not None:
            custom_grid(sigmas, None, self.config, self._model, self._levels)

    @classmethod
    def from_config(cls, config: FrozenDict | dict[str, Any] | None = None, **kwargs):
        """From the config of this or another scheduler; flow-matching and EDM ones say so in `prediction_type` and
        `preconditioning`."""
        return super().from_config(with_model_family(config), **kwargs)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        timesteps: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Prepare a run.

        Args:
            num_inference_steps: model evaluations; not needed with a list.
            device: of `timesteps`.
            sigmas: noise levels of the evaluations, falling, and optionally 0 behind them; a searched or learned grid.
            timesteps: the same as timesteps of the training schedule, not necessarily whole.
            mu: shift of flow models with `use_dynamic_shifting`.

        Raises:
            ValueError: for lists that do not fall, or a number of steps that is not positive.
        """
        if self.config.sigmas is not None and sigmas is None and timesteps is None:
            sigmas = self._listed_sigmas(num_inference_steps)
        if sigmas is not None or timesteps is not None:
            grid = custom_grid(sigmas, timesteps, self.config, self._model, self._levels)
        elif num_inference_steps is None or num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be at least 1, got {num_inference_steps}.")
        else:
            grid = make_sigmas(num_inference_steps, self.config, self._model, self._levels, self.config.final_sigmas_type, mu)
        run = partial(SolverRun, self._solver, grid.tolist())
        self._begin_run(SolverDriver(self._model, run), device)

    def _listed_sigmas(self, num_inference_steps: int | None) -> list[float]:
        listed = [sigma for sigma in self.config.sigmas if sigma > 0]
        if num_inference_steps != len(listed):
            raise ValueError(
                f"`num_inference_steps` must be {len(listed)}, the number of levels in the config's `sigmas`; got "
                f"{num_inference_steps}."
            )
        return self.config.sigmas
