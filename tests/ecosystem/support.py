"""Which scheduler and hook works in which pipeline. Tests prove every cell; examples/write_readme.py prints the table."""

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_fastdiff import (
    AMEDPredictor,
    AMEDScheduler,
    FasterDiffusionConfig,
    FDMEDMScheduler,
    FixedPointSamplingConfig,
    GDDIMScheduler,
    IPNDMMultistepScheduler,
    apply_faster_diffusion,
    apply_fixed_point_sampling,
)
from diffusers_fastdiff.numerics.linear_solver import as_linear_solver
from diffusers_fastdiff.numerics.solver_methods import Solver
from diffusers_fastdiff.numerics.solvers import SolverRun
from tests.ecosystem.pipelines import draw
from tests.models.tiny import fixed_point_dit

FINE, COARSE = 60, 6


def reference(pipe) -> torch.Tensor:
    """Nearly the end of the probability flow, by schedulers of diffusers or, for models that only we have, by ours."""
    own = pipe.scheduler
    if isinstance(own, FlowMatchEulerDiscreteScheduler | GDDIMScheduler | FDMEDMScheduler):
        return draw(pipe, 401)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(own.config, final_sigmas_type="zero")
    try:
        return draw(pipe, 160)
    finally:
        pipe.scheduler = own


def ends_near_the_reference(pipe, make) -> None:
    scheduler = make(pipe.scheduler.config)  # first: what is refused needs no reference
    expected = reference(pipe)
    pipe.scheduler = scheduler
    actual = runs_twice_alike(pipe, FINE)
    assert (actual - expected).norm() < 0.05 * expected.norm()


def runs_twice_alike(pipe, steps: int) -> torch.Tensor:
    first = draw(pipe, steps)
    assert bool(first.isfinite().all())
    assert torch.equal(draw(pipe, steps), first)
    return first


# -- what users do: each raises ValueError or TypeError where it makes no sense ----------------------------------------------


def ipndm(pipe) -> None:
    ends_near_the_reference(pipe, IPNDMMultistepScheduler.from_config)


def amed_plain(pipe) -> None:
    """The base solvers, with constants that were not learned for a budget."""
    ends_near_the_reference(pipe, lambda config: AMEDScheduler.from_config(config, student="dpmpp"))


def amed_static(pipe) -> None:
    plain = AMEDScheduler.from_config(pipe.scheduler.config, student="ipndm", sigma_schedule="logsnr")
    grid = plain.interval_grid(COARSE)
    coefficients = [[0.45, 1.01, 1.0]] * (len(grid) - 1)
    learned = {"sigmas": grid, "coefficients": coefficients, "sigma_schedule": None}
    pipe.scheduler = AMEDScheduler.from_config(plain.config, **learned)
    runs_twice_alike(pipe, COARSE)


def amed_linear(pipe) -> None:
    def learned(config):
        grid = AMEDScheduler.from_config(config, sigma_schedule="logsnr").interval_grid(2 * FINE)
        solver = as_linear_solver(lambda: SolverRun(Solver("dpmpp", 2), [*grid[:-1], 0.0])).to_dict()
        return AMEDScheduler.from_config(config, student="lms", linear_solver=solver)

    ends_near_the_reference(pipe, learned)


def amed_attached(pipe) -> None:
    torch.manual_seed(0)
    static = AMEDScheduler.from_config(pipe.scheduler.config, student="ipndm", sigma_schedule="logsnr")
    grid = static.interval_grid(COARSE)
    scheduler = AMEDScheduler.from_config(static.config, mode="attached", sigmas=grid, sigma_schedule=None)
    scheduler.predictor = AMEDPredictor(scale_dir=0.1, scale_time=0.1).eval()
    scheduler.attach(pipe)
    learned = runs_twice_alike(pipe, COARSE)
    pipe.scheduler = AMEDScheduler.from_config(static.config, sigmas=grid, sigma_schedule=None)
    assert not torch.allclose(learned, draw(pipe, COARSE), rtol=1e-3)


def gddim(pipe) -> None:
    ends_near_the_reference(pipe, lambda config: GDDIMScheduler.from_config(config, order=2))


def fdm(pipe) -> None:
    ends_near_the_reference(pipe, lambda config: FDMEDMScheduler.from_config(config, solver="dpmpp_multistep"))


def faster_diffusion(pipe) -> None:
    plain = draw(pipe, 7)
    apply_faster_diffusion(pipe, FasterDiffusionConfig(every=1))
    assert torch.equal(draw(pipe, 7), plain)
    apply_faster_diffusion(pipe, FasterDiffusionConfig(every=2))
    assert not torch.equal(runs_twice_alike(pipe, 7), plain)


def fixed_point_sampling(pipe) -> None:
    if type(pipe).__name__ == "DiTPipeline":
        pipe.transformer = fixed_point_dit(in_channels=1, out_channels=1).eval()
    hook = apply_fixed_point_sampling(pipe, FixedPointSamplingConfig(budget=14, reuse_solution=True))
    runs_twice_alike(pipe, 7)
    assert sum(int(count.max()) for count in hook.iterations_spent) == 14


FEATURES = {
    "`IPNDMMultistepScheduler`": ipndm,
    "`AMEDScheduler`, not learned": amed_plain,
    "`AMEDScheduler`, learned constants": amed_static,
    "`AMEDScheduler`, learned `lms`": amed_linear,
    "`AMEDScheduler`, attached predictor": amed_attached,
    "`GDDIMScheduler`": gddim,
    "`FDMEDMScheduler`": fdm,
    "`apply_faster_diffusion`": faster_diffusion,
    "`apply_fixed_point_sampling`": fixed_point_sampling,
}
_UNETS = ("SD 1", "SD 2", "SDXL", "ControlNet", "T2I adapter", "img2img", "inpainting")
_STOCK = ("DiT", *_UNETS, "PixArt", "SD 3")
WORKS = {
    "`IPNDMMultistepScheduler`": (*_STOCK, "Flux", "EDM"),
    "`AMEDScheduler`, not learned": (*_STOCK, "Flux", "EDM"),
    "`AMEDScheduler`, learned constants": (*_STOCK, "EDM"),  # FluxPipeline hands over a grid of its own
    "`AMEDScheduler`, learned `lms`": tuple(name for name in (*_STOCK, "EDM") if name != "img2img"),  # begins with the noise
    "`AMEDScheduler`, attached predictor": ("DiT", *_UNETS, "EDM"),
    "`GDDIMScheduler`": ("DiT", *_UNETS, "PixArt", "CLD"),
    "`FDMEDMScheduler`": ("EDM",),
    "`apply_faster_diffusion`": ("DiT", *_UNETS, "EDM", "CLD"),
    "`apply_fixed_point_sampling`": ("DiT",),
}


def table(pipelines: tuple[str, ...]) -> str:
    """In Markdown."""
    lines = ["| | " + " | ".join(pipelines) + " |", "|---" * (len(pipelines) + 1) + "|"]
    for feature, works in WORKS.items():
        lines.append(f"| {feature} | " + " | ".join("yes" if name in works else "refused" for name in pipelines) + " |")
    return "\n".join(lines)
