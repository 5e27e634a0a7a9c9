"""Where the bottleneck of a denoiser is, and what a learned solver sees of it (arXiv 2312.00094, section 3.2)."""

import functools
import math

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel

from ..models.amed_predictor import FEATURE_SIZE
from ..models.transformer_fixed_point_dit import FixedPointDiTTransformer2DModel
from ..models.unet_edm import EDMUNet2DModel


@functools.singledispatch
def bottleneck_of(model: torch.nn.Module) -> torch.nn.Module:
    """The module whose output is the bottleneck. Other models: `bottleneck_of.register(YourModel)(lambda model: ...)`.

    Raises:
        TypeError: for a model nobody registered.
    """
    raise TypeError(
        f"The bottleneck of {type(model).__name__} is not known. Say where it is with `bottleneck_of.register`, or use the "
        "solver's static mode."
    )


@bottleneck_of.register(UNet2DConditionModel)
@bottleneck_of.register(UNet2DModel)
def _(model: torch.nn.Module) -> torch.nn.Module:
    return model.mid_block


@bottleneck_of.register
def _(model: EDMUNet2DModel) -> torch.nn.Module:
    return model.bottleneck


@bottleneck_of.register
def _(model: DiTTransformer2DModel) -> torch.nn.Module:
    return model.transformer_blocks[(len(model.transformer_blocks) - 1) // 2]


@bottleneck_of.register
def _(model: FixedPointDiTTransformer2DModel) -> torch.nn.Module:
    return model.transformer_blocks[model.config.num_pre_layers]  # its last iteration in each call


def bottleneck_features(output: torch.Tensor | tuple) -> torch.Tensor:
    """Channel mean as a map of fixed size: (B, C, H, W) or tokens (B, N, C) -> (B, 8, 8) float32."""
    output = output[0] if isinstance(output, tuple) else output
    if output.ndim == 3:
        side = math.isqrt(output.shape[1])
        maps = output.float().mean(-1).reshape(-1, side, side)
    else:
        maps = output.float().mean(1)
    return F.adaptive_avg_pool2d(maps, FEATURE_SIZE)
