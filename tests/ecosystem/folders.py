"""Saved components and pipelines for the tests of this folder."""

import torch
from diffusers import DDIMScheduler, DiTPipeline

from diffusers_fastdiff import (
    AMEDPredictor,
    AMEDScheduler,
    EDMPipeline,
    EDMUNet2DModel,
    FDMEDMScheduler,
    GDDIMPipeline,
    GDDIMScheduler,
    PixelAutoencoder,
)
from tests.models.tiny import faster_dit, fixed_point_dit


def edm_unet(**overrides) -> EDMUNet2DModel:
    torch.manual_seed(0)
    config = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": (1, 2)}
    return EDMUNet2DModel(**(config | {"layers_per_block": 1, "attention_resolutions": (4,)} | overrides)).eval()


def attached_solver() -> AMEDScheduler:
    """A learned solver of three intervals (six evaluations) with a predictor."""
    torch.manual_seed(0)
    scheduler = AMEDScheduler(mode="attached", sigmas=[20.0, 4.0, 0.8, 0.1], solver_order=2, student="ipndm")
    scheduler.predictor = AMEDPredictor(scale_time=0.1).eval().requires_grad_(False)
    return scheduler


def dit_pipeline(**components) -> DiTPipeline:
    parts = {
        "transformer": fixed_point_dit(in_channels=1, out_channels=1).eval(),
        "vae": PixelAutoencoder(1),
        "scheduler": DDIMScheduler(clip_sample=False),
    }
    return DiTPipeline(**(parts | components))


def edm_pipeline() -> EDMPipeline:
    return EDMPipeline(edm_unet(num_classes=10), FDMEDMScheduler())


def gddim_pipeline() -> GDDIMPipeline:
    return GDDIMPipeline(edm_unet(num_classes=10, in_channels=2, out_channels=2), GDDIMScheduler(process="cld"))


def solver_pipeline() -> DiTPipeline:
    pipe = dit_pipeline(transformer=faster_dit(in_channels=1, out_channels=1, num_layers=6).eval())
    attached_solver().attach(pipe)
    return pipe


MODELS = {
    "fixed_point": fixed_point_dit,
    "faster": faster_dit,
    "unet_edm": edm_unet,
    "predictor": AMEDPredictor,
    "autoencoder": PixelAutoencoder,
}
PIPELINES = {"dit": dit_pipeline, "solver": solver_pipeline, "edm": edm_pipeline, "gddim": gddim_pipeline}
