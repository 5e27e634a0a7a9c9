"""The embedded models: complete pipelines of a few hundred kilobytes each, for demos, tests and solver research."""

import json
from pathlib import Path

import diffusers
import torch
from diffusers import DiTPipeline

from ..models.autoencoder_pixel import PixelAutoencoder
from ..models.transformer_faster_dit import FasterDiffusionDiTTransformer2DModel
from ..models.transformer_fixed_point_dit import FixedPointDiTTransformer2DModel

_CLASSES = {
    cls.__name__: cls for cls in (FasterDiffusionDiTTransformer2DModel, FixedPointDiTTransformer2DModel, PixelAutoencoder)
}
_FOLDER = Path(__file__).parent


def available_pretrained() -> list[str]:
    """Names that `load_pretrained` knows."""
    return sorted(path.parent.name for path in _FOLDER.glob("*/model_index.json"))


def load_pretrained(name: str, torch_dtype: torch.dtype = torch.float32) -> DiTPipeline:
    """Load an embedded pipeline; needs no network.

    Args:
        name: "digits-fpdm" (fixed-point DiT), "digits-dit" (plain DiT, 4 layers) or "digits-dit-deep" (plain DiT, more
            layers). All draw 8x8 grey digits by class label, with guidance.
        torch_dtype: precision to run in; the weights are stored in float16.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in available_pretrained():
        raise ValueError(f"`name` must be one of {available_pretrained()}, got {name!r}.")
    folder = _FOLDER / name
    index = json.loads((folder / "model_index.json").read_text())
    # Component by component, because `DiTPipeline.from_pretrained` warns about every class that is not its own.
    transformer, vae = (
        _CLASSES[index[key][1]].from_pretrained(folder, subfolder=key, torch_dtype=torch_dtype)
        for key in ("transformer", "vae")
    )
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(folder, subfolder="scheduler")
    return DiTPipeline(transformer, vae, scheduler)
