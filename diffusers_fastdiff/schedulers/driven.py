"""The surface that schedulers with a `SolverDriver` have in common: everything between `set_timesteps` and the next one."""

from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from ..numerics.noise_levels import DiscreteNoiseLevels, NoiseModel
from .model_config import make_betas, make_levels, make_model
from .run_index import RunIndex
from .solver_driver import SolverDriver


class DrivenSchedulerMixin:
    """To be inherited beside `SchedulerMixin` and `ConfigMixin`. Subclasses set `_model` and call `_begin_run`."""

    _model: NoiseModel
    _levels: DiscreteNoiseLevels
    config: Any
    _driver: SolverDriver | None = None
    timesteps: torch.Tensor
    sigmas: torch.Tensor
    num_inference_steps: int | None = None

    def _set_up_table(self) -> None:
        """Model and attributes of a scheduler whose config has a table of timesteps."""
        betas = make_betas(self.config)
        self._levels = make_levels(betas)
        self._model = make_model(self.config, self._levels)
        self.betas, self.alphas_cumprod = betas.float(), self._levels.alphas_cumprod.float()
        self.init_noise_sigma = float(self._model.initial_scale(self._model.sigma_range[1]))
        self.timesteps = torch.arange(self.config.num_train_timesteps - 1, -1, -1)
        self.sigmas = torch.cat([self._levels.sigma(self.timesteps.double()), torch.zeros(1, dtype=torch.float64)])
        self._index = RunIndex()

    def _begin_run(self, driver: SolverDriver, device: str | torch.device | None) -> None:
        self._driver, self._index = driver, RunIndex()
        self.num_inference_steps = len(driver.evaluations)
        times = driver.timesteps()
        whole = times.round()
        if bool((times - whole).abs().max() < 1e-6):
            self.timesteps = whole.long().to(device)
        else:
            self.timesteps = times.float().to(device)
        self.init_noise_sigma = float(self._model.initial_scale(driver.run.sigmas[0]))
        levels = [evaluation.sigma for evaluation in driver.evaluations]
        self.sigmas = torch.tensor([*levels, driver.run.sigmas[-1]], dtype=torch.float32)

    @property
    def noise_model(self) -> NoiseModel:
        """Coordinates and conditioning of the network this scheduler drives."""
        return self._model

    @property
    def step_index(self) -> int | None:
        """Evaluation that `step` is called for next; None before the first."""
        return self._index.current

    @property
    def begin_index(self) -> int | None:
        """Evaluation that the run begins with, if it is not the first."""
        return self._index.begin

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin the run at a later evaluation; pipelines that start from an image call this after `set_timesteps`."""
        self._index.begin = begin_index

    def index_for_timestep(self, timestep: float | torch.Tensor, schedule_timesteps: torch.Tensor | None = None) -> int:
        """Place of a timestep in this run (or in the given list)."""
        return self._index.find(timestep, self.timesteps if schedule_timesteps is None else schedule_timesteps)

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """What the network is shown for a sample: mostly the sample itself.

        Args:
            sample: (B, C, H, W).
            timestep: element of `timesteps`. Before `set_timesteps`, any of the training schedule: what the network would be
                shown at its noise level.
        """
        if self._driver is not None:
            return self._driver_at(timestep).scale_input(sample)
        sigma = self._model.sigma_range[1] if timestep is None else float(self._model.sigma(float(timestep)))
        return sample * float(self._model.input_scale(sigma) / self._model.state_scale(sigma))

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
            model_output: of the network, (B, C, H, W). A value that is not a number spreads over its sample, as in diffusers:
                looking for one would make the host wait for the device.
            timestep: element of `timesteps`.
            sample: current sample, (B, C, H, W), or what `scale_model_input` made of it.
            generator: not used; the sampler is deterministic.
            return_dict: return a [`SchedulerOutput`] instead of a tuple.

        Raises:
            ValueError: before `set_timesteps`, for a timestep of another run, or after the last one.
        """
        del generator
        driver = self._driver_at(timestep)
        previous = driver.step(model_output, sample)
        self._index.current += 1
        return SchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    def _driver_at(self, timestep: float | torch.Tensor | None) -> SolverDriver:
        if self._driver is None:
            raise ValueError("`set_timesteps` must be called before `step`.")
        is_new = self._index.current is None
        index = self._index.locate(self.timesteps[0] if timestep is None else timestep, self.timesteps)
        if index >= len(self.timesteps):
            raise ValueError(f"This run has ended after {len(self.timesteps)} steps; call `set_timesteps` for another.")
        if is_new:
            self._driver.begin(index)
        return self._driver

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Noisy samples at the given timesteps, elements of `timesteps` of this run or any of the training schedule.

        Args:
            original_samples, noise: (B, C, H, W).
            timesteps: (B,).
        """
        sigmas = [self._sigma_of(timestep) for timestep in timesteps.flatten().tolist()]
        sigma = torch.tensor(sigmas, dtype=torch.float64).reshape(-1, *[1] * (original_samples.ndim - 1))
        return self._model.add_noise(original_samples, noise, sigma.to(original_samples.device))

    def _sigma_of(self, timestep: float) -> float:
        """Level of the state at a timestep of this run (it may differ from the level the network is told), or of training."""
        if self._driver is not None:
            places = (self.timesteps == torch.tensor(timestep, dtype=self.timesteps.dtype)).nonzero().flatten()
            if len(places):
                return self._driver.evaluations[int(places[0])].sigma
        return float(self._model.sigma(timestep))

    def __len__(self) -> int:
        return self.config.num_train_timesteps
