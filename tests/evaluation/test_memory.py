"""Fifty thousand images with features of the size of Inception's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images(tmp_path):
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("measure_memory.py")), "50000", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    measured = json.loads(result.stdout.splitlines()[-1])
    assert measured["num_images"] == 50_000
    assert measured["peak_mebibytes"] < 2000
