"""Original AMED predictors (arXiv 2312.00094) to `AMEDPredictor`."""

from ..models.amed_predictor import AMEDPredictor
from .checkpoint import Checkpoint, state_dict_and_arguments

NAMES = {
    "time_layer": "map_layer0",
    "feature_layer_1": "enc_layer0",
    "feature_layer_2": "enc_layer1",
    "r_head": "fc_r",
    "scale_dir_head": "fc_scale_dir",
    "scale_time_head": "fc_scale_time",
}


def convert_amed(checkpoint: Checkpoint, *, scale_dir: float, scale_time: float) -> AMEDPredictor:
    """An original predictor with the same outputs.

    Args:
        checkpoint: file or mapping: a state dict.
        scale_dir, scale_time: half-widths of the two scales. The weights only tell whether they are 0.

    Raises:
        ValueError: on unreadable files, keys that do not belong to a predictor, or scales that contradict the weights.
    """
    original, _ = state_dict_and_arguments(checkpoint)
    for argument, value in (("scale_dir", scale_dir), ("scale_time", scale_time)):
        if (value > 0) != (f"fc_{argument}.weight" in original):
            raise ValueError(f"`{argument}` is {value}, but the checkpoint {'lacks' if value > 0 else 'has'} a layer for it.")
    converted, rest = {}, dict(original)
    for new, old in NAMES.items():
        for kind in ("weight", "bias"):
            if f"{old}.{kind}" in rest:
                converted[f"{new}.{kind}"] = rest.pop(f"{old}.{kind}")
    if rest or "feature_layer_1.weight" not in converted:
        raise ValueError(f"The checkpoint is not an AMED predictor: it has no place for {sorted(rest)[:5]}.")
    hidden_dim, _ = converted["feature_layer_1.weight"].shape
    predictor = AMEDPredictor(
        hidden_dim=hidden_dim,
        feature_dim=converted["feature_layer_2.weight"].shape[0],
        time_channels=converted["time_layer.weight"].shape[0],
        scale_dir=scale_dir,
        scale_time=scale_time,
    )
    predictor.load_state_dict(converted)
    return predictor.eval()
