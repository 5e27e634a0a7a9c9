"""The comparison with and without momentum, at the smallest size that runs."""

import csv
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
SCRIPT = Path(__file__).parents[2] / "examples" / "benchmark_fdm.py"
FLAGS = ["--max_train_steps=2", "--model_channels=8", "--num_images=12", "--curve_points=2", "--curve_num_inference_steps=3"]


def run(monkeypatch, folder: Path, *flags: str) -> list[dict]:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), f"--output_dir={folder}", *FLAGS, "--num_inference_steps", "1", "3", *flags])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    with (folder / "fdm.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_table_plot_and_resumption(monkeypatch, tmp_path, capsys):
    rows = run(monkeypatch, tmp_path, "--formulations", "edm", "--seeds", "0")
    assert {row["formulation"] for row in rows} == {"EDM", "EDM-FDM"}
    assert {(row["images"], row["evaluations"]) for row in rows} == {("128", "3"), ("256", "1"), ("256", "3")}
    assert (tmp_path / "fdm.png").stat().st_size > 1000
    assert "undecided" in (tmp_path / "fdm.md").read_text()
    kept = tmp_path / "runs" / "edm-0.json"
    written = kept.stat().st_mtime_ns
    again = run(monkeypatch, tmp_path, "--formulations", "edm", "vp", "--seeds", "0", "1")
    assert kept.stat().st_mtime_ns == written
    assert {(row["formulation"], row["seeds"]) for row in again} == {(n, "2") for n in ("EDM", "EDM-FDM", "VP", "VP-FDM")}
    run(monkeypatch, tmp_path, "--formulations", "edm", "--seeds", "0", "--learning_rate", "2e-3")
    assert kept.stat().st_mtime_ns != written  # other settings, other run
    capsys.readouterr()


def test_even_numbers_are_refused(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, "--curve_num_inference_steps=4")
    assert "odd" in capsys.readouterr().err
