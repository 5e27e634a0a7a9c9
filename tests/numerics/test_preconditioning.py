import itertools
import math
from dataclasses import asdict

import pytest
import torch

from diffusers_fastdiff.numerics.momentum import momentum_scale, warmup_clamp
from diffusers_fastdiff.numerics.preconditioning import KINDS, Preconditioning, vp_sigma, vp_time

SIGMAS = torch.logspace(-3, 2, 41, dtype=torch.float64)
every_kind = pytest.mark.parametrize("kind", KINDS)


def assert_exact(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def test_closed_forms():
    sigma, s = SIGMAS, 0.5
    one, total = torch.ones_like(sigma), sigma**2 + s**2
    vp_noise = 999 * ((0.01 + 39.8 * (1 + sigma**2).log()).sqrt() - 0.1) / 19.9
    expected = {
        "vp": (one, -sigma, 1 / (sigma**2 + 1).sqrt(), vp_noise),
        "ve": (one, sigma, one, (sigma / 2).log()),
        "edm": (s**2 / total, sigma * s / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4),
    }
    for kind, coefficients in expected.items():
        actual = Preconditioning(kind).at(sigma)
        for value, reference in zip(actual, coefficients, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-10, atol=0)  # the closed form of VP cancels


@every_kind
@pytest.mark.parametrize("momentum", [None, 1.0])
def test_numbers_tensors_and_dtypes(kind, momentum):
    preconditioning = Preconditioning(kind, momentum)
    for sigma in (0.01, 1.0, 50.0):
        vector = preconditioning.at(torch.tensor([sigma, sigma], dtype=torch.float64))
        for number, pair, single in zip(
            preconditioning.at(sigma), vector, preconditioning.at(torch.tensor(sigma)), strict=True
        ):
            assert number.dtype == torch.float64
            assert number.shape == ()
            assert torch.equal(number.expand(2), pair)
            assert single.dtype == torch.float32
            torch.testing.assert_close(single.double(), number, rtol=1e-5, atol=1e-6)


@every_kind
def test_no_momentum_is_plain(kind):
    plain, zero = Preconditioning(kind), Preconditioning(kind, momentum=0)
    assert all(torch.equal(a, b) for a, b in zip(plain.at(SIGMAS), zero.at(SIGMAS), strict=True))


@every_kind
def test_momentum_changes_the_input_scale_only(kind):
    plain, damped = Preconditioning(kind), Preconditioning(kind, momentum=2.0)
    low, high = damped.sigma_range
    for name in ("c_skip", "c_out", "c_noise"):
        assert torch.equal(getattr(plain.at(SIGMAS), name), getattr(damped.at(SIGMAS), name))
    assert_exact(damped.at(SIGMAS).c_in, momentum_scale(SIGMAS, low, high, 2.0))
    assert_exact(damped.at(low).c_in, torch.ones((), dtype=torch.float64))
    assert torch.equal(plain.loss_weight(SIGMAS), damped.loss_weight(SIGMAS))


def test_momentum_scale_is_critically_damped():
    """As a function of the damping b it solves s'' + 2 s' + s = 0 from rest at 1."""
    u = torch.linspace(0, 1, 21, dtype=torch.float64)

    def scale_at(b):
        return momentum_scale(b, 0, 1, beta_d=0, beta_min=1)

    first, second = torch.func.vmap(torch.func.grad(scale_at)), torch.func.vmap(torch.func.grad(torch.func.grad(scale_at)))
    torch.testing.assert_close(second(u) + 2 * first(u) + scale_at(u), torch.zeros_like(u), rtol=0, atol=1e-14)
    assert scale_at(u)[0] == 1
    assert first(u)[0] == 0


def test_momentum_scale_outside_the_range():
    sigma = torch.tensor([0.0, 160.0], dtype=torch.float64)
    u = sigma / 80
    damping = 0.1 * u + 9.95 * u**2
    assert_exact(momentum_scale(sigma, 0, 80), (-damping).exp() * (1 + damping))
    assert_exact(momentum_scale(sigma, 0, 80, multiplier=0), torch.ones(2, dtype=torch.float64))


def test_vp_time_is_the_inverse():
    t = torch.linspace(1e-5, 1, 101, dtype=torch.float64)
    assert_exact(vp_time(vp_sigma(t)), t)
    assert_exact(vp_sigma(vp_time(SIGMAS)), SIGMAS)
    torch.testing.assert_close(vp_time(vp_sigma(t.float())), t.float(), rtol=1e-5, atol=0)  # no cancellation in float32
    assert Preconditioning("vp").sigma_range == (float(vp_sigma(1e-5)), float(vp_sigma(1.0)))


def test_edm_coefficients_keep_unit_variance():
    """Input and target of the network have variance 1, and c_out is the smallest that allows it (appendix B.6 of EDM)."""
    s = 0.7
    c_skip, c_out, c_in, _ = Preconditioning("edm", sigma_data=s).at(SIGMAS)
    assert_exact(c_in**2 * (s**2 + SIGMAS**2), torch.ones_like(SIGMAS))
    for shift in (-1e-3, 0.0, 1e-3):
        skip = c_skip + shift
        variance = (1 - skip) ** 2 * s**2 + skip**2 * SIGMAS**2
        assert (variance >= c_out**2 * (1 - 1e-9)).all()
    torch.testing.assert_close(
        (1 - c_skip) ** 2 * s**2 + c_skip**2 * SIGMAS**2, c_out**2, rtol=1e-8, atol=0
    )  # 1 - c_skip cancels


def test_loss_weights():
    s = 0.5
    assert_exact(Preconditioning("vp").loss_weight(SIGMAS), 1 / SIGMAS**2)
    assert_exact(Preconditioning("ve").loss_weight(SIGMAS), 1 / SIGMAS**2)
    assert_exact(Preconditioning("edm").loss_weight(SIGMAS), (SIGMAS**2 + s**2) / (SIGMAS * s) ** 2)


def test_training_noise_levels():
    uniform = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    assert_exact(Preconditioning("vp").training_sigma(uniform), vp_sigma(1 + uniform * (1e-5 - 1)))
    assert_exact(Preconditioning("ve").training_sigma(uniform), 0.02 * 5000**uniform)
    normal = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    assert_exact(Preconditioning("edm").training_sigma(normal), (-1.2 + 1.2 * normal).exp())


def test_warmup_grows_to_its_end_and_stops():
    bounds = [warmup_clamp(step, 10) for step in range(14)]
    assert bounds[0] == 5
    assert bounds[5] == pytest.approx(50)
    assert [b / a for a, b in itertools.pairwise(bounds[:10])] == pytest.approx([100**0.1] * 9)
    assert bounds[10:] == [None] * 4
    assert warmup_clamp(3, 10, start=1, end=16) == pytest.approx(16**0.3)
    assert warmup_clamp(0, None) is warmup_clamp(0, 0) is None
    assert warmup_clamp(10**6, 2 * 10**6) == pytest.approx(50)


@pytest.mark.parametrize(
    ("argument", "arguments"),
    [
        ("kind", {"kind": "iddpm"}),
        ("momentum", {"momentum": -1.0}),
        ("sigma_min", {"sigma_min": 90.0}),
        ("sigma_min", {"sigma_min": 0.0}),
    ],
)
def test_impossible_settings_are_refused(argument, arguments):
    with pytest.raises(ValueError, match=f"`{argument}`"):
        Preconditioning(**arguments)


def test_settings_are_plain_values():
    settings = asdict(Preconditioning("vp", 0.5))
    assert Preconditioning(**settings) == Preconditioning("vp", 0.5)
    assert math.isclose(settings["beta_d"], 19.9)
