"""The `fastdiff` command as its users meet it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from diffusers_fastdiff import AMEDScheduler, IPNDMMultistepScheduler, load_pretrained
from diffusers_fastdiff.cli import main
from diffusers_fastdiff.pretrained import available_pretrained, available_solvers
from tests.hooks.tiny_pipelines import stable_diffusion


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


def test_sample_with_every_kind_of_pipeline_and_a_solver(tmp_path, capsys):
    output = tmp_path / "a.png"
    common = ["sample", "--rows=1", "--guidance_scale=1", f"--output={output}", "--json"]
    for flags, evaluations in (
        (["--model=digits-edm", "--num_inference_steps=5"], 5),
        (["--model=digits-cld", "--num_inference_steps=6"], 6),
        (["--model=digits-dit", "--solver=digits-dit-lms-5"], 5),
        (["--model=digits-dit", "--solver=digits-dit-amed-5"], 5),
    ):
        assert main([*common, *flags]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["model_evaluations"] == evaluations
        assert result["images"] == 10
        assert result["output"] == str(output)


def run_in_shell(command: str) -> subprocess.CompletedProcess:
    program = f"{sys.executable} -m diffusers_fastdiff.cli"
    return subprocess.run(command.replace("fastdiff", program), shell=True, capture_output=True, text=True)


def test_a_picture_through_a_pipe(tmp_path):
    picture = tmp_path / "digits.png"
    result = run_in_shell(f"fastdiff sample --rows 1 --num_inference_steps 2 --output - | cat > {picture}")
    assert result.returncode == 0, result.stderr
    assert Image.open(picture).size == (10 * 52, 52 + 14)
    assert main(["sample", "--output=-", "--json"]) == 2


def test_a_closed_pipe_is_no_error():
    result = run_in_shell("bash -c 'set -o pipefail; fastdiff info | true'")
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr


def test_info_of_everything_embedded(capsys):
    assert main(["info"]) == 0
    assert "digits-dit-lms-5" in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["versions"]) == {"diffusers_fastdiff", "diffusers", "torch"}
    assert {*available_pretrained(), *available_solvers()} == set(facts["embedded"])
    assert facts["embedded"]["digits-dit-lms-5"]["learned_for"]["num_inference_steps"] == 5


@pytest.mark.parametrize("name", ["digits-fpdm", "digits-edm"])
def test_info_counts_the_parameters(name, tmp_path, capsys):
    pipe = load_pretrained(name)
    pipe.save_pretrained(tmp_path)
    for place in (name, str(tmp_path)):
        assert main(["info", place, "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["class"] == type(pipe).__name__
        part = "transformer" if "transformer" in facts["components"] else "unet"
        assert facts["components"][part]["parameters"] == getattr(pipe, part).num_parameters()
    assert main(["info", str(tmp_path / part)]) == 0
    assert f"{getattr(pipe, part).num_parameters():,} parameters" in capsys.readouterr().out
    assert main(["info", str(tmp_path / "scheduler")]) == 0


def test_info_refuses_what_it_cannot_read(tmp_path, capsys):
    assert main(["info", str(tmp_path / "nothing")]) == 2
    assert main(["info", str(tmp_path)]) == 2
    for content in ("{", "[]", "[" * 100_000):
        (tmp_path / "model_index.json").write_text(content)
        assert main(["info", str(tmp_path)]) == 2
        assert "model_index.json" in capsys.readouterr().err.splitlines()[-1]


def test_train_solver(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--student=ipndm", "--nfe=4", "--max_train_steps=2", "--train_batch_size=4", "--held_out=4", "--static"]
    arguments = list(sys.argv)
    assert main(["train-solver", *flags, "--num_validation_images=2", "--output_dir=solver", "--json"]) == 0
    assert sys.argv == arguments
    result = json.loads(capsys.readouterr().out)
    assert result["output_dir"] == "solver"
    assert {"learned", "plain"} == set(result["error to the teacher"])
    assert AMEDScheduler.from_pretrained("solver").config.fitted_to["num_inference_steps"] == 4
    assert "train_amed.py" in Path("solver/README.md").read_text()
    assert main(["train-solver", "--nfe=0"]) == 2
    assert "--nfe" in capsys.readouterr().err
    with pytest.raises(SystemExit) as status:
        main(["train-solver", "--no_such_flag"])
    assert status.value.code == 2


def test_evaluate_as_json(tmp_path, capsys):
    flags = ["--metrics", "fid", "--bootstrap=0", f"--cache_dir={tmp_path / 'cache'}", "--json"]
    assert main(["evaluate", "digits", *flags]) == 0
    printed = capsys.readouterr()
    assert "fid" in json.loads(printed.out)["metrics"]
    assert main(["evaluate", "/nothing", *flags]) == 2


def test_a_damaged_pipeline_is_explained(tmp_path, capsys):
    load_pretrained("digits-dit").save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "NoSuchPipeline"}))
    assert main(["sample", f"--model={tmp_path}", f"--output={tmp_path / 'a.png'}"]) == 2
    assert "NoSuchPipeline" in capsys.readouterr().err.splitlines()[-1]


def test_other_pipelines_are_refused_by_sample(tmp_path, capsys):
    stable_diffusion(tmp_path).save_pretrained(tmp_path / "pipe")
    assert main(["sample", f"--model={tmp_path / 'pipe'}", f"--output={tmp_path / 'a.png'}"]) == 2
    assert "StableDiffusionPipeline" in capsys.readouterr().err.splitlines()[-1]


def test_help_teaches():
    result = run_in_shell("fastdiff --help")
    assert result.returncode == 0
    for command in ("sample", "train-solver", "convert", "search-grid", "evaluate", "info", "examples:", "exit status"):
        assert command in result.stdout
    assert "--student" in run_in_shell("fastdiff train-solver --help").stdout
    for command in ("sample", "convert", "search-grid", "evaluate", "info"):
        with pytest.raises(SystemExit) as status:
            main([command, "--no_such_flag", *(["a", "b"] if command == "convert" else ["a"])])
        assert status.value.code == 2
