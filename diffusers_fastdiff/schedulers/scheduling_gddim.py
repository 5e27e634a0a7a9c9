"""gDDIM: DDIM and DEIS for any diffusion by a linear SDE.

Source: Zhang, Tao and Chen, arXiv 2206.05564. The mathematics is in `numerics.exponential_integrator`.
"""

import itertools
from collections import deque
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from ..numerics.exponential_integrator import step_coefficients
from ..numerics.linear_sde import add_noise as add_process_noise
from ..numerics.linear_sde import apply, combine
from ..numerics.phase_space import CLDProcess
from ..numerics.reverse_steps import (
    denoising_step,
    euler_maruyama_step,
    sscs_free_step,
    sscs_middle,
    sscs_score_step,
)
from ..numerics.variance_preserving import log_noise_to_signal
from .gddim_config import check_config, make_forward_process
from .gddim_run import OutputConversion, ddim_timesteps, move, output_conversion, plan_evaluations, time_grid
from .model_config import COMPATIBLES, make_betas, with_model_family
from .run_index import RunIndex

_ZERO_SNR = 2.0**-24  # alphas_cumprod in the place of 0, as in the multistep schedulers of diffusers


class GDDIMScheduler(SchedulerMixin, ConfigMixin):
    r"""Fast sampling of diffusion models by a linear SDE: variance-preserving, critically damped Langevin (CLD) and blurring.

    With `process="vp"` it fits every pipeline that takes `DDIMScheduler`, is `DDIMScheduler` at order 0 and
    `DEISMultistepScheduler` at higher orders, and takes over their configurations. [`GDDIMPipeline`] is for the other two,
    whose network gets the time `999 t`; their images are `forward_process.project(state)`.

    `num_inference_steps` counts evaluations of the network, those of corrector and denoising step included. Differences from
    `DDIMScheduler`: nothing is clipped, and every step ends at the timestep where the next one begins (there, with "linspace"
    spacing, it does not). Differences from the published program: the covariance of stochastic steps and its multistep form,
    the hybrid grid, the weight of lambda and the denoising step are those of the mathematics.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: the noise of a "vp"
            model, as in `DDIMScheduler`.
        prediction_type: "epsilon"; with "vp" also "v_prediction" or "sample".
        timestep_spacing, steps_offset: timesteps with "vp" and no `time_grid`, as in `DDIMScheduler`.
        set_alpha_to_one: with "vp", the last step ends at the data; otherwise at the noise of timestep 0.
        lower_order_final: lower the order over the last steps of runs with less than 15 steps.
        process: "vp", "cld" or "blur".
        process_parameters: for "cld" `inverse_mass`, `beta_0`, `beta_1`, `gamma`, `epsilon`, see
            `numerics.phase_space.CLDProcess`; for "blur" `image_size`, `sigma_max`, `min_scale`, `offset`,
            `max_noise_to_signal`, see `numerics.blur.BlurProcess`.
        order: degree of the polynomial through the last eps, 0 (DDIM) to 3; the first steps use what there is.
        corrector: None, "pec" or "pece". Repeats each step with eps at its end, by a polynomial of one degree more; "pece"
            then evaluates the network again. Pays off with many steps; with few it is unstable.
        stochasticity: lambda. 0 is the probability flow, 1 the reverse of the forward process; see `ddim_etas`.
        parametrization: K in `score = -K^-T eps` for the eps that is interpolated: "R", exact for a single image, or "L", the
            Cholesky factor, for comparison.
        network_parametrization: K of the network.
        mixed_score: the CLD network leaves out `K^-1 (0, v)`.
        sampler: "gddim", or for comparison "euler_maruyama" (not for "vp") or "sscs" (for "cld", with `stochasticity=1`).
        time_grid: "power" or "hybrid" times. By default "hybrid" for "cld", "power" for "blur", `timestep_spacing` for "vp".
        time_grid_parameters: `exponent`, and for "hybrid" `noise_share`, `switch`, see `numerics.time_grids`.
        end_time: where a `time_grid` ends, by default 1e-3, for "blur" 1e-5.
        denoise: whether "cld" and "blur" spend the last evaluation on an Euler step to the data; by default only "cld".
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
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        set_alpha_to_one: bool = True,
        lower_order_final: bool = False,
        process: str = "vp",
        process_parameters: dict | None = None,
        order: int = 2,
        corrector: str | None = None,
        stochasticity: float = 0.0,
        parametrization: str = "R",
        network_parametrization: str = "R",
        mixed_score: bool = False,
        sampler: str = "gddim",
        time_grid: str | None = None,
        time_grid_parameters: dict | None = None,
        end_time: float | None = None,
        denoise: bool | None = None,
    ):
        check_config(self.config)
        self.forward_process = make_forward_process(self.config)
        if process == "vp":
            self.betas = make_betas(self.config)
            self.alphas_cumprod = (1 - self.betas).cumprod(0).clamp_min(_ZERO_SNR)
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps).flip(0)
        self._begin_index: int | None = None
        self._step_index: int | None = None

    @classmethod
    def from_config(cls, config: FrozenDict | dict[str, Any] | None = None, **kwargs):
        """From the config of this or another scheduler.

        Raises:
            ValueError: for the config of a flow-matching or EDM scheduler.
        """
        if isinstance(config, dict) and config.get("process", "vp") == "vp":
            family = with_model_family(config)
            if family.get("preconditioning") is not None or family.get("prediction_type") == "flow_prediction":
                raise ValueError("`config` is of a flow-matching or EDM scheduler, whose models GDDIMScheduler cannot drive.")
        return super().from_config(config, **kwargs)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @property
    def has_denoising_step(self) -> bool:
        """Whether the last evaluation is spent on an Euler step from `end_time` to the data."""
        return self.config.process == "cld" if self.config.denoise is None else self.config.denoise

    @property
    def final_time(self) -> float:
        """Where a `time_grid` ends; the data is at 0."""
        default = 1e-3 if self.config.process == "vp" else self.forward_process.end_time
        return default if self.config.end_time is None else self.config.end_time

    # ---- times -----------------------------------------------------------------------------------------------------------

    def time_of(self, timesteps: torch.Tensor | float) -> torch.Tensor:
        """What the network is told -> time of `forward_process`, float64 on the CPU; the inverse of `999 t` if not "vp"."""
        timesteps = torch.as_tensor(timesteps, dtype=torch.float64, device="cpu")
        if self.config.process == "vp":
            return log_noise_to_signal(self.alphas_cumprod, timesteps.reshape(-1)).reshape(timesteps.shape)
        return timesteps / (self.config.num_train_timesteps - 1)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Compute times and coefficients, and forget the last run.

        Args:
            num_inference_steps: evaluations of the network.
            device: where `self.timesteps` and, for "blur", the coefficients live.
            timesteps: evaluate exactly there, in place of `num_inference_steps`.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Give either `num_inference_steps` or `timesteps`.")
        if timesteps is not None and self.config.corrector == "pece":
            raise ValueError("`timesteps` cannot be given with `corrector='pece'`, which evaluates twice at most of them.")
        count, least = num_inference_steps if timesteps is None else len(timesteps), 1 + self.has_denoising_step
        if count < least:
            raise ValueError(f"`num_inference_steps` must be at least {least}, the denoising step included, got {count}.")
        is_vp = self.config.process == "vp"
        self._plan = plan_evaluations(count, self.config.corrector, has_end=is_vp or self.has_denoising_step)
        num_steps = 1 + max(e.advance for e in self._plan if e.advance is not None) - self.has_denoising_step
        labels, self._times = (self._vp_grid if is_vp else self._timed_grid)(num_steps, timesteps)
        if not all(a > b for a, b in itertools.pairwise(self._times)):
            raise ValueError(f"`timesteps` must decrease, and end above the end of the run, got {timesteps}.")
        labels = labels[[e.point for e in self._plan]]
        self._conversion = self._output_conversion([self._times[e.point] for e in self._plan])
        self.num_inference_steps, self.timesteps, self._device = count, labels.to(device), device
        self._begin_index = self._step_index = None
        self._begin(0)

    def _vp_grid(self, num_steps: int, timesteps: list[float] | None) -> tuple[torch.Tensor, list[float]]:
        """Timesteps of the evaluations, and the times between the steps."""
        config, last = self.config, self.config.num_train_timesteps - 1
        if timesteps is not None:
            labels = torch.as_tensor(timesteps)
        elif config.time_grid is None:
            labels = ddim_timesteps(config.timestep_spacing, num_steps, last + 1, config.steps_offset)
        else:
            labels = (last * self._time_grid(config.time_grid, 1.0, num_steps - 1)).float()
        times = self.time_of(labels).tolist()
        end = float("-inf") if config.set_alpha_to_one else self.time_of(0).item()
        return labels, times if end == times[-1] else [*times, end]  # at timestep 0 there may be no step left

    def _timed_grid(self, num_steps: int, timesteps: list[float] | None) -> tuple[torch.Tensor, list[float]]:
        """As `_vp_grid`; with a timestep for the end of the run, too."""
        if timesteps is not None:
            times = self.time_of(timesteps).tolist() + ([] if self.has_denoising_step else [self.final_time])
        else:
            kind = self.config.time_grid or {"cld": "hybrid", "blur": "power"}[self.config.process]
            times = self._time_grid(kind, self.forward_process.start_time, num_steps).tolist()
        return torch.tensor(times, dtype=torch.float64).mul(self.config.num_train_timesteps - 1).float(), times

    def _time_grid(self, kind: str, start: float, num_steps: int) -> torch.Tensor:
        return time_grid(kind, start, self.final_time, num_steps, self.config.time_grid_parameters or {})

    # ---- the position in a run -------------------------------------------------------------------------------------------

    def _begin(self, index: int) -> None:
        """Coefficients of a run that starts with evaluation `index`, and an empty history."""
        config, process = self.config, self.forward_process
        self._first_step = self._plan[index].point
        times = self._times[self._first_step :]
        num_steps = len(times) - 1
        degree = min(config.order, num_steps - 1)
        self._coefficients = None
        if num_steps > 0 and config.sampler == "gddim":
            self._coefficients = step_coefficients(
                process,
                times,
                degree,
                corrector_order=degree + 1 if config.corrector else None,
                stochasticity=config.stochasticity,
                parametrization=config.parametrization,
                lower_order_final=config.lower_order_final and len(self._times) <= 15,
                noiseless_last=False,
            )
            if process.cells:  # tensors; numbers stay on the CPU, see `numerics.linear_sde.apply`
                self._coefficients = move(self._coefficients, self._device)
        self._history: deque[torch.Tensor] = deque(maxlen=degree + 1)
        self._step_start: torch.Tensor | None = None

    @property
    def step_index(self) -> int | None:
        """Evaluations done in this run, from `begin_index` on."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start with this element of `timesteps`; call it after `set_timesteps`. Without it the first timestep is looked up."""
        if self.num_inference_steps is None or not 0 <= begin_index < len(self._plan):
            raise ValueError(f"`begin_index` must be a position in `timesteps` after `set_timesteps`, got {begin_index}.")
        self._begin_index, self._step_index = begin_index, begin_index
        self._begin(begin_index)

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        """Position of `timestep` in `timesteps`, the second one if it occurs twice."""
        return RunIndex.find(timestep, self.timesteps)

    # ---- the loop --------------------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """Returns `sample`: the networks take it as it is."""
        del timestep
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """Go on by one evaluation of the network.

        Args:
            model_output: (B, C, H, W), for "cld" (B, 2C, H, W).
            timestep: the element of `timesteps` it belongs to; looked at in the first step of a run only.
            sample: what the network saw, as `model_output`.
            generator: for the noise of stochastic samplers; a list has one for each image.
            return_dict: return a `SchedulerOutput` instead of a tuple.
        """
        if self.num_inference_steps is None:
            raise ValueError("Call `set_timesteps` before `step`.")
        if self._step_index is None:
            self.set_begin_index(self.index_for_timestep(timestep))
        if self._step_index == len(self._plan):
            raise ValueError(f"This run had {len(self._plan)} steps and is over. Call `set_timesteps` for the next one.")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"`model_output` must have the shape of `sample`, {tuple(sample.shape)}, got {tuple(model_output.shape)}; "
                "split off a learned variance before."
            )
        process, evaluation = self.forward_process, self._plan[self._step_index]
        process.check_state(sample)  # before the history changes
        precise = torch.promote_types(sample.dtype, torch.float32)
        state = process.transform(sample.to(precise))
        eps = self._to_eps(process.transform(model_output.to(precise)), state, self._conversion, self._step_index)
        if evaluation.correct is not None and self._step_start is not None:
            state = self._correct(evaluation.correct - self._first_step, eps)
        if evaluation.advance is not None:
            state = self._advance(evaluation.advance, state, eps, generator)
        self._step_index += 1
        prev_sample = process.inverse_transform(state).to(sample.dtype)
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def _correct(self, i: int, eps: torch.Tensor) -> torch.Tensor:
        """Step i once more, with `eps` at its end."""
        run, known = self._coefficients, [eps, *self._history]
        weights = [run.transition[i], *run.corrector[i, : len(known)]]
        return combine(self.forward_process, weights, [self._step_start, *known])

    def _advance(self, i: int, state: torch.Tensor, eps: torch.Tensor, generator) -> torch.Tensor:
        if i < len(self._times) - 1:
            advance = {"gddim": self._gddim_step, "euler_maruyama": self._euler_step, "sscs": self._sscs_step}
            return advance[self.config.sampler](i, state, eps, generator)
        if self.has_denoising_step:
            return denoising_step(self.forward_process, state, eps, self._times[-1], self.config.parametrization)
        return state  # timestep 0 of a "vp" run that ends there

    def _gddim_step(self, i: int, state: torch.Tensor, eps: torch.Tensor, generator) -> torch.Tensor:
        """`Psi u + sum_j C_j eps_j`, and with stochasticity the noise, by which older eps are carried along."""
        run, i, process = self._coefficients, i - self._first_step, self.forward_process
        self._step_start = state
        self._history.appendleft(eps)
        matrices, states = [run.transition[i], *run.predictor[i, : len(self._history)]], [state, *self._history]
        if self.config.stochasticity == 0:
            return combine(process, matrices, states)
        noise = self._draw(state, generator)
        carried = [combine(process, [run.carry[i], run.carry_noise[i]], [old, noise]) for old in self._history]
        self._history = deque(carried, maxlen=self._history.maxlen)
        return combine(process, [*matrices, run.noise[i]], [*states, noise])

    def _euler_step(self, i: int, state: torch.Tensor, eps: torch.Tensor, generator) -> torch.Tensor:
        noise = self._draw(state, generator) if self.config.stochasticity else None
        ends = self._times[i], self._times[i + 1]
        return euler_maruyama_step(self.forward_process, state, eps, noise, *ends, self.config.stochasticity)

    def _sscs_step(self, i: int, state: torch.Tensor, eps: torch.Tensor, generator) -> torch.Tensor:
        """The score, then the second half of the free motion of this step and the first half of that of the next, in one.

        That of the very first step does not change the law of the prior, so that no run needs it.
        """
        process, ends = self.forward_process, self._times[i : i + 3]
        assert isinstance(process, CLDProcess)  # see `check_config`
        middle = sscs_middle(process, ends[0], ends[1])
        next_middle = sscs_middle(process, ends[1], ends[2]) if len(ends) == 3 else ends[1]
        state = sscs_score_step(process, state, eps, ends[0], ends[1])
        return sscs_free_step(process, state, self._draw(state, generator), middle, next_middle)

    def _draw(self, state: torch.Tensor, generator) -> torch.Tensor:
        return randn_tensor(state.shape, generator=generator, device=state.device, dtype=state.dtype)

    # ---- between images, states and outputs ------------------------------------------------------------------------------

    def prior(self, noise: torch.Tensor) -> torch.Tensor:
        """Standard normal noise -> the state that sampling starts from."""
        process = self.forward_process
        return noise if process.block == 1 else apply(process, process.prior_factor(), noise)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) and noise, for "cld" (B, 2C, H, W), -> states at `timesteps`, (B,)."""
        time = self.time_of(timesteps)
        return add_process_noise(self.forward_process, original_samples, noise, time, self.config.network_parametrization)

    def predict_eps(self, model_output: torch.Tensor, sample: torch.Tensor, time: float) -> torch.Tensor:
        """Output of the network at any `time` -> eps, in the coordinates of `forward_process.transform`."""
        state, output = (self.forward_process.transform(x) for x in (sample, model_output))
        return self._to_eps(output, state, self._output_conversion([time]), 0)

    def _output_conversion(self, times: list[float]) -> OutputConversion | None:
        config = self.config
        settings = (config.prediction_type, config.parametrization, config.network_parametrization, config.mixed_score)
        return output_conversion(self.forward_process, times, *settings)

    def _to_eps(self, output: torch.Tensor, state: torch.Tensor, conversion: OutputConversion | None, i: int) -> torch.Tensor:
        if conversion is None:
            return output
        gains = conversion.output_gain[i], conversion.state_gain[i]
        return combine(self.forward_process, gains, (output, state))

    def ddim_etas(self) -> list[float]:
        """With "vp", the `eta` of `DDIMScheduler.step` that has the law of each step: `eta^2 = (1 - r^(lambda^2)) / (1 - r)`.

        Here `r = (1 - a_t) a_s / ((1 - a_s) a_t)` for a step from s to t, with a = alphas_cumprod. Lambda 0 and 1 are eta 0 and
        1; in between eta comes near lambda as steps become small.
        """
        if self.config.process != "vp" or self.num_inference_steps is None:
            raise ValueError("Only `process='vp'` is DDIM, and only after `set_timesteps`.")
        times = torch.tensor(self._times, dtype=torch.float64)
        r = (2 * (times[1:] - times[:-1])).exp()
        return ((1 - r ** (self.config.stochasticity**2)) / (1 - r)).sqrt().tolist()
