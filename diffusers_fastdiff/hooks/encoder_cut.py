"""Where the encoder of a denoiser ends: the one thing Faster Diffusion has to know about a model.

Sources: arXiv 2312.09608. In a U-Net the encoder is the input convolution, the down blocks and the mid block, and what it hands
to the decoder are the feature maps of all of them; in a DiT it is the first 18 of 28 blocks, and what it hands on are tokens.

Models of other kinds join by registering a function:

    from diffusers_fastdiff.hooks.encoder_cut import EncoderCut, encoder_cut

    @encoder_cut.register
    def _(model: MyTransformer, encoder_share: float | None = None) -> EncoderCut:
        return EncoderCut(skipped=tuple(model.blocks[:12]), resumed=model.blocks[12])
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel

from ..models.transformer_fixed_point_dit import FixedPointDiTTransformer2DModel
from ..models.unet_edm import EDMUNet2DModel

PUBLISHED_ENCODER_SHARE = 18 / 28
"""Share of the blocks of a DiT that are its encoder."""


@dataclass(frozen=True)
class EncoderCut:
    """The encoder of one model, module by module.

    The model's own `forward` runs at every step, so the decoder gets everything it always gets: the current timestep, text,
    labels, adapters. At a step that is not a key step, the modules named here do not compute.
    """

    skipped: tuple[torch.nn.Module, ...] = ()
    """Encoder modules whose output only later encoder modules read. When skipped, they hand on their first argument."""
    stored: tuple[torch.nn.Module, ...] = ()
    """Encoder modules whose output the decoder reads. When skipped, they return what they returned at the key step."""
    resumed: torch.nn.Module | None = None
    """First module of the decoder; its first argument is stored, and replaced where the encoder was skipped."""
    encoder_arguments: tuple[str, ...] = ()
    """Arguments of the model's `forward` that belong to the encoder (such as ControlNet residuals). At a step that is not a key
    step they are those of the key step."""
    replay_arguments: Callable[[torch.Tensor], dict[str, Any]] | None = None
    """Further arguments of `forward` at steps that are not key steps, given the feature for `resumed`."""
    expands: bool = True
    """Whether the model's `forward` still works when its decoder sees more rows than its encoder: several steps at once."""

    def __post_init__(self):
        if not self.stored and self.resumed is None:
            raise ValueError("An `EncoderCut` needs `stored` modules or a `resumed` one: nothing would be propagated.")

    @property
    def encoder_modules(self) -> tuple[torch.nn.Module, ...]:
        """All modules that do not compute at steps that are not key steps."""
        return (*self.skipped, *self.stored)


@functools.singledispatch
def encoder_cut(model: torch.nn.Module, encoder_share: float | None = None) -> EncoderCut:
    """Where the encoder of `model` ends. Register a function for each class of models (see the top of this file).

    Args:
        model: a denoiser.
        encoder_share: share of the blocks that are encoder, for models where that can be chosen; None for the published one.

    Raises:
        TypeError: for a model nobody registered.
        ValueError: if the model has no encoder and decoder to tell apart, or `encoder_share` does not fit it.
    """
    raise TypeError(
        f"Faster Diffusion does not know where the encoder of {type(model).__name__} ends. It knows DiTTransformer2DModel, "
        "FixedPointDiTTransformer2DModel, UNet2DConditionModel, UNet2DModel and EDMUNet2DModel; register others with "
        "`diffusers_fastdiff.hooks.encoder_cut.encoder_cut.register`."
    )


@encoder_cut.register
def _dit(model: DiTTransformer2DModel, encoder_share: float | None = None) -> EncoderCut:
    share = PUBLISHED_ENCODER_SHARE if encoder_share is None else encoder_share
    blocks = tuple(model.transformer_blocks)
    if not 0 < share < 1:
        raise ValueError(f"`encoder_share` must lie between 0 and 1, got {share}.")
    if len(blocks) < 2:
        raise ValueError(f"A model with {len(blocks)} block has no encoder and decoder to tell apart.")
    depth = min(max(round(share * len(blocks)), 1), len(blocks) - 1)
    return EncoderCut(skipped=blocks[:depth], resumed=blocks[depth])


@encoder_cut.register
def _fixed_point_dit(model: FixedPointDiTTransformer2DModel, encoder_share: float | None = None) -> EncoderCut:
    """Encoder: the pre blocks and the fixed point. At other steps the solution is handed in and not iterated (the output says
    one iteration, which computes nothing)."""
    _refuse_share(model, encoder_share)
    if model.config.num_post_layers == 0:
        raise ValueError("A fixed-point DiT without post blocks (`num_post_layers` 0) has no decoder to run on its own.")
    if not model.config.pre_post_timestep_conditioning:
        raise ValueError(
            "The post blocks of this fixed-point DiT do not see the timestep (`pre_post_timestep_conditioning` is False): as a "
            "decoder they would repeat the prediction of the key step."
        )
    fixed_point = model.config.num_pre_layers
    blocks = tuple(model.transformer_blocks)
    return EncoderCut(
        skipped=(*blocks[: fixed_point + 1], model.injection_in, model.injection_out),
        resumed=blocks[fixed_point + 1],
        replay_arguments=lambda feature: {"initial_solution": feature, "num_iterations": 1, "solver": None},
        expands=False,
    )


@encoder_cut.register
def _conditional_unet(model: UNet2DConditionModel, encoder_share: float | None = None) -> EncoderCut:
    _refuse_share(model, encoder_share)
    return EncoderCut(
        stored=_unet_encoder(model),
        encoder_arguments=(
            "down_block_additional_residuals",
            "mid_block_additional_residual",
            "down_intrablock_additional_residuals",
        ),
    )


@encoder_cut.register(UNet2DModel)
@encoder_cut.register(EDMUNet2DModel)
def _unet(model: UNet2DModel | EDMUNet2DModel, encoder_share: float | None = None) -> EncoderCut:
    _refuse_share(model, encoder_share)
    return EncoderCut(stored=_unet_encoder(model))


def _unet_encoder(model: torch.nn.Module) -> tuple[torch.nn.Module, ...]:
    mid_blocks = () if model.mid_block is None else (model.mid_block,)
    return (model.conv_in, *model.down_blocks, *mid_blocks)


def _refuse_share(model: torch.nn.Module, encoder_share: float | None) -> None:
    if encoder_share is not None:
        raise ValueError(
            f"`encoder_share` is for models of equal blocks; the encoder of {type(model).__name__} ends in one place. Leave "
            "it out."
        )
