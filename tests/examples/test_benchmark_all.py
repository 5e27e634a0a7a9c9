"""The benchmark of everything: what it writes, what its verdicts mean, and that nothing is measured twice."""

import csv
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from diffusers_fastdiff.evaluation.peak_memory import peak_memory

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmark_all.py"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    def run(*flags: str) -> Path:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), f"--output_dir={tmp_path}", *flags])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        capsys.readouterr()
        return tmp_path

    return run


def test_table_plot_and_resumption(run):
    flags = ["--models", "digits-fpdm", "--steps", "4", "--num_images=65", "--seeds", "0", "--reference_steps=8"]
    folder = run(*flags)
    content = json.loads((folder / "benchmark-all.json").read_text())
    assert content["settings"]["num_images"] == 65
    assert content["versions"]["torch"] == torch.__version__
    rows = {(row["scheduler"], row["besides"]): row for row in content["rows"]}
    plain = rows["DPM++(2M)", ""]
    assert plain["calls"] == 4
    assert plain["blocks"] == 4 * 8
    fewer = next(row for (_, besides), row in rows.items() if besides.startswith("3 iterations"))
    assert fewer["blocks"] == 4 * 5
    skipped = rows["DPM++(2M)", "Faster Diffusion, every 2, hold"]
    assert skipped["blocks"] < plain["blocks"]
    for row in rows.values():
        assert row["error low"] <= row["error"] <= row["error high"]
        assert row["MiB"] > 0
    with (folder / "benchmark-all.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert (folder / "benchmark-all.png").stat().st_size > 10_000
    kept = (folder / "measurements.json").stat().st_mtime_ns
    run(*flags)
    assert (folder / "measurements.json").stat().st_mtime_ns == kept
    assert json.loads((folder / "benchmark-all.json").read_text())["rows"] == content["rows"]


def test_verdicts():
    entry = lambda by, calls, time, error, model="a": {  # noqa: E731
        "model": model, "by": by, "calls": calls, "milliseconds": time, "error": error
    }  # fmt: skip
    entries = [
        entry("diffusers", 5, 1.0, 0.4), entry("diffusers", 10, 2.0, 0.1), entry("diffusers", 5, 1.0, 0.01, model="b"),
        entry("ours", 10, 1.5, 0.2), entry("ours", 4, 0.5, 0.2),
    ]  # fmt: skip
    measured = runpy.run_path(str(SCRIPT))["with_verdicts"](entries)
    assert [row["error / calls"] for row in measured] == ["", "", "", 2.0, ""]
    assert [row["error / time"] for row in measured] == ["", "", "", 0.5, ""]


@pytest.mark.parametrize(
    ("flags", "word"),
    [(["--num_images=64"], "num_images"), (["--steps", "1"], "steps"), (["--steps", "300"], "reference_steps"), (
        ["--seeds", "1", "1"], "seeds")],
)  # fmt: skip
def test_bad_flags(monkeypatch, capsys, flags, word):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert word in capsys.readouterr().err


def test_peak_memory_counts_what_lives_together():
    with peak_memory("cpu") as peak:
        first = torch.zeros(1000, 1000)
        second = first + 1
        del first
        third = second * 2
        view = third.T
        copy = view.reshape(-1)
        del second, copy
        torch.zeros(2, 1000, 100)
    assert peak.bytes == 3 * 4_000_000
