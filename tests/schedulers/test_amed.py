"""Learned solvers as schedulers: the same steps as the numerical core, static and attached, saved, loaded and refused."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import DiTPipeline, StableDiffusionInpaintPipeline
from safetensors.torch import load_file, save_file

from diffusers_fastdiff import AMEDPredictor, AMEDScheduler, EDMUNet2DModel
from diffusers_fastdiff.models.amed_predictor import FEATURE_SIZE
from diffusers_fastdiff.numerics.linear_solver import as_linear_solver
from diffusers_fastdiff.numerics.solver_methods import AMEDCoefficients, Solver
from diffusers_fastdiff.numerics.solvers import SolverRun, solve
from diffusers_fastdiff.schedulers.scheduling_amed import STUDENTS
from diffusers_fastdiff.training.pipeline_denoiser import PipelineDenoiser
from tests.hooks import tiny_pipelines as tiny

GRID = [30.0, 5.0, 1.0, 0.08]
COEFFICIENTS = [[0.4, 1.01, 0.95], [0.6, 0.99, 1.03], [0.5, 1.0, 1.1]]
MIDPOINT_STUDENTS = [name for name in STUDENTS if name != "lms"]


def linear_solver() -> dict:
    return as_linear_solver(lambda: SolverRun(Solver("dpmpp", 2), [26.0, 6.0, 1.4, 0.3, 0.0])).to_dict()


def static(pipe, student: str, skips: bool = False, **options) -> AMEDScheduler:
    config = pipe.scheduler.config
    if student == "lms":
        return AMEDScheduler.from_config(config, student="lms", linear_solver=linear_solver(), **options)
    options = {"sigmas": GRID, "coefficients": COEFFICIENTS, "analytical_first_step": skips} | options
    return AMEDScheduler.from_config(config, student=student, **options)


def attached(pipe, student: str = "amed", skips: bool = False, seed: int = 0, **options) -> AMEDScheduler:
    torch.manual_seed(seed)
    config = {"sigmas": GRID, "student": student, "analytical_first_step": skips, "mode": "attached"} | options
    scheduler = AMEDScheduler.from_config(pipe.scheduler.config, **config)
    scheduler.predictor = AMEDPredictor(scale_dir=0.05, scale_time=0.1).eval()
    return scheduler


def evaluations(scheduler: AMEDScheduler) -> int:
    return len(linear_solver()["sigmas"]) if scheduler.config.student == "lms" else 6 - scheduler.config.analytical_first_step


def expected(pipe, scheduler: AMEDScheduler, coefficients, guidance: float, labels) -> torch.Tensor:
    """What the numerical core makes of the pipeline's denoiser, as the pipeline's latents."""
    denoiser = PipelineDenoiser(pipe, scheduler.noise_model, guidance)
    noise = torch.randn(len(labels), *denoiser.sample_shape, generator=torch.Generator().manual_seed(0))
    denoise = denoiser.bind(denoiser.conditions(torch.tensor(labels)))
    if callable(coefficients):
        denoiser.watch_bottleneck()
        coefficients = coefficients(denoiser, len(labels))
    with torch.no_grad():
        start = denoiser.start(noise, GRID[0])
        end = solve(denoise, start, GRID, scheduler.solver, coefficients, scheduler.config.analytical_first_step)
    return end * float(scheduler.noise_model.state_scale(GRID[-1]))


def predicted(scheduler: AMEDScheduler):
    def of_run(denoiser: PipelineDenoiser, count: int):
        def of_interval(interval: int) -> AMEDCoefficients:
            skipped = interval == 0 and scheduler.config.analytical_first_step
            features = torch.zeros(count, FEATURE_SIZE, FEATURE_SIZE) if skipped else denoiser.features(count)
            return scheduler.predictor(features, GRID[interval], GRID[interval + 1])

        return of_interval

    return of_run


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("student", MIDPOINT_STUDENTS)
def test_static_steps_are_those_of_the_numerical_core(student, skips, guidance):
    pipe, labels = tiny.dit(), (1, 2, 3)
    scheduler = pipe.scheduler = static(pipe, student, skips)
    actual = tiny.draw(pipe, evaluations(scheduler), labels=labels, guidance_scale=guidance)
    coefficients = [AMEDCoefficients(*numbers) for numbers in COEFFICIENTS]
    torch.testing.assert_close(actual, expected(pipe, scheduler, coefficients, guidance, labels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("student", MIDPOINT_STUDENTS)
def test_attached_steps_are_those_of_the_numerical_core(student, skips, guidance):
    pipe, labels = tiny.dit(), (1, 2, 3)
    scheduler = attached(pipe, student, skips)
    scheduler.attach(pipe)
    actual = tiny.draw(pipe, evaluations(scheduler), labels=labels, guidance_scale=guidance)
    scheduler.detach()
    torch.testing.assert_close(actual, expected(pipe, scheduler, predicted(scheduler), guidance, labels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("student", STUDENTS)
def test_neutral_is_the_plain_solver(student):
    """r = 1/2 and scales 1: AMED is DPM-Solver-2; the plug-ins are their own solver on the grid with geometric means."""
    pipe = tiny.dit()
    if student == "lms":
        pipe.scheduler = static(pipe, student)
        learned = tiny.draw(pipe, 4, guidance_scale=1.0)
        denoiser = PipelineDenoiser(pipe, pipe.scheduler.noise_model)
        noise = torch.randn(2, *denoiser.sample_shape, generator=torch.Generator().manual_seed(0))
        grid = [*linear_solver()["sigmas"], 0.0]
        with torch.no_grad():
            denoise = denoiser.bind(denoiser.conditions(torch.tensor([1, 2])))
            plain = solve(denoise, denoiser.start(noise, grid[0]), grid, Solver("dpmpp", 2))
        torch.testing.assert_close(learned, plain, rtol=1e-4, atol=1e-4)
        return
    neutral = [[0.5, 1.0, 1.0]] * 3
    pipe.scheduler = static(pipe, student, coefficients=neutral)
    with_constants = tiny.draw(pipe, 6)
    pipe.scheduler = static(pipe, student, coefficients=None)
    assert torch.equal(tiny.draw(pipe, 6), with_constants)
    if student == "amed":
        pipe.scheduler = static(pipe, "dpm2", coefficients=None)
        assert torch.equal(tiny.draw(pipe, 6), with_constants)


def test_constant_predictions_make_attached_static():
    pipe = tiny.dit()
    scheduler = attached(pipe)
    with torch.no_grad():
        for head in (scheduler.predictor.r_head, scheduler.predictor.scale_dir_head, scheduler.predictor.scale_time_head):
            head.weight.zero_()
    numbers = [[float(value) for value in scheduler.predictor(torch.zeros(1, 8, 8), 1.0, 0.5)]] * 3
    scheduler.attach(pipe)
    predicted = tiny.draw(pipe, 6)
    scheduler.detach()
    pipe.scheduler = static(pipe, "amed", coefficients=numbers, mode="static")
    torch.testing.assert_close(tiny.draw(pipe, 6), predicted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_results_do_not_depend_on_the_batch_and_runs_not_on_each_other(guidance):
    pipe = tiny.dit()
    scheduler = attached(pipe, "ipndm", solver_order=3)
    scheduler.attach(pipe)
    both = tiny.draw(pipe, 6, labels=(1, 2), guidance_scale=guidance)
    alone = tiny.draw(pipe, 6, labels=(1,), guidance_scale=guidance)
    torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(tiny.draw(pipe, 6, labels=(1, 2), guidance_scale=guidance), both)


def test_an_exception_in_mid_run_leaves_the_next_run_correct():
    pipe = tiny.dit()
    scheduler = attached(pipe)
    scheduler.attach(pipe)
    whole = tiny.draw(pipe, 6)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    handle = pipe.transformer.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        tiny.draw(pipe, 6)
    handle.remove()
    assert torch.equal(tiny.draw(pipe, 6), whole)


def test_detaching_leaves_the_denoiser_as_it_was():
    pipe = tiny.dit()
    before, hooks = set(vars(pipe.transformer)), len(pipe.transformer.transformer_blocks[2]._forward_hooks)
    scheduler = attached(pipe)
    scheduler.attach(pipe)
    tiny.draw(pipe, 6)
    scheduler.detach()
    assert set(vars(pipe.transformer)) == before
    assert all(len(block._forward_hooks) == hooks for block in pipe.transformer.transformer_blocks)


# -- Stable Diffusion -----------------------------------------------------------------------------------------------------


def inpainting(folder):
    return tiny.quiet(StableDiffusionInpaintPipeline(**tiny.components(folder)))


def stable_diffusion_options(make) -> dict:
    if make is tiny.image_to_image:
        return {"image": torch.zeros(2, 3, 16, 16), "strength": 0.6}
    if make is inpainting:
        mask = torch.zeros(1, 1, 16, 16)
        mask[..., :8] = 1
        return {"image": torch.zeros(1, 3, 16, 16), "mask_image": mask, "prompt": "a b", "height": 16, "width": 16}
    return {}


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("make", [tiny.stable_diffusion, tiny.image_to_image, inpainting])
def test_stable_diffusion_static(make, student, tmp_path):
    pipe = make(tmp_path)
    scheduler = pipe.scheduler = static(pipe, student)
    options = stable_diffusion_options(make)
    if student == "lms" and make is tiny.image_to_image:
        with pytest.raises(ValueError, match="cannot begin at evaluation"):
            tiny.draw(pipe, evaluations(scheduler), **options)
        return
    first = tiny.draw(pipe, evaluations(scheduler), **options)
    assert bool(first.isfinite().all())
    assert torch.equal(tiny.draw(pipe, evaluations(scheduler), **options), first)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("student", MIDPOINT_STUDENTS)
def test_stable_diffusion_attached(student, guidance, tmp_path):
    """The same latents as the numerical core, and nothing that depends on the batch."""
    pipe = tiny.stable_diffusion(tmp_path)
    scheduler = attached(pipe, student, skips=True)
    scheduler.attach(pipe)
    both = tiny.draw(pipe, 5, guidance_scale=guidance)
    alone = tiny.draw(pipe, 5, guidance_scale=guidance, prompt=["a b"])
    torch.testing.assert_close(both[:1], alone, rtol=1e-3, atol=1e-4)
    scheduler.detach()
    denoiser = PipelineDenoiser(pipe, scheduler.noise_model, guidance, ["a b", "c"])
    denoiser.watch_bottleneck()
    noise = torch.randn(2, *denoiser.sample_shape, generator=torch.Generator().manual_seed(0))
    denoise = denoiser.bind(denoiser.conditions(torch.arange(2)))
    with torch.no_grad():
        start, of_interval = denoiser.start(noise, GRID[0]), predicted(scheduler)(denoiser, 2)
        end = solve(denoise, start, GRID, scheduler.solver, of_interval, True)
    torch.testing.assert_close(both, end * float(scheduler.noise_model.state_scale(GRID[-1])), rtol=1e-3, atol=1e-3)


# -- files ----------------------------------------------------------------------------------------------------------------

LOAD = """
import sys, torch
import diffusers_fastdiff
from diffusers import DiTPipeline
pipe = DiTPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
pipe.transformer.eval()
if pipe.scheduler.config.mode == "attached":
    pipe.scheduler.attach(pipe)
generator = torch.Generator().manual_seed(0)
images = pipe([1, 2], guidance_scale=2.0, num_inference_steps=6, generator=generator, output_type="np").images
torch.save(torch.from_numpy(images), sys.argv[2])
"""


@pytest.mark.parametrize("make", [static, attached])
def test_a_saved_pipeline_keeps_its_solver_in_a_fresh_process(make, tmp_path):
    pipe = tiny.dit()
    scheduler = make(pipe, "ipndm")
    scheduler.attach(pipe)
    pipe.save_pretrained(tmp_path / "pipe")
    generator = torch.Generator().manual_seed(0)
    images = pipe([1, 2], guidance_scale=2.0, num_inference_steps=6, generator=generator, output_type="np").images
    command = [sys.executable, "-c", LOAD, str(tmp_path / "pipe"), str(tmp_path / "images")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(tmp_path / "images", weights_only=True), torch.from_numpy(images))
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers_fastdiff", "AMEDScheduler"]


def test_a_missing_or_damaged_predictor_is_an_error(tmp_path):
    attached(tiny.dit()).save_pretrained(tmp_path)
    weights = tmp_path / "predictor" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises((OSError, ValueError)):
        AMEDScheduler.from_pretrained(tmp_path)
    tensors = load_file_from(whole, tmp_path)
    tensors.pop("r_head.weight")
    save_file(tensors, weights)
    with pytest.raises((OSError, ValueError, RuntimeError)):
        AMEDScheduler.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(OSError, match=r"safetensors"):
        AMEDScheduler.from_pretrained(tmp_path)


def load_file_from(data: bytes, folder) -> dict[str, torch.Tensor]:
    path = folder / "whole.safetensors"
    path.write_bytes(data)
    return load_file(path)


# -- wrong input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student": "heun"}, "`student` must be one of"),
        ({"mode": "dynamic"}, "`mode` must be"),
        ({"student": "lms"}, "`linear_solver`"),
        ({"linear_solver": {}}, "`linear_solver`"),
        ({"student": "lms", "linear_solver": linear_solver(), "mode": "attached"}, "no attached mode"),
        ({"sigmas": [1.0, 2.0]}, "fall strictly"),
        ({"sigmas": [1.0, 1.0]}, "fall strictly"),
        ({"coefficients": COEFFICIENTS}, "give `sigmas`"),
        ({"sigmas": GRID, "coefficients": COEFFICIENTS[:2]}, "one entry for each of the 3"),
        ({"sigmas": GRID, "coefficients": [[1.5, 1, 1]] * 3}, "interval 0"),
        ({"student": "ipndm", "solver_order": 5}, "order"),
        ({"prediction_type": "x0"}, "prediction_type"),
    ],
)
def test_wrong_configs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AMEDScheduler(**options)


def test_wrong_numbers_of_evaluations_are_refused():
    pipe = tiny.dit()
    for student, right in (("amed", 6), ("lms", 4)):
        scheduler = static(pipe, student, fitted_to={"guidance_scale": 2.0})
        with pytest.raises(ValueError, match=rf"must be {right}: .*{right} model evaluations at guidance 2.0, got 7"):
            scheduler.set_timesteps(7)
    with pytest.raises(ValueError, match="even: two for each interval"):
        AMEDScheduler().set_timesteps(5)
    with pytest.raises(ValueError, match="odd"):
        AMEDScheduler(analytical_first_step=True).set_timesteps(4)
    with pytest.raises(ValueError, match="own grid"):
        static(pipe, "amed").set_timesteps(6, sigmas=GRID)
    with pytest.raises(ValueError, match="timesteps"):
        AMEDScheduler().set_timesteps(timesteps=[5, 4])


def test_attached_without_predictor_or_pipeline_is_refused():
    with pytest.raises(ValueError, match="no predictor"):
        AMEDScheduler(mode="attached", sigmas=GRID).set_timesteps(6)
    with pytest.raises(ValueError, match="attach"):
        attached(tiny.dit()).set_timesteps(6)


@pytest.mark.parametrize(
    ("fitted", "message"),
    [
        ({"model_class": "UNet2DModel"}, "model_class"),
        ({"sample_shape": [4, 64]}, "sample_shape"),
    ],
)
def test_other_models_are_refused(fitted, message):
    pipe = tiny.dit()
    with pytest.raises(ValueError, match=message):
        attached(pipe, fitted_to=fitted).attach(pipe)


def test_other_noise_schedules_and_predictions_are_refused():
    pipe = tiny.dit()
    for option in ({"beta_schedule": "scaled_linear"}, {"prediction_type": "v_prediction"}):
        with pytest.raises(ValueError, match="another noise schedule or prediction"):
            attached(pipe, **option).attach(pipe)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_other_guidance_is_refused(guidance):
    pipe = tiny.dit()
    scheduler = attached(pipe, fitted_to={"guidance_scale": 2.0})
    scheduler.attach(pipe)
    tiny.draw(pipe, 6, guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"learned for guidance 2\.0"):
        tiny.draw(pipe, 6, guidance_scale=guidance)


def test_unknown_bottlenecks_are_refused():
    pipe = tiny.dit()
    pipe.transformer = torch.nn.Linear(2, 2)
    pipe.transformer.config = tiny.dit().transformer.config
    with pytest.raises(TypeError, match="bottleneck of Linear"):
        attached(tiny.dit()).attach(pipe)


def test_a_value_that_is_not_a_number_stays_in_its_sample():
    scheduler = static(tiny.dit(), "ipndm")
    scheduler.set_timesteps(6)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        output = torch.zeros_like(x)
        output[0] = float("nan")
        x = scheduler.step(output, timestep, x).prev_sample
    assert bool(x[0].isnan().all())
    assert bool(x[1].isfinite().all())


# -- other models ---------------------------------------------------------------------------------------------------------


def test_predictions_of_the_edm_family():
    """The same midpoints, seen through EDM's preconditioning."""
    torch.manual_seed(0)
    scheduler = AMEDScheduler(preconditioning={"kind": "edm"}, sigmas=GRID, coefficients=COEFFICIENTS)
    scheduler.set_timesteps(6)
    assert scheduler.init_noise_sigma == pytest.approx(GRID[0])
    model = EDMUNet2DModel(
        sample_size=8, in_channels=1, model_channels=8, channel_mult=(1, 2), layers_per_block=1, attention_resolutions=(4,)
    ).eval()
    noise = torch.randn(2, 1, 8, 8)
    x = noise * scheduler.init_noise_sigma
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            x = scheduler.step(model(scheduler.scale_model_input(x, timestep), timestep).sample, timestep, x).prev_sample

        def denoise(state, sigma):
            c = scheduler.noise_model.preconditioning.at(torch.as_tensor(sigma, dtype=torch.float64))
            output = model(c.c_in.float() * state, c.c_noise.float()).sample
            return c.c_skip.float() * state + c.c_out.float() * output

        coefficients = [AMEDCoefficients(*numbers) for numbers in COEFFICIENTS]
        end = solve(denoise, noise * GRID[0], GRID, scheduler.solver, coefficients)
    torch.testing.assert_close(x, end, rtol=1e-4, atol=1e-4)


def test_pipelines_of_stock_dits():
    """The classes of diffusers itself, with their own label conventions."""
    pipe = tiny.dit()
    assert isinstance(pipe, DiTPipeline)
    pipe.scheduler = static(pipe, "dpmpp", skips=True)
    assert tiny.draw(pipe, 5).shape[0] == 2


@pytest.mark.parametrize("student", STUDENTS)
def test_static_steps_read_nothing_from_the_device(student):
    """Tensors on "meta" have no contents, so that whatever asks for them fails."""
    scheduler = static(tiny.dit(), student)
    scheduler.set_timesteps(evaluations(scheduler), device="meta")
    scheduler.set_begin_index(0)
    x = torch.empty(2, 2, 4, 4, device="meta")
    for timestep in scheduler.timesteps:
        x = scheduler.step(scheduler.scale_model_input(x, timestep), timestep, x).prev_sample
    assert x.device.type == "meta"
