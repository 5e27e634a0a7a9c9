"""Critically damped Langevin diffusion: closed forms, the factor R, and its splitting sampler."""

import itertools
import math

import pytest
import torch

from diffusers_fastdiff.numerics.linear_sde import add_noise, apply
from diffusers_fastdiff.numerics.phase_space import CLDProcess, mixed_score_offset
from diffusers_fastdiff.numerics.reverse_steps import sscs_free_step, sscs_middle, sscs_score_step
from diffusers_fastdiff.numerics.time_grids import power_grid

PROCESSES = [
    CLDProcess(),
    CLDProcess(inverse_mass=1.0, beta_0=8.0),
    CLDProcess(inverse_mass=9.0, beta_0=2.0, beta_1=5.0, gamma=0.2),
    CLDProcess(gamma=0.0),
    CLDProcess(beta_0=6.0, beta_1=-4.0, epsilon=1e-9),
]
TIMES = torch.tensor([0.0, 1e-5, 1e-3, 0.03, 0.4, 1.0], dtype=torch.float64)
each_process = pytest.mark.parametrize("process", PROCESSES)


def derivative(function, t: float) -> torch.Tensor:
    """Central differences of fourth order."""
    h = 1e-3 * t
    return (8 * (function(t + h) - function(t - h)) - (function(t + 2 * h) - function(t - 2 * h))) / (12 * h)


@each_process
@pytest.mark.parametrize("t", [1e-4, 1e-3, 0.05, 0.5, 0.9])
def test_matrices_solve_their_equations(process, t):
    """Psi' = F Psi, Sigma' = F Sigma + Sigma F^T + G G^T, R' = F R + G G^T R^-T / 2."""
    F, GG = process.drift(t), process.diffusion(t)
    sigma, factor = process.covariance(t), process.factor(t)
    equations = {
        "transition": (lambda tau: process.transition(tau, 0.3), F @ process.transition(t, 0.3)),
        "covariance": (process.covariance, F @ sigma + sigma @ F.mT + GG),
        "factor": (process.factor, F @ factor + process.noise_drift(t) / 2),
    }
    for name, (function, expected) in equations.items():
        actual = derivative(function, t)
        assert (actual - expected).abs().max() <= 1e-7 * expected.abs().max(), name


@each_process
def test_both_factors_are_factors_of_the_covariance(process):
    sigma, eye = process.covariance(TIMES), torch.eye(2, dtype=torch.float64).expand(len(TIMES), 2, 2)
    for factor in (process.factor(TIMES), process.cholesky(TIMES)):
        inverse = torch.linalg.inv(factor)
        torch.testing.assert_close(inverse @ sigma @ inverse.mT, eye, rtol=0, atol=1e-9)
    assert not process.cholesky(TIMES)[:, 0, 1].any()
    start = torch.tensor([process.epsilon, process.gamma / process.inverse_mass + process.epsilon], dtype=torch.float64)
    torch.testing.assert_close(process.factor(0.0), start.sqrt().diag(), rtol=1e-14, atol=0)


@each_process
def test_transitions_compose(process):
    one, two = process.transition(0.7, 0.3) @ process.transition(0.3, 0.1), process.transition(0.7, 0.1)
    torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(process.transition(0.2, 0.2), torch.eye(2, dtype=torch.float64))


@each_process
def test_noise_added_on_the_way_adds_up(process):
    psi = process.transition(0.7, 0.3)
    sigma = psi @ process.covariance(0.3) @ psi.mT + process.added_covariance(0.7, 0.3)
    torch.testing.assert_close(sigma, process.covariance(0.7), rtol=1e-12, atol=1e-14)


def test_short_times_lose_no_digits():
    """Position variance of the noise alone is `2 Gamma beta (beta / M)^2 t^3 / 3`, far below rounding next to 1."""
    process, t = CLDProcess(), 1e-7
    expected = 2 * process.friction * process.beta_0 * (process.beta_0 * process.inverse_mass) ** 2 * t**3 / 3
    assert process.added_covariance(t, 0.0)[0, 0].item() == pytest.approx(expected, rel=1e-5)


@each_process
def test_the_end_is_nearly_the_prior(process):
    prior = process.prior_factor()
    assert (process.covariance(1.0) - prior @ prior.mT).abs().max() < 0.02
    assert process.transition(1.0, 0.0).abs().max() < 0.2


def test_time_changes_leave_the_matrices_alone():
    """Only the integral of beta matters."""
    slow, steep = CLDProcess(beta_0=4.0), CLDProcess(beta_0=1.0, beta_1=6.0)
    for t in (0.2, 0.6, 1.0):
        same = (steep.beta_integral(t) / 4).item()
        torch.testing.assert_close(slow.factor(same), steep.factor(t), rtol=1e-12, atol=1e-13)


def test_data_has_no_velocity_and_comes_back():
    process, clean = CLDProcess(), torch.rand(2, 3, 4, 4)
    state = process.lift(clean)
    assert state.shape == (2, 6, 4, 4)
    assert not state[:, 3:].any()
    assert torch.equal(process.project(state), clean)


def test_mixed_score_is_the_share_of_the_velocity():
    process = CLDProcess()
    u, t = torch.randn(3, 4, 2, 2, dtype=torch.float64), torch.tensor([0.1, 0.5, 1.0])
    offset = mixed_score_offset(process, u, t)
    restored = apply(process, process.factor(t), offset)
    torch.testing.assert_close(restored[:, 2:], u[:, 2:], rtol=1e-9, atol=1e-9)
    assert restored[:, :2].abs().max() < 1e-9


@pytest.mark.parametrize("process", [CLDProcess(), CLDProcess(beta_0=2.0, beta_1=4.0)])
def test_splitting_sampler_converges(process):
    """SSCS on Gaussian data, by exact linear propagation: first order, for a beta that depends on time too."""
    variance, unit = 0.04, torch.eye(2, dtype=torch.float64)

    def marginal(t):
        signal = process.signal(t)[:, 0]
        return process.covariance(t) + variance * signal[:, None] * signal

    def free_half(covariance, begin, end):
        matrix = sscs_free_step(process, unit, 0 * unit, begin, end).T
        factor = sscs_free_step(process, 0 * unit, unit, begin, end).T
        return matrix @ covariance @ matrix.mT + factor @ factor.mT

    def run(num_steps):
        covariance = marginal(1.0)
        for t, t_next in itertools.pairwise(power_grid(1.0, 0.1, num_steps).tolist()):
            middle = sscs_middle(process, t, t_next)
            covariance = free_half(covariance, t, middle)
            eps = apply(process, process.factor(t).mT @ torch.linalg.inv(marginal(t)), unit)
            score = sscs_score_step(process, unit, eps, t, t_next).T
            covariance = free_half(score @ covariance @ score.mT, middle, t_next)
        return (covariance - marginal(0.1)).abs().max().item()

    errors = [run(n) for n in (100, 200)]
    assert errors[1] < 0.02
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.2)


def test_middle_halves_the_integral_of_beta():
    process = CLDProcess(beta_0=1.0, beta_1=5.0)
    middle = sscs_middle(process, 0.9, 0.2)
    halves = (
        process.beta_integral(0.9) - process.beta_integral(middle),
        process.beta_integral(middle) - process.beta_integral(0.2),
    )
    assert halves[0].item() == pytest.approx(halves[1].item(), rel=1e-12)


def test_odd_channels_are_refused():
    process, odd = CLDProcess(), torch.zeros(2, 3, 4, 4)
    noise_of_positions_only = lambda: add_noise(process, odd, odd, 0.5)  # noqa: E731
    for call in (lambda: process.project(odd), lambda: apply(process, process.drift(0.5), odd), noise_of_positions_only):
        with pytest.raises(ValueError, match=r"`state` needs an even number of channels.*\(2, 3, 4, 4\).*lift"):
            call()


@pytest.mark.parametrize(
    ("parameters", "word"),
    [({"inverse_mass": 0.0}, "inverse_mass"), ({"beta_0": -1.0}, "beta_0"), ({"beta_1": -5.0}, "beta_1"),
     ({"gamma": -0.1}, "gamma"), ({"epsilon": 0.0}, "epsilon")],
)  # fmt: skip
def test_wrong_parameters_are_refused(parameters, word):
    with pytest.raises(ValueError, match=f"`{word}`"):
        CLDProcess(**parameters)
