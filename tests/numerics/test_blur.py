"""Blurring diffusion: its transform, its matrices, and its limit without blur."""

import math

import pytest
import torch

from diffusers_fastdiff.numerics.blur import BlurProcess, dct2, idct2
from diffusers_fastdiff.numerics.exponential_integrator import step_coefficients
from diffusers_fastdiff.numerics.linear_sde import add_noise, apply, combine
from diffusers_fastdiff.numerics.time_grids import power_grid
from diffusers_fastdiff.numerics.variance_preserving import LogNoiseVPProcess


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 4)])
def test_transform_is_the_orthonormal_dct(size):
    fft = pytest.importorskip("scipy.fft")
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = torch.from_numpy(fft.dctn(x.numpy(), type=2, norm="ortho", axes=(2, 3)))
    torch.testing.assert_close(dct2(x), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(idct2(dct2(x)), x, rtol=0, atol=1e-13)
    assert dct2(x).norm().item() == pytest.approx(x.norm().item())


@pytest.mark.parametrize("sigma_max", [0.0, 10.0, 20.0])
@pytest.mark.parametrize("t", [0.01, 0.3, 0.9])
def test_drift_and_diffusion_are_those_of_mean_and_variance(sigma_max, t):
    """F = (log mean)', G^2 = (variance)' - 2 F variance, positive everywhere."""
    process, h = BlurProcess((6, 4), sigma_max=sigma_max), 1e-5
    log_mean = (process.signal(t + h).log() - process.signal(t - h).log()) / (2 * h)
    growth = (process.factor(t + h) ** 2 - process.factor(t - h) ** 2) / (2 * h)
    torch.testing.assert_close(process.drift(t), log_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(process.diffusion(t), growth - 2 * log_mean * process.factor(t) ** 2, rtol=1e-6, atol=1e-6)
    assert (process.diffusion(t) > 0).all()


def test_constant_images_are_not_blurred_and_noise_is_left_alone():
    process = BlurProcess((8, 8))
    flat, noise = torch.full((1, 1, 8, 8), 0.7, dtype=torch.float64), torch.randn(1, 1, 8, 8, dtype=torch.float64)
    alpha, sigma = process.signal(0.6)[0, 0], process.factor(0.6)[0, 0]
    torch.testing.assert_close(add_noise(process, flat, noise, 0.6), alpha * flat + sigma * noise)


@pytest.mark.parametrize("stochasticity", [0.0, 0.7])
def test_without_blur_it_is_the_cosine_vp_process(stochasticity):
    process, vp = BlurProcess((3, 5), sigma_max=0.0), LogNoiseVPProcess()
    times = power_grid(process.start_time, process.end_time, 6)
    clock = (process.factor(times) / process.signal(times))[:, 0, 0, 0, 0].log()
    run = step_coefficients(process, times, 0, stochasticity=stochasticity)
    expected = step_coefficients(vp, clock, 0, stochasticity=stochasticity)
    for name in ("transition", "predictor", "noise"):
        actual, value = getattr(run, name), getattr(expected, name)
        cells = value[..., None, None, :, :].expand_as(actual)
        torch.testing.assert_close(actual, cells, rtol=1e-9, atol=1e-12)


def test_step_denoises_and_noises_again_at_every_frequency():
    process = BlurProcess((4, 4))
    run = step_coefficients(process, [0.8, 0.5], 0)
    y, eps = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    denoised = (y - process.factor(0.8)[..., 0, 0] * eps) / process.signal(0.8)[..., 0, 0]
    expected = process.signal(0.5)[..., 0, 0] * denoised + process.factor(0.5)[..., 0, 0] * eps
    torch.testing.assert_close(combine(process, [run.transition[0], run.predictor[0, 0]], [y, eps]), expected)


def test_higher_orders_are_more_accurate_on_gaussian_data():
    """Against the exact flow, which scales each frequency by its standard deviation."""
    process, std = BlurProcess((6, 6)), 0.2
    deviation = lambda t: (process.signal(t) ** 2 * std**2 + process.factor(t) ** 2).sqrt()  # noqa: E731
    times = power_grid(process.start_time, process.end_time, 40)
    start = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = apply(process, deviation(times[-1]) / deviation(times[0]), start)
    errors = []
    for order in (0, 1, 2):
        run, y, history = step_coefficients(process, times, order), start, []
        for i, t in enumerate(run.times[:-1]):
            history = [apply(process, process.factor(t) / deviation(t) ** 2, y), *history][: order + 1]
            y = combine(process, [run.transition[i], *run.predictor[i, : len(history)]], [y, *history])
        errors.append((y - exact).square().mean().sqrt().item())
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[1]


def test_clock_has_an_inverse_and_sampling_starts_at_its_maximum():
    process = BlurProcess((4, 4), max_noise_to_signal=50.0)
    assert process.noise_to_signal(process.start_time).item() == pytest.approx(50.0)
    assert process.time_of(process.noise_to_signal(0.37).item()) == pytest.approx(0.37)
    assert process.noise_to_signal(0.0).item() == pytest.approx(0.0, abs=1e-12)


def test_images_of_another_size_are_refused():
    process, image = BlurProcess((8, 8)), torch.zeros(1, 3, 8, 6)
    for call in (process.transform, process.inverse_transform, lambda x: add_noise(process, x, x, 0.5)):
        with pytest.raises(ValueError, match=r"`image_size` is \(8, 8\), but the state has shape \(1, 3, 8, 6\).*Resize"):
            call(image)


def test_sizes_may_come_from_a_saved_list():
    assert BlurProcess([8, 4]) == BlurProcess((8, 4))
    assert hash(BlurProcess([8, 4])) == hash(BlurProcess((8, 4)))


@pytest.mark.parametrize(
    ("parameters", "word"),
    [({"image_size": (0, 4)}, "image_size"), ({"image_size": (4,)}, "image_size"), ({"sigma_max": -1.0}, "sigma_max"),
     ({"min_scale": 0.0}, "min_scale"), ({"min_scale": 1.5}, "min_scale"), ({"offset": 0.0}, "offset"),
     ({"max_noise_to_signal": 0.0}, "max_noise_to_signal"), ({"max_noise_to_signal": math.inf}, "max_noise_to_signal")],
)  # fmt: skip
def test_wrong_parameters_are_refused(parameters, word):
    with pytest.raises(ValueError, match=f"`{word}`"):
        BlurProcess(**parameters)
