"""Stock pipelines of tiny random components: the real classes, built without a network; deterministic."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DiTPipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusers_fastdiff import PixelAutoencoder
from tests.models.tiny import faster_dit

UNET = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, timestep_spacing="linspace", steps_offset=1)


def conditional_unet(seed: int = 0, **overrides) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**(UNET | blocks | {"cross_attention_dim": 16} | overrides)).eval()


def xl_unet() -> UNet2DConditionModel:
    return conditional_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
    )


def pixel_unet(**overrides) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(**(UNET | {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": (
        "AttnUpBlock2D", "UpBlock2D"), "in_channels": 3, "out_channels": 3} | overrides)).eval()  # fmt: skip


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        sample_size=16,
    ).eval()


def tokenizer(folder: Path) -> CLIPTokenizer:
    """Letters only; written to `folder`, since a tokenizer is made of files."""
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12)


def text_encoder(projection: bool = False) -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=54, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, projection_dim=16, bos_token_id=52, eos_token_id=53,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def components(folder: Path) -> dict:
    """Of Stable Diffusion 1 and 2."""
    return {
        "vae": autoencoder(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(folder),
        "unet": conditional_unet(),
        "scheduler": scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def stable_diffusion(folder: Path) -> StableDiffusionPipeline:
    return quiet(StableDiffusionPipeline(**components(folder)))


def image_to_image(folder: Path) -> StableDiffusionImg2ImgPipeline:
    return quiet(StableDiffusionImg2ImgPipeline(**components(folder)))


def stable_diffusion_xl(folder: Path) -> StableDiffusionXLPipeline:
    return quiet(
        StableDiffusionXLPipeline(
            vae=autoencoder(),
            text_encoder=text_encoder(),
            text_encoder_2=text_encoder(projection=True),
            tokenizer=tokenizer(folder),
            tokenizer_2=tokenizer(folder),
            unet=xl_unet(),
            scheduler=scheduler(),
        )
    )


def controlled(folder: Path) -> StableDiffusionControlNetPipeline:
    parts = components(folder)
    torch.manual_seed(1)
    controlnet = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4, 4))
    for parameter in controlnet.parameters():  # the last layers begin at zero, which would hide mistakes
        torch.nn.init.normal_(parameter, std=0.1)
    return quiet(StableDiffusionControlNetPipeline(**parts, controlnet=controlnet.eval()))


def adapted(folder: Path) -> StableDiffusionAdapterPipeline:
    torch.manual_seed(1)
    adapter = T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter")
    return quiet(StableDiffusionAdapterPipeline(**components(folder), adapter=adapter.eval()))


def dit(**overrides) -> DiTPipeline:
    model = faster_dit(**({"in_channels": 1, "out_channels": 1, "num_layers": 6} | overrides)).eval()
    return quiet(DiTPipeline(model, PixelAutoencoder(1), scheduler()))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, steps: int = 8, seed: int = 0, **options) -> torch.Tensor:
    """Latents of any of these pipelines."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # DiTPipeline hands no generator to the scheduler
    if isinstance(pipe, DiTPipeline):
        caught, decode = [], pipe.vae.decode  # the pipeline clips what it returns
        pipe.vae.decode = lambda z, *args, **kwargs: caught.append(z) or decode(z, *args, **kwargs)
        try:
            labels = options.pop("labels", (1, 2))
            pipe(list(labels), **({"guidance_scale": 2.0} | options), num_inference_steps=steps, generator=generator)
        finally:
            del pipe.vae.decode
        return caught[0]
    text = {"prompt": ["a b", "c"], "guidance_scale": 3.0, "output_type": "latent"}
    call = ({} if "class_labels" in options else text) | INPUTS.get(type(pipe), {}) | options
    return pipe(**call, num_inference_steps=steps, generator=generator).images


def image(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(7))


INPUTS = {
    StableDiffusionImg2ImgPipeline: {"image": image(2, 3, 16, 16), "strength": 0.75},
    StableDiffusionControlNetPipeline: {"image": image(2, 3, 16, 16)},
    StableDiffusionAdapterPipeline: {"image": image(2, 3, 16, 16)},
}
PIPELINES = {
    "dit": lambda folder: dit(),
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "img2img": image_to_image,
    "controlnet": controlled,
    "adapter": adapted,
}
