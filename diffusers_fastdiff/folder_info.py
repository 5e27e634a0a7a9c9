"""What is embedded, and what a saved folder holds: read from JSON and headers, nothing is built or followed."""

import json
import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .pretrained import available_pretrained, available_solvers

_PRETRAINED = Path(__file__).parent / "pretrained"

INDEX, MODEL_CONFIG, SCHEDULER_CONFIG = "model_index.json", "config.json", "scheduler_config.json"


def describe(name: str) -> dict[str, Any]:
    """Facts about an embedded pipeline or solver by name, or about a folder of a pipeline, model or scheduler.

    Raises:
        ValueError: for a name that is neither, or a folder with none of them.
    """
    folder = _folder_of(name)
    if not folder.is_dir():
        known = available_pretrained() + available_solvers()
        raise ValueError(
            f"{name!r} is no folder and not embedded; embedded are {known}. Names on the Hub: download them first."
        )
    if (folder / INDEX).is_file():
        return _describe_pipeline(folder)
    if (folder / SCHEDULER_CONFIG).is_file():
        return _describe_scheduler(folder)
    if (folder / MODEL_CONFIG).is_file():
        return _describe_model(folder)
    raise ValueError(f"{name!r} holds none of {INDEX}, {SCHEDULER_CONFIG} and {MODEL_CONFIG}: it is no folder of diffusers.")


def describe_embedded() -> dict[str, dict[str, Any]]:
    """Facts about everything that is embedded, by name."""
    return {name: describe(name) for name in available_pretrained() + available_solvers()}


def summarize(facts: dict[str, Any]) -> str:
    """One line."""
    words = [str(facts["class"])]
    if "components" in facts:
        parts = facts["components"]
        parameters = sum(part.get("parameters") or 0 for part in parts.values())
        words += [f"{parameters:,} parameters", ", ".join(f"{key} {part['class']}" for key, part in parts.items())]
    elif "parameters" in facts:
        words.append("no safetensors weights" if facts["parameters"] is None else f"{facts['parameters']:,} parameters")
    if facts.get("learned_for"):
        fit = facts["learned_for"]
        words.append(
            f"{fit.get('num_inference_steps')} evaluations at guidance {fit.get('guidance_scale')} of {fit.get('model_id')}"
        )
    return "; ".join(words)


def _folder_of(name: str) -> Path:
    if name in available_pretrained():
        return _PRETRAINED / name
    return _PRETRAINED / "solvers" / name if name in available_solvers() else Path(name)


def _describe_pipeline(folder: Path) -> dict[str, Any]:
    index = _read(folder / INDEX)
    components = {}
    for key, entry in index.items():
        if key.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
            continue
        library, class_name = entry
        known = {"class": class_name, "library": library}
        part = folder / key
        if (part / SCHEDULER_CONFIG).is_file():
            known = _describe_scheduler(part) | known
        elif (part / MODEL_CONFIG).is_file():
            known = _describe_model(part) | known
        components[key] = known
    return {"class": index.get("_class_name"), "components": components}


def _describe_scheduler(folder: Path) -> dict[str, Any]:
    config = _read(folder / SCHEDULER_CONFIG)
    facts: dict[str, Any] = {"class": config.get("_class_name")}
    for key in ("student", "mode", "solver", "solver_order", "process", "prediction_type"):
        if config.get(key) is not None:
            facts[key] = config[key]
    if config.get("fitted_to"):
        facts["learned_for"] = config["fitted_to"]
    return facts


def _describe_model(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {"class": _read(folder / MODEL_CONFIG).get("_class_name"), "parameters": None}
    files = sorted(folder.glob("*.safetensors"))
    if files:
        facts["parameters"] = sum(map(_count_numbers, files))
        facts["bytes"] = sum(path.stat().st_size for path in files)
    return facts


def _count_numbers(path: Path) -> int:
    try:
        with safe_open(path, framework="pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is damaged or not safetensors ({error}).") from error
    return sum(math.prod(shape) for shape in shapes)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold an object, got {type(content).__name__}.")
    return content
