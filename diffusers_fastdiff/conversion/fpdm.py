"""Original fixed-point diffusion checkpoints (arXiv 2401.08741) to `FixedPointDiTTransformer2DModel`."""

from ..models.transformer_fixed_point_dit import SIZES, FixedPointDiTTransformer2DModel
from .checkpoint import Checkpoint, state_dict_and_arguments
from .dit import StateDict, common_config, convert_block, convert_outer_layers, count_blocks, refuse_leftovers


def convert_fpdm(
    checkpoint: Checkpoint,
    *,
    num_attention_heads: int | None = None,
    num_iterations: int | None = None,
    pre_post_timestep_conditioning: bool | None = None,
    flow: bool = False,
    weights: str = "ema",
) -> FixedPointDiTTransformer2DModel:
    """An original fixed-point DiT with the same outputs (to float32 rounding).

    Args:
        checkpoint: file or mapping: a bare state dict, or a training checkpoint with "ema", "model" and "args".
        num_attention_heads: heads, needed for widths other than the published 384, 768, 1024 and 1152.
        num_iterations: default iterations of a call; by default the depth of the DiT of that width minus the pre and post
            blocks.
        pre_post_timestep_conditioning: whether pre blocks, post blocks and output see the timestep. The weights do not tell;
            it is read from the arguments in a training checkpoint, and must be given for a bare state dict.
        flow: the model was trained with the original's rectified flow, whose velocity points from noise to data. The output
            layer is negated, so that it predicts the "flow_prediction" of diffusers.
        weights: "ema" or "model", which weights of a training checkpoint to take.

    Raises:
        ValueError: on unreadable files, keys that do not belong to the model, or a setting that has to be given.
    """
    original, arguments = state_dict_and_arguments(checkpoint, weights)
    config = common_config(original, num_attention_heads)
    if pre_post_timestep_conditioning is None:
        pre_post_timestep_conditioning = arguments.get("fixed_point_pre_post_timestep_conditioning")
    if pre_post_timestep_conditioning is None:
        raise ValueError(
            "`pre_post_timestep_conditioning` must be given: the checkpoint does not record it. The published training "
            "script uses False."
        )
    num_pre, num_post = count_blocks(original, "blocks_pre"), count_blocks(original, "blocks_post")
    if num_iterations is None:
        depths = {width: depth for depth, width, _ in SIZES.values()}
        dim = config["num_attention_heads"] * config["attention_head_dim"]
        if dim not in depths:
            raise ValueError(f"`num_iterations` must be given: {dim} is not the width of a published model.")
        num_iterations = depths[dim] - num_pre - num_post

    converted, rest = convert_outer_layers(original)
    converted |= _convert_embedders(rest, config)
    for index in range(num_pre):
        converted |= _convert_block(rest, f"blocks_pre.{index}", index)
    converted |= _convert_block(rest, "block_fixed_point", num_pre)
    converted |= _convert_injection(rest, f"transformer_blocks.{num_pre}")
    for index in range(num_post):
        converted |= _convert_block(rest, f"blocks_post.{index}", num_pre + 1 + index)
    refuse_leftovers(rest, "fixed-point DiT")
    if flow:
        converted |= {key: -value for key, value in converted.items() if key.startswith("proj_out_2.")}

    model = FixedPointDiTTransformer2DModel(
        **config,
        num_pre_layers=num_pre,
        num_post_layers=num_post,
        num_iterations=num_iterations,
        pre_post_timestep_conditioning=pre_post_timestep_conditioning,
    )
    model.load_state_dict(converted)
    return model.eval()


def _convert_embedders(rest: StateDict, config: dict) -> StateDict:
    """Timestep MLP and label table or projection; adds what they say about conditioning to `config`."""
    names = {"time_embedder.linear_1": "t_embedder.mlp.0", "time_embedder.linear_2": "t_embedder.mlp.2"}
    converted = {f"{new}.{kind}": rest.pop(f"{old}.{kind}") for new, old in names.items() for kind in ("weight", "bias")}
    if "y_embedder.embedding_table.weight" in rest:
        converted["class_embedder.weight"] = rest.pop("y_embedder.embedding_table.weight")
        config["num_classes"] = converted["class_embedder.weight"].shape[0] - 1
    else:
        for kind in ("weight", "bias"):
            converted[f"conditioning_embedder.{kind}"] = rest.pop(f"y_embedder.embedding_projection.{kind}")
        config |= {"num_classes": None, "conditioning_dim": converted["conditioning_embedder.weight"].shape[1]}
    return converted


def _convert_block(rest: StateDict, source: str, index: int) -> StateDict:
    target = f"transformer_blocks.{index}"
    return convert_block(rest, source, target, attention="attn", modulation=f"modulations.{index}")


def _convert_injection(rest: StateDict, target: str) -> StateDict:
    """`fc1([z; inj])` becomes `state_proj(z) + injection_out(inj)`: the columns of its weight are split."""
    state, injection = rest.pop("block_fixed_point_projection_fc1.weight").chunk(2, dim=1)
    converted = {
        f"{target}.state_proj.weight": state.clone(),
        "injection_out.weight": injection.clone(),
        "injection_out.bias": rest.pop("block_fixed_point_projection_fc1.bias"),
    }
    for kind in ("weight", "bias"):
        converted[f"{target}.merge_proj.{kind}"] = rest.pop(f"block_fixed_point_projection_fc2.{kind}")
        converted[f"injection_in.{kind}"] = rest.pop(f"block_pre_projection.{kind}")
    return converted
