"""Stock pipelines of tiny random components beside those of tests/hooks: other versions, inpainting, flow matching, PixArt."""

from pathlib import Path

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)

from tests.ecosystem.folders import edm_pipeline, gddim_pipeline
from tests.hooks import tiny_pipelines as tiny


def stable_diffusion_2(folder: Path) -> StableDiffusionPipeline:
    pipe = tiny.stable_diffusion(folder)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type="v_prediction")
    return pipe


def inpainting(folder: Path) -> StableDiffusionInpaintPipeline:
    return tiny.quiet(StableDiffusionInpaintPipeline(**tiny.components(folder)))


def pixart(folder: Path) -> PixArtAlphaPipeline:
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=4, cross_attention_dim=16, caption_channels=16, sample_size=8,
        in_channels=4, out_channels=8, use_additional_conditions=False,
    ).eval()  # fmt: skip
    parts = {"tokenizer": None, "text_encoder": None, "vae": tiny.autoencoder(), "scheduler": tiny.scheduler()}
    return tiny.quiet(PixArtAlphaPipeline(transformer=transformer, **parts))


def stable_diffusion_3(folder: Path) -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=8,
    ).eval()  # fmt: skip
    absent = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    vae = tiny.autoencoder()
    return tiny.quiet(StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, vae=vae, **dict.fromkeys(absent)))


def flux(folder: Path) -> FluxPipeline:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    absent = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    vae = tiny.autoencoder()
    return tiny.quiet(FluxPipeline(transformer=transformer, scheduler=scheduler, vae=vae, **dict.fromkeys(absent)))


def embeddings(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw(pipe, steps: int, **options) -> torch.Tensor:
    """Latents of any of these pipelines, (2, ...)."""
    name = type(pipe).__name__
    call: dict = {"output_type": "latent", "num_inference_steps": steps, "generator": torch.Generator().manual_seed(0)}
    if name in ("EDMPipeline", "GDDIMPipeline"):
        call |= {"class_labels": [1, 2], "guidance_scale": 2.0}
    elif name == "StableDiffusionInpaintPipeline":
        mask = torch.zeros(2, 1, 16, 16)
        mask[..., :8] = 1
        call |= {"prompt": ["a b", "c"], "image": tiny.image(2, 3, 16, 16), "mask_image": mask, "height": 16, "width": 16}
        call |= {"guidance_scale": 3.0, "strength": 1.0}
    elif name == "PixArtAlphaPipeline":
        text = {"prompt_embeds": embeddings(2, 5, 16), "negative_prompt_embeds": embeddings(2, 5, 16, seed=1)}
        masks = dict.fromkeys(("prompt_attention_mask", "negative_prompt_attention_mask"), torch.ones(2, 5))
        call |= {**text, **masks, "prompt": None, "negative_prompt": None, "height": 16, "width": 16, "guidance_scale": 3.0}
        call |= {"use_resolution_binning": False}
    elif name == "StableDiffusion3Pipeline":
        text = {"prompt_embeds": embeddings(2, 5, 16), "negative_prompt_embeds": embeddings(2, 5, 16, seed=1)}
        pooled = {"pooled_prompt_embeds": embeddings(2, 16), "negative_pooled_prompt_embeds": embeddings(2, 16, seed=1)}
        call |= {**text, **pooled, "height": 16, "width": 16, "guidance_scale": 3.0}
    elif name == "FluxPipeline":
        call |= {"prompt_embeds": embeddings(2, 5, 16), "pooled_prompt_embeds": embeddings(2, 16), "height": 16, "width": 16}
    else:
        return tiny.draw(pipe, steps, **options)
    return pipe(**(call | options)).images


PIPELINES = {
    "DiT": lambda folder: tiny.dit(),
    "SD 1": tiny.stable_diffusion,
    "SD 2": stable_diffusion_2,
    "SDXL": tiny.stable_diffusion_xl,
    "ControlNet": tiny.controlled,
    "T2I adapter": tiny.adapted,
    "img2img": tiny.image_to_image,
    "inpainting": inpainting,
    "PixArt": pixart,
    "SD 3": stable_diffusion_3,
    "Flux": flux,
    "EDM": lambda folder: edm_pipeline(),
    "CLD": lambda folder: gddim_pipeline(),
}
