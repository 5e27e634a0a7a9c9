"""Samplers of the EDM family: recordings, neutral limits, exact flows, and the surface of diffusers."""

import copy
import re
from itertools import pairwise

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler

from diffusers_fastdiff import AMEDScheduler, FDMEDMScheduler, FDMVEScheduler, FDMVPScheduler
from diffusers_fastdiff.schedulers import scheduling_fdm
from tests.analytic import gaussian_denoiser, gaussian_flow, mixture_denoiser
from tests.golden.recordings import assert_relative, recordings

SCHEDULERS = (FDMEDMScheduler, FDMVPScheduler, FDMVEScheduler)
SOLVERS = ("heun", "euler", "dpmpp_multistep", "dpmpp_singlestep", "ipndm")


def network(scheduler, denoiser):
    """The raw network whose preconditioned denoiser is `denoiser(x, sigma)`."""

    def output(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        sigma = scheduler.sigmas.double()[scheduler.step_index or 0]
        c_skip, c_out, c_in, c_noise = scheduler.preconditioning.at(sigma)
        assert torch.allclose(c_noise, timestep.double(), rtol=1e-5, atol=1e-6)
        x = sample / c_in
        return (denoiser(x, sigma) - c_skip * x) / c_out

    return output


def sample(scheduler, denoiser, x: torch.Tensor, generator=None, start: int = 0) -> torch.Tensor:
    raw = network(scheduler, denoiser)
    for timestep in scheduler.timesteps[start:]:
        scaled = scheduler.scale_model_input(x, timestep)
        x = scheduler.step(raw(scaled, timestep), timestep, x, generator=generator).prev_sample
    return x


# -- recordings of the published program ----------------------------------------------------------------------------------


@pytest.mark.parametrize("multiplier", [None, 1.0])
@pytest.mark.parametrize("recording", recordings("edm_samplers"))
def test_recorded_heun_with_churn(recording, multiplier, monkeypatch):
    """With any multiplier: a network that is ideal in its own formulation has the same denoiser."""
    tensors, settings = recording.tensors, recording.info["settings"]
    denoiser, checked = mixture_denoiser(tensors["mu"], settings["s0"]), 0
    for key, expected in tensors.items():
        match = re.fullmatch(r"edm\.(det|churn|churnmax)\.n(\d+)\.final", key)
        if not match:
            continue
        kind, count = match[1], int(match[2])
        options = {name.lower(): float(value) for name, value in settings["churn"].get(kind, {}).items()}
        if options.get("s_max") == float("inf"):
            options["s_max"] = None
        scheduler = FDMEDMScheduler(multiplier=multiplier, **options)
        scheduler.set_timesteps(2 * count - 1)
        x = tensors["latents"] * 80.0
        if kind != "det":
            noises = tensors[f"edm.{kind}.n{count}.noises"]
            raised = scheduler._driver.evaluations[0].sigma
            x = x + (raised**2 - 80.0**2) ** 0.5 * scheduler.config.s_noise * noises[0]
            grid = scheduler._driver.run.sigmas  # the program draws at every interval, we only where something is added
            draws = iter([noises[i] for i in range(1, count) if scheduler._churn.raised(grid[i], count) > grid[i]])
            monkeypatch.setattr(scheduling_fdm, "randn_tensor", lambda *_, draws=draws, **__: next(draws))
        # float64 levels instead of the float32 ones that the scheduler shows
        exact = torch.tensor([evaluation.sigma for evaluation in scheduler._driver.evaluations], dtype=torch.float64)
        scheduler.sigmas = exact
        assert_relative(exact, tensors[f"edm.{kind}.n{count}.call_sigma"], 1e-10)
        assert_relative(sample(scheduler, denoiser, x), expected, 1e-9)
        checked += 1
    assert checked


@pytest.mark.parametrize("recording", recordings("edm_samplers"))
def test_recorded_singlestep_dpm_solver(recording):
    tensors, settings = recording.tensors, recording.info["settings"]
    denoiser, checked = mixture_denoiser(tensors["mu"], settings["s0"]), 0
    for key, expected in tensors.items():
        match = re.fullmatch(r"dpm\.denoise(\d)\.n(\d+)\.f64\.final", key)
        if not match:
            continue
        final = "zero" if match[1] == "1" else "sigma_min"
        scheduler = FDMEDMScheduler(multiplier=None, solver="dpmpp_singlestep", final_sigmas_type=final)
        scheduler.set_timesteps(int(match[2]))
        scheduler.sigmas = torch.tensor([e.sigma for e in scheduler._driver.evaluations], dtype=torch.float64)
        assert_relative(sample(scheduler, denoiser, tensors["latents"] * 80.0), expected, 1e-9)
        checked += 1
    assert checked


# -- neutral limits and exact solutions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("theirs", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
@pytest.mark.parametrize("schedule", ["karras", "exponential"])
def test_without_momentum_it_is_the_scheduler_of_diffusers(theirs, schedule):
    reference = theirs(sigma_schedule=schedule)
    ours = FDMEDMScheduler.from_config(reference.config)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 80
    y = x.clone()
    for scheduler in (reference, ours):
        scheduler.set_timesteps(7)
    torch.testing.assert_close(ours.timesteps, reference.timesteps, rtol=1e-5, atol=1e-6)
    for t, u in zip(reference.timesteps, ours.timesteps, strict=True):
        x = reference.step(torch.tanh(reference.scale_model_input(x, t)) * (t / 4).exp(), t, x).prev_sample
        y = ours.step(torch.tanh(ours.scale_model_input(y, u)) * (u / 4).exp(), u, y).prev_sample
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert ours.config.multiplier is None


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_multiplier_changes_nothing_but_the_input_scale(cls):
    plain, momentum = cls(multiplier=None), cls(multiplier=2.0)
    for scheduler in (plain, momentum):
        scheduler.set_timesteps(9)
    assert torch.equal(plain.timesteps, momentum.timesteps)
    x = torch.randn(1, 1, 4, 4)
    scale = float(momentum.scale_model_input(x, momentum.timesteps[0])[0, 0, 0, 0] / x[0, 0, 0, 0])
    c_in = float(momentum.preconditioning.at(momentum.sigmas[0].double()).c_in)
    assert scale == pytest.approx(c_in, rel=1e-5)
    assert c_in != pytest.approx(float(plain.preconditioning.at(plain.sigmas[0].double()).c_in), rel=1e-2)
    zero = cls(multiplier=0)
    zero.set_timesteps(9)
    assert torch.equal(zero.scale_model_input(x, zero.timesteps[0]), plain.scale_model_input(x, plain.timesteps[0]))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("cls", SCHEDULERS)
def test_solvers_converge_to_the_exact_flow(cls, solver):
    scheduler = cls(solver=solver, final_sigmas_type="sigma_min")
    errors = []
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for count in (20, 80):
        scheduler.set_timesteps(count)
        scheduler.sigmas = torch.tensor([e.sigma for e in scheduler._driver.evaluations], dtype=torch.float64)
        first, last = scheduler._driver.run.sigmas[0], scheduler._driver.run.sigmas[-1]
        exact = gaussian_flow(first * x, first, last)
        errors.append(float((sample(scheduler, gaussian_denoiser, first * x) - exact).abs().max()))
    assert errors[1] < errors[0] / 2.5
    assert errors[1] < (0.05 if solver == "euler" else 2e-2)


def test_churn_has_the_distribution_of_the_algorithm():
    """For Gaussian data every step is a factor on the sample, so its variance follows by hand."""
    scheduler = FDMEDMScheduler(s_churn=20.0, s_min=0.05, s_max=90.0, s_noise=1.05)
    scheduler.set_timesteps(31)
    assert scheduler.init_noise_sigma > 80
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 1, 8, 8, dtype=torch.float64, generator=generator) * scheduler.init_noise_sigma
    result = sample(scheduler, gaussian_denoiser, x, generator=generator)

    grid, variance = scheduler._driver.run.sigmas, 80.0**2
    for level, following in pairwise(grid):
        raised = level * (1 + min(20.0 / 16, 2**0.5 - 1)) if 0.05 <= level <= 90 else level
        variance += 1.05**2 * (raised**2 - level**2)
        slope = raised / (raised**2 + 0.25)
        step = following - raised
        euler = 1 + step * slope
        second = following / (following**2 + 0.25) * euler
        factor = euler if following == 0 else 1 + step * (slope + second) / 2
        variance *= factor**2
    assert float(result.std()) == pytest.approx(variance**0.5, rel=0.03)
    assert variance**0.5 != pytest.approx(0.5, rel=0.1)  # far enough from what it would be without


def test_churn_of_an_image_comes_from_its_own_generator():
    scheduler = FDMEDMScheduler(s_churn=20.0)
    x = torch.randn(3, 1, 4, 4)
    scheduler.set_timesteps(9)
    generators = [torch.Generator().manual_seed(k) for k in range(3)]
    whole = sample(scheduler, gaussian_denoiser, x * 80, generators)
    scheduler.set_timesteps(9)
    alone = sample(scheduler, gaussian_denoiser, x[1:2] * 80, [torch.Generator().manual_seed(1)])
    torch.testing.assert_close(whole[1:2], alone)


# -- surface --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_num_inference_steps_counts_evaluations(solver, final):
    scheduler = FDMEDMScheduler(solver=solver, final_sigmas_type=final)
    for count in (1, 2, 3, 4, 5, 10):
        if solver == "heun" and count % 2 != (final == "zero"):
            with pytest.raises(ValueError, match="odd" if final == "zero" else "even"):
                scheduler.set_timesteps(count)
            continue
        scheduler.set_timesteps(count)
        assert len(scheduler.timesteps) == count
        assert bool(sample(scheduler, gaussian_denoiser, torch.randn(1, 1, 2, 2) * 80).isfinite().all())
        with pytest.raises(ValueError, match="ended"):
            scheduler.step(torch.zeros(1, 1, 2, 2), scheduler.timesteps[-1], torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize("solver", ["heun", "euler", "dpmpp_singlestep", "ipndm"])
def test_runs_can_begin_later(solver):
    scheduler = FDMEDMScheduler(solver=solver)
    scheduler.set_timesteps(21)
    clean = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    noise = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    for start in (8, 9, 10):
        scheduler.set_timesteps(21)
        scheduler.set_begin_index(start)
        timestep = scheduler.timesteps[start : start + 1]
        noisy = scheduler.add_noise(clean, noise, timestep)
        level = float(scheduler._sigma_of(float(timestep)))
        torch.testing.assert_close(noisy, level * noise)
        result = sample(scheduler, gaussian_denoiser, noisy, start=start)
        torch.testing.assert_close(result, gaussian_flow(noisy, level, 0.0), rtol=0.2, atol=0.02)


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_timesteps_tell_their_noise_level(cls):
    scheduler = cls(noise_input_scale=3.0)
    scheduler.set_timesteps(11)
    model = scheduler.noise_model
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        assert float(model.sigma(timestep)) == pytest.approx(float(sigma), rel=2e-4)


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_two_runs_are_the_same_and_survive_saving_and_copying(cls, tmp_path):
    scheduler = cls(multiplier=1.5, solver="ipndm", solver_order=3)
    scheduler.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    x = torch.randn(1, 1, 4, 4) * 80
    results = []
    for one in (scheduler, scheduler, loaded, copy.deepcopy(scheduler)):
        one.set_timesteps(8)
        results.append(sample(one, gaussian_denoiser, x))
    assert all(torch.equal(results[0], result) for result in results)


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_amed_takes_over_the_formulation(cls, tmp_path):
    """An untrained solver with r = 1/2 is DPM-Solver-2 on the same denoiser."""
    scheduler = cls(multiplier=1.5, sigma_min=0.05)
    scheduler.save_pretrained(tmp_path)
    for config in (scheduler.config, cls.load_config(tmp_path)):
        amed = AMEDScheduler.from_config(config, student="dpm2")
        assert amed.noise_model.preconditioning == scheduler.preconditioning
        amed.set_timesteps(24)
        assert amed.init_noise_sigma == pytest.approx(float(amed.sigmas[0]))
        amed.preconditioning = scheduler.preconditioning
        x = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        levels = torch.tensor([e.sigma for e in amed._driver.evaluations], dtype=torch.float64)
        exact = gaussian_flow(levels[0] * x.double(), float(levels[0]), float(amed._driver.run.sigmas[-1]))
        amed.sigmas = levels
        torch.testing.assert_close(sample(amed, gaussian_denoiser, levels[0] * x.double()), exact, rtol=0.05, atol=0.01)
    amed.save_pretrained(tmp_path / "amed")
    assert AMEDScheduler.load_config(tmp_path / "amed")["_class_name"] == "AMEDScheduler"


def test_another_formulation_is_refused():
    with pytest.raises(ValueError, match="formulation"):
        FDMVPScheduler.from_config(FDMEDMScheduler().config)
    assert FDMVPScheduler.from_config(FDMVPScheduler(multiplier=2.0).config, solver="euler").config.multiplier == 2.0


def test_own_grids():
    scheduler = FDMEDMScheduler(solver="euler")
    scheduler.set_timesteps(sigmas=[40.0, 4.0, 0.4])
    assert scheduler.sigmas.tolist() == pytest.approx([40.0, 4.0, 0.4, 0.0])
    assert scheduler.init_noise_sigma == pytest.approx(40.0)
    with pytest.raises(ValueError, match="fall"):
        scheduler.set_timesteps(sigmas=[1.0, 2.0])
    narrow = FDMVEScheduler(sigma_max=50.0)
    narrow.set_timesteps(5)
    assert narrow.sigmas[0] == 50
    assert float(narrow.sigmas[-2]) == pytest.approx(0.02)  # not below what the network has seen


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"solver": "rk4"}, "solver"),
        ({"solver": "heun", "solver_order": 3}, "solver_order"),
        ({"solver": "ipndm", "solver_order": 7}, "order"),
        ({"final_sigmas_type": "one"}, "final_sigmas_type"),
        ({"multiplier": -1.0}, "momentum"),
        ({"s_churn": 10.0, "solver": "ipndm"}, "s_churn"),
        ({"sigma_min": 90.0}, "sigma_min"),
        ({"sigma_schedule": "cosine"}, "grid"),
        ({"prediction_type": "v_prediction"}, "prediction_type"),
    ],
)
def test_wrong_options_are_refused_by_name(options, word):
    with pytest.raises(ValueError, match=word):
        FDMEDMScheduler(**options)


def test_wrong_calls_are_refused():
    scheduler, x = FDMEDMScheduler(), torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, 0.0, x)
    with pytest.raises(ValueError, match="num_inference_steps"):
        scheduler.set_timesteps(0)
    with pytest.raises(ValueError, match="sigmas"):
        FDMEDMScheduler(solver="dpmpp_singlestep").set_timesteps(4, sigmas=[2.0, 1.0])
    with pytest.raises(ValueError, match="algorithm_type"):
        FDMEDMScheduler.from_config(EDMDPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++").config)
