"""Which steps are key steps: given, published, measured."""

import json

import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_fastdiff import (
    FasterDiffusionConfig,
    KeySchedule,
    apply_faster_diffusion,
    calibrate_key_steps,
    load_pretrained,
)
from diffusers_fastdiff.hooks.key_steps import PRESETS
from tests.hooks import tiny_pipelines as tiny


@pytest.mark.parametrize(
    ("options", "steps", "expected"),
    [
        ({"every": 3}, 8, (0, 3, 6)),
        ({"every": 1}, 3, (0, 1, 2)),
        ({"every": 9}, 8, (0,)),
        ({"key_steps": [5, 0, 3, 3]}, 8, (0, 3, 5)),
        ({"key_steps": range(0, 8, 4)}, 8, (0, 4)),
        ({"key_steps": lambda count: [0, count // 2]}, 8, (0, 4)),
        ({"key_steps": "sd-50"}, 50, (0, 1, 2, 3, 5, 10, 15, 25, 35)),
        ({"key_steps": "sd-50"}, 100, (0, 2, 4, 6, 10, 20, 30, 50, 70)),
        ({"key_steps": "sd-50"}, 25, (0, 1, 2, 3, 5, 8, 13, 18)),
        ({"key_steps": KeySchedule(10, (0, 4, 9))}, 20, (0, 8, 18)),
        ({"key_steps": KeySchedule(10, (0, 4, 9))}, 1, (0,)),
    ],
)
def test_key_steps(options, steps, expected):
    assert FasterDiffusionConfig(**options).key_steps_of(steps) == expected


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("steps", [1, 7, 50, 250, 1000])
def test_scaled_presets_keep_the_longest_gap(name, steps):
    """No step is farther from its key step, as a share of the run, than published."""
    schedule = PRESETS[name]
    keys = schedule.scaled(steps)
    assert keys[0] == 0
    assert keys[-1] < steps

    def longest(keys, count):
        return max(end - start for start, end in zip(keys, (*keys[1:], count), strict=True)) / count

    assert longest(keys, steps) <= longest(schedule.key_steps, schedule.num_steps) + 1 / steps


def test_published_lists():
    assert len(PRESETS["dit-250"].key_steps) == 113
    assert PRESETS["dit-250"].key_steps[:6] == (0, 6, 7, 8, 9, 16)
    assert len(PRESETS["sd-100"].key_steps) == 10 + 16 + 14
    assert PRESETS["growing-50"].key_steps == (0, 2, 5, 9, 14, 20, 27, 35, 44)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({}, "key_steps"),
        ({"every": 2, "key_steps": [0]}, "every"),
        ({"every": 0}, "every"),
        ({"every": 1.5}, "every"),
        ({"key_steps": [1, 2]}, "contain 0"),
        ({"key_steps": [0, -1]}, "from 0"),
        ({"key_steps": [0, 1.5]}, "whole"),
        ({"key_steps": "20ls"}, "dit-250"),
        ({"every": 2, "propagation": "cubic"}, "propagation"),
        ({"every": 2, "max_batch": 4}, "batched"),
        ({"every": 2, "max_batch": 0, "batched": True}, "max_batch"),
        ({"every": 2, "encoder_share": 1.0}, "encoder_share"),
        ({"every": 2, "noise_injection": -0.1}, "noise_injection"),
        ({"every": 2, "noise_injection_below": 300}, "noise_injection_below"),
    ],
)
def test_bad_configs_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        FasterDiffusionConfig(**options)


def test_schedules_are_json(tmp_path):
    schedule = KeySchedule(50, (0, 7, 9))
    schedule.save(tmp_path / "keys.json")
    assert json.loads((tmp_path / "keys.json").read_text()) == {"num_steps": 50, "key_steps": [0, 7, 9]}
    assert KeySchedule.load(tmp_path / "keys.json") == schedule
    for text in ("[]", "{", '{"num_steps": 50}', '{"num_steps": 5, "key_steps": [0, 9]}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad\.json|Key step 9"):
            KeySchedule.load(tmp_path / "bad.json")


def digits(steps: int):
    pipe = load_pretrained("digits-dit-deep")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    return pipe, lambda seed=0: tiny.draw(pipe, steps, seed, labels=range(10), guidance_scale=1.5)


def test_measured_key_steps_beat_even_ones():
    """On samples that were not measured, at the same number of key steps."""
    pipe, sample = digits(30)
    schedule = calibrate_key_steps(pipe, lambda: sample(seed=1), 10, propagation="taylor", num_probes=3)
    assert schedule.num_steps == 30
    assert len(schedule.key_steps) == 10
    plain, deviations = sample(), []
    for options in ({"key_steps": schedule}, {"every": 3}):
        apply_faster_diffusion(pipe, FasterDiffusionConfig(**options, propagation="taylor"))
        deviations.append(float((sample() - plain).norm()))
    assert deviations[0] < 0.7 * deviations[1]


@pytest.mark.parametrize("name", ["sd", "controlnet"])
def test_calibration_leaves_the_pipeline_alone(name, tmp_path):
    pipe = tiny.PIPELINES[name](tmp_path)
    before = set(vars(pipe.unet))
    schedule = calibrate_key_steps(pipe, lambda: tiny.draw(pipe, 6), 3, propagation="linear", num_probes=2)
    assert len(schedule.key_steps) == 3
    assert set(vars(pipe.unet)) == before


def test_bad_calibrations_are_refused():
    pipe = tiny.dit()
    seeds = iter(range(10))
    for sample, options, word in [
        (lambda: tiny.draw(pipe, 4, seed=next(seeds)), {}, "same at every call"),
        (lambda: torch.zeros(1), {}, "did not call"),
        (lambda: tiny.draw(pipe, 4), {"num_probes": 0}, "num_probes"),
        (lambda: tiny.draw(pipe, 4), {"propagation": "cubic"}, "propagation"),
    ]:
        with pytest.raises(ValueError, match=word):
            calibrate_key_steps(pipe, sample, 2, **options)
    with pytest.raises(ValueError, match="num_key_steps"):
        calibrate_key_steps(pipe, lambda: tiny.draw(pipe, 4), 5)
    assert not hasattr(pipe.transformer, "_diffusers_hook")
