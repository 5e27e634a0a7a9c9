"""What users of diffusers expect of every scheduler."""

import inspect

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

import diffusers_fastdiff

SCHEDULERS = [
    value
    for name in diffusers_fastdiff.__all__
    for value in [getattr(diffusers_fastdiff, name)]
    if name.endswith("Scheduler") and issubclass(value, SchedulerMixin)
]


def evaluations(scheduler_class: type) -> int:
    """A number that the default solver can take: AMED has two evaluations in every interval, Heun one in the last."""
    return 4 if scheduler_class is diffusers_fastdiff.AMEDScheduler else 5


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_compatible_schedulers_and_back(scheduler_class):
    scheduler = scheduler_class()
    assert scheduler.compatibles
    for other in scheduler.compatibles:
        back = scheduler_class.from_config(other.from_config(scheduler.config).config)
        assert {key: value for key, value in back.config.items() if key in scheduler.config} == dict(scheduler.config)
        extra = set(back.config) - set(scheduler.config)
        assert not extra & set(inspect.signature(scheduler_class.__init__).parameters)


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_saved_config_is_the_config(scheduler_class, tmp_path):
    scheduler = scheduler_class()
    scheduler.save_pretrained(tmp_path)
    expected = dict(scheduler.config)
    expected.pop("_use_default_values")
    assert expected == scheduler_class.from_pretrained(tmp_path).config


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_steps_and_their_outputs(scheduler_class):
    outputs = []
    for return_dict in (True, False):
        scheduler = scheduler_class()
        scheduler.set_timesteps(evaluations(scheduler_class))
        generator = torch.Generator().manual_seed(0)
        sample = torch.linspace(-1, 1, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8)
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(sample, timestep)
            assert scaled.shape == sample.shape
            result = scheduler.step(0.1 * scaled, timestep, sample, generator=generator, return_dict=return_dict)
            sample = result.prev_sample if return_dict else result[0]
            assert sample.shape == (2, 4, 8, 8)
        outputs.append(sample)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_public_attributes(scheduler_class):
    scheduler = scheduler_class()
    assert isinstance(scheduler.init_noise_sigma, float | torch.Tensor)
    assert scheduler.order == 1
    assert len(scheduler) == scheduler.config.num_train_timesteps
    scheduler.set_timesteps(evaluations(scheduler_class))
    assert scheduler.timesteps.shape == (evaluations(scheduler_class),)
    assert scheduler.step_index is None
    scheduler.set_begin_index(0)
    assert scheduler.begin_index == 0
    noisy = scheduler.add_noise(torch.zeros(2, 4, 8, 8), torch.ones(2, 4, 8, 8), scheduler.timesteps[1:3])
    assert noisy.shape == (2, 4, 8, 8)
    with pytest.raises(AttributeError):
        _ = scheduler.no_such_attribute


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_input_is_scaled_before_a_run_as_in_it(scheduler_class):
    scheduler, sample = scheduler_class(), torch.ones(1, 1, 2, 2)
    scheduler.set_timesteps(evaluations(scheduler_class))
    first = scheduler.timesteps[0]
    expected = scheduler.scale_model_input(sample, first)
    torch.testing.assert_close(scheduler_class().scale_model_input(sample, first), expected)
    assert scheduler_class().scale_model_input(sample, 0.0).shape == sample.shape


TABLES = [cls for cls in SCHEDULERS if "trained_betas" in inspect.signature(cls.__init__).parameters]


@pytest.mark.parametrize("scheduler_class", TABLES)
@pytest.mark.parametrize("timestep", [0, 1])
def test_the_end_of_the_schedule_means_the_last_evaluation(scheduler_class, timestep):
    """As in the multistep schedulers of diffusers, whose timesteps need not hold 0 either."""
    results = []
    for given in (timestep, None):
        scheduler, sample = scheduler_class(), torch.linspace(-1, 1, 4).reshape(1, 1, 2, 2)
        scheduler.set_timesteps(10)
        at = scheduler.timesteps[-1] if given is None else given
        assert torch.equal(scheduler.scale_model_input(sample, at), sample)
        results.append(scheduler.step(0.1 * sample, at, sample, generator=torch.Generator().manual_seed(0)).prev_sample)
    assert torch.equal(*results)


@pytest.mark.parametrize("scheduler_class", TABLES)
def test_listed_betas_are_saved(scheduler_class, tmp_path):
    scheduler = scheduler_class(trained_betas=np.array([0.1, 0.3]))
    scheduler.save_pretrained(tmp_path)
    assert scheduler_class.from_pretrained(tmp_path).betas.tolist() == scheduler.betas.tolist()
