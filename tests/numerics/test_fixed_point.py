import pytest
import torch

from diffusers_fastdiff.numerics.fixed_point import FixedPointSolver, allocate_iterations, relative_residual, solve


def linear_map(rates: torch.Tensor, target: torch.Tensor):
    """`z <- target + rate * (z - target)` with a matrix of contraction rates for each sample; the fixed point is `target`."""

    def step(state, rows):
        rate, goal = (rates, target) if rows is None else (rates[rows], target[rows])
        return goal + ((state - goal) @ rate)

    return step


def contraction(batch: int = 3, dim: int = 8, largest=(0.5, 0.9, 0.99)):
    """Symmetric maps whose slowest direction shrinks by `largest` per iteration."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(batch, dim, dim, generator=generator, dtype=torch.float64))[0]
    spectrum = torch.stack([torch.linspace(0.1, rate, dim, dtype=torch.float64) for rate in largest])
    target = torch.randn(batch, 4, dim, generator=generator, dtype=torch.float64)
    return linear_map(basis * spectrum[:, None] @ basis.mT, target), target


def test_plain_iteration_applies_the_map_exactly_that_often():
    step, target = contraction()
    state = torch.zeros_like(target)
    solution = solve(step, state, 4)
    for _ in range(4):
        state = step(state, None)
    assert torch.equal(solution.state, state)
    assert solution.num_iterations.tolist() == [4, 4, 4]
    assert solution.residuals is None


def test_residuals_are_recorded_for_each_iteration_and_sample():
    step, target = contraction()
    start = torch.zeros_like(target)
    solution = solve(step, start, 5, return_residuals=True)
    assert solution.residuals.shape == (5, 3)
    torch.testing.assert_close(solution.residuals[0], relative_residual(step(start, None), start))


def test_batch_tolerance_stops_when_the_slowest_sample_is_there():
    step, target = contraction()
    solution = solve(step, torch.zeros_like(target), 2000, FixedPointSolver(tolerance=1e-4), return_residuals=True)
    counts = solution.num_iterations.tolist()
    assert counts[0] == counts[1] == counts[2] < 2000
    assert solution.residuals[-1].max() < 1e-4 <= solution.residuals[-2].max()


def test_sample_tolerance_gives_each_sample_what_it_gets_alone():
    step, target = contraction()
    solver = FixedPointSolver(tolerance=1e-4, stop="sample")
    together = solve(step, torch.zeros_like(target), 2000, solver, return_residuals=True)
    counts = together.num_iterations.tolist()
    assert counts[0] < counts[1] < counts[2]
    for index in range(3):
        row = torch.tensor([index])
        alone = solve(lambda z, rows, row=row: step(z, row), torch.zeros_like(target[row]), 2000, solver)
        assert alone.num_iterations.item() == counts[index]
        torch.testing.assert_close(together.state[index], alone.state[0], rtol=1e-12, atol=1e-12)
    assert together.residuals[counts[0] :, 0].isnan().all()
    assert not together.residuals[: counts[0], 0].isnan().any()


def test_sample_tolerance_respects_the_limit():
    step, target = contraction()
    solution = solve(step, torch.zeros_like(target), 6, FixedPointSolver(tolerance=1e-9, stop="sample"))
    assert solution.num_iterations.tolist() == [6, 6, 6]
    torch.testing.assert_close(solution.state, solve(step, torch.zeros_like(target), 6).state, rtol=0, atol=0)


@pytest.mark.parametrize("stop", ["batch", "sample"])
def test_anderson_needs_fewer_iterations_on_a_slow_map(stop):
    step, target = contraction()
    start = torch.zeros_like(target)
    plain = solve(step, start, 2000, FixedPointSolver(tolerance=1e-4, stop=stop))
    mixed = solve(step, start, 2000, FixedPointSolver(tolerance=1e-4, stop=stop, anderson_depth=5))
    assert mixed.num_iterations[2] < plain.num_iterations[2] / 5
    assert (mixed.state - target).norm() < (plain.state - target).norm()


def test_anderson_is_nearly_exact_when_depth_exceeds_the_dimension():
    step, target = contraction(batch=1, dim=2, largest=(0.999,))
    start = torch.zeros_like(target)
    solution = solve(step, start, 8, FixedPointSolver(anderson_depth=4, anderson_ridge=1e-12))
    plain = solve(step, start, 8)
    assert (solution.state - target).norm() < 1e-3 * (plain.state - target).norm()


def test_gradient_flows_through_every_iteration():
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    start = torch.ones(1, 1, 1, dtype=torch.float64)
    solve(lambda z, _: weight * z, start, 3).state.sum().backward()
    assert weight.grad.item() == pytest.approx(3 * 0.5**2)


@pytest.mark.parametrize(("budget", "steps"), [(100, 10), (107, 20), (20, 20), (23, 20), (9, 1)])
@pytest.mark.parametrize("allocation", ["constant", "increasing", "decreasing"])
def test_budget_is_kept_and_every_step_gets_one(budget, steps, allocation):
    table = allocate_iterations(budget, steps, allocation)
    assert len(table) == steps
    assert min(table) >= 1
    assert budget - steps <= sum(table) <= budget
    ends = table[0] - table[-1]
    assert {"constant": abs(ends) <= 1, "increasing": ends >= -1, "decreasing": ends <= 1}[allocation]


def test_increasing_spends_most_where_there_is_most_noise():
    assert allocate_iterations(60, 10, "increasing")[0] > allocate_iterations(60, 10, "increasing")[-1]
    assert allocate_iterations(60, 10, "decreasing")[0] < allocate_iterations(60, 10, "decreasing")[-1]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [((9, 10), "budget"), ((5, 0), "num_steps"), ((10, 5, "up"), "allocation"), ((10, 5, "constant", (0, 1)), "ratio")],
)
def test_bad_budgets_are_refused(arguments, word):
    with pytest.raises(ValueError, match=word):
        allocate_iterations(*arguments)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [({"tolerance": 0.0}, "tolerance"), ({"stop": "token"}, "stop"), ({"anderson_depth": 1}, "depth"),
     ({"anderson_depth": -1}, "depth"), ({"anderson_ridge": 0.0}, "ridge")],
)  # fmt: skip
def test_bad_solvers_are_refused(arguments, word):
    with pytest.raises(ValueError, match=word):
        FixedPointSolver(**arguments)
