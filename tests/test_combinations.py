"""Every model with every scheduler, every hook, with guidance and without: it runs, or is refused with a reason."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from diffusers_fastdiff import (
    AMEDPredictor,
    AMEDScheduler,
    EDMPipeline,
    FasterDiffusionConfig,
    FDMEDMScheduler,
    FDMVEScheduler,
    FDMVPScheduler,
    FixedPointSamplingConfig,
    GDDIMScheduler,
    IPNDMMultistepScheduler,
    PixelAutoencoder,
    apply_faster_diffusion,
    apply_fixed_point_sampling,
    remove_faster_diffusion,
    remove_fixed_point_sampling,
)
from diffusers_fastdiff.numerics.linear_solver import as_linear_solver
from diffusers_fastdiff.numerics.solver_methods import Solver
from diffusers_fastdiff.numerics.solvers import SolverRun
from tests.ecosystem.folders import edm_unet
from tests.hooks import tiny_pipelines as tiny
from tests.models.tiny import fixed_point_dit

STEPS = 6
DISCRETE = {"clip_sample": False, "timestep_spacing": "linspace", "steps_offset": 1}


def fixed_point_pipeline(folder) -> DiTPipeline:
    model = fixed_point_dit(in_channels=1, out_channels=1, num_iterations=4).eval()
    return DiTPipeline(model, PixelAutoencoder(1), DDIMScheduler(**DISCRETE))


MODELS = {
    "DiT": lambda folder: tiny.dit(),
    "fixed-point DiT": fixed_point_pipeline,
    "EDM U-Net": lambda folder: EDMPipeline(edm_unet(num_classes=10), FDMEDMScheduler()),
    "SD U-Net": tiny.stable_diffusion,
}


def linear(config) -> AMEDScheduler:
    """A linear multistep solver as learning leaves it: weights for its own six evaluations."""
    grid = AMEDScheduler.from_config(config, sigma_schedule="logsnr").interval_grid(2 * STEPS)
    solver = as_linear_solver(lambda: SolverRun(Solver("dpmpp", 2), [*grid[:-1], 0.0])).to_dict()
    return AMEDScheduler.from_config(config, student="lms", linear_solver=solver)


def constants(config) -> AMEDScheduler:
    grid = AMEDScheduler.from_config(config, student="ipndm", sigma_schedule="logsnr").interval_grid(STEPS)
    coefficients = [[0.45, 1.02, 1.0]] * (len(grid) - 1)
    return AMEDScheduler.from_config(config, student="ipndm", sigmas=grid, coefficients=coefficients)


def attached(config) -> AMEDScheduler:
    torch.manual_seed(0)
    grid = AMEDScheduler.from_config(config, student="ipndm", sigma_schedule="logsnr").interval_grid(STEPS)
    scheduler = AMEDScheduler.from_config(config, student="ipndm", mode="attached", sigmas=grid)
    scheduler.predictor = AMEDPredictor(scale_dir=0.1, scale_time=0.1).eval()
    return scheduler


OURS = {
    "iPNDM": IPNDMMultistepScheduler.from_config,
    "iPNDM_v": lambda config: IPNDMMultistepScheduler.from_config(config, variable_step=True),
    "AMED, plain DPM-Solver-2": lambda config: AMEDScheduler.from_config(config, student="dpm2", sigma_schedule="logsnr"),
    "AMED, plain DPM-Solver++": lambda config: AMEDScheduler.from_config(config, student="dpmpp"),
    "AMED, constants": constants,
    "AMED, lms": linear,
    "AMED, attached": attached,
    "gDDIM": lambda config: GDDIMScheduler.from_config(config, order=2),
    "gDDIM, stochastic": lambda config: GDDIMScheduler.from_config(config, order=0, stochasticity=1.0),
    "gDDIM, corrected": lambda config: GDDIMScheduler.from_config(config, order=1, corrector="pece"),
    "FDM-EDM, Heun": lambda config: FDMEDMScheduler.from_config(config, solver="heun"),
    "FDM-EDM, DPM-Solver++": lambda config: FDMEDMScheduler.from_config(config, solver="dpmpp_multistep"),
    "FDM-VP": FDMVPScheduler.from_config,
    "FDM-VE": FDMVEScheduler.from_config,
}
THEIRS = {
    "DDIM": DDIMScheduler,
    "DDPM": DDPMScheduler,
    "DPM-Solver++": DPMSolverMultistepScheduler,
    "UniPC": UniPCMultistepScheduler,
    "DEIS": DEISMultistepScheduler,
    "Heun": HeunDiscreteScheduler,
    "Euler": EulerDiscreteScheduler,
    "PNDM": PNDMScheduler,
    "EDM Euler": EDMEulerScheduler,
}
HOOKS = ("no hook", "propagation", "iterations", "both")


def refusal(model: str, scheduler: str, hook: str) -> str | None:
    """Words of the reason, or None where the combination works."""
    if hook in ("iterations", "both") and model != "fixed-point DiT":
        return "must be a FixedPointDiTTransformer2DModel"
    if hook == "both":
        return "cannot rule the same model"
    if scheduler.startswith("FDM") and model != "EDM U-Net":
        return "raw networks"
    if scheduler in ("FDM-VP", "FDM-VE"):
        return "formulation 'edm'"
    if scheduler.startswith("gDDIM") and model == "EDM U-Net":
        return "EDM"
    return None


def evaluations(scheduler: str) -> int:
    """A number of steps that the scheduler can have: Heun's method of diffusers has two evaluations in each."""
    return {"FDM-EDM, Heun": 7, "Heun": 4}.get(scheduler, STEPS)


def set_scheduler(pipe, name: str) -> None:
    if name in OURS:
        scheduler = OURS[name](pipe.scheduler.config)
    elif isinstance(pipe, EDMPipeline):  # diffusers' classes take every config, so the caller names the model's own schedule
        scheduler = THEIRS[name]()
    else:
        scheduler = THEIRS[name].from_config(pipe.scheduler.config)
    if name == "AMED, attached":
        scheduler.attach(pipe)
    else:
        pipe.scheduler = scheduler


def apply_hooks(pipe, hook: str, neutral: bool) -> None:
    if hook in ("propagation", "both"):
        apply_faster_diffusion(pipe, FasterDiffusionConfig(every=1 if neutral else 2))
    if hook in ("iterations", "both"):
        config = FixedPointSamplingConfig() if neutral else FixedPointSamplingConfig(num_iterations=2, reuse_solution=True)
        apply_fixed_point_sampling(pipe, config)


def prepare(pipe, scheduler: str, hook: str) -> None:
    set_scheduler(pipe, scheduler)
    apply_hooks(pipe, hook, neutral=True)
    draw(pipe, scheduler, 1.0)


def remove_hooks(pipe, hook: str) -> None:
    if hook in ("iterations", "both"):
        remove_fixed_point_sampling(pipe)
    if hook in ("propagation", "both"):
        remove_faster_diffusion(pipe)


def draw(pipe, scheduler: str, guidance_scale: float) -> torch.Tensor:
    options = {"class_labels": [1, 2], "output_type": "latent"} if isinstance(pipe, EDMPipeline) else {}
    return tiny.draw(pipe, evaluations(scheduler), guidance_scale=guidance_scale, **options)


CELLS = [
    (model, scheduler, hook, guidance)
    for model in MODELS
    for scheduler in (*OURS, *THEIRS)
    for hook in HOOKS
    for guidance in (1.0, 2.5)
    # the hooks refuse a model, or each other, without a look at the scheduler: once is enough
    if scheduler == "DDIM" or hook in ("no hook", "propagation") or (hook == "iterations" and model == "fixed-point DiT")
]


@pytest.mark.parametrize(("model", "scheduler", "hook", "guidance"), CELLS, ids=[" + ".join(map(str, cell)) for cell in CELLS])
def test_cell(model, scheduler, hook, guidance, tmp_path):
    pipe = tiny.quiet(MODELS[model](tmp_path))
    reason = refusal(model, scheduler, hook)
    if reason is not None:
        with pytest.raises((ValueError, TypeError), match=reason):
            prepare(pipe, scheduler, hook)
        return
    set_scheduler(pipe, scheduler)
    plain = draw(pipe, scheduler, guidance)
    assert bool(plain.isfinite().all())
    assert torch.equal(draw(pipe, scheduler, guidance), plain)
    if hook == "no hook":
        assert not torch.equal(draw(pipe, scheduler, 4.0), plain)
        return
    apply_hooks(pipe, hook, neutral=True)
    assert torch.equal(draw(pipe, scheduler, guidance), plain)
    apply_hooks(pipe, hook, neutral=False)
    changed = draw(pipe, scheduler, guidance)
    assert bool(changed.isfinite().all())
    assert not torch.equal(changed, plain)
    assert torch.equal(draw(pipe, scheduler, guidance), changed)
    remove_hooks(pipe, hook)
    assert torch.equal(draw(pipe, scheduler, guidance), plain)


def trailing(config) -> DDIMScheduler:
    """The spacing in which a step of DDIM ends where the next one begins."""
    return DDIMScheduler.from_config(config, timestep_spacing="trailing")


def as_weights(config) -> AMEDScheduler:
    grid = IPNDMMultistepScheduler.from_config(config)
    grid.set_timesteps(5)
    solver = as_linear_solver(lambda: SolverRun(Solver("ipndm", 4), grid.sigmas.double().tolist())).to_dict()
    return AMEDScheduler.from_config(config, student="lms", linear_solver=solver)


NEUTRAL = {
    "iPNDM of order 1 is DDIM": (lambda c: IPNDMMultistepScheduler.from_config(trailing(c).config, solver_order=1), trailing),
    "gDDIM of order 0 is DDIM": (lambda c: GDDIMScheduler.from_config(trailing(c).config, order=0), trailing),
    "lms with the weights of iPNDM is iPNDM": (as_weights, IPNDMMultistepScheduler.from_config),
}


@pytest.mark.parametrize("name", NEUTRAL)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("model", ["DiT", "fixed-point DiT", "SD U-Net"])
def test_neutral_settings(model, guidance, name, tmp_path):
    results = []
    for make in NEUTRAL[name]:
        pipe = tiny.quiet(MODELS[model](tmp_path))
        pipe.scheduler = make(pipe.scheduler.config)
        results.append(tiny.draw(pipe, 5, guidance_scale=guidance))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_fdm_without_momentum_is_edm(guidance):
    results = []
    for scheduler in (FDMEDMScheduler(multiplier=0.0, solver="euler"), EDMEulerScheduler(sigma_data=0.5)):
        pipe = tiny.quiet(EDMPipeline(edm_unet(num_classes=10), scheduler))
        results.append(draw(pipe, "", guidance))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
