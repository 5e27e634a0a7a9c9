"""The `fastdiff` command as its users meet it."""

import subprocess
import sys

import pytest
from PIL import Image

from diffusers_fastdiff import IPNDMMultistepScheduler
from diffusers_fastdiff.cli import main


def test_sample_makes_a_labelled_grid_and_says_what_it_did(tmp_path, capsys):
    output = tmp_path / "grid.png"
    assert main(["sample", "--rows=2", "--num_inference_steps=3", f"--output={output}"]) == 0
    printed = capsys.readouterr()
    assert "20 images, 3 model evaluations" in printed.out
    assert str(output) in printed.out
    assert "3/3" in printed.err  # the progress bar
    assert Image.open(output).size == (10 * 52, 2 * (52 + 14))


def test_sample_with_a_budget_and_reuse(tmp_path, capsys):
    arguments = ["sample", "--rows=1", "--num_inference_steps=4", f"--output={tmp_path / 'a.png'}"]
    assert main([*arguments, "--iteration_budget=10", "--allocation=decreasing", "--reuse_solution"]) == 0
    assert main([*arguments, "--model=digits-dit"]) == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--model=/nothing"], "The model '/nothing' is no embedded pipeline"),
        (["--rows=0"], "--rows"),
        (["--labels", "11"], "class_labels"),
        (["--iteration_budget=2"], "budget"),
        (["--iteration_budget=9", "--allocation=random"], "allocation"),
        (["--model=digits-dit", "--reuse_solution"], "FixedPointDiT"),
        (["--output=/proc/nowhere/a.png"], "--output"),
    ],
)
def test_mistakes_are_explained_in_one_line(arguments, word, tmp_path, capsys):
    common = ["sample", "--num_inference_steps=3", f"--output={tmp_path / 'a.png'}"]
    assert main([*common, *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert word in line
    assert not (tmp_path / "a.png").exists()


def test_search_grid_saves_a_scheduler(tmp_path, capsys):
    assert main(["search-grid", str(tmp_path), "--num_inference_steps=4"]) == 0
    scheduler = IPNDMMultistepScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(4)
    assert len(scheduler.config.sigmas) == 4
    assert capsys.readouterr().out.startswith(f"{scheduler.config.sigmas[0]:.4g} ")
    with pytest.raises(ValueError, match="must be 4"):
        scheduler.set_timesteps(5)
    assert main(["search-grid", str(tmp_path), "--num_inference_steps=1"]) == 2


def test_help_teaches():
    result = subprocess.run([sys.executable, "-m", "diffusers_fastdiff.cli", "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert "sample" in result.stdout
    assert "convert" in result.stdout
