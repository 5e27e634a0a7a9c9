import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr as diffusers_rescale

from diffusers_fastdiff.numerics.gaussian_diffusion import (
    DiffusionSchedule,
    ancestral_step,
    ddim_step,
    linear_betas,
    rescale_zero_terminal_snr,
    reverse_distribution,
)

BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": False}


def exact_epsilon(x: torch.Tensor, schedule: DiffusionSchedule, index: torch.Tensor, std: float) -> torch.Tensor:
    """The noise expected in `x` when the data is Gaussian."""
    alpha, sigma = schedule.at("alpha", index, x), schedule.at("sigma", index, x)
    return x * sigma / (alpha**2 * std**2 + sigma**2)


def test_zero_terminal_snr_is_that_of_diffusers():
    ours = rescale_zero_terminal_snr(linear_betas())
    assert ours[-1] == 1
    torch.testing.assert_close(ours, diffusers_rescale(linear_betas()), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddim_step_is_that_of_diffusers(prediction_type):
    scheduler = DDIMScheduler(**BETAS, prediction_type=prediction_type, timestep_spacing="leading")
    scheduler.set_timesteps(20)
    schedule = DiffusionSchedule.from_betas(linear_betas())
    output, noisy = torch.randn(2, 1, 3, 4, 4)
    for timestep, previous in zip(scheduler.timesteps[:-1], scheduler.timesteps[1:], strict=True):
        respaced = schedule.respaced(torch.stack([previous, timestep]))
        ours = ddim_step(respaced, output, noisy, torch.tensor([1]), prediction_type)
        theirs = scheduler.step(output, timestep, noisy).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def test_fixed_large_variance_is_that_of_ddpm():
    scheduler = DDPMScheduler(**BETAS, variance_type="fixed_large")
    schedule = DiffusionSchedule.from_betas(linear_betas())
    noisy = torch.randn(1, 1, 2, 2)
    for index in (1, 500, 999):
        ours = reverse_distribution(schedule, noisy, noisy, torch.tensor([index]), "epsilon").log_variance.exp()
        torch.testing.assert_close(ours[0, 0, 0, 0], scheduler._get_variance(index), rtol=1e-4, atol=0)


def test_exact_noise_prediction_gives_exact_gaussian_samples():
    """Ancestral sampling with the exact posterior of Gaussian data reproduces its variance; DDIM follows its flow."""
    std = 0.5
    schedule = DiffusionSchedule.from_betas(linear_betas()).respaced(torch.arange(0, 1000, 4))
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(10_000, 1, 1, 1, generator=generator, dtype=torch.float64)
    samples = {"ancestral": start, "ddim": start}
    for step in reversed(range(250)):
        index = torch.full((len(start),), step)
        noise = torch.randn(start.shape, generator=generator, dtype=torch.float64)
        for kind, x in samples.items():
            epsilon = exact_epsilon(x, schedule, index, std)
            if kind == "ancestral":
                samples[kind] = ancestral_step(schedule, epsilon, x, index, noise, "epsilon")
            else:
                samples[kind] = ddim_step(schedule, epsilon, x, index, "epsilon")
    assert samples["ancestral"].std().item() == pytest.approx(std, rel=0.02)
    torch.testing.assert_close(samples["ddim"], start * std, rtol=0.02, atol=0)


def test_last_step_adds_no_noise():
    schedule = DiffusionSchedule.from_betas(linear_betas())
    output, noisy = torch.randn(2, 1, 1, 4, 4)
    index = torch.zeros(1, dtype=torch.long)
    still, noisy_step = (ancestral_step(schedule, output, noisy, index, n, "epsilon") for n in (noisy * 0, noisy))
    assert torch.equal(still, noisy_step)
