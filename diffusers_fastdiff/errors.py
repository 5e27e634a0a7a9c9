"""Errors that name the remedy."""

import importlib
import os
from pathlib import Path
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Raises:
        ImportError: saying which extra of this package brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"This needs `{package}`, which is not installed. Install it with `pip install 'diffusers_fastdiff[{extra}]'`."
        ) from error


def check_writable(folder: str | Path, argument: str = "output_dir") -> Path:
    """Create `folder` if needed and make sure that files can be written to it.

    Raises:
        ValueError: naming the argument, if not.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"`{argument}` {str(folder)!r} cannot be written to ({error.strerror}). Choose another.") from error
    return folder
