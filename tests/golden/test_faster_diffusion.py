"""Encoder propagation on a DiT of 28 blocks against the published program: 250 ancestral steps with guidance.

Batched decoding is compared with the recordings in which the published mix-up of labels was repaired.
"""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.embeddings import get_2d_sincos_pos_embed

from diffusers_fastdiff.conversion import convert_dit
from diffusers_fastdiff.hooks.faster_diffusion import FasterDiffusionConfig, apply_faster_diffusion
from diffusers_fastdiff.hooks.key_steps import PRESETS
from diffusers_fastdiff.numerics.gaussian_diffusion import DiffusionSchedule, ancestral_step, linear_betas
from tests.golden.recordings import Recording, assert_relative, recordings

TOLERANCE = 1e-5
NUM_STEPS = 250


def model_of(recording: Recording):
    """The recorded weights; their positions are random, which no published model has, so they are put in afterwards."""
    state = recording.group("state.")
    positions, grid = state["pos_embed"], recording.info["config"]["input_size"] // recording.info["config"]["patch_size"]
    table = get_2d_sincos_pos_embed(positions.shape[-1], grid, base_size=grid, output_type="pt")
    model = convert_dit(state | {"pos_embed": table[None]}, num_attention_heads=recording.info["config"]["num_heads"])
    model.pos_embed.pos_embed.copy_(positions)
    return model


def scheduler_of(recording: Recording) -> DDPMScheduler:
    """Only its timesteps are used; the published sampler has a learned variance."""
    scheduler = DDPMScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(NUM_STEPS)
    assert scheduler.timesteps.tolist() == recording.info["timestep_map_index0_is_last_step"][::-1]
    return scheduler


def sample(model, scheduler, recording: Recording, noise=None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The published loop: guidance on three channels, both halves carried along. Also the image latents after every step."""
    labels, scale = recording.tensors["in.y"], recording.info["cfg_scale"]
    betas = DiffusionSchedule.from_betas(linear_betas())
    schedule = betas.respaced(scheduler.timesteps.flip(0))
    latents, trajectory = recording.tensors["in.latent"], []
    for step, timestep in enumerate(scheduler.timesteps):
        half = latents[: len(latents) // 2]
        output = model(torch.cat([half, half]), timestep.expand(len(labels)), labels).sample
        conditional, unconditional = output[:, :3].chunk(2)
        guided = unconditional + scale * (conditional - unconditional)
        output = torch.cat([torch.cat([guided, guided]), output[:, 3:]], dim=1)
        index = torch.full((len(labels),), NUM_STEPS - 1 - step)
        drawn = torch.zeros_like(latents) if noise is None else noise[step]
        latents = ancestral_step(schedule, output, latents, index, drawn, "epsilon")
        trajectory.append(latents[: len(half)])
    return latents, trajectory


def published_config(recording: Recording, name: str, **options) -> FasterDiffusionConfig:
    keys = recording.info["key_list_uniform5" if name.startswith("uniform5") else "key_time_steps"]
    return FasterDiffusionConfig(key_steps=[key for key in keys if key < NUM_STEPS], **options)


@pytest.mark.parametrize("recording", recordings("fasterdiffusion_dit"))
@torch.no_grad()
def test_decoder_on_stored_features(recording):
    """One group of steps, serial and batched: what the model returns for each."""
    expected = [recording.tensors["single.key_raw_output"], *recording.tensors["single.nonkey_raw_output"]]
    scheduler, model = DDPMScheduler(), model_of(recording)
    for batched in (False, True):
        scheduler.set_timesteps(timesteps=recording.tensors["single.timesteps"].tolist())
        scheduler.num_inference_steps = len(scheduler.timesteps)
        config = FasterDiffusionConfig(key_steps=[0], batched=batched)
        hook = apply_faster_diffusion(model, config, scheduler=scheduler)
        half = recording.tensors["single.x"].chunk(2)[0]
        for timestep, output in zip(scheduler.timesteps, expected, strict=True):
            actual = model(torch.cat([half, half]), timestep.expand(4), recording.tensors["in.y"]).sample
            assert_relative(actual, output, TOLERANCE)
        assert hook.steps_computed[1:] == ["buffer" if batched else "decode"] * (len(expected) - 1)


@pytest.mark.parametrize("recording", recordings("fasterdiffusion_dit"))
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("name", ["", "uniform5_"])
@torch.no_grad()
def test_deterministic_run(recording, name, batched):
    """Without sampling noise; serial as published, batched as published but with the right labels."""
    model, scheduler = model_of(recording), scheduler_of(recording)
    apply_faster_diffusion(model, published_config(recording, name, batched=batched), scheduler=scheduler)
    actual, trajectory = sample(model, scheduler, recording)
    serial = recording.tensors[f"final.{name}serial.zero"]
    aligned = recording.tensors[f"experiment.{name}parallel_noinj_labels_aligned.zero"]
    assert_relative(actual, aligned if batched else serial, TOLERANCE)
    if not name and not batched and "trajectory_first_half.serial.zero" in recording.tensors:
        assert_relative(torch.stack(trajectory), recording.tensors["trajectory_first_half.serial.zero"], TOLERANCE)


@pytest.mark.parametrize("recording", recordings("fasterdiffusion_dit"))
@torch.no_grad()
def test_ancestral_run(recording):
    """With the recorded sampling noise, one draw for each step."""
    if "in.noise_pool" not in recording.tensors:
        pytest.skip("this recording has no noise")
    noise, model, scheduler = recording.tensors["in.noise_pool"], model_of(recording), scheduler_of(recording)
    for batched in (False, True):
        apply_faster_diffusion(model, published_config(recording, "", batched=batched), scheduler=scheduler)
        assert_relative(sample(model, scheduler, recording, noise)[0], recording.tensors["final.serial.pool"], TOLERANCE)
        scheduler.set_timesteps(NUM_STEPS)


@pytest.mark.parametrize("recording", recordings("fasterdiffusion_dit"))
@torch.no_grad()
def test_all_key_is_plain(recording):
    model, scheduler = model_of(recording), scheduler_of(recording)
    plain, _ = sample(model, scheduler, recording)
    assert_relative(plain, recording.tensors["final.plain.zero"], TOLERANCE)
    apply_faster_diffusion(model, FasterDiffusionConfig(every=1), scheduler=scheduler)
    assert torch.equal(sample(model, scheduler, recording)[0], plain)


@pytest.mark.parametrize("recording", recordings("fasterdiffusion_dit"))
def test_published_schedule(recording):
    keys = [key for key in recording.info["key_time_steps"] if key < NUM_STEPS]
    assert list(PRESETS["dit-250"].key_steps) == keys
    assert len(keys) == 113
    groups = [group[0] for group in recording.info["groups"]]
    np.testing.assert_array_equal(groups, keys)
