"""The oldest supported release of diffusers, from the registry, in the place of the installed one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = ("schedulers/test_common.py", "models", "pipelines", "hooks", "test_combinations.py")


@pytest.mark.slow
def test_oldest_diffusers(tmp_path):
    oldest = re.search(r'"diffusers>=([\d.]+)"', (ROOT / "setup.py").read_text())[1]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), f"diffusers=={oldest}.*"]
    subprocess.run(command, check=True)
    variables = os.environ | {"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    version = [sys.executable, "-c", "import diffusers; print(diffusers.__version__)"]
    assert subprocess.run(version, env=variables, capture_output=True, text=True).stdout.startswith(oldest)
    # warnings about this package's own calls are errors, see pyproject.toml: nothing deprecated is used
    command = [sys.executable, "-m", "pytest", "-q", *(str(ROOT / "tests" / name) for name in TESTS)]
    result = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
