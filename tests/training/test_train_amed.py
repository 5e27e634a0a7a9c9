"""The solver training script as its users run it, on tiny pipelines of the real classes."""

import json
from pathlib import Path

import pytest
import torch

from diffusers_fastdiff import AMEDScheduler
from diffusers_fastdiff.numerics.solver_methods import Solver
from diffusers_fastdiff.training.linear_distillation import LearnableLinearSolver
from tests.hooks import tiny_pipelines as tiny
from tests.training.scripts import TWO_PROCESSES, run, run_here

TINY = [
    "--train_batch_size=4", "--max_train_steps=3", "--logging_steps=1", "--checkpointing_steps=2", "--held_out=4",
    "--num_trajectories=8", "--teacher_evaluations=6", "--num_validation_images=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def dit_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dit")
    tiny.dit().save_pretrained(folder)
    return folder


def command(pipeline: Path, output_dir: Path, *flags: str) -> list[str]:
    names = [f"--pretrained_model_name_or_path={pipeline}", f"--output_dir={output_dir}"]
    return ["train_amed.py", *names, *TINY, *flags]


@pytest.fixture
def train(monkeypatch, dit_folder, tmp_path):
    def train(*flags: str, output_dir: Path = tmp_path / "out", pipeline: Path = dit_folder) -> Path:
        run_here(monkeypatch, *command(pipeline, output_dir, *flags))
        return output_dir

    return train


def errors(folder: Path) -> dict[str, float]:
    return json.loads((folder / "report.json").read_text())["error to the teacher"]


def numbers(folder: Path):
    """Everything that was learned."""
    scheduler = AMEDScheduler.from_pretrained(folder)
    if scheduler.predictor is not None:
        return scheduler.predictor.state_dict()
    return scheduler.config.linear_solver or scheduler.config.coefficients


@pytest.mark.parametrize(
    "flags",
    [
        ["--student=amed", "--export_static", "--initialization=published"],
        ["--student=dpm2", "--nfe=4", "--teacher=dpm2", "--scale_time=0"],
        ["--student=dpmpp", "--solver_order=3", "--teacher=dpmpp", "--no-predict_x0", "--no-lower_order_final"],
        ["--student=euler", "--static", "--guidance_scale=2", "--sigma_schedule=logsnr", "--sigma_max=20"],
        ["--student=ipndm", "--solver_order=4", "--teacher=ipndm", "--teacher_points=2", "--search_grid"],
        ["--student=ipndm", "--objective=end", "--gradient_accumulation_steps=2"],
        ["--student=lms", "--nfe=3", "--guidance_scale=2", "--gradient_checkpointing"],
        ["--student=lms", "--nfe=2", "--ingredients", "weights", "--sigmas", "20", "1"],
    ],
)
def test_every_student_is_learned_and_runs_in_the_pipeline(train, flags):
    folder = train(*flags)
    scheduler = AMEDScheduler.from_pretrained(folder)
    pipe = tiny.dit()
    scheduler.attach(pipe)
    fitted = scheduler.config.fitted_to
    images = tiny.draw(pipe, fitted["num_inference_steps"], guidance_scale=fitted["guidance_scale"])
    assert bool(images.isfinite().all())
    assert set(errors(folder)) == {"learned", "plain"}
    assert (folder / "samples" / "teacher-learned-plain.png").is_file()
    assert "num_inference_steps=" in (folder / "README.md").read_text()
    if "--export_static" in flags:
        constants = AMEDScheduler.from_pretrained(folder / "static")
        constants.set_timesteps(5)
        assert constants.config.mode == "static"
    if "--static" in flags:
        assert scheduler.config.mode == "static"


@pytest.mark.parametrize("student", ["amed", "ipndm", "dpmpp"])
def test_a_solver_that_has_not_learned_is_the_plain_one(train, student):
    """A learning rate of next to nothing."""
    found = errors(train(f"--student={student}", "--learning_rate=1e-12"))
    assert found["learned"] == pytest.approx(found["plain"], rel=1e-5)


@pytest.mark.parametrize("student", ["ipndm", "lms"])
def test_learning_brings_the_student_nearer_to_its_teacher(train, student):
    folder = train(f"--student={student}", "--nfe=3", "--max_train_steps=30", "--train_batch_size=8", "--num_trajectories=32")
    found = errors(folder)
    assert found["learned"] < 0.9 * found["plain"]


@pytest.mark.parametrize("flags", [["--student=ipndm"], ["--student=lms", "--nfe=3", "--lr_scheduler=constant"]])
def test_a_resumed_run_is_the_uninterrupted_one(train, flags, tmp_path):
    whole = train(*flags, "--max_train_steps=4", output_dir=tmp_path / "whole")
    train(*flags, "--max_train_steps=2", output_dir=tmp_path / "parts")
    parts = train(*flags, "--max_train_steps=4", "--resume_from_checkpoint=latest", output_dir=tmp_path / "parts")
    assert_same(numbers(parts), numbers(whole))


@pytest.mark.parametrize("flags", [["--student=ipndm"], ["--student=lms", "--nfe=3"]])
def test_accumulated_rounds_are_one_batch(train, flags, tmp_path):
    one = train(*flags, output_dir=tmp_path / "one")
    two = train(*flags, "--train_batch_size=2", "--gradient_accumulation_steps=2", output_dir=tmp_path / "two")
    if "--student=lms" in flags:  # another batch of trajectories for the teacher: only near
        assert errors(two)["learned"] < 2 * errors(one)["learned"]
    else:
        assert_same(numbers(two), numbers(one), 1e-4)


def assert_same(ours, theirs, tolerance: float = 0.0) -> None:
    if isinstance(ours, dict) and all(isinstance(value, torch.Tensor) for value in ours.values()):
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance)
    else:
        assert ours == theirs


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_batch(dit_folder, tmp_path):
    results = []
    for launcher, size in (((), 4), (TWO_PROCESSES, 2)):
        folder = tmp_path / str(size)
        run(*command(dit_folder, folder, "--student=ipndm", f"--train_batch_size={size}"), launcher=launcher)
        results.append(numbers(folder))
    assert_same(results[1], results[0], 1e-4)


def test_text_to_image_with_prompts(train, tmp_path):
    (tmp_path / "sd").mkdir()
    tiny.stable_diffusion(tmp_path).save_pretrained(tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("a b\nc\n\nd\n")
    flags = ["--student=ipndm", "--nfe=3", "--guidance_scale=3", f"--prompts_file={tmp_path / 'prompts.txt'}"]
    folder = train(*flags, pipeline=tmp_path / "sd")
    pipe = tiny.stable_diffusion(tmp_path)
    AMEDScheduler.from_pretrained(folder).attach(pipe)
    assert bool(tiny.draw(pipe, 3).isfinite().all())


def test_a_learnable_solver_begins_as_its_base_and_is_differentiable():
    solver = LearnableLinearSolver(Solver("dpmpp", 2), [20.0, 5.0, 1.0, 0.0])
    sigmas, network_sigmas, decay, weights = solver()
    assert sigmas.tolist() == pytest.approx([20.0, 5.0, 1.0])
    assert torch.equal(sigmas, network_sigmas)
    assert decay.tolist() == pytest.approx([1.0, 1.0, 1.0])
    (weights.square().sum() + decay.sum() + network_sigmas.sum()).backward()
    for parameter in solver.parameters():
        assert bool(parameter.grad.isfinite().all())
        assert bool(parameter.grad.abs().sum() > 0)
    # A consistent solver goes from its first level to 0 along a constant slope.
    assert weights.sum(1).tolist() == pytest.approx([5.0 - 20.0, 1.0 - 20.0, -20.0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nfe=0"], "--nfe"),
        (["--nfe=4", "--analytical_first_step"], "--no-analytical_first_step"),
        (["--student=lms", "--search_grid"], "lms"),
        (["--scale_time=1.5"], "--scale_time"),
        (["--sigmas", "1", "2", "3", "4"], "fall strictly"),
        (["--sigmas", "3", "2"], "4 positive levels"),
        (["--student=ipndm", "--solver_order=7"], "order"),
        (["--teacher=dpmpp", "--teacher_order=5"], "order"),
        (["--learning_rate=-1"], "--learning_rate"),
        (["--resume_from_checkpoint=checkpoint-77"], "checkpoint-77"),
        (["--pretrained_model_name_or_path=/nowhere"], "no embedded pipeline"),
    ],
)
def test_wrong_flags_are_refused_before_any_work(train, flags, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        train(*flags)
    assert not (tmp_path / "out" / "scheduler_config.json").exists()
