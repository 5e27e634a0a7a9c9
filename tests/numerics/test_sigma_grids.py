"""Grids and noise levels: ends, shapes, inverses, and lists that make no sense."""

import pytest
import torch

from diffusers_fastdiff.numerics.noise_levels import (
    DiscreteNoiseLevels,
    PreconditionedModel,
    RectifiedFlowModel,
    VariancePreservingModel,
)
from diffusers_fastdiff.numerics.preconditioning import Preconditioning
from diffusers_fastdiff.numerics.sigma_grids import GRIDS, check_grid, fit_vp_rates, make_grid, time_uniform_grid

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)


def levels(interpolation: str = "log_sigma") -> DiscreteNoiseLevels:
    return DiscreteNoiseLevels((1 - BETAS).cumprod(0), interpolation)


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("rho", [None, 2.0])
def test_grids_fall_between_their_ends(kind, rho):
    grid = make_grid(kind, 9, 0.02, 60.0, rho, levels())
    assert grid.dtype == torch.float64
    assert grid.shape == (9,)
    assert bool((grid[1:] < grid[:-1]).all())
    torch.testing.assert_close(grid[[0, -1]], torch.tensor([60.0, 0.02], dtype=torch.float64), rtol=1e-9, atol=0)


def test_each_kind_is_even_in_its_own_variable():
    table = levels()
    variables = {
        "polynomial": lambda sigma: sigma ** (1 / 7),
        "logsnr": torch.log,
        "discrete": table.timestep,
    }
    for kind, variable in variables.items():
        steps = variable(make_grid(kind, 7, 0.02, 60.0, None, table)).diff()
        torch.testing.assert_close(steps, steps.mean().expand_as(steps), rtol=1e-9, atol=0)
    beta_d, beta_min = fit_vp_rates(0.02, 60.0)
    t = torch.linspace(1, 1e-3, 7, dtype=torch.float64)
    expected = torch.expm1(beta_d * t**2 / 2 + beta_min * t).sqrt()
    torch.testing.assert_close(time_uniform_grid(7, 0.02, 60.0), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("interpolation", ["log_sigma", "log_alpha"])
def test_timesteps_and_levels_are_inverses_also_outside_the_table(interpolation):
    table = levels(interpolation)
    timesteps = torch.tensor([-0.5, 0.0, 0.25, 499.0, 998.7, 999.0, 1005.0], dtype=torch.float64)
    torch.testing.assert_close(table.timestep(table.sigma(timesteps)), timesteps, rtol=0, atol=1e-8)
    at_knots = table.sigma(torch.arange(1000, dtype=torch.float64))
    expected = ((1 - table.alphas_cumprod) / table.alphas_cumprod).sqrt()
    torch.testing.assert_close(at_knots, expected, rtol=1e-12, atol=0)


def test_timesteps_can_be_learned():
    sigma = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(levels().timestep, sigma)


@pytest.mark.parametrize(
    "model",
    [
        VariancePreservingModel(levels()),
        VariancePreservingModel(levels(), "v_prediction"),
        VariancePreservingModel(levels(), "sample"),
        RectifiedFlowModel(),
        PreconditionedModel(Preconditioning("edm")),
        PreconditionedModel(Preconditioning("vp")),
        PreconditionedModel(Preconditioning("ve")),
        PreconditionedModel(Preconditioning("edm", momentum=0.5)),
    ],
)
def test_models_undo_their_own_parametrization(model):
    """An output made from known data and noise leads back to the slope of the straight line between them."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 1, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    sigma = torch.tensor([0.3, 0.9], dtype=torch.float64).reshape(-1, 1, 1, 1)
    x = model.add_noise(clean, noise, sigma) / model.state_scale(sigma)
    if isinstance(model, RectifiedFlowModel):
        output, slope = noise - clean, noise - clean
    elif isinstance(model, PreconditionedModel):
        c = model.preconditioning.at(sigma)
        output, slope = (clean - c.c_skip * x) / c.c_out, noise
    else:
        alpha = model.state_scale(sigma)
        output = {"epsilon": noise, "sample": clean, "v_prediction": alpha * noise - alpha * sigma * clean}[
            model.prediction_type
        ]
        slope = noise
    torch.testing.assert_close(model.slope(output, x, sigma), slope, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.sigma(model.timestep(sigma)), sigma, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([1.0, 1.0, 0.0], "fall strictly"),
        ([1.0, 2.0], "entry 0"),
        ([1.0], "at least two"),
        ([1.0, -0.1], ">= 0"),
        ([float("nan"), 1.0], "finite"),
    ],
)
def test_lists_that_are_no_grid_are_refused(grid, message):
    with pytest.raises(ValueError, match=message):
        check_grid(grid)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cosine", 5, 0.1, 1.0), "must be one of"),
        (("discrete", 5, 0.1, 1.0), "table of timesteps"),
        (("logsnr", 1, 0.1, 1.0), "num_points"),
        (("logsnr", 5, 1.0, 0.1), "sigma_min"),
        (("polynomial", 5, 0.1, 1.0, -1.0), "rho"),
    ],
)
def test_grids_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_grid(*arguments)
