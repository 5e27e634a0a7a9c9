"""Solvers on data whose probability flow is known: observed orders, neutral limits, and what each evaluation is asked for."""

import itertools
import math

import pytest
import torch

from diffusers_fastdiff.numerics.linear_solver import LinearRun, LinearSolver, as_linear_solver
from diffusers_fastdiff.numerics.multistep import StepWeights, adams_bashforth, dpmpp_weights, ipndm_v_weights, ipndm_weights
from diffusers_fastdiff.numerics.sigma_grids import logsnr_grid, polynomial_grid
from diffusers_fastdiff.numerics.singlestep import SinglestepRun
from diffusers_fastdiff.numerics.solver_methods import AMEDCoefficients, Solver, dynamic_threshold
from diffusers_fastdiff.numerics.solvers import SolverRun, solve
from tests.analytic import gaussian_denoiser, gaussian_flow, mixture_denoiser

STD = 0.5
MEANS = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
START = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def exact_slope(sigma: float) -> float:
    """Of the trajectory `x = sqrt(sigma^2 + std^2)` of Gaussian data."""
    return sigma / math.hypot(sigma, STD)


def observed_order(errors: list[float], refinement: float = 2.0) -> float:
    return math.log(errors[-2] / errors[-1], refinement)


def one_step_error(weights: StepWeights, values: list[float], sigmas: list[float], sigma_next: float) -> float:
    x = torch.tensor(math.hypot(sigmas[0], STD), dtype=torch.float64)
    end = weights.apply(x, [torch.tensor(value, dtype=torch.float64) for value in values])
    return abs(float(end) - math.hypot(sigma_next, STD))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("method", [ipndm_weights, ipndm_v_weights])
def test_a_step_with_exact_history_has_one_order_more(method, order):
    errors = []
    for h in (0.04, 0.02, 0.01):
        # Uneven steps, unless the weights are those of even ones.
        steps = [h * (1.0 if method is ipndm_weights else factor) for factor in (1.0, 0.7, 1.3, 0.9)]
        sigmas = [1.0 + sum(steps[1 : k + 1]) for k in range(order)]
        sigma_next = 1.0 - steps[0]
        weights = method(sigmas, sigma_next, order)
        errors.append(one_step_error(weights, [exact_slope(sigma) for sigma in sigmas], sigmas, sigma_next))
    assert observed_order(errors) == pytest.approx(order + 1, abs=0.2)


@pytest.mark.parametrize(("order", "true_third_order"), [(1, False), (2, False), (3, False), (3, True)])
@pytest.mark.parametrize("data_prediction", [True, False])
def test_a_dpmpp_step_with_exact_history_has_one_order_more(data_prediction, order, true_third_order):
    errors = []
    for h in (0.04, 0.02, 0.01):
        steps = [h * factor for factor in (1.0, 0.7, 1.3)]
        sigmas = [1.0 + sum(steps[1 : k + 1]) for k in range(order)]
        sigma_next = 1.0 - steps[0]
        values = [exact_slope(sigma) for sigma in sigmas]
        if data_prediction:
            values = [math.hypot(sigma, STD) - sigma * slope for sigma, slope in zip(sigmas, values, strict=True)]
        weights = dpmpp_weights(sigmas, sigma_next, order, data_prediction, true_third_order)
        errors.append(one_step_error(weights, values, sigmas, sigma_next))
    # The published third-order step is of second order.
    expected = 3 if order == 3 and not true_third_order else order + 1
    assert observed_order(errors) == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (Solver("euler"), 1),
        (Solver("ipndm", 1), 1),
        (Solver("dpmpp", 1), 1),
        (Solver("heun"), 2),
        (Solver("dpm2"), 2),
        (Solver("ipndm_v", 2), 2),
        (Solver("dpmpp", 2, lower_order_final=False), 2),
        (Solver("dpmpp", 2, data_prediction=False, lower_order_final=False), 2),
    ],
)
def test_whole_runs_converge_with_the_order_of_the_method(solver, order):
    errors = []
    for count in (40, 80, 160):
        sigmas = polynomial_grid(count + 1, 0.05, 5.0).tolist()
        end = solve(lambda x, s: gaussian_denoiser(x, s, STD), START, sigmas, solver)
        errors.append(float((end - gaussian_flow(START, 5.0, 0.05, STD)).abs().max()))
    assert observed_order(errors) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_singlestep_runs_converge_with_their_order(order):
    errors = []
    for count in (20, 40, 80):
        run, x = SinglestepRun(logsnr_grid(count + 1, 0.05, 5.0).tolist(), [order] * count), START
        while not run.is_done:
            x = run.advance(x, gaussian_denoiser(x, run.sigma, STD))
        errors.append(float((x - gaussian_flow(START, 5.0, 0.05, STD)).abs().max()))
    assert observed_order(errors) == pytest.approx(order, abs=0.25)


def test_weights_of_even_steps():
    assert adams_bashforth(4) == pytest.approx([55 / 24, -59 / 24, 37 / 24, -9 / 24], abs=1e-13)
    sigmas, sigma_next = [1.0, 1.5, 2.0, 2.5], 0.5
    for order in (1, 2, 3, 4):
        even, true = (method(sigmas, sigma_next, order).weights for method in (ipndm_weights, ipndm_v_weights))
        assert [float(w) for w in true] == pytest.approx([float(w) for w in even], rel=1e-12)


def run(solver: Solver, sigmas: list[float], coefficients=None, **options) -> torch.Tensor:
    return solve(mixture_denoiser(MEANS, 0.3), sigmas[0] * START, sigmas, solver, coefficients, **options)


GRID = [10.0, 3.0, 0.8, 0.1]


def with_midpoints(grid: list[float], r: float) -> list[float]:
    pairs = itertools.pairwise(grid)
    return [grid[0], *(level for a, b in pairs for level in (b**r * a ** (1 - r), b))]


@pytest.mark.parametrize("name", ["ipndm", "dpmpp", "ipndm_v"])
def test_order_1_is_euler(name):
    torch.testing.assert_close(run(Solver(name, 1), GRID), run(Solver("euler"), GRID), rtol=1e-12, atol=1e-13)


def test_neutral_amed_is_dpm_solver_2():
    neutral = [AMEDCoefficients()] * 3
    assert torch.equal(run(Solver("amed"), GRID), run(Solver("dpm2"), GRID))
    torch.testing.assert_close(run(Solver("amed"), GRID, neutral), run(Solver("dpm2"), GRID, neutral), rtol=0, atol=0)


@pytest.mark.parametrize("solver", [Solver("euler"), Solver("ipndm", 4), Solver("dpmpp", 3), Solver("ipndm_v", 3)])
@pytest.mark.parametrize("r", [0.5, 0.3])
def test_neutral_plugin_is_the_plain_solver_on_the_finer_grid(solver, r):
    neutral = [AMEDCoefficients(r=r)] * 3
    torch.testing.assert_close(run(solver, GRID, neutral), run(solver, with_midpoints(GRID, r)), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("solver", [Solver("amed"), Solver("dpm2"), Solver("ipndm", 3), Solver("dpmpp", 2)])
def test_samples_do_not_depend_on_their_batch(solver):
    values = torch.linspace(0.3, 0.7, len(START), dtype=torch.float64).reshape(-1, 1, 1, 1)
    together = [AMEDCoefficients(values, 1.1 - values / 10, values + 0.5)] * 3
    whole = run(solver, GRID, together)
    for k in range(len(START)):
        alone = [AMEDCoefficients(*(float(v.flatten()[k]) for v in together[0]))] * 3
        single = solve(mixture_denoiser(MEANS, 0.3), GRID[0] * START[k : k + 1], GRID, solver, alone)
        torch.testing.assert_close(whole[k : k + 1], single, rtol=1e-12, atol=1e-12)


def test_the_scale_of_time_is_told_to_the_network_only():
    told = []

    def denoiser(x, sigma):
        told.append(float(sigma))
        return gaussian_denoiser(x, sigma)

    solve(denoiser, START, [4.0, 1.0], Solver("amed"), [AMEDCoefficients(r=0.5, scale_time=1.25)])
    assert told == pytest.approx([4.0, 2.5])


@pytest.mark.parametrize("solver", [Solver("euler"), Solver("heun"), Solver("ipndm", 2), Solver("dpmpp", 2)])
def test_the_analytical_first_step_takes_the_noise_for_the_slope_and_saves_an_evaluation(solver):
    calls = []

    def denoiser(x, sigma):
        calls.append(sigma)
        if sigma == GRID[0]:  # what the analytical step assumes
            return x - sigma * x / (1 + sigma**2) ** 0.5
        return gaussian_denoiser(x, sigma)

    with_it = solve(denoiser, START, GRID, solver, analytical_first_step=True)
    count = len(calls)
    without = solve(denoiser, START, GRID, solver)
    assert len(calls) == 2 * count + 1
    torch.testing.assert_close(with_it, without, rtol=1e-12, atol=1e-13)


def test_a_run_that_begins_later_is_the_rest_of_the_plain_run():
    solver, states = Solver("heun"), []
    end = solve(lambda x, s: gaussian_denoiser(x, s), START, GRID, solver, callback=lambda i, x: states.append(x))
    run_ = SolverRun(solver, GRID)
    run_.seek(2)
    x = states[1]
    while not run_.is_done:
        x = run_.advance(x, gaussian_denoiser(x, run_.network_sigma))
    assert torch.equal(x, end)


def test_thresholding_clips_to_the_quantile_but_never_below_1():
    wide = dynamic_threshold(torch.tensor([[4.0, -2.0, 1.0, 0.0]]), 1.0)
    assert wide.tolist() == [[1.0, -0.5, 0.25, 0.0]]
    small = torch.tensor([[0.4, -0.2]])
    assert torch.equal(dynamic_threshold(small, 0.5), small)


@pytest.mark.parametrize("solver", [Solver("euler"), Solver("ipndm", 3), Solver("ipndm_v", 2), Solver("dpmpp", 3)])
def test_linear_solvers_hold_all_others(solver):
    grid = [10.0, 3.0, 1.0, 0.3, 0.0]
    linear = as_linear_solver(lambda: SolverRun(solver, grid))
    assert all(decay == pytest.approx(1.0) for decay in linear.decay)
    run_, x, denoiser = LinearRun(linear), grid[0] * START, mixture_denoiser(MEANS, 0.3)
    while not run_.is_done:
        x = run_.follow(x, (x - denoiser(x, run_.network_sigma)) / run_.sigma)
    torch.testing.assert_close(x, run(solver, grid), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigmas": [1.0, 2.0]}, "fall strictly"),
        ({"sigmas": [2.0, 2.0]}, "fall strictly"),
        ({"network_sigmas": [2.0]}, "as many"),
        ({"network_sigmas": [2.0, -1.0]}, "positive"),
        ({"weights": [[1.0], [1.0]]}, "Row 1"),
    ],
)
def test_linear_solvers_that_make_no_sense_are_refused(changes, message):
    numbers = {"sigmas": [2.0, 1.0], "network_sigmas": [2.0, 1.0], "decay": [1.0, 1.0], "weights": [[-1.0], [0.0, -1.0]]}
    LinearSolver(**numbers)
    with pytest.raises(ValueError, match=message):
        LinearSolver(**(numbers | changes))


@pytest.mark.parametrize("arguments", [("rk4",), ("ipndm", 5), ("dpmpp", 0), ("dpmpp", 4)])
def test_unknown_methods_and_orders_are_refused(arguments):
    with pytest.raises(ValueError, match="must be"):
        Solver(*arguments)
