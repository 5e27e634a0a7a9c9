"""Training checkpoints that are complete or do not exist.

A checkpoint is written under a name that nothing reads and renamed when every process has finished, so a kill at any moment
leaves the previous one. It holds safetensors, JSON, and optimizer and random states that accelerate reads without executing.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

_PREFIX, _INCOMPLETE = "checkpoint-", ".incomplete-"


def find_checkpoint(output_dir: str | Path, wanted: str) -> Path | None:
    """The folder of checkpoint `wanted`: "latest" (None if there is no checkpoint yet) or a path or name of one.

    Raises:
        ValueError: if a named checkpoint does not exist or is not complete.
    """
    folders = sorted(Path(output_dir).glob(f"{_PREFIX}*"), key=lambda path: int(path.name.removeprefix(_PREFIX)))
    if wanted == "latest":
        return folders[-1] if folders else None
    for path in (Path(wanted), Path(output_dir) / wanted):
        if (path / "training_state.json").is_file():
            return path
    names = [path.name for path in folders]
    raise ValueError(f"`resume_from_checkpoint` {wanted!r} is no complete checkpoint; {output_dir} has {names}.")


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | Path,
    step: int,
    settings: dict[str, Any],
    ema: EMAModel | None = None,
    total_limit: int | None = None,
) -> None:
    """Write the state after `step` optimisation steps. Every process must call it."""
    output_dir = Path(output_dir)
    partial, final = output_dir / f"{_INCOMPLETE}{step}", output_dir / f"{_PREFIX}{step}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(partial)
    if accelerator.is_main_process:
        if ema is not None:
            shadow = {str(index): value.contiguous() for index, value in enumerate(ema.shadow_params)}
            save_file(shadow, partial / "ema.safetensors")
        state = {"step": step, "ema_step": ema.optimization_step if ema else None, "settings": settings}
        (partial / "training_state.json").write_text(json.dumps(state, indent=2))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _discard(final)
        partial.rename(final)
        _prune(output_dir, total_limit)


def load_checkpoint(accelerator: Accelerator, path: Path, settings: dict[str, Any], ema: EMAModel | None = None) -> int:
    """Restore everything and return the number of steps done.

    Raises:
        ValueError: if the checkpoint belongs to a run with other settings, which it could only continue as a third run.
    """
    state = json.loads((path / "training_state.json").read_text())
    saved = state["settings"]
    different = [f"{key} ({saved.get(key)!r}, now {value!r})" for key, value in settings.items() if saved.get(key) != value]
    if different:
        raise ValueError(
            f"`resume_from_checkpoint` {str(path)!r} was made with other settings: {', '.join(different)}. Use the same, or "
            "start a new run in another `output_dir`."
        )
    accelerator.load_state(path)
    if ema is not None:
        shadow = load_file(path / "ema.safetensors")
        with torch.no_grad():
            for index, value in enumerate(ema.shadow_params):
                value.copy_(shadow[str(index)])
        ema.optimization_step = state["ema_step"]
    return state["step"]


def _prune(output_dir: Path, total_limit: int | None) -> None:
    folders = sorted(output_dir.glob(f"{_PREFIX}*"), key=lambda path: int(path.name.removeprefix(_PREFIX)))
    for path in folders[: -total_limit if total_limit else 0]:
        _discard(path)
    for path in output_dir.glob(f"{_INCOMPLETE}*"):
        shutil.rmtree(path)


def _discard(path: Path) -> None:
    """Delete a checkpoint so that no half of it is ever taken for a whole one."""
    if path.exists():
        doomed = path.with_name(f"{_INCOMPLETE}{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)
