"""The embedded models and learned solvers, for demos, tests and research: small, offline, safetensors and JSON."""

import importlib
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from ..schedulers.scheduling_amed import AMEDScheduler

_FOLDER = Path(__file__).parent
_SOLVERS = _FOLDER / "solvers"


def available_pretrained() -> list[str]:
    """Names of the embedded pipelines."""
    return sorted(path.parent.name for path in _FOLDER.glob("*/model_index.json"))


def available_solvers() -> list[str]:
    """Names of the embedded learned solvers, `<pipeline>-<student>-<evaluations>[-guidance<scale>]`."""
    return sorted(path.parent.name for path in _SOLVERS.glob("*/scheduler_config.json"))


def load_pretrained(name: str, torch_dtype: torch.dtype = torch.float32) -> DiffusionPipeline | AMEDScheduler:
    """Load an embedded pipeline or learned solver; needs no network.

    Args:
        name: a pipeline: "digits-fpdm" (fixed-point DiT), "digits-dit" (plain DiT, 4 layers), "digits-dit-deep" (8 layers),
            "digits-edm", "digits-cld" or "digits-blur", which draw 8x8 grey digits by class label; or a solver for one of
            them, such as "digits-dit-lms-5".
        torch_dtype: precision of a pipeline; the weights are stored in float16.

    Raises:
        ValueError: for an unknown name.
    """
    if name in available_solvers():
        return AMEDScheduler.from_pretrained(_SOLVERS / name)
    if name not in available_pretrained():
        raise ValueError(f"`name` must be one of {available_pretrained() + available_solvers()}, got {name!r}.")
    folder = _FOLDER / name
    index = json.loads((folder / "model_index.json").read_text())
    # Component by component, because `DiTPipeline.from_pretrained` warns about every class that is not its own.
    entries = {key: entry for key, entry in index.items() if isinstance(entry, list) and entry[0] is not None}
    components = {key: _load(folder, key, entry[0], entry[1], torch_dtype) for key, entry in entries.items()}
    return _find("diffusers_fastdiff", index["_class_name"])(**components)


def open_pipeline(name: str, **kwargs: Any) -> DiffusionPipeline:
    """An embedded pipeline by name, or any other by folder or Hub name with `DiffusionPipeline.from_pretrained(**kwargs)`.

    Raises:
        ValueError: for a name that is neither.
    """
    if name in available_pretrained():
        return load_pretrained(name)
    try:
        return _pipeline_class(name).from_pretrained(name, **{key: value for key, value in kwargs.items() if value is not None})
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The model {name!r} is no embedded pipeline ({available_pretrained()}) and cannot be loaded from a folder or the "
            f"Hub: {error}"
        ) from error


def _pipeline_class(name: str) -> type[DiffusionPipeline]:
    """`DiffusionPipeline` finds only the pipelines of diffusers itself."""
    index = Path(name) / "model_index.json"
    if not index.is_file():
        return DiffusionPipeline
    own = getattr(importlib.import_module("diffusers_fastdiff"), str(json.loads(index.read_text())["_class_name"]), None)
    return own if isinstance(own, type) and issubclass(own, DiffusionPipeline) else DiffusionPipeline


def _load(folder: Path, key: str, library: str, class_name: str, torch_dtype: torch.dtype) -> Any:
    options = {} if "scheduler" in key else {"torch_dtype": torch_dtype}
    return _find(library, class_name).from_pretrained(folder, subfolder=key, **options)


def _find(library: str, class_name: str) -> Any:
    own = getattr(importlib.import_module("diffusers_fastdiff"), class_name, None)
    return own if own is not None and library == "diffusers_fastdiff" else getattr(diffusers, class_name)
