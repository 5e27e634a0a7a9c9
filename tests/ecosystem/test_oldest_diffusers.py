"""The oldest supported release of diffusers, from the registry, in the place of the installed one."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = ("schedulers/test_common.py", "models", "pipelines", "hooks", "test_combinations.py")


@pytest.mark.slow
def test_oldest_diffusers():
    with tempfile.TemporaryDirectory() as folder:  # not of pytest, which empties those of older runs
        check(folder)


def check(folder: str) -> None:
    oldest = re.search(r'"diffusers>=([\d.]+)"', (ROOT / "setup.py").read_text())[1]
    install = [sys.executable, "-m", "pip", "install", "-q", "--target", folder]
    subprocess.run([*install, "--no-deps", f"diffusers=={oldest}.*"], check=True)
    subprocess.run([*install, "httpx<1"], check=True)  # what it needs besides, and newer ones do not
    variables = os.environ | {"PYTHONPATH": folder, "HF_HUB_OFFLINE": "0"}  # it loads no LoRA from a folder when offline
    version = [sys.executable, "-c", "import diffusers; print(diffusers.__version__)"]
    assert subprocess.run(version, env=variables, capture_output=True, text=True).stdout.startswith(oldest)
    # warnings about this package's own calls are errors, see pyproject.toml: nothing deprecated is used
    command = [sys.executable, "-m", "pytest", "-q", *(str(ROOT / "tests" / name) for name in TESTS)]
    result = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
