"""iPNDM as a scheduler: schedules of diffusers, custom grids, image-to-image, flow models, configs, wrong input."""

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_fastdiff import IPNDMMultistepScheduler
from diffusers_fastdiff.numerics.solver_methods import Solver
from diffusers_fastdiff.numerics.solvers import solve
from tests.analytic import gaussian_flow
from tests.hooks.tiny_pipelines import dit, draw, image_to_image, stable_diffusion

LABELS = {"labels": (1, 2), "guidance_scale": 1.0}


def slope_model(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """A stand-in for a network: smooth in both."""
    return torch.sin(2 * x + timestep.double() / 300).to(x.dtype)


def sample(scheduler, steps: int, model=slope_model, start: int = 0, **options) -> torch.Tensor:
    scheduler.set_timesteps(steps, **options)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if start:
        scheduler.set_begin_index(start)
        x = scheduler.add_noise(x, x.flip(0), scheduler.timesteps[start : start + 1].repeat(2))
    for timestep in scheduler.timesteps[start:]:
        x = scheduler.step(model(scheduler.scale_model_input(x, timestep), timestep), timestep, x).prev_sample
    return x


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 7])
def test_order_1_is_ddim(spacing, prediction_type, steps):
    """diffusers' first-order DPM-Solver++ is DDIM on the same timesteps."""
    config = {
        "timestep_spacing": spacing,
        "prediction_type": prediction_type,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
    }
    theirs = DPMSolverMultistepScheduler(solver_order=1, final_sigmas_type="zero", **config)
    ours = IPNDMMultistepScheduler(solver_order=1, **config)
    expected = sample(theirs, steps)
    actual = sample(ours, steps)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)  # their table of noise levels is in single precision


@pytest.mark.parametrize("variable_step", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_steps_are_those_of_the_numerical_core(order, variable_step):
    scheduler = IPNDMMultistepScheduler(solver_order=order, variable_step=variable_step, sigma_schedule="polynomial")
    actual = sample(scheduler, 6)
    model, sigmas = scheduler.noise_model, scheduler._driver.run.sigmas
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def denoiser(x, sigma):
        return x - sigma * slope_model(model.input_scale(sigma) * x, model.timestep(sigma).float())

    expected = solve(denoiser, (1 + sigmas[0] ** 2) ** 0.5 * x, sigmas, Solver("ipndm_v" if variable_step else "ipndm", order))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_higher_orders_are_nearer_to_the_exact_solution():
    """Gaussian data seen through a table of timesteps."""

    def error(order: int) -> float:
        scheduler = IPNDMMultistepScheduler(
            solver_order=order, variable_step=True, sigma_schedule="logsnr", final_sigmas_type="sigma_min"
        )
        model, std = scheduler.noise_model, 0.5

        def network(x, timestep):  # the exact prediction of noise, from what the pipeline shows the network
            sigma = model.sigma(timestep)
            return x * (sigma * (1 + sigma**2).sqrt() / (std**2 + sigma**2))

        end = sample(scheduler, 40, network)
        low, high = model.sigma_range
        noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        exact = gaussian_flow(noise * (1 + high**2) ** 0.5, high, low, std) / (1 + low**2) ** 0.5
        return float((end - exact).abs().max())

    errors = [error(order) for order in (1, 2, 3)]
    assert errors[0] > 3 * errors[1]
    assert errors[1] > 1.5 * errors[2]


def test_lists_of_levels_and_of_timesteps_are_the_same_grid():
    scheduler = IPNDMMultistepScheduler()
    by_time = sample(scheduler, None, timesteps=[900.0, 500.5, 100.0])
    levels = [float(scheduler.noise_model.sigma(t)) for t in (900.0, 500.5, 100.0)]
    assert scheduler.num_inference_steps == 3
    for sigmas in (levels, [*levels, 0.0]):
        torch.testing.assert_close(sample(scheduler, None, sigmas=sigmas), by_time, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["polynomial", "logsnr", "time_uniform", "discrete"])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_every_grid_and_end(kind, final):
    scheduler = IPNDMMultistepScheduler(sigma_schedule=kind, final_sigmas_type=final)
    assert bool(sample(scheduler, 5).isfinite().all())
    assert len(scheduler.timesteps) == 5
    ends = scheduler.noise_model.sigma_range
    assert float(scheduler.sigmas[0]) == pytest.approx(ends[1], rel=1e-5)
    assert float(scheduler.sigmas[-1]) == pytest.approx(0.0 if final == "zero" else ends[0], rel=1e-4)


def test_flow_matching():
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = IPNDMMultistepScheduler.from_config(theirs.config, solver_order=1)
    assert ours.config.prediction_type == "flow_prediction"
    actual = sample(ours, 5)
    grid = ours.sigmas.tolist()
    assert grid[0] == pytest.approx(1.0)
    sigmas = torch.linspace(1, 1 / 1000, 5, dtype=torch.float64)
    shifted = 3 * sigmas / (1 + 2 * sigmas)
    torch.testing.assert_close(ours.sigmas[:-1].double(), shifted, rtol=1e-6, atol=1e-7)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for now, following in zip(shifted.tolist(), [*shifted[1:].tolist(), 0.0], strict=True):
        x = x + (following - now) * slope_model(x, torch.tensor(1000 * now))
    torch.testing.assert_close(actual, x, rtol=1e-5, atol=1e-5)


def test_image_to_image_begins_in_the_middle():
    scheduler = IPNDMMultistepScheduler(solver_order=1)
    late = sample(scheduler, 8, start=5)
    ddim = DPMSolverMultistepScheduler(solver_order=1, final_sigmas_type="zero")
    torch.testing.assert_close(late, sample(ddim, 8, start=5), rtol=2e-4, atol=2e-4)
    assert scheduler.begin_index == 5


def test_runs_in_pipelines(tmp_path):
    pipe = dit()
    pipe.scheduler = IPNDMMultistepScheduler.from_config(pipe.scheduler.config, solver_order=1)
    ours = draw(pipe, 5, **LABELS)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, solver_order=1, final_sigmas_type="zero")
    torch.testing.assert_close(ours, draw(pipe, 5, **LABELS), rtol=1e-3, atol=1e-3)
    for make in (stable_diffusion, image_to_image):
        pipe = make(tmp_path)
        pipe.scheduler = IPNDMMultistepScheduler.from_config(pipe.scheduler.config)
        image = {"image": torch.zeros(2, 3, 16, 16)} if make is image_to_image else {}
        first = draw(pipe, 6, **image)
        assert torch.equal(first, draw(pipe, 6, **image))
        assert bool(first.isfinite().all())


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_configs_go_both_ways(name):
    theirs = getattr(diffusers, name)(
        beta_start=0.001, beta_end=0.013, beta_schedule="scaled_linear", prediction_type="v_prediction"
    )
    ours = IPNDMMultistepScheduler.from_config(theirs.config)
    back = type(theirs).from_config(ours.config)
    for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type", "num_train_timesteps"):
        assert back.config[key] == ours.config[key] == theirs.config[key]


def test_saved_and_loaded(tmp_path):
    scheduler = IPNDMMultistepScheduler(solver_order=3, variable_step=True, sigma_schedule="logsnr")
    scheduler.save_pretrained(tmp_path)
    assert torch.equal(sample(IPNDMMultistepScheduler.from_pretrained(tmp_path), 6), sample(scheduler, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_comes_back_as_such(dtype):
    scheduler = IPNDMMultistepScheduler()
    scheduler.set_timesteps(4)
    x = torch.ones(1, 1, 2, 2, dtype=dtype)
    assert scheduler.step(x, scheduler.timesteps[0], x).prev_sample.dtype is dtype


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"solver_order": 5}, {}, "order"),
        ({"prediction_type": "x0"}, {}, "prediction_type"),
        ({"beta_schedule": "cosine"}, {}, "beta_schedule"),
        ({}, {"num_inference_steps": 0}, "num_inference_steps"),
        ({}, {"sigmas": [1.0, 2.0]}, "fall strictly"),
        ({}, {"sigmas": [1.0, 1.0]}, "fall strictly"),
        ({}, {"sigmas": []}, "empty"),
        ({}, {"timesteps": [5.0, 9.0]}, "fall strictly"),
        ({}, {"timesteps": [9.0], "sigmas": [1.0]}, "not both"),
        ({"use_karras_sigmas": True, "sigma_schedule": "logsnr"}, {"num_inference_steps": 4}, "Only one grid"),
        ({"use_beta_sigmas": True}, {"num_inference_steps": 4}, "use_beta_sigmas"),
        ({"final_sigmas_type": "one"}, {"num_inference_steps": 4}, "final_sigmas_type"),
        ({"timestep_spacing": "even"}, {"num_inference_steps": 4}, "timestep_spacing"),
        ({"prediction_type": "flow_prediction", "use_dynamic_shifting": True}, {"num_inference_steps": 4}, "`mu`"),
    ],
)
def test_wrong_input_is_refused(options, arguments, message):
    with pytest.raises(ValueError, match=message):
        IPNDMMultistepScheduler(**options).set_timesteps(**arguments)


def test_steps_out_of_turn_are_refused():
    scheduler, x = IPNDMMultistepScheduler(), torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, 999, x)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="not among those of this run"):
        scheduler.step(x, 600, x)
    for timestep in scheduler.timesteps:
        scheduler.step(x, timestep, x)
    with pytest.raises(ValueError, match="has ended"):
        scheduler.step(x, scheduler.timesteps[-1], x)


def test_not_the_scheduler_of_diffusers():
    """Theirs has a schedule of its own; on the models of DiT and Stable Diffusion it is simply wrong."""
    theirs = diffusers.IPNDMScheduler.from_config(DDIMScheduler().config)
    theirs.set_timesteps(5)
    ours = IPNDMMultistepScheduler.from_config(DDIMScheduler().config)
    ours.set_timesteps(5)
    assert not torch.allclose(theirs.timesteps.double(), ours.timesteps.double(), atol=1)


def test_steps_read_nothing_from_the_device():
    """Tensors on "meta" have no contents, so that whatever asks for them fails."""
    scheduler = IPNDMMultistepScheduler(variable_step=True)
    scheduler.set_timesteps(5, device="meta")
    scheduler.set_begin_index(0)
    x = torch.empty(2, 2, 4, 4, device="meta")
    for timestep in scheduler.timesteps:
        x = scheduler.step(scheduler.scale_model_input(x, timestep), timestep, x).prev_sample
    assert x.device.type == "meta"
