"""The embedded digits pipelines: they load, draw what they are asked for, and have not learned the data by heart."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline, DPMSolverMultistepScheduler

import diffusers_fastdiff
from diffusers_fastdiff import load_pretrained
from diffusers_fastdiff.evaluation.digits import evaluate_digits, load_digits_classifier
from diffusers_fastdiff.pretrained import available_pretrained, available_solvers
from diffusers_fastdiff.training.data import DigitsDataset

REPORTS = Path(diffusers_fastdiff.__file__).parent / "pretrained" / "solvers"
DIGITS = ["digits-dit", "digits-dit-deep", "digits-fpdm"]


def draw(pipe, count: int, steps: int, guidance_scale: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(count) % 10
    generator = torch.Generator().manual_seed(seed)
    images = pipe(
        labels.tolist(),
        guidance_scale=guidance_scale,
        num_inference_steps=steps,
        generator=generator,
        output_type="np",
    ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1, labels


def test_embedded_names():
    assert set(DIGITS) <= set(available_pretrained())
    with pytest.raises(ValueError, match="digits-fpdm"):
        load_pretrained("digits")


@pytest.mark.parametrize("name", DIGITS)
def test_draws_the_digits_it_is_asked_for(name):
    images, labels = draw(load_pretrained(name), 200, 20, guidance_scale=1.5)
    assert evaluate_digits(images, labels)["accuracy"] >= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("name", DIGITS)
def test_quality_at_50_steps_without_guidance(name):
    images, labels = draw(load_pretrained(name), 2000, 50, guidance_scale=1.0)
    result = evaluate_digits(images, labels)
    assert result["accuracy"] >= 0.97
    assert result["nearest_distance"] >= result["nearest_distance_real"]
    assert result["closer_than_real"] <= 0.02
    assert result["frechet_distance"] < 1.5


@pytest.mark.parametrize("name", DIGITS)
def test_is_a_stock_pipeline(name, tmp_path):
    pipe = load_pretrained(name)
    assert type(pipe) is DiTPipeline
    pipe.save_pretrained(tmp_path)
    again = DiTPipeline.from_pretrained(tmp_path)
    again.transformer.eval()
    first, second = (draw(p, 4, 3, guidance_scale=1.5)[0] for p in (pipe, again))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_draws_the_same_digits(dtype):
    pipe = load_pretrained("digits-fpdm", torch_dtype=dtype)
    assert pipe.transformer.dtype == dtype
    low, labels = draw(pipe, 50, 10, guidance_scale=1.5)
    assert (load_digits_classifier()(low.float()).argmax(1) == labels).double().mean() > 0.9


def test_classifier_reads_real_digits():
    data = DigitsDataset()
    with torch.no_grad():
        accuracy = (load_digits_classifier()(data.images).argmax(1) == data.labels).double().mean()
    assert accuracy > 0.99


@pytest.mark.parametrize("name", available_solvers())
def test_learned_solvers_come_near_a_slow_one(name):
    scheduler = load_pretrained(name)
    fitted, report = scheduler.config.fitted_to, REPORTS / name / "report.json"
    pipe = load_pretrained(fitted["model_id"])
    pipe.set_progress_bar_config(disable=True)
    ends = []
    for solver, steps in ((scheduler, fitted["num_inference_steps"]), (slow_solver(pipe), 60)):
        if solver.config.get("mode") == "attached":
            solver.attach(pipe)
        pipe.scheduler = solver
        generator = torch.Generator().manual_seed(1)
        labels = [k % 10 for k in range(40)]
        options = {"guidance_scale": fitted["guidance_scale"], "num_inference_steps": steps, "output_type": "np"}
        ends.append(torch.from_numpy(pipe(labels, generator=generator, **options).images) * 2 - 1)
        if solver.config.get("mode") == "attached":
            solver.detach()
    error = float((ends[0] - ends[1]).square().mean().sqrt())
    left = scheduler.config.sigmas[-1] if scheduler.config.sigmas else 0.0  # noise where an AMED grid ends
    assert error < left + 1.5 * json.loads(report.read_text())["error to the teacher"]["learned"]


def slow_solver(pipe) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_lu_lambdas=True, solver_order=2)
