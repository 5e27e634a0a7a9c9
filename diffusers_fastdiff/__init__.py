"""Diffusion models that are fast to sample and to train, as ordinary components of diffusers."""

from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.pipelines import pipeline_loading_utils as _pipeline_loading_utils

from .hooks.faster_diffusion import FasterDiffusionConfig, apply_faster_diffusion, remove_faster_diffusion
from .hooks.faster_diffusion_calibration import KeyStepCalibration, calibrate_key_steps
from .hooks.fixed_point_sampling import (
    FixedPointSamplingConfig,
    apply_fixed_point_sampling,
    remove_fixed_point_sampling,
)
from .hooks.key_steps import KeySchedule
from .models.amed_predictor import AMEDPredictor
from .models.autoencoder_pixel import PixelAutoencoder
from .models.transformer_faster_dit import FasterDiffusionDiTTransformer2DModel
from .models.transformer_fixed_point_dit import FixedPointDiTTransformer2DModel
from .models.unet_edm import EDMUNet2DModel
from .numerics.fixed_point import FixedPointSolver
from .pipelines.pipeline_edm import EDMPipeline
from .pipelines.pipeline_gddim import GDDIMPipeline
from .pretrained import load_pretrained
from .schedulers.scheduling_amed import AMEDScheduler
from .schedulers.scheduling_fdm import FDMEDMScheduler, FDMVEScheduler, FDMVPScheduler
from .schedulers.scheduling_gddim import GDDIMScheduler
from .schedulers.scheduling_ipndm import IPNDMMultistepScheduler

__version__ = "0.1.0"

_COMPONENTS = (
    AMEDPredictor,
    AMEDScheduler,
    EDMPipeline,
    EDMUNet2DModel,
    FDMEDMScheduler,
    FDMVEScheduler,
    FDMVPScheduler,
    FasterDiffusionDiTTransformer2DModel,
    FixedPointDiTTransformer2DModel,
    GDDIMPipeline,
    GDDIMScheduler,
    IPNDMMultistepScheduler,
    PixelAutoencoder,
)

# Saved pipelines record where their components are defined. This makes them record the package instead of one of its files,
# which keeps them loadable when a file moves.
for _component in _COMPONENTS:
    _component.__module__ = __name__

# diffusers loads components of pipelines only from libraries it knows, on the Hub even after an import. The table is private,
# hence the guard; without it local folders still load.
if hasattr(_pipeline_loading_utils, "LOADABLE_CLASSES"):
    _pipeline_loading_utils.LOADABLE_CLASSES.setdefault(
        __name__,
        {name: ["save_pretrained", "from_pretrained"] for name in ("ModelMixin", "SchedulerMixin", "DiffusionPipeline")},
    )

__all__ = [
    "AMEDPredictor",
    "AMEDScheduler",
    "DiffusionPipeline",
    "EDMPipeline",
    "EDMUNet2DModel",
    "FDMEDMScheduler",
    "FDMVEScheduler",
    "FDMVPScheduler",
    "FasterDiffusionConfig",
    "FasterDiffusionDiTTransformer2DModel",
    "FixedPointDiTTransformer2DModel",
    "FixedPointSamplingConfig",
    "FixedPointSolver",
    "GDDIMPipeline",
    "GDDIMScheduler",
    "IPNDMMultistepScheduler",
    "KeySchedule",
    "KeyStepCalibration",
    "ModelMixin",
    "PixelAutoencoder",
    "SchedulerMixin",
    "apply_faster_diffusion",
    "apply_fixed_point_sampling",
    "calibrate_key_steps",
    "load_pretrained",
    "remove_faster_diffusion",
    "remove_fixed_point_sampling",
]
