"""Heun's method with churn and singlestep DPM-Solver++ against the published program, to 1e-10 in float64."""

import re

import pytest
import torch

from diffusers_fastdiff.numerics.sigma_grids import polynomial_grid
from diffusers_fastdiff.numerics.singlestep import SinglestepRun, singlestep_grid, singlestep_orders
from diffusers_fastdiff.numerics.solver_methods import Solver
from diffusers_fastdiff.numerics.solvers import SolverRun
from diffusers_fastdiff.numerics.stochastic import Churn
from tests.analytic import mixture_denoiser
from tests.golden.recordings import assert_relative, recordings


def range_of(recording, kind: str) -> tuple[float, float]:
    """The program clips the range of its Heun sampler, and only of that one, to the range of the network."""
    settings = recording.info["settings"]
    low, high = settings["sigma_min"], settings["sigma_max"]
    if kind == "clipped":
        limits = re.search(r"net with range \(([\d.]+), ([\d.]+)\)", recording.info["key_format"])
        low, high = max(low, float(limits[1])), min(high, float(limits[2]))
    return low, high


@pytest.mark.parametrize("recording", recordings("edm_samplers"))
def test_heun_with_churn(recording):
    tensors, settings = recording.tensors, recording.info["settings"]
    denoiser, checked = mixture_denoiser(tensors["mu"], settings["s0"]), 0
    for key, expected in tensors.items():
        match = re.fullmatch(r"edm\.(\w+)\.n(\d+)\.final", key)
        if not match:
            continue
        kind, count = match[1], int(match[2])
        options = settings["churn"].get(kind, {})
        names = {"S_churn": "amount", "S_min": "sigma_min", "S_max": "sigma_max", "S_noise": "noise_scale"}
        churn = Churn(**{names[name]: float(value) for name, value in options.items()})
        grid = polynomial_grid(count, *range_of(recording, kind), settings["rho"]).tolist()
        run = SolverRun(Solver("heun"), [*grid, 0.0])
        x, seen = tensors["latents"] * grid[0], []
        noises = tensors.get(f"edm.{kind}.n{count}.noises")
        while not run.is_done:
            if not run.is_second_half and noises is not None:
                noise = churn.noise_scale * noises[run.interval]
                x = run.raise_noise(x, churn.raised(run.sigma, count), noise)
            seen.append((run.network_sigma, x))
            x = run.advance(x, denoiser(x, run.network_sigma))
        assert_relative(x, expected, 1e-10)
        sigmas = torch.tensor([sigma for sigma, _ in seen], dtype=torch.float64)
        assert_relative(sigmas, tensors[f"edm.{kind}.n{count}.call_sigma"], 1e-10)
        if f"edm.{kind}.n{count}.call_x" in tensors:
            assert_relative(torch.stack([state for _, state in seen]), tensors[f"edm.{kind}.n{count}.call_x"], 1e-10)
        checked += 1
    assert checked


@pytest.mark.parametrize("recording", recordings("edm_samplers"))
def test_singlestep_dpm_solver(recording):
    tensors, settings = recording.tensors, recording.info["settings"]
    denoiser, checked = mixture_denoiser(tensors["mu"], settings["s0"]), 0
    for key, expected in tensors.items():
        match = re.fullmatch(r"dpm\.denoise(\d)\.n(\d+)\.f64\.final", key)
        if not match:
            continue
        denoises, count = match[1] == "1", int(match[2])
        prefix = key.removesuffix("final")
        evaluations = count - 1 if denoises else count
        orders = singlestep_orders(evaluations)
        assert orders == recording.info["calls"][prefix.rstrip(".")]["orders"]
        grid = singlestep_grid(evaluations, settings["sigma_min"], settings["sigma_max"])
        assert_relative(torch.tensor(grid, dtype=torch.float64), tensors[f"{prefix}outer_t"].double(), 1e-10)
        run, x, states, calls = SinglestepRun(grid, orders), tensors["latents"] * grid[0], [], []
        while not run.is_done:
            before = run.interval
            calls.append(run.sigma)
            x = run.advance(x, denoiser(x, run.sigma))
            if run.interval > before:
                states.append(x)
        if denoises:
            states.append(denoiser(x, grid[-1]))
            calls.append(grid[-1])
        assert_relative(torch.stack(states), tensors[f"{prefix}inter"], 1e-10)
        assert_relative(states[-1], expected, 1e-10)
        assert_relative(torch.tensor(calls, dtype=torch.float64), tensors[f"{prefix}call_sigma"], 1e-10)
        checked += 1
    assert checked
