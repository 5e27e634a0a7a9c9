"""Images from the U-Nets of EDM and FDM, in pixel space."""

import inspect
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from ..models.unet_edm import EDMUNet2DModel
from .callbacks import StepCallback, StepCallbackMixin
from .pipeline_gddim import image_generators

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class EDMPipeline(StepCallbackMixin, DiffusionPipeline):
    r"""Draws noise, runs the scheduler, and returns images. What follows a sample's path is its own: noise and churn of image k
    come from its own generator, so it is the same image whatever the batch or the number of processes.

    Args:
        unet: raw network, with labels or without.
        scheduler: [`FDMEDMScheduler`], [`FDMVPScheduler`], [`FDMVEScheduler`], [`AMEDScheduler`] or another one of the same
            formulation.
        guidance_unet: a weaker model of the same formulation (smaller, or trained for a shorter time) to guide away from, as in
            Karras et al., arXiv 2406.02507; None to guide by the dropped label.
    """

    model_cpu_offload_seq = "guidance_unet->unet"
    _optional_components = ["guidance_unet"]

    def __init__(self, unet: EDMUNet2DModel, scheduler: SchedulerMixin, guidance_unet: EDMUNet2DModel | None = None):
        super().__init__()
        config = unet.config
        if config.out_channels not in (config.in_channels, 2 * config.in_channels):
            raise ValueError(
                f"`unet` must have as many output as input channels (or twice as many, with a learned variance), got "
                f"in_channels={config.in_channels} and out_channels={config.out_channels}."
            )
        if guidance_unet is not None:
            for name in ("in_channels", "sample_size", "num_classes"):
                if guidance_unet.config[name] != config[name]:
                    raise ValueError(
                        f"`guidance_unet` must have the {name} of `unet`, {config[name]}, got {guidance_unet.config[name]}."
                    )
        self.register_modules(unet=unet, scheduler=scheduler, guidance_unet=guidance_unet)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int] | torch.Tensor | None = None,
        batch_size: int | None = None,
        num_inference_steps: int = 35,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[list[Image.Image] | np.ndarray | torch.Tensor]:
        r"""Draw images.

        Args:
            class_labels: one for each image, for a model with classes; its `unet.null_label` means none.
            batch_size: number of images, for a model without; by default 1.
            num_inference_steps: evaluations of the network; guidance doubles each. Odd for Heun's method.
            guidance_scale: 1 for none. Larger ones go away from the model without label (which must have been trained with
                labels dropped), or from `guidance_unet`, if there is one.
            generator: a list has one for each image; a single one is asked for one number, from which those follow.
            latents: standard normal noise to start from, (B, C, H, W); scaled here. float64 noise gives a run in float64.
            output_type: "pil", "np" (B, H, W, C) and "pt" (B, C, H, W) in [0, 1], or "latent": as the model is trained, not
                clipped.
            return_dict: return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: called after each step with the pipeline, the step, its timestep and a dict of the tensors
                named next, and returns changed ones; setting `pipe._interrupt` in it ends the run.
            callback_on_step_end_tensor_inputs: "latents" or nothing.

        Raises:
            ValueError: for arguments that do not fit the model or each other.

        Examples:

        ```py
        >>> from diffusers_fastdiff import load_pretrained

        >>> pipe = load_pretrained("digits-edm")  # or EDMPipeline.from_pretrained(your folder or Hub name)
        >>> image = pipe(class_labels=[7], num_inference_steps=17, guidance_scale=1.5).images[0]
        ```
        """
        # 1. Arguments
        labels = self._check_inputs(class_labels, batch_size, guidance_scale, latents, output_type)
        batch_size = len(labels) if labels is not None else batch_size or (1 if latents is None else len(latents))
        generators = image_generators(generator, batch_size)
        self._begin_callbacks(callback_on_step_end_tensor_inputs, guidance_scale)

        # 2. Noise
        config, device = self.unet.config, self._execution_device
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        if latents is None:
            shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
            dtype = torch.promote_types(self.unet.dtype, torch.float32)
            latents = randn_tensor(shape, generators, device=device, dtype=dtype)
        state = latents.to(device) * self.scheduler.init_noise_sigma

        # 3. Reverse process
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        options = {"generator": generators} if takes_generator else {}
        self._num_timesteps = len(self.scheduler.timesteps)
        for step, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            sample = self.scheduler.scale_model_input(state, timestep)
            output = self._predict(sample, timestep, labels, self.guidance_scale)
            state = self.scheduler.step(output, timestep, state, **options).prev_sample
            state = self._call_back(callback_on_step_end, callback_on_step_end_tensor_inputs, step, timestep, state)
            if self.interrupt:
                break

        # 4. Images
        images = state if output_type == "latent" else (state / 2 + 0.5).clamp(0, 1).float()
        if output_type in ("np", "pil"):
            images = images.cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_inputs(self, class_labels, batch_size, guidance_scale, latents, output_type) -> torch.Tensor | None:
        """Labels as a tensor on the device, None for a model without classes."""
        config = self.unet.config
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, got {output_type!r}.")
        if guidance_scale != 1 and config.num_classes is None and self.guidance_unet is None:
            raise ValueError("`guidance_scale` needs a model with classes or a `guidance_unet`; this pipeline has neither.")
        labels = self._labels(class_labels)
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
        return labels

    def _labels(self, class_labels: int | list[int] | torch.Tensor | None) -> torch.Tensor | None:
        null = self.unet.null_label
        if null is None:
            if class_labels is not None:
                raise ValueError("`class_labels` were given to a model without classes: leave them out.")
            return None
        if class_labels is None:
            raise ValueError(f"`class_labels` must be given: the model has classes. The label {null} means none.")
        labels = torch.as_tensor(class_labels).reshape(-1)
        if labels.is_floating_point() or not bool(((labels >= 0) & (labels <= null)).all()):
            raise ValueError(f"`class_labels` must be integers from 0 to {null} (none), got {labels.tolist()}.")
        return labels.to(self._execution_device)

    def _predict(self, sample: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor | None, scale: float) -> torch.Tensor:
        """Output of the raw network, guided. The denoiser is affine in it, so guiding one is guiding the other."""
        channels = sample.shape[1]
        if scale == 1:
            return self.unet(sample, timestep, labels).sample[:, :channels]
        if self.guidance_unet is not None:
            output = self.unet(sample, timestep, labels).sample[:, :channels]
            weaker = self.guidance_unet(sample, timestep, labels).sample[:, :channels].to(output.dtype)
        else:
            both = torch.cat([labels, torch.full_like(labels, self.unet.null_label)])
            output, weaker = self.unet(torch.cat([sample, sample]), timestep, both).sample[:, :channels].chunk(2)
        return weaker + scale * (output - weaker)
