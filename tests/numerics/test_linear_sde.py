"""gDDIM's integrator on any linear process, and its limits: DDIM and DEIS on variance-preserving ones."""

import itertools
import math
import time

import pytest
import torch
from diffusers import DDIMScheduler, DEISMultistepScheduler

from diffusers_fastdiff.numerics import exponential_integrator
from diffusers_fastdiff.numerics.blur import BlurProcess
from diffusers_fastdiff.numerics.exponential_integrator import step_coefficients
from diffusers_fastdiff.numerics.linear_sde import add_noise, apply, combine
from diffusers_fastdiff.numerics.phase_space import CLDProcess
from diffusers_fastdiff.numerics.processes import make_process
from diffusers_fastdiff.numerics.reverse_steps import denoising_step, euler_maruyama_step, reverse_drift
from diffusers_fastdiff.numerics.time_grids import hybrid_grid, power_grid
from diffusers_fastdiff.numerics.variance_preserving import LogNoiseVPProcess, VPProcess, log_noise_to_signal

PROCESSES = [
    VPProcess(),
    CLDProcess(),
    CLDProcess(inverse_mass=9.0, beta_0=2.0, beta_1=3.0, gamma=0.1),
    CLDProcess(gamma=0.0),
    BlurProcess((4, 6), sigma_max=20.0),
    LogNoiseVPProcess(),
]
TIMED = PROCESSES[:-1]
TABLES = {
    "DiT": {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
    "Stable Diffusion": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
}


def name_of(process) -> str:
    return type(process).__name__


def grid_for(process, num_steps: int) -> torch.Tensor:
    if isinstance(process, LogNoiseVPProcess):
        return torch.linspace(5.0, -5.0, num_steps + 1, dtype=torch.float64)
    return power_grid(process.start_time, process.end_time, num_steps)


def draw(process, *batch: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = process.cells or (2, 2)
    return torch.randn(*batch, 2 * process.block, *size, generator=generator, dtype=torch.float64)


def point_mass_eps(process, state, clean, t, parametrization="R"):
    """The exact network for a data set of one image."""
    mean = apply(process, process.signal(t), process.lift(clean))
    return apply(process, torch.linalg.inv(process.noise_factor(t, parametrization)), state - mean)


def point_mass_flow(process, state, clean, t, s):
    """Exact probability flow from s to t for a data set of one image."""
    factor = process.factor(t) @ torch.linalg.inv(process.factor(s))
    means = (apply(process, process.signal(tau), process.lift(clean)) for tau in (t, s))
    mean, old = means
    return mean + apply(process, factor, state - old)


# ---- coefficients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES, ids=name_of)
@pytest.mark.parametrize("num_steps", [4, 50])
@pytest.mark.parametrize(
    "options",
    [{}, {"corrector_order": 3}, {"stochasticity": 1.0}, {"parametrization": "L"}],
    ids=str,
)
def test_doubling_the_quadrature_changes_nothing(process, num_steps, options):
    times = grid_for(process, num_steps)
    nodes = max(48, min(256, 1024 // num_steps))
    once, default, twice = (step_coefficients(process, times, 3, num_nodes=n, **options) for n in (nodes, None, 2 * nodes))
    for name in ("predictor", "corrector", "noise", "carry"):
        coarse, fine = getattr(once, name), getattr(twice, name)
        if fine is None:
            continue
        assert torch.equal(coarse, getattr(default, name))
        assert (coarse - fine).abs().max() <= 1e-10 * fine.abs().max().clamp_min(1)


@pytest.mark.parametrize("process", [CLDProcess(beta_1=2.0), VPProcess()], ids=name_of)
@pytest.mark.parametrize("parametrization", ["R", "L"])
def test_coefficients_integrate_polynomials(process, parametrization):
    """`sum_j C_j p(t_j)` is the integral of the kernel times p, for p of the degree of the method; by another quadrature."""
    integrate = pytest.importorskip("scipy.integrate")
    times = power_grid(1.0, 0.01, 6)
    run = step_coefficients(process, times, 2, corrector_order=3, parametrization=parametrization)
    for i, (start, end) in enumerate(itertools.pairwise(run.times)):
        for rule, points, degree in (
            (run.predictor[i], run.times[: i + 1][::-1], min(i, 2)),
            (run.corrector[i], run.times[: i + 2][::-1], min(i + 1, 3)),
        ):

            def integrand(tau, end=end, degree=degree):
                kernel = process.transition(end, tau) @ process.noise_drift(tau, parametrization) / 2
                return (kernel * tau**degree).flatten().numpy()

            expected = integrate.quad_vec(integrand, start, end, epsabs=1e-12, epsrel=1e-12)[0]
            powers = torch.tensor(points[: len(rule)], dtype=torch.float64) ** degree
            actual = torch.einsum("j,j...->...", powers, rule[: len(powers)]).flatten()
            torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("process", PROCESSES, ids=name_of)
def test_order_zero_is_in_closed_form(process):
    times = grid_for(process, 7)
    run = step_coefficients(process, times, 0)
    factors = process.factor(times)
    expected = factors[1:] - run.transition @ factors[:-1]
    torch.testing.assert_close(run.predictor[:, 0], expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(step_coefficients(process, times, 3).predictor.sum(1), run.predictor[:, 0], rtol=1e-9, atol=1e-9)


def test_fifty_steps_of_order_three_are_built_in_no_time():
    """Well below a second on an idle core; the leash is for a busy one."""
    exponential_integrator._coefficients.cache_clear()
    began = time.perf_counter()
    step_coefficients(CLDProcess(epsilon=1.1e-6), power_grid(1.0, 1e-3, 50), 3)
    assert time.perf_counter() - began < 5


def test_coefficients_are_cached_for_every_parameter():
    times = power_grid(1.0, 1e-3, 5)
    first = step_coefficients(CLDProcess(), times, 2)
    assert step_coefficients(CLDProcess(), times.tolist(), 2) is first
    for change in ({"inverse_mass": 5.0}, {"beta_0": 5.0}, {"beta_1": 1.0}, {"gamma": 0.05}, {"epsilon": 1e-5}):
        other = step_coefficients(CLDProcess(**change), times, 2)
        assert other is not first
        assert not torch.equal(other.predictor, first.predictor)
    assert exponential_integrator._coefficients.cache_info().maxsize <= 16


def test_the_order_grows_with_the_history():
    run = step_coefficients(CLDProcess(), power_grid(1.0, 1e-3, 6), 3)
    used = run.predictor.flatten(2).abs().sum(2) > 0
    assert used.sum(1).tolist() == [1, 2, 3, 4, 4, 4]
    run = step_coefficients(CLDProcess(), power_grid(1.0, 1e-3, 6), 3, lower_order_final=True)
    assert (run.predictor.flatten(2).abs().sum(2) > 0).sum(1).tolist() == [1, 2, 3, 3, 2, 1]


# ---- claims of the paper -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", TIMED, ids=name_of)
@pytest.mark.parametrize("end", [0.5, 0.1, 1e-3])
def test_point_mass_is_exact_in_one_step_of_any_size(process, end):
    clean, start = torch.rand(1, 2, *(process.cells or (2, 2)), dtype=torch.float64), process.start_time
    u = draw(process, 1)
    run = step_coefficients(process, [start, end], 0)
    step = combine(process, [run.transition[0], run.predictor[0, 0]], [u, point_mass_eps(process, u, clean, start)])
    expected = point_mass_flow(process, u, clean, end, start)
    torch.testing.assert_close(step, expected, rtol=1e-11, atol=1e-12 * run.transition.abs().max().item())


def test_point_mass_is_not_exact_for_cholesky():
    process, clean = CLDProcess(), torch.rand(1, 2, 2, 2, dtype=torch.float64)
    u = draw(process, 1)
    for end in (0.5, 0.1, 1e-3):
        run = step_coefficients(process, [1.0, end], 0, parametrization="L")
        eps = point_mass_eps(process, u, clean, 1.0, "L")
        step = combine(process, [run.transition[0], run.predictor[0, 0]], [u, eps])
        assert (step - point_mass_flow(process, u, clean, end, 1.0)).abs().max() > 0.1


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("stochasticity", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_vp_is_ddim_with_eta_from_lambda(table, stochasticity, set_alpha_to_one):
    """`eta^2 = (1 - r^(lambda^2)) / (1 - r)` with `r = (sigma_t alpha_s / (sigma_s alpha_t))^2` in every step."""
    scheduler = DDIMScheduler(**TABLES[table], clip_sample=False, set_alpha_to_one=set_alpha_to_one, steps_offset=1)
    scheduler.set_timesteps(10)
    process = LogNoiseVPProcess()
    last = torch.tensor([-math.inf], dtype=torch.float64)
    last = last if set_alpha_to_one else log_noise_to_signal(scheduler.alphas_cumprod, torch.zeros(1))
    times = torch.cat([log_noise_to_signal(scheduler.alphas_cumprod, scheduler.timesteps), last])
    run = step_coefficients(process, times, 0, stochasticity=stochasticity, noiseless_last=False)
    r = ((times[1:] - times[:-1]) * 2).exp()
    etas = ((1 - r ** (stochasticity**2)) / (1 - r)).sqrt()
    x = draw(process, 2)
    for i, timestep in enumerate(scheduler.timesteps):
        eps, noise = (x * 0.7).sin(), draw(process, 2, seed=i)
        ours = combine(process, [run.transition[i], run.predictor[i, 0], run.noise[i]], [x, eps, noise])
        x = scheduler.step(eps, timestep, x, eta=etas[i].item(), variance_noise=noise).prev_sample
        torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("num_steps", [10, 20])
@pytest.mark.parametrize("spacing", ["linspace", "leading"])
def test_vp_is_deis_step_for_step(table, order, num_steps, spacing):
    scheduler = DEISMultistepScheduler(**TABLES[table], solver_order=order + 1, timestep_spacing=spacing)
    scheduler.set_timesteps(num_steps)
    process, times = LogNoiseVPProcess(), scheduler.sigmas.double().log()
    exact = log_noise_to_signal(scheduler.alphas_cumprod, scheduler.timesteps)
    torch.testing.assert_close(times[:-1], exact, rtol=0, atol=1e-5)
    run = step_coefficients(process, times, order, lower_order_final=num_steps < 15)
    x, history = draw(process, 2), []
    for i, timestep in enumerate(scheduler.timesteps):
        eps = (x * 0.7).sin() + i / num_steps
        history = [eps, *history][: run.predictor.shape[1]]
        ours = combine(process, [run.transition[i], *run.predictor[i, : len(history)]], [x, *history])
        x = scheduler.step(eps, timestep, x).prev_sample
        torch.testing.assert_close(ours, x, rtol=2e-5, atol=2e-5)


def test_continuous_vp_is_the_same_process_on_its_own_clock():
    vp, t = VPProcess(), power_grid(1.0, 1e-3, 9)
    other, clock = LogNoiseVPProcess(), vp.log_noise_to_signal(t)
    torch.testing.assert_close(vp.factor(t), other.factor(clock), rtol=1e-12, atol=0)
    torch.testing.assert_close(vp.signal(t), other.signal(clock), rtol=1e-12, atol=0)
    for strength in (0.0, 0.5):
        ours, theirs = (step_coefficients(p, grid, 0, stochasticity=strength) for p, grid in ((vp, t), (other, clock)))
        torch.testing.assert_close(ours.predictor, theirs.predictor, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(ours.noise, theirs.noise, rtol=1e-10, atol=1e-13)


def gaussian_problem(process, wide):
    """Gaussian data: `wide` is the process whose R is the factor of the marginal covariance, and so its flow."""

    def eps(u, t):
        return combine(process, [process.factor(t).mT @ torch.linalg.inv(wide.covariance(t))], [u])

    def flow(u, t, s):
        return combine(process, [wide.factor(t) @ torch.linalg.inv(wide.factor(s))], [u])

    return eps, flow


class WideVP(VPProcess):
    """Marginals of VP for data of standard deviation 0.3; for scalars R is the square root."""

    def factor(self, t):
        return (self.signal(t) ** 2 * 0.3**2 + super().factor(t) ** 2).sqrt()


PROBLEMS = {
    # (process, the same with the data inside its initial covariance)
    "vp": (VPProcess(), WideVP()),
    "cld": (CLDProcess(), CLDProcess(epsilon=1e-6 + 0.0025, gamma=0.03)),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize(("order", "corrector_order"), [(0, None), (1, None), (2, None), (3, None), (0, 1), (1, 2), (2, 3)])
def test_observed_order(problem, order, corrector_order):
    """With an exact history: one more than the degree of the polynomial."""
    process, wide = PROBLEMS[problem]
    eps, flow = gaussian_problem(process, wide)
    start, errors = draw(process, 1), []
    for num_steps in (64, 128):
        times = power_grid(1.0, 0.2, num_steps, 1.0)
        run = step_coefficients(process, times, order, corrector_order=corrector_order)
        states = [flow(start, t, run.times[0]) for t in run.times[:4]]
        history = [eps(u, t) for u, t in zip(states, run.times, strict=False)][::-1]
        u = states[-1]
        for i in range(3, num_steps):
            new = combine(process, [run.transition[i], *run.predictor[i]], [u, *history[: order + 1]])
            if corrector_order is not None:
                values = [eps(new, run.times[i + 1]), *history][: corrector_order + 1]
                new = combine(process, [run.transition[i], *run.corrector[i]], [u, *values])
            u = new
            history = [eps(u, run.times[i + 1]), *history]
        errors.append((u - flow(start, run.times[-1], run.times[0])).abs().max().item())
    expected = (order if corrector_order is None else corrector_order) + 1
    assert math.log2(errors[0] / errors[1]) == pytest.approx(expected, abs=0.35)


# ---- stochastic sampling -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [VPProcess(), CLDProcess(), CLDProcess(beta_1=3.0)], ids=name_of)
@pytest.mark.parametrize("stochasticity", [0.3, 1.0, 2.0])
def test_stochastic_step_solves_its_equations(process, stochasticity):
    """Transition and covariance of the reverse process by a general ODE solver, on a point mass at 0."""
    integrate = pytest.importorskip("scipy.integrate")
    s, t, k = 0.6, 0.1, process.block

    def slope(tau, y):
        psi, p = torch.from_numpy(y).reshape(2, k, k)
        drift = process.drift(tau) + (1 + stochasticity**2) / 2 * process.diffusion(tau) @ torch.linalg.inv(
            process.covariance(tau)
        )
        spread = drift @ p + p @ drift.mT - stochasticity**2 * process.diffusion(tau)
        return torch.stack([drift @ psi, spread]).flatten().numpy()

    start = torch.stack([torch.eye(k), torch.zeros(k, k)]).double().flatten().numpy()
    result = integrate.solve_ivp(slope, (s, t), start, method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
    psi, covariance = torch.from_numpy(result).reshape(2, k, k)
    run = step_coefficients(process, [s, t], 0, stochasticity=stochasticity, noiseless_last=False)
    factor = process.factor(s)
    torch.testing.assert_close(run.predictor[0, 0], (psi - process.transition(t, s)) @ factor, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(run.noise[0] @ run.noise[0].mT, covariance, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(run.carry[0], torch.linalg.inv(process.factor(t)) @ psi @ factor, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("process", "stochasticity"), [(VPProcess(), 0.5), (CLDProcess(), 0.5), (CLDProcess(), 1.0)])
def test_stochastic_step_is_the_law_of_simulated_paths(process, stochasticity):
    """1e5 paths in 160 Euler-Maruyama steps against one step of ours."""
    s, t, k, num_paths = 0.6, 0.3, process.block, 100_000
    generator = torch.Generator().manual_seed(0)
    clean = torch.full((1, 1), 0.5, dtype=torch.float64)
    start = torch.tensor([[0.8, -0.3][:k]], dtype=torch.float64)
    u = start.expand(num_paths, k)
    for a, b in itertools.pairwise(torch.linspace(s, t, 161, dtype=torch.float64).tolist()):
        noise = torch.randn(num_paths, k, generator=generator, dtype=torch.float64)
        u = euler_maruyama_step(process, u, point_mass_eps(process, u, clean, a), noise, a, b, stochasticity)
    run = step_coefficients(process, [s, t], 0, stochasticity=stochasticity, noiseless_last=False)
    eps = point_mass_eps(process, start, clean, s)
    mean = combine(process, [run.transition[0], run.predictor[0, 0]], [start, eps])
    covariance = run.noise[0] @ run.noise[0].mT
    scale = covariance.diagonal().sqrt()
    assert ((u.mean(0) - mean[0]).abs() / scale).max() < 0.02
    assert ((u.T.cov().reshape(k, k) - covariance).abs() / scale / scale[:, None]).max() < 0.03


@pytest.mark.parametrize("process", TIMED, ids=name_of)
def test_without_stochasticity_the_multistep_sampler_is_the_deterministic_one(process):
    times = grid_for(process, 6)
    still, loud = (step_coefficients(process, times, 2, stochasticity=s) for s in (0.0, 1e-7))
    assert not still.noise.any()
    assert torch.equal(still.carry, torch.eye(process.block).double().expand_as(still.carry))
    torch.testing.assert_close(loud.predictor, still.predictor, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("process", TIMED, ids=name_of)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_stochastic_multistep_is_exact_on_point_masses(process, order):
    """Carried along, all older eps equal the newest one: a run in many steps is a draw from the law of one step."""
    clean = torch.rand(1, 2, *(process.cells or (2, 2)), dtype=torch.float64)
    times = power_grid(process.start_time, 0.05, 5)
    run = step_coefficients(process, times, order, stochasticity=0.8, noiseless_last=False)
    u, history = draw(process, 1), []
    for i, t in enumerate(run.times[:-1]):
        eps = point_mass_eps(process, u, clean, t)
        for old in history:
            torch.testing.assert_close(old, eps, rtol=1e-8, atol=1e-8)
        history, noise = [eps, *history][: order + 1], draw(process, 1, seed=i + 1)
        first = step_coefficients(process, run.times[i : i + 2], 0, stochasticity=0.8, noiseless_last=False)
        expected = combine(process, [first.transition[0], first.predictor[0, 0], first.noise[0]], [u, eps, noise])
        matrices = [run.transition[i], *run.predictor[i, : len(history)], run.noise[i]]
        u = combine(process, matrices, [u, *history, noise])
        torch.testing.assert_close(u, expected, rtol=1e-8, atol=1e-8)
        history = [combine(process, [run.carry[i], run.carry_noise[i]], [old, noise]) for old in history]


@pytest.mark.parametrize("stochasticity", [0.3, 1.0])
def test_higher_orders_have_better_marginals_with_stochasticity_too(stochasticity):
    """Variance of the position at the end for Gaussian data, 2e4 paths in 30 steps."""
    (process, wide), num_paths = PROBLEMS["cld"], 20_000
    eps, _ = gaussian_problem(process, wide)
    generator, times, errors = torch.Generator().manual_seed(0), power_grid(1.0, 1e-2, 30), []
    for order in (0, 1, 2):
        run = step_coefficients(process, times, order, stochasticity=stochasticity)
        u = torch.randn(num_paths, 2, generator=generator, dtype=torch.float64) @ wide.factor(1.0).mT
        history = []
        for i, t in enumerate(run.times[:-1]):
            noise = torch.randn(num_paths, 2, generator=generator, dtype=torch.float64)
            history = [eps(u, t), *history][: order + 1]
            u = combine(process, [run.transition[i], *run.predictor[i, : len(history)], run.noise[i]], [u, *history, noise])
            history = [combine(process, [run.carry[i], run.carry_noise[i]], [old, noise]) for old in history]
        errors.append(abs(u[:, 0].var().item() / wide.covariance(1e-2)[0, 0].item() - 1))
    assert errors[1] < 0.75 * errors[0]
    assert errors[2] < errors[1]


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("stochasticity", [0.0, 0.3, 1.0])
def test_euler_maruyama_keeps_the_marginals_for_any_lambda(problem, stochasticity):
    """Exact linear propagation of the covariance for Gaussian data, in many steps."""
    process, wide = PROBLEMS[problem]
    times = power_grid(1.0, 0.3, 4000, 1.0).tolist()
    covariance, eye = wide.covariance(1.0), torch.eye(process.block, dtype=torch.float64)
    for t, t_next in itertools.pairwise(times):
        gain = (1 + stochasticity**2) / 2 * process.diffusion(t) @ torch.linalg.inv(wide.covariance(t))
        step = eye + (t_next - t) * (process.drift(t) + gain)
        covariance = step @ covariance @ step.mT + stochasticity**2 * (t - t_next) * process.diffusion(t)
    torch.testing.assert_close(covariance, wide.covariance(0.3), rtol=0.01, atol=0.001)
    u = draw(process, 1)
    eps = gaussian_problem(process, wide)[0](u, 0.5)
    drift = process.drift(0.5) + (1 + stochasticity**2) / 2 * process.diffusion(0.5) @ torch.linalg.inv(wide.covariance(0.5))
    torch.testing.assert_close(reverse_drift(process, u, eps, 0.5, stochasticity), combine(process, [drift], [u]))


# ---- training, the last step, precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("process", TIMED, ids=name_of)
@pytest.mark.parametrize("parametrization", ["R", "L"])
def test_noised_data_has_the_marginal_of_the_process(process, parametrization):
    """One time for each sample; the noise comes back out of the exact network."""
    clean = torch.rand(3, 2, *(process.cells or (2, 2)), dtype=torch.float64)
    noise, t = draw(process, 3), torch.tensor([0.02, 0.3, 0.9])
    noisy = add_noise(process, clean, noise, t, parametrization)
    for i in range(3):
        one = add_noise(process, clean[i : i + 1], noise[i : i + 1], t[i].item(), parametrization)
        torch.testing.assert_close(noisy[i : i + 1], one, rtol=1e-12, atol=1e-14)
        state, image = process.transform(one), process.transform(clean[i : i + 1])
        eps = point_mass_eps(process, state, image, t[i].item(), parametrization)
        torch.testing.assert_close(eps, process.transform(noise[i : i + 1]), rtol=1e-7, atol=1e-7)


def test_a_run_on_the_noise_clock_may_end_at_the_data():
    process, clean = LogNoiseVPProcess(), torch.rand(1, 1, 2, 2, dtype=torch.float64)
    for corrector_order in (None, 2):
        run = step_coefficients(process, [3.0, 1.0, -1.0, -math.inf], 2, corrector_order=corrector_order)
        assert run.predictor.isfinite().all()
        assert not run.predictor[-1, 1:].any()
    u = add_noise(process, clean, torch.ones_like(clean), -1.0)
    u = combine(process, [run.transition[-1], run.predictor[-1, 0]], [u, torch.ones_like(clean)])
    torch.testing.assert_close(u, clean)
    assert run.corrector.isfinite().all()


def test_denoising_step_removes_noise_that_is_left():
    process = CLDProcess()
    clean = torch.rand(8, 2, 4, 4, dtype=torch.float64)
    u = add_noise(process, clean, draw(process, 8)[:, :, :1, :1].expand(8, 4, 4, 4), 1e-3)
    eps = point_mass_eps(process, u, clean, 1e-3)
    before, after = (process.project(x) - clean for x in (u, denoising_step(process, u, eps, 1e-3)))
    assert after.std() < 0.7 * before.std()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_states_keep_their_dtype_and_lose_only_its_rounding(dtype):
    process = CLDProcess()
    run = step_coefficients(process, power_grid(1.0, 1e-3, 5), 1)
    exact = draw(process, 2)
    states = [exact.to(dtype), exact.flip(0).to(dtype)]
    result = combine(process, run.predictor[2], states)
    assert result.dtype == dtype
    expected = combine(process, run.predictor[2], [s.double() for s in states])
    torch.testing.assert_close(result.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


# ---- time grids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [1.0, 2.0, 7.0])
def test_power_grid_is_even_in_the_root(exponent):
    grid = power_grid(0.9, 1e-3, 12, exponent)
    assert (grid[0].item(), grid[-1].item()) == (0.9, 1e-3)
    torch.testing.assert_close(
        (grid ** (1 / exponent)).diff(), torch.full((12,), (1e-3 ** (1 / exponent) - 0.9 ** (1 / exponent)) / 12).double()
    )


@pytest.mark.parametrize("num_steps", [2, 3, 9, 50])
@pytest.mark.parametrize("noise_share", [0.01, 0.2, 0.99])
def test_hybrid_grid_falls_from_end_to_end(num_steps, noise_share):
    grid = hybrid_grid(1.0, 1e-3, num_steps, noise_share=noise_share)
    assert len(grid) == num_steps + 1
    assert (grid[0].item(), grid[-1].item()) == (1.0, 1e-3)
    assert (grid.diff() < 0).all()


# ---- wrong input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stochasticity": -0.1}, "`stochasticity`.*-0.1"),
        ({"stochasticity": math.nan}, "`stochasticity`.*nan"),
        ({"order": -1}, "`order`.*-1"),
        ({"order": 9}, "`order`.*9"),
        ({"order": 5}, "`order` .5. needs 6 evaluations.*4 steps.*Lower it to 3"),
        ({"corrector_order": 0}, "`corrector_order`.*0"),
        ({"corrector_order": 5}, "`corrector_order` .5. needs.*Lower it to 4"),
        ({"corrector_order": 1, "stochasticity": 0.5}, "`stochasticity` .0.5.*`corrector_order`"),
        ({"parametrization": "L", "stochasticity": 0.5}, "`stochasticity` .0.5.*`parametrization`"),
        ({"parametrization": "Q"}, "`parametrization`.*'Q'"),
        ({"times": [1.0, 0.5, 0.6, 0.2, 0.1]}, "`times`.*decreasing"),
        ({"times": [1.0]}, "`times`.*two"),
        ({"times": [1.0, 0.5, 0.2, 0.1, -0.1]}, "`times`.*-0.1"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(options, words):
    arguments = {"times": [1.0, 0.8, 0.5, 0.3, 0.1], "order": 1} | options
    with pytest.raises(ValueError, match=words):
        step_coefficients(CLDProcess(), **arguments)


def test_wrong_processes_are_refused():
    with pytest.raises(ValueError, match=r"`process` must be one of.*'vp'.*'cld'.*'blur'.*'edm'"):
        make_process("edm")
    with pytest.raises(ValueError, match="beta_min"):
        make_process("vp", beta_min=3.0, beta_max=1.0)
    assert make_process("cld", gamma=0.1) == CLDProcess(gamma=0.1)


def test_wrong_timesteps_and_tables_are_refused():
    table = torch.tensor([0.9, 0.5, 0.0])
    with pytest.raises(ValueError, match=r"`timesteps` must lie in \[0, 2\]"):
        log_noise_to_signal(table, torch.tensor([3]))
    with pytest.raises(ValueError, match="`alphas_cumprod` must be inside"):
        log_noise_to_signal(table, torch.tensor([2]))
    torch.testing.assert_close(log_noise_to_signal(table, torch.tensor([1])), torch.zeros(1).double())


def test_wrong_steps_and_grids_are_refused():
    u = torch.zeros(1, 2, 2, 2)
    with pytest.raises(ValueError, match=r"`stochasticity`.*-1"):
        euler_maruyama_step(VPProcess(), u, u, u, 0.5, 0.4, -1.0)
    with pytest.raises(ValueError, match="End `times` there"):
        denoising_step(LogNoiseVPProcess(), u, u, -5.0)
    for arguments, word in (((1.0, 1.0, 3), "start"), ((1.0, 0.1, 0), "num_steps"), ((1.0, 0.1, 3, 0.0), "exponent")):
        with pytest.raises(ValueError, match=f"`{word}`"):
            power_grid(*arguments)
    for arguments, word in (((1,), "num_steps"), ((5, 2.0, 1.0), "noise_share"), ((5, 2.0, 0.5, 0.05), "switch")):
        with pytest.raises(ValueError, match=f"`{word}`"):
            hybrid_grid(1.0, 0.1, *arguments)
