"""Running the scripts of examples/, in this process or in others, and looking at what they leave."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
TWO_PROCESSES = ("-m", "torch.distributed.run", "--nproc_per_node=2")  # `accelerate launch` starts one on a machine without GPU


def run_here(monkeypatch, name: str, *flags: str) -> None:
    """Run examples/<name> in this process, with accelerate as it is in a fresh one."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / "examples" / name), *flags])
    _forget()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        _forget()


def _forget() -> None:
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def start(name: str, *flags: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    """Run examples/<name> in processes of its own."""
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launcher, str(ROOT / "examples" / name), *flags]
    return subprocess.Popen(command, env=os.environ | variables, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def run(name: str, *flags: str, launcher: tuple[str, ...] = ()) -> None:
    process = start(name, *flags, launcher=launcher)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


class Training:
    """A training script with flags that make it small."""

    def __init__(self, name: str, weights: str, *flags: str):
        self.name, self.weights, self.flags = name, weights, flags
        self.script = ROOT / "examples" / name

    def command(self, output_dir: Path, *flags: str) -> list[str]:
        return [self.name, f"--output_dir={output_dir}", *self.flags, *flags]

    def fixture(self):
        """Train in this process: `train(*flags, output_dir=...)` returns the folder."""

        @pytest.fixture
        def train(monkeypatch, tmp_path):
            def train(*flags: str, output_dir: Path = tmp_path / "out") -> Path:
                run_here(monkeypatch, *self.command(output_dir, *flags))
                return output_dir

            return train

        return train

    def run(self, output_dir: Path, *flags: str, launcher: tuple[str, ...] = ()) -> None:
        run(*self.command(output_dir, *flags), launcher=launcher)

    def kill_at_a_checkpoint(self, output_dir: Path, *flags: str, pause: float = 0.0) -> None:
        """SIGKILL after a new checkpoint, in the middle of whatever the process does: training, or writing the next one."""
        process = start(*self.command(output_dir, *flags, "--resume_from_checkpoint=latest"))
        seen = set(output_dir.glob("checkpoint-*"))
        while process.poll() is None and set(output_dir.glob("checkpoint-*")) <= seen:
            time.sleep(0.01)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
        assert all((checkpoint / "training_state.json").exists() for checkpoint in output_dir.glob("checkpoint-*"))

    def assert_same_weights(self, first: Path, second: Path, tolerance: float = 0.0) -> None:
        ours, theirs = load_file(first / self.weights), load_file(second / self.weights)
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance, msg=name)

    def assert_refused(self, train, flags: list[str], word: str, folder: Path) -> None:
        """One line that names the argument, before any work."""
        with pytest.raises(SystemExit) as caught:
            train(*flags)
        assert word in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not list(folder.rglob("*.safetensors"))


def losses(output_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output_dir / "log.jsonl").read_text().splitlines()]
