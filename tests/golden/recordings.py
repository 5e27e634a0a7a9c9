"""Recordings of the published programs: a .json that explains a .safetensors.

The folder comes from FASTDIFF_GOLDEN; without it, the small subset in the repository is used. Tests take every setting from
the .json, so that they run on recordings with other configurations.
"""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FOLDER = Path(os.environ.get("FASTDIFF_GOLDEN") or Path(__file__).parent / "recordings")


@dataclass(frozen=True)
class Recording:
    path: Path

    @cached_property
    def info(self) -> dict:
        return json.loads(self.path.read_text())

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.path.with_suffix(".safetensors"))

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors whose name starts with `prefix`, without it."""
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


def recordings(pattern: str) -> list:
    """Parameters for all recordings called `pattern`; there has to be at least one."""
    paths = sorted(FOLDER.rglob(f"{pattern}.json"))
    if not paths:
        if os.environ.get("FASTDIFF_GOLDEN"):
            return [pytest.param(None, marks=pytest.mark.skip(reason=f"{FOLDER} has no {pattern}"))]
        raise FileNotFoundError(f"{FOLDER} has no recording {pattern}.json")
    return [pytest.param(Recording(path), id=str(path.relative_to(FOLDER).with_suffix(""))) for path in paths]


def assert_relative(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Largest difference at most `tolerance` times the largest expected value."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    assert error <= tolerance, f"relative error {error:.2e}"
