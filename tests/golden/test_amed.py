"""Grids, solvers, predictor, sampling and distillation against the published program: float64 to 1e-10, float32 to 1e-5.

Deliberate differences: iPNDM of order 1 runs, the "discrete" grid has its exponent on both ends (equal for rho = 1), a
predictor without scales gives a triple, and dynamic thresholding is an option (the program always thresholds in data
prediction).
"""

import re

import pytest
import torch

from diffusers_fastdiff.conversion import convert_amed
from diffusers_fastdiff.conversion.amed import NAMES
from diffusers_fastdiff.models.amed_predictor import AMEDPredictor
from diffusers_fastdiff.numerics.noise_levels import DiscreteNoiseLevels
from diffusers_fastdiff.numerics.sigma_grids import discrete_grid, make_grid
from diffusers_fastdiff.numerics.solver_methods import AMEDCoefficients, Solver
from diffusers_fastdiff.numerics.solvers import solve
from diffusers_fastdiff.training.distillation import student_intervals, teacher_states
from tests.analytic import mixture_denoiser
from tests.golden.recordings import Recording, assert_relative, recordings

DTYPES = {"f32": torch.float32, "f64": torch.float64}
TOLERANCES = {"f32": 1e-5, "f64": 1e-10}
QUANTILE = 0.995  # of the program's thresholding


def sd_levels() -> DiscreteNoiseLevels:
    """The table of Stable Diffusion, to which the program's "discrete" grid belongs."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return DiscreteNoiseLevels((1 - betas).cumprod(0), interpolation="log_alpha")


def options_of(text: str) -> dict[str, str]:
    return dict(re.findall(r"\.(o|px|lof|r)(\d+(?:\.\d+)?)(?=\.|$)", text))


def solver_of(name: str, options: dict[str, str], default_data_prediction: str = "1") -> Solver:
    name = {"dpm_2": "dpm2", "dpm": "dpm2", "dpm_pp": "dpmpp"}.get(name, name)
    order = int(options.get("o", 1))
    if name != "dpmpp":
        return Solver(name, order)
    data_prediction = options.get("px", default_data_prediction) == "1"
    lower_order_final = options.get("lof", "1") == "1"
    return Solver(name, order, data_prediction, lower_order_final, QUANTILE if data_prediction else None)


@pytest.mark.parametrize("recording", recordings("amed_schedules"))
def test_grids(recording):
    levels, checked = sd_levels(), 0
    for key, expected in recording.tensors.items():
        if key.endswith("f32"):
            continue  # the program's time_uniform misses its own ends by 0.7 % in float32
        named = re.fullmatch(r"(polynomial|logsnr|time_uniform)\.rho(\d+)\.n(\d+)\.min([\d.]+)\.max([\d.]+)\.f64", key)
        discrete = re.fullmatch(r"discrete\.rho1\.n(\d+)\.(net|sd|min([\d.]+)\.max([\d.]+))\.f64", key)
        if named:
            kind, rho, points, low, high = named.groups()
            grid = make_grid(kind, int(points), float(low), float(high), None if kind == "logsnr" else float(rho))
        elif discrete:
            points, which, low, high = discrete.groups()
            ends = {"net": levels.sigma_range, "sd": (0.0292, 14.6146)}.get(which) or (float(low), float(high))
            grid = discrete_grid(int(points), levels, *ends)
        else:
            continue
        torch.testing.assert_close(grid, expected, rtol=5e-11, atol=0)
        checked += 1
    assert checked > 0
    table = recording.group("sd.probe_")
    torch.testing.assert_close(levels.sigma(table["t.f64"] * 1000 - 1), table["sigma_of_t.f64"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(levels.timestep(table["sigma.f64"]) + 1, table["t_of_sigma.f64"] * 1000, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("recording", recordings("amed_solvers"))
def test_solvers(recording):
    tensors, std, checked = recording.tensors, recording.info["settings"]["s0"], set()
    pattern = r"(std1|small)\.(\w+?)\.(ipndm|euler|heun|dpm_2|dpm_pp)(.*?)\.n(\d+)\.afs(\d)\.dtz(\d)\.(f32|f64)"
    for key, expected in tensors.items():
        match = re.fullmatch(pattern, key)
        if not match:
            continue
        data, grid, name, text, points, afs, denoise, precision = match.groups()
        options = options_of(text)
        sigmas = tensors[f"tsteps.{grid}.n{points}.{precision}"].double().tolist()
        coefficients = [AMEDCoefficients(r=float(options["r"]))] * (len(sigmas) - 1) if "r" in options else None
        denoiser = mixture_denoiser(tensors["mu" if data == "std1" else "mu_small"], std)
        states, calls = [], []

        def counted(x, sigma, denoiser=denoiser, calls=calls):
            calls.append(1)
            return denoiser(x, sigma)

        start = tensors["latents"].to(DTYPES[precision]) * sigmas[0]
        solver = solver_of(name, options)
        solve(counted, start, sigmas, solver, coefficients, afs == "1", lambda _, x, states=states: states.append(x))
        if denoise == "1":
            states = [states[-1], counted(states[-1], sigmas[-1])]
        assert_relative(torch.stack(states), expected, TOLERANCES[precision])
        assert len(calls) == recording.info["calls"].get(key, len(calls))
        checked.add(name)
    assert checked


@pytest.mark.parametrize("recording", recordings("amed_predictor_net"))
@torch.no_grad()
def test_predictor(recording):
    tensors = recording.tensors
    for case, (scale_dir, scale_time) in recording.info["settings"]["scale_dir/scale_time per case"].items():
        predictor = convert_amed(recording.group(f"{case}.state."), scale_dir=scale_dir, scale_time=scale_time)
        for key, expected in recording.group(f"{case}.").items():
            match = re.fullmatch(r"(rand|zeros)\.(r|scale_dir|scale_time)\.(f32|f64)", key)
            if not match:
                continue
            kind, field, precision = match.groups()
            predictor.to(DTYPES[precision])
            features = tensors["unet_bottleneck"].to(DTYPES[precision]) * (kind == "rand")
            rows = [getattr(predictor(features, *pair), field).reshape(-1, 1) for pair in tensors["t_pairs"].tolist()]
            assert_relative(torch.stack(rows), expected, TOLERANCES[precision])


class FeatureModel:
    """The analytic denoiser with the synthetic bottleneck of the recordings."""

    def __init__(self, recording: Recording, dtype: torch.dtype):
        settings, tensors = recording.info["settings"], recording.tensors
        self._denoiser = mixture_denoiser(tensors["mu"], settings["s0"])
        self._projection = tensors["P"].to(dtype)
        self.features: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor, sigma) -> torch.Tensor:
        level = torch.as_tensor(sigma, dtype=x.dtype)
        if level.ndim == 0:  # the beginning of an interval; midpoints have one level for each sample
            maps = torch.einsum("chwk,bk->bchw", self._projection, x.flatten(1))
            self.features = (level.log() * maps / (1 + level**2).sqrt()).mean(1).detach()
        return self._denoiser(x, sigma)


def coefficients_of(predictor: AMEDPredictor, model: FeatureModel, sigmas: list[float], skips_first: bool, batch_size: int):
    def coefficients(interval: int) -> AMEDCoefficients:
        features = model.features
        if interval == 0 and skips_first:
            features = torch.zeros(batch_size, 8, 8, dtype=predictor.dtype)
        return predictor(features, sigmas[interval], sigmas[interval + 1])

    return coefficients


@pytest.mark.parametrize("recording", recordings("amed_sampling"))
@torch.no_grad()
def test_sampling_with_a_predictor(recording):
    tensors, settings, checked = recording.tensors, recording.info["settings"], set()
    pattern = r"(dir|time|both)\.(\w+?)\.(amed|euler|ipndm|dpmpp|dpm)((?:\.(?:o|px|lof)\d)*)\.n(\d+)\.afs(\d)\.(f32|f64)\.traj"
    for key, expected in tensors.items():
        match = re.fullmatch(pattern, key)
        if not match:
            continue
        case, _, name, text, _, afs, precision = match.groups()
        scale_dir = settings["scale_dir"] if case in ("dir", "both") else 0
        scale_time = settings["scale_time"] if case in ("time", "both") else 0
        predictor = convert_amed(recording.group(f"pred_{case}.state."), scale_dir=scale_dir, scale_time=scale_time)
        predictor.to(DTYPES[precision])
        sigmas = tensors[key.replace(".traj", ".t_steps")].double().tolist()
        start = tensors["latents"].to(DTYPES[precision]) * sigmas[0]
        model, states = FeatureModel(recording, DTYPES[precision]), []
        coefficients = coefficients_of(predictor, model, sigmas, afs == "1", len(start))
        solver = solver_of(name, options_of(text))
        solve(model, start, sigmas, solver, coefficients, afs == "1", lambda _, x, states=states: states.append(x))
        assert_relative(torch.stack(states), expected, TOLERANCES[precision])
        checked.add(name)
    assert checked


@pytest.mark.parametrize("recording", recordings("amed_loss"))
def test_distillation(recording):
    """Losses, gradients and the weights after every Adam step of short training runs."""
    levels, names = sd_levels(), {f"{new}.{kind}": f"{old}.{kind}" for new, old in NAMES.items() for kind in ("weight", "bias")}
    for case, settings in recording.info["cases"].items():
        kind = {"poly": "polynomial"}.get(settings["schedule"], settings["schedule"])
        ends = (settings["sigma_min"], settings["sigma_max"], settings["rho"], levels)
        sigmas, fine = (make_grid(kind, settings[n], *ends).tolist() for n in ("num_steps", "num_steps_teacher"))
        options = {"o": str(settings["max_order"]), "px": str(int(settings.get("predict_x0", True)))}
        options["lof"] = str(int(settings.get("lower_order_final", True)))
        student, teacher = solver_of(settings["student"], options), solver_of(settings["teacher"], options)
        for mode in ("frozen", "train"):
            predictor = convert_amed(
                recording.group(f"{case}.state."),
                scale_dir=settings["scale_dir"],
                scale_time=settings["scale_time"],
            ).to(torch.float64)
            optimizer = torch.optim.Adam(predictor.parameters(), lr=5e-3)
            for number, latents in enumerate(recording.tensors["latents_unit"]):
                prefix = f"{case}.frozen." if mode == "frozen" else f"{case}.train.it{number}."
                expected = recording.group(prefix)
                if not expected or (mode == "frozen" and number > 0):
                    continue
                start, model = settings["sigma_max"] * latents, FeatureModel(recording, torch.float64)
                targets = teacher_states(model, start, fine, teacher, settings["M"] + 1)
                if "teacher" in expected:
                    assert_relative(torch.stack(targets), expected["teacher"], 1e-10)
                coefficients = coefficients_of(predictor, model, sigmas, settings["afs"], len(start))
                for result in student_intervals(model, start, sigmas, student, coefficients, targets, settings["afs"]):
                    optimizer.zero_grad()
                    loss = result.squared_error.sum() / len(start)
                    loss.backward()
                    values = {"loss_total": loss.detach().reshape(1), "student_out": result.end}
                    values |= {f"grad.{names[n]}": p.grad for n, p in predictor.named_parameters() if p.grad is not None}
                    if mode == "train":
                        optimizer.step()
                    values |= {f"state_after.{names[n]}": p.detach() for n, p in predictor.named_parameters()}
                    for name, value in values.items():
                        recorded = expected.get(f"step{result.index}.{name}")
                        if recorded is not None and recorded.abs().max() > 0:
                            assert_relative(value, recorded, 1e-9)
