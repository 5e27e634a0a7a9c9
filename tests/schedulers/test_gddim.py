"""gDDIM as a scheduler: DDIM and DEIS on variance-preserving models, exact claims and recorded errors on the others."""

import copy
import math

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DiTPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)

from diffusers_fastdiff import PixelAutoencoder
from diffusers_fastdiff.numerics.linear_sde import apply
from diffusers_fastdiff.schedulers.scheduling_gddim import GDDIMScheduler
from tests.golden.recordings import recordings
from tests.golden.test_gddim import cases, find, mixture_of, pack, rms_error
from tests.models.tiny import faster_dit

TABLES = {
    "DiT": {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
    "Stable Diffusion": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1},
}
BLUR = {"process": "blur", "process_parameters": {"image_size": (4, 4), "sigma_max": 2.0}}
RUNS = {
    "vp": {},
    "vp, v": {"prediction_type": "v_prediction", "time_grid": "hybrid"},
    "vp, stochastic": {"stochasticity": 0.5},
    "vp, pec": {"corrector": "pec", "order": 1},
    "cld": {"process": "cld"},
    "cld, stochastic": {"process": "cld", "stochasticity": 1.0},
    "cld, pece": {"process": "cld", "corrector": "pece", "denoise": False},
    "cld, Cholesky": {"process": "cld", "parametrization": "L", "time_grid": "power"},
    "cld, mixed score": {"process": "cld", "mixed_score": True, "network_parametrization": "L"},
    "cld, Euler": {"process": "cld", "sampler": "euler_maruyama", "stochasticity": 1.0},
    "cld, SSCS": {"process": "cld", "sampler": "sscs", "stochasticity": 1.0},
    "blur": BLUR,
    "blur, stochastic": BLUR | {"stochasticity": 1.0, "denoise": True},
    "blur, Euler": BLUR | {"sampler": "euler_maruyama"},
}


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def network(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Bounded, different at every timestep, and the same for all entries of a batch."""
    return (x * 0.7).sin() + timestep.to(x) / 1000


def sample(scheduler, start: torch.Tensor, count: int, generator=None, predict=network) -> torch.Tensor:
    scheduler.set_timesteps(count)
    x = start
    for timestep in scheduler.timesteps:
        x = scheduler.step(predict(x, timestep), timestep, x, generator=generator).prev_sample
    return x


def grid_time(scheduler: GDDIMScheduler, timestep: torch.Tensor) -> float:
    """The time of an evaluation; timesteps are float32, which matters where the blur is undone."""
    told = scheduler.time_of(timestep).item()
    return min(scheduler._times, key=lambda time: abs(time - told))


def exact_eps(scheduler: GDDIMScheduler, clean: torch.Tensor, parametrization: str | None = None):
    """The perfect network for a data set of one image."""
    process = scheduler.forward_process
    parametrization = parametrization or scheduler.config.network_parametrization

    def predict(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        t = grid_time(scheduler, timestep)
        mean = apply(process, process.signal(t), process.transform(process.lift(clean)))
        inverse = torch.linalg.inv(process.noise_factor(t, parametrization))
        return process.inverse_transform(apply(process, inverse, process.transform(x) - mean))

    return predict


# ---- DDIM and DEIS -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("stochasticity", [0.0, 0.3, 1.0])
def test_order_0_is_ddim(table, spacing, prediction_type, set_alpha_to_one, stochasticity):
    """Step for step, with the timesteps of its config, `eta` from lambda and the same random numbers."""
    options = {"timestep_spacing": spacing, "prediction_type": prediction_type, "set_alpha_to_one": set_alpha_to_one}
    theirs = DDIMScheduler(**TABLES[table], **options, clip_sample=False)
    ours = GDDIMScheduler.from_config(theirs.config, order=0, stochasticity=stochasticity)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    assert torch.equal(theirs.timesteps, ours.timesteps)
    etas = ours.ddim_etas()
    etas += [0.0] * (10 - len(etas))  # a last step without length
    x, generators = noise(2, 3, 4, 4), [torch.Generator().manual_seed(1) for _ in range(2)]
    for timestep, eta in zip(theirs.timesteps, etas, strict=True):
        output = network(x, timestep)
        actual = ours.step(output, timestep, x, generator=generators[0]).prev_sample
        x = theirs.step(output, timestep, x, eta=eta, generator=generators[1]).prev_sample
        torch.testing.assert_close(actual, x, rtol=1e-4, atol=1e-4)  # they compute in float32


def test_eta_is_lambda_at_both_ends_and_for_small_steps():
    scheduler = GDDIMScheduler(stochasticity=1.0)
    scheduler.set_timesteps(20)
    assert scheduler.ddim_etas() == pytest.approx([1.0] * 20)
    scheduler = GDDIMScheduler(stochasticity=0.5)
    scheduler.set_timesteps(1000)
    assert scheduler.ddim_etas()[200] == pytest.approx(0.5, abs=0.01)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("count", [10, 20])
@pytest.mark.parametrize("begin", [0, 4])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_higher_orders_are_deis(table, order, count, begin, prediction_type):
    """From any place of the run, as image-to-image pipelines start."""
    theirs = DEISMultistepScheduler(**TABLES[table], solver_order=order + 1, prediction_type=prediction_type)
    ours = GDDIMScheduler.from_config(theirs.config, order=order, lower_order_final=True, set_alpha_to_one=False)
    theirs.set_timesteps(count)
    ours.set_timesteps(timesteps=theirs.timesteps)
    x = y = noise(2, 3, 4, 4, dtype=torch.float32)
    for scheduler in (ours, theirs):
        scheduler.set_begin_index(begin)
    for timestep in theirs.timesteps[begin:]:
        x = theirs.step(network(x, timestep), timestep, x).prev_sample
        y = ours.step(network(y, timestep), timestep, y).prev_sample
    torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


def test_run_may_start_in_the_middle_without_being_told():
    scheduler = GDDIMScheduler(order=2)
    scheduler.set_timesteps(8)
    told, x, y = copy.deepcopy(scheduler), noise(1, 1, 2, 2), noise(1, 1, 2, 2)
    told.set_begin_index(3)
    for timestep in scheduler.timesteps[3:]:
        x = scheduler.step(network(x, timestep), timestep, x).prev_sample
        y = told.step(network(y, timestep), timestep, y).prev_sample
    assert torch.equal(x, y)


def test_zero_terminal_snr():
    """First step from pure noise, with a velocity model."""
    options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    theirs = DDIMScheduler(**options, clip_sample=False)
    ours = GDDIMScheduler.from_config(theirs.config, order=0)
    start = noise(2, 3, 4, 4, dtype=torch.float32)
    torch.testing.assert_close(sample(theirs, start, 10), sample(ours, start, 10), rtol=2e-3, atol=2e-3)


CLASSES = [
    "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", CLASSES)
def test_configs_go_both_ways(name):
    theirs = getattr(diffusers, name)(beta_start=0.001, beta_end=0.01, beta_schedule="scaled_linear", num_train_timesteps=500)
    ours = GDDIMScheduler.from_config(theirs.config, order=1)
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-6)
    assert sample(ours, noise(1, 1, 2, 2), 5).isfinite().all()
    back = type(theirs).from_config(ours.config)
    back.set_timesteps(5)
    assert torch.equal(back.alphas_cumprod, theirs.alphas_cumprod)
    assert {"solver_type", "algorithm_type"}.isdisjoint(GDDIMScheduler().config)  # names that others give a meaning of theirs


# ---- stock pipelines -----------------------------------------------------------------------------------------------------


def dit_images(scheduler, guidance_scale: float = 2.0) -> torch.Tensor:
    pipe = DiTPipeline(faster_dit(in_channels=1, out_channels=1), PixelAutoencoder(1), scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.eval()
    generator = torch.Generator().manual_seed(0)
    options = {"guidance_scale": guidance_scale, "num_inference_steps": 5, "generator": generator, "output_type": "np"}
    return torch.from_numpy(pipe([1, 2], **options).images)


def test_in_dit_pipeline():
    theirs = DDIMScheduler(clip_sample=False)
    ours = GDDIMScheduler.from_config(theirs.config, order=0)
    torch.testing.assert_close(dit_images(ours), dit_images(theirs), rtol=1e-4, atol=1e-4)
    again = GDDIMScheduler.from_config(theirs.config, order=3)
    assert torch.equal(dit_images(again), dit_images(again))  # nothing is left over from one run for the next
    assert torch.equal(dit_images(again), dit_images(copy.deepcopy(again)))


def stable_diffusion(scheduler, pipeline_class=StableDiffusionPipeline):
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    parts = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    pipe = pipeline_class(vae=vae, unet=unet, scheduler=scheduler, **parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion_images(scheduler, **options) -> torch.Tensor:
    pipe = stable_diffusion(scheduler, StableDiffusionImg2ImgPipeline if "image" in options else StableDiffusionPipeline)
    prompts = {"prompt_embeds": noise(1, 3, 8, dtype=torch.float32), "negative_prompt_embeds": torch.zeros(1, 3, 8)}
    images = pipe(**prompts, **options, generator=torch.Generator().manual_seed(0), output_type="np").images
    return torch.from_numpy(images)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "options", [{}, {"image": noise(1, 3, 8, 8, dtype=torch.float32), "strength": 0.6}], ids=["text", "image"]
)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_in_stable_diffusion_pipelines(options, prediction_type):
    config = TABLES["Stable Diffusion"] | {"prediction_type": prediction_type}
    theirs = DDIMScheduler(**config, clip_sample=False, set_alpha_to_one=False)
    ours = GDDIMScheduler.from_config(theirs.config, order=0)
    options = options | {"num_inference_steps": 10}
    images = stable_diffusion_images(theirs, **options)
    torch.testing.assert_close(stable_diffusion_images(ours, **options), images, rtol=1e-3, atol=1e-3)
    deis = DEISMultistepScheduler(**config)
    deis.set_timesteps(10)
    higher = GDDIMScheduler.from_config(deis.config, order=1, lower_order_final=True, set_alpha_to_one=False)
    timesteps = {"num_inference_steps": None, "timesteps": deis.timesteps.tolist()}
    if "image" in options:  # there `num_inference_steps` also says how many steps `strength` leaves
        timesteps["num_inference_steps"] = 10
    expected = stable_diffusion_images(deis, **options)
    torch.testing.assert_close(stable_diffusion_images(higher, **options | timesteps), expected, rtol=1e-3, atol=1e-3)


# ---- claims of the paper -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vp", "cld", "blur"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_single_image_is_exact_in_any_number_of_steps(name, count):
    """With R. For Cholesky it is not."""
    options = {"denoise": False} if name != "vp" else {"set_alpha_to_one": False, "timestep_spacing": "trailing"}
    scheduler = GDDIMScheduler(**RUNS[name], **options)
    process, clean = scheduler.forward_process, torch.rand(1, 2, 4, 4, dtype=torch.float64)
    end = scheduler.final_time if name != "vp" else scheduler.time_of(0).item()
    scheduler.set_timesteps(count)
    start_time, eps = scheduler._times[0], noise(1, 2 * process.block, 4, 4)
    signal, factor = (process.signal(t) for t in (start_time, end)), (process.factor(t) for t in (start_time, end))
    lifted = process.transform(process.lift(clean))
    start, expected = (
        process.inverse_transform(apply(process, a, lifted) + apply(process, r, process.transform(eps)))
        for a, r in zip(signal, factor, strict=True)
    )
    predict = exact_eps(scheduler, clean)
    torch.testing.assert_close(sample(scheduler, start, count, predict=predict), expected, rtol=1e-9, atol=1e-9)
    if name == "cld":
        cholesky = GDDIMScheduler(**RUNS[name], **options, parametrization="L")
        assert (sample(cholesky, start, count, predict=predict) - expected).abs().max() > 0.05


@pytest.mark.parametrize("name", ["vp", "cld"])
@pytest.mark.parametrize("stochasticity", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("order", [0, 2])
def test_stochastic_sampler_has_the_marginals_of_the_process(name, stochasticity, order):
    """1e5 paths of a data set of one image: its mean and covariance at the end, at any lambda, order and number of steps."""
    options = {"denoise": False} if name != "vp" else {"set_alpha_to_one": False, "timestep_spacing": "trailing"}
    scheduler = GDDIMScheduler(**RUNS[name], **options, order=order, stochasticity=stochasticity)
    process, num_paths = scheduler.forward_process, 100_000
    scheduler.set_timesteps(4)
    start_time, end = scheduler._times[0], scheduler._times[-1]
    clean = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64)
    eps = noise(num_paths, process.block, 1, 1)
    start = apply(process, process.signal(start_time), process.lift(clean)) + apply(process, process.factor(start_time), eps)
    generator = torch.Generator().manual_seed(1)
    end_states = sample(scheduler, start, 4, generator, exact_eps(scheduler, clean)).flatten(1)
    mean, covariance = apply(process, process.signal(end), process.lift(clean)).flatten(), process.covariance(end)
    scale = covariance.diagonal().sqrt()
    assert ((end_states.mean(0) - mean).abs() / scale).max() < 0.02
    measured = end_states.T.cov().reshape(process.block, process.block)
    assert ((measured - covariance).abs() / scale / scale[:, None]).max() < 0.03
    if stochasticity == 1:  # memory of the start is lost as fast as the forward process loses it
        still = GDDIMScheduler(**RUNS[name], **options, order=order)
        assert (sample(still, start, 4, predict=exact_eps(scheduler, clean)).flatten(1) - end_states).std() > 0.5 * scale[0]


def mixture_error(case, count: int, **options) -> float:
    """Of the positions, against the probability flow; float64 through the scheduler."""
    scheduler = GDDIMScheduler(process="cld", **options)
    mixture, process = mixture_of(case), scheduler.forward_process
    assert process == case.process
    generator = torch.Generator().manual_seed(0)

    def predict(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return mixture.eps(x.flatten(1), grid_time(scheduler, timestep)).reshape(x.shape)

    start = pack(case.tensors["u_T"])[..., None, None]
    end = sample(scheduler, start, count, generator, predict)
    return rms_error(case, end.flatten(1), scheduler.has_denoising_step)


def default_cases(recording):
    return [case for case in cases(recording) if mixture_of(case).process == GDDIMScheduler(process="cld").forward_process]


@pytest.mark.parametrize("recording", recordings("cld_trajectories"))
def test_recorded_errors_are_not_exceeded(recording):
    for case in default_cases(recording):
        stated = find(recording.info["results"]["error_tables"], case.name)
        for order in range(4):
            for key, values in stated[f"exact_deis{order}"].items():
                count, ending = key.removeprefix("nfe").split("_")
                options = {"order": order, "denoise": ending == "den"}
                published = mixture_error(case, int(count), time_grid="power", **options)
                assert published == pytest.approx(values["rms_x"], rel=1e-8)


@pytest.mark.parametrize("recording", recordings("cld_trajectories"))
def test_better_grid_and_corrector_lower_the_error(recording):
    """Hybrid times at every order and number of steps; the corrector when steps are many."""
    for case in default_cases(recording):
        gains = {}
        for count in (10, 20, 50):
            for order in range(4):
                power, hybrid = (
                    mixture_error(case, count, order=order, time_grid=g, denoise=False) for g in ("power", "hybrid")
                )
                gains[count, order] = power / hybrid
        assert min(gains.values()) > 1
        assert gains[10, 3] > 1.25
        assert gains[20, 3] > 1.25
        for order in (0, 1, 2):
            plain, pec, pece = (
                mixture_error(case, 50, order=order, time_grid="power", denoise=False, corrector=c)
                for c in (None, "pec", "pece")
            )
            assert pec < plain / 2
            assert pec < pece


@pytest.mark.parametrize("recording", recordings("cld_trajectories"))
def test_baselines_are_worse(recording):
    for case in default_cases(recording):
        for count in (20, 50):
            ours = mixture_error(case, count, time_grid="power", denoise=False)
            for options in (
                {"parametrization": "L"},
                {"sampler": "euler_maruyama"},
                {"sampler": "euler_maruyama", "stochasticity": 1.0},
                {"sampler": "sscs", "stochasticity": 1.0},
            ):
                options |= {"network_parametrization": "R", "time_grid": "power", "denoise": False}
                assert mixture_error(case, count, **options) > 3 * ours


# ---- what a network predicts ---------------------------------------------------------------------------------------------


def test_predictions_of_all_kinds_give_the_same_samples():
    start, clean = noise(1, 2, 4, 4), torch.rand(1, 2, 4, 4, dtype=torch.float64)
    results = []
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        scheduler = GDDIMScheduler(prediction_type=prediction_type)
        eps, process = exact_eps(scheduler, clean), scheduler.forward_process

        def predict(x, timestep, eps=eps, process=process, kind=prediction_type, scheduler=scheduler):
            t = grid_time(scheduler, timestep)
            alpha, sigma = process.signal(t), process.factor(t)
            return {"epsilon": eps(x, timestep), "v_prediction": alpha * eps(x, timestep) - sigma * clean, "sample": clean}[
                kind
            ]

        results.append(sample(scheduler, start, 5, predict=predict))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sampler", ["R", "L"])
def test_network_of_the_other_parametrization_and_with_mixed_score(sampler):
    """All say the same score."""
    start, clean, results = noise(1, 4, 4, 4), torch.rand(1, 2, 4, 4, dtype=torch.float64), []
    for kind in ("R", "L"):
        for mixed_score in (False, True):
            scheduler = GDDIMScheduler(
                process="cld", parametrization=sampler, network_parametrization=kind, mixed_score=mixed_score
            )
            eps, process = exact_eps(scheduler, clean), scheduler.forward_process

            def predict(x, timestep, eps=eps, process=process, scheduler=scheduler, kind=kind, mixed_score=mixed_score):
                velocity = torch.cat([torch.zeros_like(clean), x.chunk(2, dim=1)[1]], dim=1)
                inverse = torch.linalg.inv(process.noise_factor(grid_time(scheduler, timestep), kind))
                return eps(x, timestep) - mixed_score * apply(process, inverse, velocity)

            results.append(sample(scheduler, start, 5, predict=predict))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-9, atol=1e-9)


# ---- the interface -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("count", [2, 3, 4, 7, 50])
def test_the_network_is_evaluated_as_often_as_asked_for(name, count):
    scheduler, seen = GDDIMScheduler(**RUNS[name]), []

    def predict(x, timestep):
        seen.append(timestep.item())
        return network(x, timestep)

    result = sample(scheduler, scheduler.prior(noise(1, 2, 4, 4)), count, torch.Generator().manual_seed(0), predict)
    assert result.isfinite().all()
    assert len(seen) == count == scheduler.num_inference_steps == len(scheduler.timesteps)
    assert seen == sorted(seen, reverse=True)
    repeats = len(seen) - len(set(seen))
    assert (repeats > 0) == (RUNS[name].get("corrector") == "pece" and count > 2)
    first = {"cld": 999, "blur": 995, "vp": seen[0]}[scheduler.config.process]
    assert seen[0] == pytest.approx(first, abs=0.5)
    if scheduler.has_denoising_step:
        assert scheduler.time_of(seen[-1]).item() == pytest.approx(scheduler.final_time)


@pytest.mark.parametrize("name", RUNS)
def test_two_runs_are_two_fresh_runs(name):
    start, results = noise(2, 2, 4, 4), []
    scheduler = GDDIMScheduler(**RUNS[name])
    for current in (scheduler, scheduler, GDDIMScheduler(**RUNS[name])):
        results.append(sample(current, start, 6, torch.Generator().manual_seed(0)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    scheduler.set_timesteps(6)
    for timestep in scheduler.timesteps[:3]:  # a run that is given up
        scheduler.step(network(start, timestep), timestep, start)
    assert torch.equal(sample(scheduler, start, 6, torch.Generator().manual_seed(0)), results[0])


@pytest.mark.parametrize("name", ["vp, stochastic", "cld, stochastic", "cld, SSCS", "blur, stochastic"])
def test_generators_of_images(name):
    """A list has one for each image, whose noise then does not depend on the others."""
    start = noise(3, 2, 4, 4)
    seeded = lambda: [torch.Generator().manual_seed(k) for k in range(3)]  # noqa: E731
    together = sample(GDDIMScheduler(**RUNS[name]), start, 4, seeded())
    alone = sample(GDDIMScheduler(**RUNS[name]), start[1:2], 4, seeded()[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-12, atol=1e-12)
    other = sample(GDDIMScheduler(**RUNS[name]), start, 4, seeded()[::-1])
    assert not torch.allclose(together[:1], other[:1])


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_comes_back_as_such(name, dtype):
    scheduler, precise = GDDIMScheduler(**RUNS[name]), GDDIMScheduler(**RUNS[name])
    x, y = (noise(2, 2, 4, 4, dtype=kind) for kind in (dtype, torch.float64))
    for current in (scheduler, precise):
        current.set_timesteps(6)
    timestep = scheduler.timesteps[0]
    low, high = (
        current.step(value, timestep, value, generator=torch.Generator().manual_seed(0), return_dict=False)[0]
        for current, value in ((scheduler, x), (precise, y))
    )
    assert low.dtype == dtype
    if scheduler.config.stochasticity == 0:
        torch.testing.assert_close(low.double(), high, rtol=0.05, atol=0.05 * high.abs().max().item())


@pytest.mark.parametrize(
    "name", [name for name in RUNS if "stochastic" not in name and "SSCS" not in name and "Euler" not in name]
)
def test_step_reads_nothing_from_the_device(name):
    """Tensors on "meta" have no contents, so that whatever asks for them fails."""
    scheduler = GDDIMScheduler(**RUNS[name])
    scheduler.set_timesteps(5, device="meta")
    scheduler.set_begin_index(0)
    assert scheduler.timesteps.device.type == "meta"
    x = torch.empty(2, 2, 4, 4, device="meta")
    for timestep in scheduler.timesteps:
        x = scheduler.step(x, timestep, x).prev_sample
    assert x.device.type == "meta"


def test_add_noise():
    clean, eps, timesteps = noise(3, 2, 4, 4), noise(3, 2, 4, 4, seed=1), torch.tensor([0, 500, 999])
    theirs = DDIMScheduler().add_noise(clean, eps, timesteps)
    torch.testing.assert_close(GDDIMScheduler().add_noise(clean, eps, timesteps), theirs, rtol=1e-4, atol=1e-4)
    scheduler = GDDIMScheduler(process="cld")
    state = scheduler.add_noise(clean, noise(3, 4, 4, 4), torch.tensor([1.0, 500.0, 999.0]))
    assert state.shape == (3, 4, 4, 4)
    torch.testing.assert_close(scheduler.forward_process.project(state)[0], clean[0], rtol=0, atol=0.02)
    blurred = GDDIMScheduler(**BLUR).add_noise(clean.half(), eps.half(), torch.tensor([300.0]))
    assert blurred.dtype == torch.float16
    assert blurred.isfinite().all()


def test_prior():
    state = GDDIMScheduler(process="cld").prior(noise(1000, 2, 4, 4))
    assert state[:, :1].std() == pytest.approx(1.0, abs=0.02)
    assert state[:, 1:].std() == pytest.approx(0.5, abs=0.01)
    for options in ({}, BLUR):
        assert torch.equal(GDDIMScheduler(**options).prior(noise(1, 2, 4, 4)), noise(1, 2, 4, 4))


@pytest.mark.parametrize("name", RUNS)
def test_config_is_saved_and_loaded(name, tmp_path):
    scheduler = GDDIMScheduler(**RUNS[name])
    scheduler.save_pretrained(tmp_path)
    again = GDDIMScheduler.from_pretrained(tmp_path)
    assert again.forward_process == scheduler.forward_process
    start = noise(1, 2, 4, 4)
    first, second = (sample(s, start, 4, torch.Generator().manual_seed(0)) for s in (scheduler, again))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"process": "ve"}, "process"),
        ({"process": "cld", "process_parameters": {"sigma_max": 1.0}}, "process_parameters"),
        ({"process": "cld", "process_parameters": {"inverse_mass": -1.0}}, "inverse_mass"),
        ({"process": "blur", "process_parameters": {"image_size": (0, 4)}}, "image_size"),
        ({"order": 4}, "order"),
        ({"order": -1}, "order"),
        ({"stochasticity": -0.1}, "stochasticity"),
        ({"stochasticity": float("nan")}, "stochasticity"),
        ({"corrector": "pc"}, "corrector"),
        ({"corrector": "pec", "stochasticity": 1.0}, "corrector"),
        ({"process": "cld", "parametrization": "Q"}, "parametrization"),
        ({"process": "cld", "parametrization": "L", "stochasticity": 1.0}, "parametrization"),
        ({"sampler": "sscs", "stochasticity": 1.0}, "sampler"),
        ({"process": "cld", "sampler": "sscs"}, "stochasticity"),
        ({"process": "cld", "prediction_type": "v_prediction"}, "prediction_type"),
        ({"prediction_type": "flow_prediction"}, "prediction_type"),
        ({"timestep_spacing": "karras"}, "timestep_spacing"),
        ({"beta_schedule": "exponential"}, "beta_schedule"),
        ({"time_grid": "linear"}, "time_grid"),
        ({"mixed_score": True}, "mixed_score"),
        ({"denoise": True}, "denoise"),
    ],
    ids=str,
)
def test_bad_configs_are_refused(options, word):
    with pytest.raises(ValueError, match=f"`{word}`"):
        GDDIMScheduler(**options)


@pytest.mark.parametrize(
    ("options", "arguments", "word"),
    [
        ({}, {"num_inference_steps": 0}, "num_inference_steps"),
        ({}, {"num_inference_steps": 1001}, "num_inference_steps"),
        ({"process": "cld"}, {"num_inference_steps": 1}, "num_inference_steps"),
        ({}, {}, "timesteps"),
        ({}, {"timesteps": [10, 20]}, "timesteps"),
        ({}, {"timesteps": [1000, 20]}, "timesteps"),
        ({"corrector": "pece"}, {"timesteps": [20, 10]}, "timesteps"),
        ({"process": "cld", "time_grid": "power", "time_grid_parameters": {"switch": 0.5}}, {"num_inference_steps": 5}, "grid"),
        ({"process": "cld", "time_grid_parameters": {"switch": 2.0}}, {"num_inference_steps": 5}, "switch"),
        ({"process": "cld", "end_time": 2.0}, {"num_inference_steps": 5}, "end"),
    ],
    ids=str,
)
def test_bad_timesteps_are_refused(options, arguments, word):
    with pytest.raises(ValueError, match=word):
        GDDIMScheduler(**options).set_timesteps(**arguments)


def test_bad_steps_are_refused():
    scheduler, x = GDDIMScheduler(process="cld"), noise(1, 4, 4, 4)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, 999, x)
    with pytest.raises(ValueError, match="begin_index"):
        scheduler.set_begin_index(0)
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="begin_index"):
        scheduler.set_begin_index(3)
    with pytest.raises(ValueError, match="timestep"):
        scheduler.step(x, float(scheduler.timesteps[:2].mean()), x)
    with pytest.raises(ValueError, match="even number of channels"):
        scheduler.step(x[:, :3], scheduler.timesteps[0], x[:, :3])
    with pytest.raises(ValueError, match="shape"):
        scheduler.step(x[:, :2], scheduler.timesteps[0], x)
    for timestep in scheduler.timesteps:
        scheduler.step(x, timestep, x)
    with pytest.raises(ValueError, match="over"):
        scheduler.step(x, scheduler.timesteps[-1], x)
    blur = GDDIMScheduler(**BLUR)
    blur.set_timesteps(3)
    with pytest.raises(ValueError, match="image_size"):
        blur.step(noise(1, 1, 8, 8), blur.timesteps[0], noise(1, 1, 8, 8))
    with pytest.raises(ValueError, match="DDIM"):
        blur.ddim_etas()
    assert math.isinf(GDDIMScheduler().forward_process.origin)
