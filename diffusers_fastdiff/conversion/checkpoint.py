"""Reading checkpoint files without executing anything in them."""

import argparse
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file

Checkpoint = str | Path | Mapping[str, Any]

_READ_ERRORS = (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, safetensors.SafetensorError, ValueError)


def read_checkpoint(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The content of a checkpoint file: safetensors, or a PyTorch file of tensors, containers and parsed arguments.

    Args:
        checkpoint: a path, or a mapping that has been read already (returned as it is).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or holds anything but tensors and plain containers. PyTorch's own restricted
            reader refuses such a file before any of it runs.
    """
    if isinstance(checkpoint, Mapping):
        return checkpoint
    path = Path(checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f"`checkpoint` {str(path)!r} is not a file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _READ_ERRORS as error:
        raise ValueError(f"`checkpoint` {str(path)!r} cannot be read as a plain checkpoint: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"`checkpoint` {str(path)!r} must hold a state dict, got {type(content).__name__}.")
    return content


def state_dict_and_arguments(checkpoint: Checkpoint, weights: str = "ema") -> tuple[dict[str, torch.Tensor], dict]:
    """State dict and training arguments (often empty) of a training checkpoint or of a bare state dict.

    Args:
        checkpoint: see `read_checkpoint`. Training checkpoints hold "model", "ema" and "args".
        weights: which of the two sets of weights to take from a training checkpoint, "ema" or "model".

    Raises:
        ValueError: if a training checkpoint lacks the wanted weights or values are not tensors.
    """
    content = read_checkpoint(checkpoint)
    arguments = content.get("args", {})
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else dict(arguments)
    if "model" in content or "ema" in content:
        if weights not in content:
            raise ValueError(f"`weights` is {weights!r}, but the checkpoint holds only {sorted(content)}.")
        content = content[weights]
    state_dict = {key.removeprefix("module."): value for key, value in content.items()}
    strangers = [key for key, value in state_dict.items() if not isinstance(value, torch.Tensor)]
    if strangers or not state_dict:
        raise ValueError(f"The checkpoint is no state dict: {strangers[:5] or 'it is empty'}.")
    return state_dict, arguments
