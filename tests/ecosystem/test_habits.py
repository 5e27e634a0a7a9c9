"""What pipelines of diffusers do with a scheduler besides calling `step`: lists of timesteps, callbacks, interruption."""

import inspect

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps

from diffusers_fastdiff import FDMEDMScheduler, GDDIMScheduler, IPNDMMultistepScheduler
from tests.ecosystem.folders import edm_pipeline, gddim_pipeline
from tests.ecosystem.pipelines import draw
from tests.hooks import tiny_pipelines as tiny
from tests.schedulers.test_common import SCHEDULERS, evaluations
from tests.test_combinations import OURS

IN_STABLE_DIFFUSION = [name for name in OURS if not name.startswith("FDM")]


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_retrieve_timesteps(scheduler_class):
    count = evaluations(scheduler_class)
    timesteps, number = retrieve_timesteps(scheduler_class(), count, "cpu")
    assert len(timesteps) == number == count
    for argument, values in (("timesteps", [900, 600, 300]), ("sigmas", [10.0, 3.0, 1.0, 0.1])):
        scheduler = scheduler_class()
        if argument not in inspect.signature(scheduler.set_timesteps).parameters:
            with pytest.raises(ValueError, match=argument):
                retrieve_timesteps(scheduler, device="cpu", **{argument: values})


def test_lists_are_followed():
    timesteps, _ = retrieve_timesteps(IPNDMMultistepScheduler(), device="cpu", timesteps=[900, 600, 300])
    assert timesteps.tolist() == [900, 600, 300]
    timesteps, _ = retrieve_timesteps(GDDIMScheduler(), device="cpu", timesteps=[900, 600, 300])
    assert timesteps.tolist() == [900, 600, 300]
    scheduler = FDMEDMScheduler(solver="euler")
    retrieve_timesteps(scheduler, device="cpu", sigmas=[10.0, 3.0, 1.0])
    assert scheduler.sigmas.tolist() == [10.0, 3.0, 1.0, 0.0]


@pytest.mark.parametrize("name", IN_STABLE_DIFFUSION)
def test_callbacks_and_interruption(name, tmp_path):
    pipe = tiny.stable_diffusion(tmp_path)
    scheduler = OURS[name](pipe.scheduler.config)
    if name == "AMED, attached":
        scheduler.attach(pipe)
    pipe.scheduler = scheduler
    plain = tiny.draw(pipe, 6)
    seen = []

    def watch(pipe, index, timestep, values):
        seen.append((index, float(timestep)))
        return {}

    assert torch.equal(tiny.draw(pipe, 6, callback_on_step_end=watch), plain)
    assert [index for index, _ in seen] == list(range(6))
    assert [timestep for _, timestep in seen] == pytest.approx([float(t) for t in pipe.scheduler.timesteps])

    def change(pipe, index, timestep, values):
        return {"latents": values["latents"] * (0.5 if index == 2 else 1.0)}

    changed = tiny.draw(pipe, 6, callback_on_step_end=change)
    assert not torch.equal(changed, plain)
    assert bool(changed.isfinite().all())

    def stop(pipe, index, timestep, values):
        pipe._interrupt = index == 2
        return {}

    stopped = tiny.draw(pipe, 6, callback_on_step_end=stop)
    assert not torch.equal(stopped, plain)
    assert torch.equal(tiny.draw(pipe, 6), plain)  # the next run knows nothing of it


@pytest.mark.parametrize("name", IN_STABLE_DIFFUSION)
def test_tuples(name, tmp_path):
    pipe = tiny.stable_diffusion(tmp_path)
    scheduler = OURS[name](pipe.scheduler.config)
    if name == "AMED, attached":
        scheduler.attach(pipe)
    pipe.scheduler = scheduler
    options = {"prompt": ["a"], "num_inference_steps": 6, "output_type": "latent"}
    as_tuple = pipe(**options, return_dict=False, generator=torch.Generator().manual_seed(0))[0]
    assert torch.equal(as_tuple, pipe(**options, generator=torch.Generator().manual_seed(0)).images)


@pytest.mark.parametrize("make", [edm_pipeline, gddim_pipeline])
def test_callbacks_of_own_pipelines(make):
    pipe = tiny.quiet(make())
    plain = draw(pipe, 5)
    seen = []

    def watch(pipe, index, timestep, values):
        seen.append((index, sorted(values)))
        return values

    assert torch.equal(draw(pipe, 5, callback_on_step_end=watch), plain)
    assert seen == [(index, ["latents"]) for index in range(5)]
    assert pipe.num_timesteps == 5

    def clear(pipe, index, timestep, values):
        return {"latents": torch.zeros_like(values["latents"])} if index == 4 else values

    assert not draw(pipe, 5, callback_on_step_end=clear).any()

    def stronger(pipe, index, timestep, values):
        pipe._guidance_scale += 1
        return values

    assert not torch.equal(draw(pipe, 5, callback_on_step_end=stronger), plain)
    assert pipe.guidance_scale == 2.0 + 5
    steps = []

    def stop(pipe, index, timestep, values):
        steps.append(index)
        pipe._interrupt = index == 2
        return {}

    draw(pipe, 5, callback_on_step_end=stop, callback_on_step_end_tensor_inputs=[])
    assert steps == [0, 1, 2]
    assert torch.equal(draw(pipe, 5), plain)
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        draw(pipe, 5, callback_on_step_end_tensor_inputs=["velocity"])
