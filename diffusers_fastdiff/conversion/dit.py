"""Original DiT checkpoints (arXiv 2212.09748) to the layout of diffusers.

Two things in diffusers' `DiTTransformer2DModel` differ from the original. It computes the sinusoidal frequencies of the
timestep with a divisor of 127 instead of 128, which changes outputs by tens of per cent and cannot be undone in the weights;
`FasterDiffusionDiTTransformer2DModel` has a config entry for it. And it copies the embedders into every block.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed

from ..models.transformer_faster_dit import FasterDiffusionDiTTransformer2DModel
from ..models.transformer_fixed_point_dit import SIZES
from .checkpoint import Checkpoint, state_dict_and_arguments

StateDict = dict[str, torch.Tensor]


def convert_dit(
    checkpoint: Checkpoint,
    *,
    num_attention_heads: int | None = None,
    weights: str = "ema",
    model_class: type[DiTTransformer2DModel] = FasterDiffusionDiTTransformer2DModel,
) -> DiTTransformer2DModel:
    """An original DiT as a diffusers transformer with the same outputs (to float32 rounding).

    Args:
        checkpoint: file or mapping: a bare state dict, or a training checkpoint with "ema" and "model".
        num_attention_heads: heads, needed for widths other than the published 384, 768, 1024 and 1152.
        weights: "ema" or "model", which weights of a training checkpoint to take.
        model_class: the default keeps the original's timestep frequencies when saved and loaded. diffusers' own
            `DiTTransformer2DModel` gives the same outputs only until it is saved: its config has no place for them.

    Raises:
        ValueError: on unreadable files, keys that do not belong to a DiT, or an unknown width without heads.
    """
    original, _ = state_dict_and_arguments(checkpoint, weights)
    common = common_config(original, num_attention_heads)
    num_layers = count_blocks(original, "blocks")
    num_classes = original["y_embedder.embedding_table.weight"].shape[0] - 1
    config = common | {"num_layers": num_layers, "num_embeds_ada_norm": num_classes, "norm_eps": 1e-6}

    converted, rest = convert_outer_layers(original)
    embedders: dict[str, Any] = {}
    for new, old in _EMBEDDERS.items():
        embedders |= {f"{new}.{kind}": rest.pop(f"{old}.{kind}") for kind in _kinds(rest, old)}
    for index in range(num_layers):
        target = f"transformer_blocks.{index}"
        converted |= {f"{target}.norm1.emb.{key}": value for key, value in embedders.items()}
        converted |= convert_block(rest, f"blocks.{index}", target, attention="attn1", modulation=f"{target}.norm1.linear")
    refuse_leftovers(rest, "DiT")

    model = model_class(**config, **({"time_freq_shift": 0} if _has_time_freq_shift(model_class) else {}))
    if not _has_time_freq_shift(model_class):
        for block in model.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
    model.load_state_dict(converted)
    return model.eval()


_EMBEDDERS = {
    "timestep_embedder.linear_1": "t_embedder.mlp.0",
    "timestep_embedder.linear_2": "t_embedder.mlp.2",
    "class_embedder.embedding_table": "y_embedder.embedding_table",
}


def common_config(original: Mapping[str, torch.Tensor], num_attention_heads: int | None) -> dict[str, Any]:
    """What the weights of a DiT or FPDM say about its shape.

    Raises:
        ValueError: if the file is neither, has other than sin-cos positions, or a width whose heads are not known.
    """
    try:
        dim, in_channels, patch_size, _ = original["x_embedder.proj.weight"].shape
        positions, out_rows = original["pos_embed"], original["final_layer.linear.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"The checkpoint is not a DiT: it has no {error}.") from error
    heads = num_attention_heads or {width: h for _, width, h in SIZES.values()}.get(dim)
    if heads is None:
        raise ValueError(f"`num_attention_heads` must be given: {dim} is not the width of a published model.")
    grid = math.isqrt(positions.shape[1])
    expected = get_2d_sincos_pos_embed(dim, grid, base_size=grid, output_type="pt").to(positions)
    if not torch.allclose(positions[0], expected, atol=1e-4):
        raise ValueError("The position table `pos_embed` of the checkpoint is not the fixed sin-cos table of DiT.")
    return {
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "in_channels": in_channels,
        "out_channels": out_rows // patch_size**2,
        "sample_size": grid * patch_size,
        "patch_size": patch_size,
    }


def count_blocks(original: Mapping[str, torch.Tensor], prefix: str) -> int:
    return len({key.split(".")[1] for key in original if key.startswith(f"{prefix}.")})


def convert_outer_layers(original: Mapping[str, torch.Tensor]) -> tuple[StateDict, StateDict]:
    """Patch embedding and output layers under their new names, and everything else under the old ones."""
    rest = {key: value for key, value in original.items() if key != "pos_embed"}
    names = {
        "pos_embed.proj": "x_embedder.proj",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    }
    converted: dict[str, Any] = {}
    for new, old in names.items():
        converted |= {f"{new}.{kind}": rest.pop(f"{old}.{kind}") for kind in _kinds(rest, old)}
    return converted, rest


def convert_block(rest: StateDict, source: str, target: str, attention: str, modulation: str) -> StateDict:
    """Move one block out of `rest`; the fused qkv rows are split."""
    names = {
        f"{target}.{attention}.to_out.0": f"{source}.attn.proj",
        f"{target}.ff.net.0.proj": f"{source}.mlp.fc1",
        f"{target}.ff.net.2": f"{source}.mlp.fc2",
        modulation: f"{source}.adaLN_modulation.1",
    }
    block: dict[str, Any] = {}
    for kind in ("weight", "bias"):
        block |= {f"{new}.{kind}": rest.pop(f"{old}.{kind}") for new, old in names.items()}
        query, key, value = rest.pop(f"{source}.attn.qkv.{kind}").chunk(3)
        for name, part in {"to_q": query, "to_k": key, "to_v": value}.items():
            block[f"{target}.{attention}.{name}.{kind}"] = part.clone()
    return block


def refuse_leftovers(rest: StateDict, kind: str) -> None:
    if rest:
        raise ValueError(f"The checkpoint is not a {kind}: it has no place for {sorted(rest)[:5]}.")


def _kinds(state_dict: StateDict, name: str) -> list[str]:
    return [kind for kind in ("weight", "bias") if f"{name}.{kind}" in state_dict]


def _has_time_freq_shift(model_class: type) -> bool:
    return issubclass(model_class, FasterDiffusionDiTTransformer2DModel)
