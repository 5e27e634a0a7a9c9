"""Weights of the original EDM-style U-Nets (DDPM++, NCSN++, ADM) to [`EDMUNet2DModel`] and back. State dicts only.

The originals name their modules by resolution ("enc.16x16_block0") and keep queries, keys and values in one 1x1 convolution
whose rows are interleaved: q, k and v of the first channel, of the second, ... . FIR kernels are stored with every resampling
convolution; here they follow from the config.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..models.unet_edm import ADM, EDMUNet2DModel
from ..models.unet_edm_blocks import EDMInputResidual, EDMResample, EDMResnetBlock, fir_kernel
from .dit import StateDict, refuse_leftovers

_BLOCK = {
    "norm1": "norm0",
    "conv1": "conv0",
    "time_emb_proj": "affine",
    "norm2": "norm1",
    "conv2": "conv1",
    "conv_shortcut": "skip",
    "attn_norm": "norm2",
    "attn.to_q": "qkv",
    "attn.to_k": "qkv",
    "attn.to_v": "qkv",
    "attn.to_out.0": "proj",
}
_EMBEDDERS = {
    "time_proj": "map_noise",
    "time_embedder.linear_1": "map_layer0",
    "time_embedder.linear_2": "map_layer1",
    "class_embedder": "map_label",
    "augment_embedder": "map_augment",
}
_QKV = ("to_q", "to_k", "to_v")


def convert_edm_unet(state_dict: Mapping[str, torch.Tensor], **config: Any) -> EDMUNet2DModel:
    """An original U-Net with the same outputs (to float32 rounding), in evaluation mode.

    Args:
        state_dict: weights of the raw network, or of a preconditioned one ("model." before every key).
        config: arguments of [`EDMUNet2DModel`] that weights do not tell: `dropout` and `class_dropout_prob` (0 if not given),
            or, for networks other than the published ones, for example `attention_head_dim`.

    Raises:
        ValueError: on keys or shapes that do not belong to such a network.
    """
    original = {key.removeprefix("model."): value for key, value in state_dict.items()}
    model = EDMUNet2DModel(**(read_config(original) | config))
    rest = {key: value for key, value in original.items() if not key.endswith(".resample_filter")}
    converted, names = {}, _module_names(model)
    for key, ours in model.state_dict().items():
        source = _original_key(names, key)
        if source not in original:
            raise ValueError(f"`state_dict` is not an EDM U-Net: it has no {source!r}.")
        rest.pop(source, None)
        value = original[source]
        name = key.rsplit(".", 2)[-2]
        value = value[_QKV.index(name) :: 3] if name in _QKV else value
        if value.numel() != ours.numel():
            raise ValueError(
                f"{source!r} of `state_dict` does not fit an EDM U-Net: its shape is {tuple(original[source].shape)}."
            )
        converted[key] = value.reshape(ours.shape)
    refuse_leftovers(rest, "EDM U-Net")
    model.load_state_dict(converted)
    return model.eval()


def edm_unet_state_dict(model: EDMUNet2DModel) -> StateDict:
    """The weights of `model` under the names and in the shapes of the original network: the inverse of `convert_edm_unet`.

    Raises:
        ValueError: if the model carries adapters or fused projections.
    """
    original: dict[str, Any] = {}
    interleaved: dict[str, Any] = {}
    names = _module_names(model)
    for key, value in model.state_dict().items():
        source, name = _original_key(names, key), key.rsplit(".", 2)[-2]
        if name in _QKV:
            interleaved.setdefault(source, []).append(value)
        else:
            is_projection = key.endswith(".attn.to_out.0.weight")
            original[source] = value[:, :, None, None] if is_projection else value
    for source, parts in interleaved.items():
        value = torch.stack(parts, dim=1).flatten(0, 1)
        original[source] = value[:, :, None, None] if source.endswith(".weight") else value
    kernel = fir_kernel(1, model.config.resample_filter)
    return original | {f"{source}.resample_filter": kernel.clone() for source in _resampling_convolutions(model)}


def read_config(original: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What the weights of an original network say about its shape.

    Raises:
        ValueError: if they are not those of such a network.
    """
    sizes = {int(match[1]) for key in original if (match := re.match(r"enc\.(\d+)x\1_block0\.", key))}
    if not sizes or "map_layer0.weight" not in original:
        raise ValueError("`state_dict` is not an EDM U-Net: it has no encoder blocks ('enc.32x32_block0', ...).")
    sizes = sorted(sizes, reverse=True)
    names = [f"{size}x{size}" for size in sizes]
    is_adm = "out_conv.weight" in original
    conv_in, layer = original[f"enc.{names[0]}_conv.weight"], original["map_layer0.weight"]
    conv_out = original["out_conv.weight" if is_adm else f"dec.{names[0]}_aux_conv.weight"]
    width = conv_in.shape[0]
    with_attention = [size for size, name in zip(sizes, names, strict=True) if f"enc.{name}_block0.qkv.weight" in original]
    config = (ADM if is_adm else {}) | {
        "sample_size": sizes[0],
        "in_channels": conv_in.shape[1],
        "out_channels": conv_out.shape[0],
        "num_classes": original["map_label.weight"].shape[1] if "map_label.weight" in original else None,
        "augment_dim": original["map_augment.weight"].shape[1] if "map_augment.weight" in original else 0,
        "model_channels": width,
        "channel_mult": tuple(original[f"enc.{name}_block0.conv1.weight"].shape[0] // width for name in names),
        "layers_per_block": sum(bool(re.match(rf"enc\.{names[0]}_block\d+\.conv0\.weight", key)) for key in original),
        "attention_resolutions": tuple(with_attention),
        "dropout": 0.0,
        "embedding_type": "fourier" if "map_noise.freqs" in original else "positional",
        "noise_channel_mult": layer.shape[1] // width,
        "temb_channel_mult": layer.shape[0] // width,
    }
    if len(sizes) > 1:
        prefix = f"enc.{names[1]}"
        config |= {
            "encoder_type": _input_branch(original, prefix),
            "decoder_type": "skip" if f"dec.{names[1]}_aux_conv.weight" in original else "standard",
            "resample_filter": _taps(original[f"{prefix}_down.conv0.resample_filter"]),
        }
    return config


def _input_branch(original: Mapping[str, torch.Tensor], prefix: str) -> str:
    for kind in ("residual", "skip"):
        if f"{prefix}_aux_{kind}.weight" in original:
            return kind
    return "standard"


def _taps(kernel: torch.Tensor) -> tuple[float, ...]:
    """Taps of a separable kernel (1, 1, k, k), the smallest being 1."""
    taps = kernel[0, 0].double().sum(0)
    return tuple((taps / taps[taps > 0].min()).round(decimals=4).tolist())


def _module_names(model: EDMUNet2DModel) -> dict[str, str]:
    """Our name -> original name, of every module with weights."""
    names = dict(_EMBEDDERS)
    for ours, source in _stages(model):
        names[ours] = source
        if isinstance(model.get_submodule(ours), EDMResnetBlock):
            names |= {f"{ours}.{inner}": f"{source}.{original}" for inner, original in _BLOCK.items()}
    return names


def _stages(model: EDMUNet2DModel) -> Iterator[tuple[str, str]]:
    """Our name and original name of residual blocks, input branches, first and last layers."""
    size = model.config.sample_size
    yield "conv_in", f"enc.{size}x{size}_conv"
    for level, block in enumerate(model.down_blocks):
        ours, source = f"down_blocks.{level}", f"enc.{size >> level}x{size >> level}"
        if block.downsampler is not None:
            yield f"{ours}.downsampler", f"{source}_down"
        if block.input_branch is not None:
            kind = "residual" if isinstance(block.input_branch, EDMInputResidual) else "skip"
            yield f"{ours}.input_branch.conv", f"{source}_aux_{kind}"
        yield from ((f"{ours}.resnets.{index}", f"{source}_block{index}") for index in range(len(block.resnets)))

    num_levels = len(model.up_blocks)
    lowest = size >> (num_levels - 1)
    yield from ((f"mid_block.resnets.{index}", f"dec.{lowest}x{lowest}_in{index}") for index in range(2))
    num_silent_blocks = num_levels - len(model.output_layers)
    for index, block in enumerate(model.up_blocks):
        ours, source = f"up_blocks.{index}", f"dec.{lowest << index}x{lowest << index}"
        if block.upsampler is not None:
            yield f"{ours}.upsampler", f"{source}_up"
        yield from ((f"{ours}.resnets.{layer}", f"{source}_block{layer}") for layer in range(len(block.resnets)))
        if index >= num_silent_blocks:
            layer = f"output_layers.{index - num_silent_blocks}"
            is_adm = model.config.adaptive_scale
            yield f"{layer}.norm", "out_norm" if is_adm else f"{source}_aux_norm"
            yield f"{layer}.conv", "out_conv" if is_adm else f"{source}_aux_conv"


def _resampling_convolutions(model: EDMUNet2DModel) -> Iterator[str]:
    """Original names of the modules that hold a FIR kernel, with or without weights of their own."""
    for ours, source in _stages(model):
        module = model.get_submodule(ours)
        if isinstance(module, EDMResnetBlock) and isinstance(module.resample, EDMResample):
            yield from (f"{source}.conv0", f"{source}.skip")
        elif source.endswith("_aux_residual"):
            yield source
        elif source.endswith("_aux_skip"):
            yield source.replace("_aux_skip", "_aux_down")
    if model.output_upsampler is not None:
        size, num_levels = model.config.sample_size, len(model.up_blocks)
        yield from (f"dec.{size >> level}x{size >> level}_aux_up" for level in range(num_levels - 1))


def _original_key(names: Mapping[str, str], key: str) -> str:
    """ "down_blocks.0.resnets.1.conv2.weight" -> "enc.32x32_block1.conv1.weight"."""
    module, _, kind = key.rpartition(".")
    if module not in names:
        raise ValueError(f"{key!r} has no place in the original network: unload adapters and unfuse projections first.")
    return f"{names[module]}.{'freqs' if kind == 'frequencies' else kind}"
