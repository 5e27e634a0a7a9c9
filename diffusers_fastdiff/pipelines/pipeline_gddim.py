"""Images from critically damped Langevin (CLD), blurring and variance-preserving diffusion models with [`GDDIMScheduler`]."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from ..models.time_input import network_time
from ..models.unet_edm import EDMUNet2DModel
from ..numerics.reverse_steps import denoising_step
from ..schedulers.scheduling_gddim import GDDIMScheduler
from .callbacks import StepCallback, StepCallbackMixin
from .probability_flow import integrate_probability_flow

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class GDDIMPipelineOutput(BaseOutput):
    """What [`GDDIMPipeline`] returns.

    Args:
        images: pictures, or an array (B, H, W, C) or tensor (B, C, H, W) in [0, 1], or final states.
        num_evaluations: of the network, for each image; guidance doubles each of them.
        trajectory: states (num_evaluations + 1, B, kC, H, W) on the CPU, if they were asked for.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    num_evaluations: int
    trajectory: torch.Tensor | None = None


class GDDIMPipeline(StepCallbackMixin, DiffusionPipeline):
    r"""Draws the prior of the process, runs the scheduler, and drops the velocity.

    Args:
        unet: predicts eps from states: for CLD all position channels, then all velocity channels, in and out.
        scheduler: any process, sampler and grid.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: EDMUNet2DModel, scheduler: GDDIMScheduler):
        super().__init__()
        if not isinstance(scheduler, GDDIMScheduler):
            raise ValueError(f"`scheduler` must be a GDDIMScheduler, which knows the process, got {type(scheduler).__name__}.")
        process, config = scheduler.forward_process, unet.config
        if config.in_channels != config.out_channels or config.in_channels % process.block:
            raise ValueError(
                f"`unet` must have as many output as input channels, {process.block} for each of the image, got in_channels="
                f"{config.in_channels} and out_channels={config.out_channels}."
            )
        if process.cells and process.cells != (config.sample_size, config.sample_size):
            raise ValueError(
                f"`unet` is for images of size {config.sample_size}, the blur of `scheduler` for {process.cells}. Create the "
                f"scheduler with `process_parameters={{'image_size': ({config.sample_size}, {config.sample_size}), ...}}`."
            )
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int] | torch.Tensor | None = None,
        batch_size: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        output_trajectory: bool = False,
        ode_tolerance: float | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> GDDIMPipelineOutput | tuple:
        r"""Draw images.

        Args:
            class_labels: one for each image, for a model with classes; its `unet.null_label` means none.
            batch_size: number of images, for a model without; by default 1.
            num_inference_steps: evaluations of the network.
            guidance_scale: 1 for none; needs a model that was trained without labels, too.
            generator: image k depends on the generator and on k, not on the batch; a list has one for each image.
            latents: states to start from, (B, kC, H, W); for CLD, the velocities have the standard deviation `sqrt(M)`.
            output_type: "pil", "np", "pt", or "latent" for the final states, with velocity.
            return_dict: return a [`GDDIMPipelineOutput`] instead of a tuple of its fields.
            output_trajectory: also return the states on the way.
            ode_tolerance: integrate the probability flow adaptively to this tolerance instead, with as many evaluations as
                that takes, before the denoising step; needs `torchdiffeq`. Images then depend on the batch, by the tolerance.
            callback_on_step_end: called after each step with the pipeline, the step, its timestep and a dict of the tensors
                named next, and returns changed ones; setting `pipe._interrupt` in it ends the run. Not with
                `ode_tolerance`, which has no steps.
            callback_on_step_end_tensor_inputs: "latents" or nothing.

        Examples:

        ```py
        >>> from diffusers_fastdiff import load_pretrained

        >>> pipe = load_pretrained("digits-cld")
        >>> image = pipe(class_labels=[7], num_inference_steps=50).images[0]
        ```
        """
        # 1. Arguments
        labels = self._check_inputs(class_labels, batch_size, guidance_scale, latents, output_type, ode_tolerance)
        batch_size = len(labels) if labels is not None else batch_size or (1 if latents is None else len(latents))
        generators = image_generators(generator, batch_size)
        self._begin_callbacks(callback_on_step_end_tensor_inputs, guidance_scale)
        if callback_on_step_end is not None and ode_tolerance is not None:
            raise ValueError("`callback_on_step_end` needs steps: leave `ode_tolerance` out.")

        # 2. Prior
        config, device = self.unet.config, self._execution_device
        precise = torch.promote_types(self.unet.dtype, torch.float32)
        if latents is None:
            shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
            latents = self.scheduler.prior(randn_tensor(shape, generators, device=device, dtype=precise))
        state = latents.to(device, precise)

        # 3. Reverse process
        trajectory = [state]
        if ode_tolerance is not None:
            state, num_evaluations = self._integrate(state, labels, guidance_scale, ode_tolerance)
            trajectory.append(state)
        else:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
            self.scheduler.set_begin_index(0)
            num_evaluations = self._num_timesteps = len(self.scheduler.timesteps)
            for step, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
                output = self._predict(state, timestep, labels, self.guidance_scale)
                state = self.scheduler.step(output, timestep, state, generator=generators).prev_sample
                state = self._call_back(callback_on_step_end, callback_on_step_end_tensor_inputs, step, timestep, state)
                if output_trajectory:
                    trajectory.append(state)
                if self.interrupt:
                    break

        # 4. Images
        images = state if output_type == "latent" else self.scheduler.forward_process.project(state)
        if output_type != "latent":
            images = (images / 2 + 0.5).clamp(0, 1).float()
        if output_type in ("np", "pil"):
            images = images.cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        states = torch.stack(trajectory).cpu() if output_trajectory else None
        result = GDDIMPipelineOutput(images=images, num_evaluations=num_evaluations, trajectory=states)
        return result if return_dict else result.to_tuple()

    def _check_inputs(
        self, class_labels, batch_size, guidance_scale, latents, output_type, ode_tolerance
    ) -> torch.Tensor | None:
        """Labels as a tensor on the device, None for a model without classes."""
        config = self.unet.config
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, got {output_type!r}.")
        if ode_tolerance is not None and self.scheduler.config.process == "vp":
            raise ValueError("`ode_tolerance` is for `process='cld'` and `'blur'`; for 'vp' take small steps.")
        if config.num_classes is None:
            if class_labels is not None or guidance_scale != 1:
                raise ValueError("`class_labels` and `guidance_scale` need a model with classes; this one has none.")
            labels = None
        elif class_labels is None:
            raise ValueError(
                f"`class_labels` must be given: the model has classes. The label {self.unet.null_label} means none."
            )
        else:
            labels = torch.as_tensor(class_labels).reshape(-1)
        sizes = {"class_labels": labels if labels is None else len(labels), "batch_size": batch_size}
        sizes["latents"] = latents if latents is None else len(latents)
        given = {name: size for name, size in sizes.items() if size is not None}
        if len(set(given.values())) > 1 or min(given.values(), default=1) < 1:
            raise ValueError(
                f"`class_labels`, `batch_size` and `latents` must be for one and the same number of images, got {given}."
            )
        expected = (config.in_channels, config.sample_size, config.sample_size)
        if latents is not None and tuple(latents.shape[1:]) != expected:
            raise ValueError(f"`latents` must have the shape (B, {', '.join(map(str, expected))}), got {tuple(latents.shape)}.")
        return labels if labels is None else labels.to(self._execution_device)

    def _predict(self, state: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor | None, scale: float) -> torch.Tensor:
        """Output of the network, guided."""
        time = network_time(timestep, self.unet.config.embedding_type).expand(len(state))
        if scale == 1:
            return self.unet(state, time, labels).sample
        both = torch.cat([labels, torch.full_like(labels, self.unet.null_label)])
        output, null_output = self.unet(torch.cat([state, state]), time.repeat(2), both).sample.chunk(2)
        return null_output + scale * (output - null_output)

    def _integrate(self, state: torch.Tensor, labels, scale: float, tolerance: float) -> tuple[torch.Tensor, int]:
        """Probability flow from the prior to the end time, then the denoising step if the scheduler has one."""
        scheduler, process = self.scheduler, self.scheduler.forward_process

        def predict_eps(coordinates: torch.Tensor, t: float) -> torch.Tensor:
            sample = process.inverse_transform(coordinates).to(state.dtype)
            timestep = torch.full((), t * (scheduler.config.num_train_timesteps - 1), device=state.device)
            output = self._predict(sample, timestep, labels, scale)
            return scheduler.predict_eps(output.to(state.dtype), sample, t).to(coordinates.dtype)

        precise = state.dtype if state.device.type == "mps" else torch.float64
        start, end = process.start_time, scheduler.final_time
        settings = (start, end, tolerance, scheduler.config.parametrization)
        result, count = integrate_probability_flow(process, predict_eps, process.transform(state.to(precise)), *settings)
        if scheduler.has_denoising_step:
            result = denoising_step(process, result, predict_eps(result, end), end, scheduler.config.parametrization)
        return process.inverse_transform(result).to(state.dtype), count + scheduler.has_denoising_step


def image_generators(generator: torch.Generator | list[torch.Generator] | None, count: int) -> list[torch.Generator]:
    """One generator for each image. A single one is asked for a number, from which those of the images follow.

    Raises:
        ValueError: if a list has another length.
    """
    if isinstance(generator, list):
        if len(generator) != count:
            raise ValueError(f"`generator` must be a list of {count} generators, one for each image, got {len(generator)}.")
        return generator
    device = "cpu" if generator is None else generator.device
    first = torch.randint(2**62, (), generator=generator, device=device).item()
    return [torch.Generator(device).manual_seed(first + index) for index in range(count)]
