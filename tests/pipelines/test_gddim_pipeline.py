"""From noise to images: prior, loop, what is dropped or inverted at the end, guidance, saving, and the adaptive integrator."""

import csv
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import diffusers_fastdiff
from diffusers_fastdiff import EDMUNet2DModel, GDDIMPipeline, GDDIMScheduler, load_pretrained
from diffusers_fastdiff.evaluation.digits import evaluate_digits
from diffusers_fastdiff.numerics.linear_sde import apply
from diffusers_fastdiff.pretrained import available_pretrained
from tests.local_hub_server import serve

ROOT = Path(diffusers_fastdiff.__file__).parents[1]
BLUR = {"process": "blur", "process_parameters": {"image_size": [8, 8], "sigma_max": 2.0}}
PROCESSES = {"vp": {}, "cld": {"process": "cld"}, "blur": BLUR}
CHANNELS = {"vp": 1, "cld": 2, "blur": 1}


def pipeline(name: str = "cld", num_classes: int | None = None, images: int = 1, seed: int = 0, **options) -> GDDIMPipeline:
    """The real classes, tiny."""
    torch.manual_seed(seed)
    unet = EDMUNet2DModel(
        sample_size=8, in_channels=images * CHANNELS[name], num_classes=num_classes, model_channels=8, channel_mult=(1, 2),
        layers_per_block=1, attention_resolutions=(4,),
    )  # fmt: skip
    pipe = GDDIMPipeline(unet.eval(), GDDIMScheduler(**PROCESSES[name] | options))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: GDDIMPipeline, seed: int = 0, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipe(**{"num_inference_steps": 4, "output_type": "pt", "generator": generator} | options).images


def make_perfect(pipe: GDDIMPipeline, clean: torch.Tensor) -> None:
    """Give a pipeline the perfect network for a data set of one image, (1, C, 8, 8), in float64 inside."""
    scheduler = pipe.scheduler
    process = scheduler.forward_process

    def forward(sample, timestep, class_labels=None):
        t = scheduler.time_of(timestep[0]).item()
        mean = apply(process, process.signal(t), process.transform(process.lift(clean)))
        inverse = torch.linalg.inv(process.noise_factor(t))
        eps = process.inverse_transform(apply(process, inverse, process.transform(sample.double()) - mean))
        return SimpleNamespace(sample=eps.to(sample.dtype))

    pipe.unet.forward = forward


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("cld", {}, 6e-3),
        ("cld", {"sampler": "sscs", "stochasticity": 1.0}, None),
        ("cld", {"stochasticity": 1.0}, 6e-3),
        ("cld", {"parametrization": "L", "order": 0}, None),
        ("blur", {"denoise": True}, 2e-2),
        ("vp", {}, 1e-4),
    ],
    ids=str,
)
def test_single_image_comes_out_whole(name, options, tolerance):
    """Prior, loop, denoising, velocity or DCT, and grey levels, in 4 evaluations; other samplers need more."""
    clean = torch.rand(1, 2, 8, 8, dtype=torch.float64) * 2 - 1
    pipe = pipeline(name, images=2, **options)
    make_perfect(pipe, clean)
    error = (draw(pipe, batch_size=3) - (clean / 2 + 0.5)).abs().max()
    if tolerance is None:
        assert error > 0.1
    else:
        assert error < tolerance


@pytest.mark.parametrize("name", ["cld", "blur"])
@pytest.mark.parametrize("parametrization", ["R", "L"])
def test_adaptive_integrator_follows_the_probability_flow(name, parametrization):
    """On point-mass data it is known: the eps of R is constant. Evaluations grow with the accuracy."""
    clean, scheduler = torch.rand(1, 1, 8, 8, dtype=torch.float64), {"denoise": False, "parametrization": parametrization}
    pipe = pipeline(name, **scheduler)
    make_perfect(pipe, clean)
    process, end = pipe.scheduler.forward_process, pipe.scheduler.final_time
    start = torch.randn(2, CHANNELS[name], 8, 8, generator=torch.Generator().manual_seed(0))
    lifted, factors = process.transform(process.lift(clean)), [process.factor(t) for t in (process.start_time, end)]
    gap = process.transform(start.double()) - apply(process, process.signal(process.start_time), lifted)
    eps = apply(process, torch.linalg.inv(factors[0]), gap)
    expected = process.inverse_transform(apply(process, process.signal(end), lifted) + apply(process, factors[1], eps))
    results = [pipe(latents=start, output_type="latent", ode_tolerance=tolerance) for tolerance in (1e-3, 1e-6)]
    errors = [(result.images - expected).abs().max() for result in results]
    assert errors[1] < 2e-4
    assert errors[1] < errors[0] / 3
    assert results[0].num_evaluations < results[1].num_evaluations


def test_many_steps_come_near_the_adaptive_integrator():
    """With a network that nobody knows the flow of, denoising step and classes included."""
    pipe = pipeline(num_classes=3, order=3)
    options = {"class_labels": [0, 1, 2], "output_type": "latent"}
    exact = pipe(**options, ode_tolerance=1e-6, generator=torch.Generator().manual_seed(0))
    errors = [(draw(pipe, num_inference_steps=count, **options) - exact.images).abs().max() for count in (20, 80)]
    assert errors[1] < 0.1 * exact.images.abs().max()
    assert errors[1] < errors[0] / 4


def test_integrator_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match=r"diffusers_fastdiff\[ode\]"):
        pipeline()(ode_tolerance=1e-3)


def test_saved_pipelines_load_in_a_fresh_process(tmp_path):
    """From a folder and from the Hub."""
    expected = {}
    for name in PROCESSES:
        pipe = pipeline(name, num_classes=3, stochasticity=0.5)
        pipe.save_pretrained(tmp_path / "hub" / "org" / name)
        expected[str(tmp_path / "hub" / "org" / name)] = expected[f"org/{name}"] = draw(pipe, class_labels=[0, 2])
    index = json.loads((tmp_path / "hub" / "org" / "cld" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers_fastdiff", "GDDIMScheduler"]
    code = """
import sys, torch
from diffusers_fastdiff import GDDIMPipeline
for place, expected in torch.load(sys.argv[1], weights_only=True).items():
    pipe = GDDIMPipeline.from_pretrained(place)
    generator = torch.Generator().manual_seed(0)
    result = pipe([0, 2], num_inference_steps=4, output_type="pt", generator=generator)
    assert torch.equal(result.images, expected), place
"""
    torch.save(expected, tmp_path / "images")
    endpoint, server = serve(tmp_path / "hub")
    variables = {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", code, str(tmp_path / "images")]
    try:
        result = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    finally:
        server.shutdown()
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("options", [{}, {"stochasticity": 1.0}, {"sampler": "sscs", "stochasticity": 1.0}], ids=str)
def test_images_do_not_depend_on_the_batch(options):
    """Neither noise nor history is shared, and nothing is left over from the last run."""
    pipe = pipeline(**options)
    seeded = lambda *seeds: [torch.Generator().manual_seed(seed) for seed in seeds]  # noqa: E731
    together = draw(pipe, generator=seeded(1, 2, 3), batch_size=3)
    torch.testing.assert_close(draw(pipe, generator=seeded(2)), together[1:2], rtol=1e-4, atol=1e-5)
    assert torch.equal(draw(pipe, batch_size=2), draw(pipe, batch_size=2))
    torch.testing.assert_close(draw(pipe, batch_size=3)[:2], draw(pipe, batch_size=2), rtol=1e-4, atol=1e-5)
    torch.manual_seed(5)
    first = draw(pipe, generator=None)
    torch.manual_seed(5)
    assert torch.equal(draw(pipe, generator=None), first)


def test_guidance():
    """Between "no class" at scale 0 and beyond the class above 1; doubled evaluations are one batch."""
    pipe = pipeline(num_classes=3)
    plain, null = draw(pipe, class_labels=[1]), draw(pipe, class_labels=[3])
    torch.testing.assert_close(draw(pipe, class_labels=[1], guidance_scale=0.0), null, rtol=1e-4, atol=1e-5)
    near = draw(pipe, class_labels=[1], guidance_scale=1.0 + 1e-4)
    torch.testing.assert_close(near, plain, rtol=1e-2, atol=1e-2)
    assert (draw(pipe, class_labels=[1], guidance_scale=3.0) - plain).abs().max() > 1e-4


def test_outputs():
    pipe = pipeline(images=3)
    result = pipe(batch_size=2, num_inference_steps=5, output_trajectory=True)
    assert isinstance(result.images[0], Image.Image)
    assert result.images[0].size == (8, 8)
    assert result.trajectory.shape == (6, 2, 6, 8, 8)
    assert result.num_evaluations == 5
    assert pipe(num_inference_steps=3, output_type="np").images.shape == (1, 8, 8, 3)
    states = draw(pipe, output_type="latent")
    torch.testing.assert_close(draw(pipe), (states[:, :3] / 2 + 0.5).clamp(0, 1))
    images, count = pipe(num_inference_steps=3, return_dict=False, output_type="pt")
    assert (images.shape, count) == ((1, 3, 8, 8), 3)
    blur = pipeline("blur")
    assert draw(blur).shape == (1, 1, 8, 8)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["vp", "cld"])
def test_low_precision_networks_keep_a_precise_state(name):
    """The state is float32 whatever the weights are: 20 steps stay near those of the precise network."""
    pipe, low = pipeline(name), pipeline(name).to(torch.bfloat16)
    precise, rounded = (draw(p, num_inference_steps=20, output_type="latent") for p in (pipe, low))
    assert rounded.dtype == torch.float32
    assert (rounded - precise).abs().mean() < 0.05 * precise.abs().mean()


def test_starting_from_an_image():
    """`add_noise` and the `timesteps` of a part of a run: what image-to-image needs."""
    pipe = pipeline()
    clean = torch.rand(1, 1, 8, 8, dtype=torch.float64) * 2 - 1
    make_perfect(pipe, clean)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(5)
    noise = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    state = scheduler.add_noise(clean, noise, torch.tensor([scheduler._times[5] * 999]))
    for timestep in scheduler.timesteps[5:]:
        state = scheduler.step(pipe.unet.forward(state, timestep.reshape(1)).sample, timestep, state).prev_sample
    torch.testing.assert_close(scheduler.forward_process.project(state), clean, rtol=0, atol=3e-3)


@pytest.mark.parametrize(
    ("options", "arguments", "word"),
    [
        ({}, {"output_type": "jpg"}, "output_type"),
        ({}, {"class_labels": [1]}, "class_labels"),
        ({}, {"guidance_scale": 2.0}, "guidance_scale"),
        ({"num_classes": 3}, {}, "class_labels"),
        ({"num_classes": 3}, {"class_labels": [4]}, "class_labels"),
        ({"num_classes": 3}, {"class_labels": [1, 2], "batch_size": 3}, "class_labels"),
        ({}, {"batch_size": 0}, "batch_size"),
        ({}, {"latents": torch.zeros(1, 1, 8, 8)}, "latents"),
        ({}, {"latents": torch.zeros(1, 2, 8, 8), "batch_size": 2}, "latents"),
        ({}, {"generator": [torch.Generator()], "batch_size": 2}, "generator"),
        ({}, {"num_inference_steps": 1}, "num_inference_steps"),
        ({}, {"ode_tolerance": 0.0}, "ode_tolerance"),
        ({"name": "vp"}, {"ode_tolerance": 1e-3}, "ode_tolerance"),
    ],
    ids=str,
)
def test_bad_calls_are_refused_before_any_evaluation(options, arguments, word):
    pipe = pipeline(**options)
    with pytest.raises(ValueError, match=f"`{word}`"):
        pipe(**arguments)


def test_bad_pairs_of_model_and_scheduler_are_refused():
    unet = EDMUNet2DModel(sample_size=8, in_channels=3, model_channels=8, channel_mult=(1,), attention_resolutions=())
    with pytest.raises(ValueError, match="in_channels=3"):
        GDDIMPipeline(unet, GDDIMScheduler(process="cld"))
    with pytest.raises(ValueError, match=r"image_size.*\(8, 8\)"):
        GDDIMPipeline(unet, GDDIMScheduler(process="blur"))
    with pytest.raises(ValueError, match="GDDIMScheduler"):
        GDDIMPipeline(unet, diffusers_fastdiff.IPNDMMultistepScheduler())


EMBEDDED = [name for name in ("digits-cld", "digits-blur") if name in available_pretrained()]


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_models_draw_the_digits_they_are_asked_for(name):
    pipe, labels = load_pretrained(name), torch.arange(100) % 10
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is GDDIMPipeline
    images = draw(pipe, class_labels=labels, num_inference_steps=20, guidance_scale=1.5)
    assert evaluate_digits(images * 2 - 1, labels)["accuracy"] >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_models_show_what_is_claimed(name):
    """At 50 evaluations gDDIM is nearer to the probability flow than Euler steps, and so are its images to digits."""
    pipe, labels = load_pretrained(name), torch.arange(500) % 10
    pipe.set_progress_bar_config(disable=True)
    config, exact = pipe.scheduler.config, draw(pipe, class_labels=labels, ode_tolerance=1e-3)
    images = {}
    for key, options in (("gDDIM", {}), ("Euler", {"sampler": "euler_maruyama", "time_grid": "power"})):
        pipe.scheduler = GDDIMScheduler.from_config(config, stochasticity=0.0, **options)
        images[key] = draw(pipe, class_labels=labels, num_inference_steps=50)
    errors = {key: (value - exact).square().mean().sqrt() for key, value in images.items()}
    distances = {key: evaluate_digits(value * 2 - 1, labels)["frechet_distance"] for key, value in images.items()}
    assert errors["gDDIM"] < errors["Euler"] / {"digits-cld": 2, "digits-blur": 1}[name]
    assert distances["gDDIM"] < distances["Euler"]


def run_example(monkeypatch, name: str, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *flags])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def test_sampling_script_and_its_picture_of_a_trajectory(monkeypatch, tmp_path):
    for name in PROCESSES:
        pipeline(name, num_classes=3).save_pretrained(tmp_path / name)
        pictures = [tmp_path / f"{name}-samples.png", tmp_path / f"{name}-trajectory.png"]
        flags = [f"--pretrained_model_name_or_path={tmp_path / name}", "--num_inference_steps=4", "--order=1"]
        run_example(
            monkeypatch, "sample_gddim.py", *flags, "--class_labels", "0", "2", f"--output={pictures[0]}",
            f"--trajectory={pictures[1]}",
        )  # fmt: skip
        assert all(Image.open(picture).size[0] > 100 for picture in pictures)
    with pytest.raises(SystemExit, match="sampler"):
        run_example(monkeypatch, "sample_gddim.py", flags[0], "--sampler=sscs", f"--output={pictures[0]}")


@pytest.mark.slow
def test_benchmark_script(monkeypatch, tmp_path):
    """At toy size: gDDIM is nearest to the probability flow, and every sampler has its rows."""
    flags = ["--parts", "coefficients", "mixture", "--evaluations", "20", "--num_samples=50", f"--output_dir={tmp_path}"]
    run_example(monkeypatch, "benchmark_gddim.py", *flags)
    rows = list(csv.DictReader((tmp_path / "mixture.csv").open()))
    errors = {row["sampler"]: float(row["error"]) for row in rows if row["evaluations"] == "20" and row["error"]}
    assert min(errors, key=errors.get).startswith("gDDIM order")
    assert errors["gDDIM order 3"] < errors["gDDIM order 0"] < errors["Cholesky order 0"] < errors["Euler, probability flow"]
    assert {"SSCS", "Euler-Maruyama", "gDDIM order 2, lambda 1", "Runge-Kutta 5(4)"} <= {row["sampler"] for row in rows}
    assert (tmp_path / "mixture.png").exists()
    assert (tmp_path / "coefficients.csv").exists()
