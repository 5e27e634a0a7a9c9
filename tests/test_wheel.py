"""What users install: the wheel alone, in a process that cannot see the source tree."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("diffusers_fastdiff", "examples", "setup.py", "pyproject.toml", "README.md", "LICENSE")
EXAMPLES = """
import json, sys, diffusers_fastdiff
for name, code in json.load(open(sys.argv[1])).items():
    names = {}
    try:
        exec(compile(code, name, "exec"), names)
    except Exception as error:
        sys.exit(f"{name}: {type(error).__name__}: {error}")
print(diffusers_fastdiff.__file__)
"""
IMPORTS = """
import sys, time, diffusers
from diffusers import DiTPipeline
before, start = set(sys.modules), time.perf_counter()
import diffusers_fastdiff
seconds = time.perf_counter() - start
print(json.dumps([sorted({name.partition(".")[0] for name in set(sys.modules) - before}), seconds]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(source / "dist"), str(source)]
    subprocess.run(command, check=True, capture_output=True, cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """Runs code in a fresh process that finds the package in the wheel only."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), str(wheel)], check=True)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    variables = os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def python(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        result = subprocess.run(command, env=variables, cwd=elsewhere, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        assert str(ROOT) not in result.stdout
        return result.stdout

    python.folder = folder
    return python


def test_contents(wheel):
    assert wheel.stat().st_size < 8_000_000
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"diffusers_fastdiff"}
    assert [name for name in names if "/examples/" in name] == ["diffusers_fastdiff/examples/train_amed.py"]
    ends = {Path(name).suffix for name in names if ".dist-info" not in name}
    assert ends <= {".py", ".json", ".safetensors", ".md", ".typed"}


def docstring_examples() -> dict[str, str]:
    """Those that need nothing but the package."""
    found = {}
    for path in (ROOT / "diffusers_fastdiff").rglob("*.py"):
        lines = re.findall(r"^ *>>> (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        if any("import" in line for line in lines):
            found[str(path.relative_to(ROOT))] = "\n".join(lines)
    return found


def test_every_example_runs(python, tmp_path):
    pages = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    examples = docstring_examples()
    for page in pages:
        blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        examples |= {f"{page.name} {number}": block for number, block in enumerate(blocks)}
    assert len(examples) >= 12
    (tmp_path / "examples.json").write_text(json.dumps(examples))
    assert str(python.folder) in python("-c", EXAMPLES, str(tmp_path / "examples.json"))


def test_importing_adds_little_to_diffusers(python):
    """diffusers loads lazily what it has; what a pipeline needs of it is there in either case."""
    packages, seconds = json.loads(python("-c", "import json" + IMPORTS))
    assert set(packages) <= {"diffusers_fastdiff", "diffusers", "torch"}, packages
    assert seconds < 1.0  # 0.07 on a quiet machine; a test is no place for a stop-watch


def test_command_line(python, tmp_path):
    fastdiff = str(python.folder / "bin" / "fastdiff")
    python(fastdiff, "sample", "--output", str(tmp_path / "digits.png"), "--rows", "1", "--num_inference_steps", "3")
    assert (tmp_path / "digits.png").stat().st_size > 1000
    flags = [
        "--student=lms",
        "--nfe=3",
        "--max_train_steps=2",
        "--num_trajectories=8",
        "--held_out=4",
        "--teacher_evaluations=6",
    ]
    python(fastdiff, "train-solver", *flags, "--train_batch_size=4", f"--output_dir={tmp_path / 'solver'}")
    assert (tmp_path / "solver" / "scheduler_config.json").exists()


@pytest.mark.slow
def test_an_empty_environment(wheel, tmp_path):
    """Everything from the registries; the core dependencies are enough to draw."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    bin_folder = tmp_path / "venv" / "bin"
    subprocess.run([bin_folder / "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), str(wheel)], check=True)
    command = [bin_folder / "fastdiff", "sample", "--output", str(tmp_path / "digits.png"), "--rows", "1"]
    subprocess.run(command, check=True, cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    installed = subprocess.run([bin_folder / "pip", "list"], check=True, capture_output=True, text=True).stdout.lower()
    assert not {"matplotlib", "datasets", "peft", "scikit-learn", "scipy", "torchmetrics"} & set(installed.split())
