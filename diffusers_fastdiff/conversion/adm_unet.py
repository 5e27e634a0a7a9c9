"""Weights of ADM and of consistency models' U-Nets to [`EDMUNet2DModel`] and back. State dicts only.

Sources: Dhariwal and Nichol, arXiv 2105.05233; Song et al., arXiv 2303.01469. Both name modules by position
("input_blocks.4.0.in_layers.2") and keep queries, keys and values in one projection, which ADM orders by head first ("adm") and
consistency models by kind first ("consistency"); the weights do not tell which. Resampling must be part of residual blocks
(`resblock_updown`), as in the published models from 64x64 on.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..models.unet_edm import ADM, EDMUNet2DModel
from .dit import StateDict, refuse_leftovers

FAMILIES = ("adm", "consistency")
_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "time_embedder.linear_1": "time_embed.0",
    "time_embedder.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "output_layers.0.norm": "out.0",
    "output_layers.0.conv": "out.2",
}
_QKV = ("to_q", "to_k", "to_v")


def convert_adm_unet(
    state_dict: Mapping[str, torch.Tensor], *, family: str, sample_size: int, attention_head_dim: int = 64, **config: Any
) -> EDMUNet2DModel:
    """An ADM U-Net with the same outputs (to float32 rounding), in evaluation mode.

    Args:
        state_dict: its weights.
        family: "adm" or "consistency".
        sample_size: height and width of its images.
        attention_head_dim: channels of an attention head.
        config: other arguments of [`EDMUNet2DModel`], for example `dropout` (0 if not given).

    Raises:
        ValueError: on keys or shapes that do not belong to such a network.
    """
    if family not in FAMILIES:
        raise ValueError(f"`family` must be one of {FAMILIES}: the weights do not tell; got {family!r}.")
    config = _read_config(state_dict, sample_size) | {"attention_head_dim": attention_head_dim} | config
    model = EDMUNet2DModel(**config)
    converted, rest = {}, dict(state_dict)
    names = dict(_modules(model))
    for key, ours in model.state_dict().items():
        source, name = _source(names, key), key.rsplit(".", 2)[-2]
        if source not in state_dict:
            raise ValueError(f"`state_dict` is not an ADM U-Net: it has no {source!r}.")
        rest.pop(source, None)
        value = state_dict[source]
        if name in _QKV:
            value = _split(value, family, model.config.attention_head_dim)[_QKV.index(name)]
        elif name == "class_embedder":
            value = value.T
        if value.numel() != ours.numel():
            raise ValueError(f"{source!r} of `state_dict` does not fit an ADM U-Net: its shape is {tuple(value.shape)}.")
        converted[key] = value.reshape(ours.shape)
    refuse_leftovers(rest, "ADM U-Net")
    model.load_state_dict(converted)
    return model.eval()


def adm_unet_state_dict(model: EDMUNet2DModel, family: str) -> StateDict:
    """The weights of `model` under the names and in the shapes of the original: the inverse of `convert_adm_unet`."""
    original: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    names = dict(_modules(model))
    for key, value in model.state_dict().items():
        source, name = _source(names, key), key.rsplit(".", 2)[-2]
        if name in _QKV:
            parts.setdefault(source, []).append(value)
        elif name == "class_embedder":
            original[source] = value.T.contiguous()
        else:
            original[source] = value[:, :, None] if ".attn.to_out.0.weight" in key else value
    head_dim = model.config.attention_head_dim
    for source, values in parts.items():
        heads = torch.stack([value.unflatten(0, (-1, head_dim)) for value in values], dim=1 if family == "adm" else 0)
        merged = heads.flatten(0, 2)
        original[source] = merged[:, :, None] if source.endswith(".weight") else merged
    return original


def _split(value: torch.Tensor, family: str, head_dim: int) -> tuple[torch.Tensor, ...]:
    """Rows of queries, keys and values, (3 C, ...) -> three times (C, ...)."""
    if family == "consistency":
        return value.chunk(3)
    heads = value.unflatten(0, (-1, 3, head_dim))
    return tuple(heads[:, index].flatten(0, 1) for index in range(3))


def _read_config(original: Mapping[str, torch.Tensor], sample_size: int) -> dict[str, Any]:
    if "input_blocks.0.0.weight" not in original:
        raise ValueError("`state_dict` is not an ADM U-Net: it has no 'input_blocks.0.0.weight'.")
    if any(re.match(r"input_blocks\.\d+\.0\.op\.", key) for key in original):
        raise ValueError("`state_dict` resamples by plain convolutions; only networks with `resblock_updown` are supported.")
    num_blocks = len({key.split(".")[1] for key in original if key.startswith("output_blocks.")})
    num_ups = len({key.split(".")[1] for key in original if re.match(r"output_blocks\.\d+\.[12]\.in_layers\.", key)})
    num_levels = num_ups + 1
    if num_blocks == 0 or num_blocks % num_levels:
        raise ValueError(f"`state_dict` is not an ADM U-Net: {num_blocks} output blocks do not make {num_levels} resolutions.")
    per_level = num_blocks // num_levels
    width = original["input_blocks.0.0.weight"].shape[0]
    firsts = [f"input_blocks.{1 + level * per_level}" for level in range(num_levels)]
    widths = [original[f"{first}.0.out_layers.3.weight"].shape[0] for first in firsts]
    attention = [sample_size >> level for level, first in enumerate(firsts) if f"{first}.1.qkv.weight" in original]
    embedding = original["time_embed.0.weight"].shape[0]
    scales = original[f"{firsts[0]}.0.emb_layers.1.weight"].shape[0] == 2 * widths[0]
    return ADM | {
        "sample_size": sample_size,
        "in_channels": original["input_blocks.0.0.weight"].shape[1],
        "out_channels": original["out.2.weight"].shape[0],
        "num_classes": original["label_emb.weight"].shape[0] if "label_emb.weight" in original else None,
        "model_channels": width,
        "channel_mult": tuple(channels // width for channels in widths),
        "layers_per_block": per_level - 1,
        "attention_resolutions": tuple(attention),
        "temb_channel_mult": embedding // width,
        "adaptive_scale": scales,
        "dropout": 0.0,
    }


def _modules(model: EDMUNet2DModel) -> Iterator[tuple[str, str]]:
    """Our name -> original name, of every module with weights."""
    yield from _OUTER.items()
    yield "class_embedder", "label_emb"
    index = 1
    for level, block in enumerate(model.down_blocks):
        if block.downsampler is not None:
            yield from _resnet(f"down_blocks.{level}.downsampler", f"input_blocks.{index}", 0)
            index += 1
        for layer in range(len(block.resnets)):
            yield from _resnet(f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{index}", 0)
            index += 1
    yield from _resnet("mid_block.resnets.0", "middle_block", 0)
    yield from _resnet("mid_block.resnets.1", "middle_block", 2)
    index = 0
    for level, block in enumerate(model.up_blocks):
        if block.upsampler is not None:  # the last part of the block before
            position = 1 + (model.up_blocks[level - 1].resnets[-1].attn is not None)
            yield from _resnet(f"up_blocks.{level}.upsampler", f"output_blocks.{index - 1}", position)
        for layer in range(len(block.resnets)):
            yield from _resnet(f"up_blocks.{level}.resnets.{layer}", f"output_blocks.{index}", 0)
            index += 1


def _resnet(ours: str, source: str, position: int) -> Iterator[tuple[str, str]]:
    yield from ((f"{ours}.{name}", f"{source}.{position}.{original}") for name, original in _BLOCK.items())
    attention = f"{source}.{position + 1}"
    yield f"{ours}.attn_norm", f"{attention}.norm"
    yield f"{ours}.attn.to_out.0", f"{attention}.proj_out"
    yield from ((f"{ours}.attn.{name}", f"{attention}.qkv") for name in _QKV)


def _source(names: Mapping[str, str], key: str) -> str:
    module, _, kind = key.rpartition(".")
    if module not in names:
        raise ValueError(f"{key!r} has no place in an ADM U-Net: unload adapters and unfuse projections first.")
    return f"{names[module]}.{kind}"
