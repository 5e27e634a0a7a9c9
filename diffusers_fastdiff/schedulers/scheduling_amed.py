"""Learned few-step solvers: AMED, its plug-ins for other solvers, and the learned linear multistep family.

Source: Zhou et al., arXiv 2312.00094. Differences from the published programs: `num_inference_steps` counts model
evaluations; a midpoint's time is a fractional timestep, its input is scaled for that time, and its slope is taken at the
unscaled level, so that the static mode takes the same steps as the published solver (the published plug-in for diffusers
does not); predictions never depend on the composition of the batch.
"""

import os
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..hooks.denoiser_tap import DenoiserTap
from ..models.amed_predictor import FEATURE_SIZE, AMEDPredictor
from ..numerics.linear_solver import LinearRun, LinearSolver
from ..numerics.sigma_grids import check_grid
from ..numerics.solver_methods import AMEDCoefficients, Solver
from ..numerics.solvers import SolverRun
from .driven import DrivenSchedulerMixin
from .model_config import COMPATIBLES, make_sigmas, with_model_family
from .solver_driver import SolverDriver

STUDENTS = ("amed", "dpm2", "dpmpp", "euler", "ipndm", "lms")
_PREDICTOR_FOLDER = "predictor"


class AMEDScheduler(DrivenSchedulerMixin, SchedulerMixin, ConfigMixin):
    r"""A solver with learned coefficients for one number of evaluations. Without them it is the plain solver.

    Static mode keeps the coefficients as plain numbers in the config and works in every pipeline. Attached mode predicts them
    for each sample from the bottleneck of the denoiser; call `attach(pipe)` once. `num_inference_steps` is the number of model
    evaluations: 2 for each interval of the grid, one less with the analytical first step, one for each row of an "lms" solver.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr, prediction_type: of the
            model, as in the schedulers of diffusers.
        preconditioning: of raw networks of the EDM family, the arguments of [`Preconditioning`]; then the entries above do not
            count. `from_config` of EDM schedulers sets it.
        student: the solver: "amed", "dpm2", "dpmpp", "euler", "ipndm", or the learned linear multistep "lms".
        solver_order: highest order of "ipndm" (1 to 4) and "dpmpp" (1 to 3).
        data_prediction: "dpmpp" on denoised samples rather than on noise.
        lower_order_final: let the order of "dpmpp" fall at the end.
        thresholding, dynamic_thresholding_ratio: clip denoised samples of "dpmpp" at this quantile.
        analytical_first_step: the first evaluation is replaced by the initial noise itself (AFS).
        sigmas: learned or searched grid, one point more than intervals; None makes one as `sigma_schedule` says.
        sigma_schedule, rho, sigma_min, sigma_max, timestep_spacing, steps_offset: of grids that are not listed, as in
            [`IPNDMMultistepScheduler`]. They end at `sigma_min`: midpoints are geometric means, so no interval can end at 0.
        coefficients: static mode: r, scale_dir and scale_time of each interval.
        linear_solver: the numbers of an "lms" solver, see [`LinearSolver`].
        mode: "static" or "attached".
        fitted_to: what the solver was learned for: "num_inference_steps", "guidance_scale", "model_class", "sample_shape",
            "model_id", "model_revision", "teacher". None for a solver that was not learned.
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
        student: str = "amed",
        solver_order: int = 2,
        data_prediction: bool = True,
        lower_order_final: bool = True,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        analytical_first_step: bool = False,
        sigmas: list[float] | None = None,
        sigma_schedule: str | None = None,
        rho: float | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_beta_sigmas: bool = False,
        flow_shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        coefficients: list[list[float]] | None = None,
        linear_solver: dict[str, Any] | None = None,
        mode: str = "static",
        fitted_to: dict[str, Any] | None = None,
    ):
        if student not in STUDENTS:
            raise ValueError(f"`student` must be one of {STUDENTS}, got {student!r}.")
        if mode not in ("static", "attached"):
            raise ValueError(f"`mode` must be 'static' or 'attached', got {mode!r}.")
        if (student == "lms") != (linear_solver is not None):
            raise ValueError("`linear_solver` belongs to `student='lms'`, which needs it: give both or neither.")
        if student == "lms" and mode == "attached":
            raise ValueError("`student='lms'` has no attached mode.")
        self._set_up_table()
        self.predictor: AMEDPredictor | None = None
        self._tap: DenoiserTap | None = None
        self._check_coefficients()
        if linear_solver is not None:
            self._linear_solver = LinearSolver(**linear_solver)
        else:
            quantile = dynamic_thresholding_ratio if thresholding else None
            order = solver_order if student in ("ipndm", "dpmpp") else 1
            self.solver = Solver(student, order, data_prediction, lower_order_final, quantile)

    def _check_coefficients(self) -> None:
        config = self.config
        if config.sigmas is not None:
            check_grid(config.sigmas)
        if config.coefficients is None:
            return
        if config.sigmas is None:
            raise ValueError("`coefficients` belong to a grid: give `sigmas`, too.")
        if len(config.coefficients) != len(config.sigmas) - 1:
            raise ValueError(
                f"`coefficients` must have one entry for each of the {len(config.sigmas) - 1} intervals of `sigmas`, got "
                f"{len(config.coefficients)}."
            )
        for interval, (r, scale_dir, scale_time) in enumerate(config.coefficients):
            if not (0 < r < 1 and scale_dir > 0 and scale_time > 0):
                raise ValueError(
                    f"`coefficients` of interval {interval} must be r in (0, 1) and two positive scales, got "
                    f"{[r, scale_dir, scale_time]}."
                )

    @classmethod
    def from_config(cls, config: dict[str, Any] | None = None, **kwargs):
        """From the config of this or another scheduler; flow-matching and EDM ones say so in `prediction_type` and
        `preconditioning`."""
        return super().from_config(with_model_family(config), **kwargs)

    # -- runs -------------------------------------------------------------------------------------------------------------

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
            num_inference_steps: model evaluations; a learned solver has exactly one number it can be.
            device: of `timesteps`.
            sigmas: grid of the intervals, for solvers that were not learned.
            timesteps: refused; the solver's evaluations lie where it puts them.
            mu: shift of flow models with `use_dynamic_shifting`.

        Raises:
            ValueError: for a number of evaluations or a grid that the solver was not learned for, or without its predictor.
        """
        if timesteps is not None:
            raise ValueError("`timesteps` cannot be chosen: a learned solver places its evaluations itself. Use `sigmas`.")
        self._check_fit(num_inference_steps, sigmas)
        if self.config.student == "lms":
            driver = SolverDriver(self._model, partial(LinearRun, self._linear_solver))
        else:
            grid = self.interval_grid(num_inference_steps, sigmas, mu)
            constants = self._constants(grid)
            plan = run = partial(SolverRun, self.solver, grid, constants)
            if self.config.mode == "attached":
                run = partial(SolverRun, self.solver, grid, partial(self._predict, grid, constants))
                self._tap.begin_run()
            driver = SolverDriver(self._model, run, self.config.analytical_first_step, plan)
        self._begin_run(driver, device)

    def _check_fit(self, num_inference_steps: int | None, sigmas: list[float] | None) -> None:
        config, fitted = self.config, self.config.fitted_to or {}
        is_learned = config.linear_solver is not None or config.coefficients is not None or config.mode == "attached"
        if is_learned and sigmas is not None:
            raise ValueError("`sigmas` cannot be chosen: this solver was learned for its own grid.")
        count = self._learned_evaluations()
        if count is not None and num_inference_steps != count:
            guidance = fitted.get("guidance_scale")
            at = "" if guidance is None else f" at guidance {guidance}"
            raise ValueError(
                f"`num_inference_steps` must be {count}: this solver was learned for {count} model evaluations{at}, got "
                f"{num_inference_steps}."
            )
        if config.mode == "attached":
            if self.predictor is None:
                raise ValueError("`mode` is 'attached', but there is no predictor. Load the scheduler with `from_pretrained`.")
            if self._tap is None:
                raise ValueError(
                    "The predictor is not attached to a denoiser: call `scheduler.attach(pipe)` once, or use the solver's "
                    "constants with `AMEDScheduler.from_config(scheduler.config, mode='static')`."
                )

    def _learned_evaluations(self) -> int | None:
        """Evaluations of a solver with a fixed grid, None without one."""
        if self.config.linear_solver is not None:
            return len(self._linear_solver.sigmas)
        if self.config.sigmas is None:
            return None
        return 2 * (len(self.config.sigmas) - 1) - int(self.config.analytical_first_step)

    def interval_grid(
        self, num_inference_steps: int | None, sigmas: list[float] | None = None, mu: float | None = None
    ) -> list[float]:
        """Ends of the intervals of a run, in solver coordinates; arguments as in `set_timesteps`."""
        if sigmas is not None or self.config.sigmas is not None:
            return check_grid(self.config.sigmas if sigmas is None else sigmas).tolist()
        skipped = int(self.config.analytical_first_step)
        if num_inference_steps is None or num_inference_steps < 1 or (num_inference_steps + skipped) % 2:
            parity = "odd: two for each interval but the first" if skipped else "even: two for each interval"
            raise ValueError(f"`num_inference_steps` must be positive and {parity}; got {num_inference_steps}.")
        intervals = (num_inference_steps + skipped) // 2
        return make_sigmas(intervals, self.config, self._model, self._levels, "sigma_min", mu).tolist()

    def _constants(self, grid: list[float]) -> list[AMEDCoefficients]:
        """Coefficients that do not depend on the samples; in attached mode exact only for the analytical first step."""
        if self.config.coefficients is not None:
            return [AMEDCoefficients(*numbers) for numbers in self.config.coefficients]
        if self.predictor is None or self.config.mode == "static":
            return [AMEDCoefficients()] * (len(grid) - 1)
        return constant_coefficients(self.predictor, grid)

    # -- attached mode ----------------------------------------------------------------------------------------------------

    def attach(self, pipe: Any) -> None:
        """Make this the scheduler of a pipeline and let the predictor see the pipeline's denoiser.

        Args:
            pipe: a pipeline with a `transformer` or a `unet`.

        Raises:
            ValueError: if the solver was learned for another kind of model, noise schedule or prediction.
            TypeError: if the bottleneck of the denoiser is not known.
        """
        model = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
        if model is None:
            raise TypeError(f"{type(pipe).__name__} has neither a `transformer` nor a `unet`.")
        self._check_family(pipe, model)
        self.detach()
        if self.config.mode == "attached":
            self._tap = DenoiserTap(model, self._timesteps_for)
        pipe.scheduler = self

    def detach(self) -> None:
        """Undo what `attach` did to the denoiser."""
        if self._tap is not None:
            self._tap.remove()
            self._tap = None

    def _check_family(self, pipe: Any, model: torch.nn.Module) -> None:
        config, fitted = self.config, self.config.fitted_to or {}
        expected = {"model_class": type(model).__name__, "sample_shape": sample_shape(model)}
        for name, actual in expected.items():
            if fitted.get(name) is not None and fitted[name] != actual:
                raise ValueError(f"This solver was learned for {name} {fitted[name]!r}, but the pipeline has {actual!r}.")
        theirs = getattr(pipe.scheduler, "alphas_cumprod", None)
        if theirs is not None and pipe.scheduler is not self:
            same = theirs.shape == self.alphas_cumprod.shape and torch.allclose(theirs.cpu(), self.alphas_cumprod, atol=1e-4)
            prediction = pipe.scheduler.config.get("prediction_type", config.prediction_type)
            if not same or prediction != config.prediction_type:
                raise ValueError(
                    "This solver was learned for another noise schedule or prediction than the pipeline's scheduler has: "
                    f"prediction_type {config.prediction_type!r}, beta_schedule {config.beta_schedule!r} from "
                    f"{config.beta_start} to {config.beta_end}."
                )

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        """As in all schedulers here. In attached mode the first step of a run also checks the guidance (one device read)."""
        if self._tap is not None and self.config.mode == "attached":
            self._check_calls(model_output, sample.shape[0])
            self._batch_size = sample.shape[0]
        result = super().step(model_output, timestep, sample, generator, return_dict)
        if self._tap is not None:
            self._tap.forget()
        return result

    def _check_calls(self, model_output: torch.Tensor, batch_size: int) -> None:
        if self._tap.calls != 1:
            raise ValueError(
                f"The denoiser was called {self._tap.calls} times for one step. The attached mode needs one call, with both "
                "parts of a guided batch in it; use the static mode in this pipeline."
            )
        guidance = (self.config.fitted_to or {}).get("guidance_scale")
        if self._index.current not in (None, 0) or guidance is None:
            return
        measured = self._tap.measured_guidance(model_output, batch_size)
        if abs(measured - guidance) > 0.03 * max(1.0, guidance):
            raise ValueError(
                f"This solver was learned for guidance {guidance}, but the pipeline runs with {measured:.3g}. Use that "
                "guidance, or a solver learned for this one."
            )

    def _predict(self, grid: list[float], constants: list[AMEDCoefficients], interval: int) -> AMEDCoefficients:
        if interval == 0 and self.config.analytical_first_step:
            return constants[0]
        features = self._tap.features(self._batch_size)
        predictor = self.predictor.to(features.device)
        with torch.no_grad():
            predicted = predictor(features, grid[interval], grid[interval + 1])
        copies = self._batch_size // features.shape[0]  # DiTPipeline steps both halves of a guided batch
        return AMEDCoefficients(*(v.repeat(copies, 1, 1, 1) if isinstance(v, torch.Tensor) else v for v in predicted))

    def _timesteps_for(self, batch_size: int) -> torch.Tensor | None:
        """What the samples of a batch are conditioned on, where they differ."""
        sigma = self._driver.run.network_sigma if self._driver is not None else 0.0
        if not isinstance(sigma, torch.Tensor) or sigma.ndim == 0:
            return None
        times = self._model.timestep(sigma).flatten().float()
        return times.repeat(batch_size // len(times))

    # -- files ------------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Save the config and, in a subfolder, the predictor; see `SchedulerMixin.save_pretrained`."""
        if self.predictor is not None:
            self.predictor.save_pretrained(os.path.join(save_directory, _PREDICTOR_FOLDER))
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder: str | None = None, **kwargs):
        """Load the config and the predictor it needs; see `SchedulerMixin.from_pretrained`.

        Raises:
            OSError: if a predictor is needed and missing or damaged.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        scheduler = loaded[0] if isinstance(loaded, tuple) else loaded
        if scheduler.config.mode == "attached":
            folder = f"{subfolder}/{_PREDICTOR_FOLDER}" if subfolder else _PREDICTOR_FOLDER
            known = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
            options = {key: value for key, value in kwargs.items() if key in known}
            scheduler.predictor = _load_predictor(pretrained_model_name_or_path, subfolder=folder, **options)
        return loaded

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tap": None}  # a copy of the scheduler is not attached


def _load_predictor(name: str | os.PathLike, **options: Any) -> AMEDPredictor:
    """Raises OSError where diffusers would fill in missing weights with random ones."""
    predictor, report = AMEDPredictor.from_pretrained(name, output_loading_info=True, use_safetensors=True, **options)
    wrong = [*report["missing_keys"], *report["unexpected_keys"]]
    if wrong:
        raise OSError(f"The predictor in {str(name)!r} is damaged or of another version: it lacks or has too many {wrong}.")
    return predictor.eval().requires_grad_(False)


def constant_coefficients(predictor: AMEDPredictor, grid: list[float]) -> list[AMEDCoefficients]:
    """What a predictor says about each interval of a grid when it sees nothing of the sample: constants for static mode."""
    features = torch.zeros(1, FEATURE_SIZE, FEATURE_SIZE, device=predictor.device)
    with torch.no_grad():
        predicted = [predictor(features, *ends) for ends in pairwise(grid)]
    return [AMEDCoefficients(*map(float, values)) for values in predicted]


def sample_shape(model: torch.nn.Module) -> list[int | None]:
    """Channels and side of what a denoiser works on; None for what its config does not fix."""
    side = model.config.get("sample_size")
    return [model.config.get("in_channels"), side if isinstance(side, int | None) else max(side)]
