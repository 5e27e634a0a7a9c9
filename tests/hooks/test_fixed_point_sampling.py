"""Budgets and reuse in the stock pipeline: what is spent, and that nothing leaks from one run into another."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DPMSolverMultistepScheduler

from diffusers_fastdiff import (
    FixedPointSamplingConfig,
    FixedPointSolver,
    PixelAutoencoder,
    apply_fixed_point_sampling,
    remove_fixed_point_sampling,
)
from tests.models.tiny import dit_inputs, faster_dit, fixed_point_dit


def make_pipe() -> DiTPipeline:
    model = fixed_point_dit(in_channels=1, out_channels=1).eval()
    pipe = DiTPipeline(model, PixelAutoencoder(1), DDIMScheduler(clip_sample=False, timestep_spacing="linspace"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, labels=(1, 2), guidance_scale=2.0, num_inference_steps=5, seed=0) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return pipe(
        list(labels),
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        generator=generator,
        output_type="np",
    ).images


def spent(hook) -> list[int]:
    return [int(counts.max()) for counts in hook.iterations_spent]


RUNS = [
    {"labels": (1, 2), "guidance_scale": 2.0, "num_inference_steps": 5},
    {"labels": (3,), "guidance_scale": 1.0, "num_inference_steps": 5},
    {"labels": (4, 5, 6), "guidance_scale": 2.0, "num_inference_steps": 3},
    {"labels": (1, 2), "guidance_scale": 2.0, "num_inference_steps": 1},
    {"labels": (1, 2), "guidance_scale": 2.0, "num_inference_steps": 1},
]
REUSE = FixedPointSamplingConfig(num_iterations=2, reuse_solution=True)


def test_reuse_changes_the_result_and_removal_restores_it():
    pipe = make_pipe()
    plain = draw(pipe)
    before = set(vars(pipe.transformer))
    apply_fixed_point_sampling(pipe, REUSE)
    assert not np.array_equal(draw(pipe), plain)
    remove_fixed_point_sampling(pipe)
    assert np.array_equal(draw(pipe), plain)
    assert set(vars(pipe.transformer)) == before


def test_default_config_is_the_plain_pipeline():
    pipe = make_pipe()
    plain = draw(pipe)
    hook = apply_fixed_point_sampling(pipe, FixedPointSamplingConfig())
    assert np.array_equal(draw(pipe), plain)
    assert spent(hook) == [3] * 5


def test_runs_in_a_row_equal_fresh_ones():
    """Other batch sizes, guidance on and off, other numbers of steps, single steps: none sees the run before it."""
    fresh = []
    for run in RUNS:
        pipe = make_pipe()
        apply_fixed_point_sampling(pipe, REUSE)
        fresh.append(draw(pipe, **run))
    pipe = make_pipe()
    apply_fixed_point_sampling(pipe, REUSE)
    for run, expected in [*zip(RUNS, fresh, strict=True), *zip(RUNS, fresh, strict=True)]:
        assert np.array_equal(draw(pipe, **run), expected)


def test_an_exception_in_mid_run_leaves_the_next_run_correct():
    pipe = make_pipe()
    apply_fixed_point_sampling(pipe, REUSE)
    expected = draw(pipe)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = pipe.transformer.proj_out_2.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        draw(pipe)
    handle.remove()
    assert np.array_equal(draw(pipe), expected)


def test_a_training_step_between_runs_sees_and_leaves_nothing():
    pipe = make_pipe()
    apply_fixed_point_sampling(pipe, REUSE)
    expected = draw(pipe)
    inputs = dit_inputs() | {"hidden_states": torch.randn(2, 1, 8, 8)}
    model = pipe.transformer.train()
    torch.manual_seed(0)
    with_hook = model(**inputs, num_iterations=2).sample
    remove_fixed_point_sampling(pipe)
    torch.manual_seed(0)
    assert torch.equal(model(**inputs, num_iterations=2).sample, with_hook)
    apply_fixed_point_sampling(pipe, REUSE)
    model.eval()
    assert np.array_equal(draw(pipe), expected)


def test_a_new_scheduler_is_followed():
    pipe = make_pipe()
    hook = apply_fixed_point_sampling(pipe, FixedPointSamplingConfig(budget=12))
    draw(pipe)
    assert sum(spent(hook)) == 12
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    draw(pipe, num_inference_steps=4)
    assert spent(hook) == [3, 3, 3, 3]


def test_reuse_is_starting_from_the_last_solution():
    pipe = make_pipe()
    apply_fixed_point_sampling(pipe, REUSE)
    expected = draw(pipe, guidance_scale=1.0)
    model, scheduler = make_pipe().transformer, pipe.scheduler
    sample, solution = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), None
    scheduler.set_timesteps(5)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            output = model(sample, timestep, torch.tensor([1, 2]), num_iterations=2, initial_solution=solution)
            solution, sample = output.solution, scheduler.step(output.sample, timestep, sample).prev_sample
    np.testing.assert_array_equal((sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), expected)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_iterations": 4}, [4, 4, 4, 4, 4]),
        ({"num_iterations": [5, 4, 3, 2, 1]}, [5, 4, 3, 2, 1]),
        ({"num_iterations": lambda t: 1 if t < 600 else 6}, [6, 6, 1, 1, 1]),
        ({"budget": 15}, [3, 3, 3, 3, 3]),
        ({"budget": 20, "allocation": "increasing"}, [5, 4, 4, 4, 3]),
        ({"budget": 20, "allocation": "decreasing"}, [2, 3, 4, 5, 6]),
        ({"budget": 5}, [1, 1, 1, 1, 1]),
    ],
)
def test_iterations_of_each_step(config, expected):
    pipe = make_pipe()
    hook = apply_fixed_point_sampling(pipe, FixedPointSamplingConfig(**config))
    for _ in range(2):
        draw(pipe)
        assert spent(hook) == expected


def test_tolerance_and_anderson_in_the_pipeline():
    pipe = make_pipe()
    exact = FixedPointSamplingConfig(num_iterations=100)
    apply_fixed_point_sampling(pipe, exact)
    expected = draw(pipe)
    solver = FixedPointSolver(tolerance=1e-4, stop="sample", anderson_depth=3)
    hook = apply_fixed_point_sampling(pipe, FixedPointSamplingConfig(num_iterations=100, solver=solver))
    np.testing.assert_allclose(draw(pipe), expected, atol=2e-2)
    assert max(spent(hook)) < 50


@pytest.mark.parametrize(
    ("config", "word"),
    [({"num_iterations": 0}, "num_iterations"), ({"num_iterations": [1, 0]}, "num_iterations"), ({"budget": 0}, "budget"),
     ({"budget": 9, "num_iterations": 3}, "either"), ({"budget": 9, "allocation": "random"}, "allocation")],
)  # fmt: skip
def test_bad_configs_are_refused(config, word):
    with pytest.raises(ValueError, match=word):
        FixedPointSamplingConfig(**config)


@pytest.mark.parametrize(
    ("config", "word"),
    [({"budget": 4}, "budget"), ({"num_iterations": [1, 2]}, "num_iterations"),
     ({"num_iterations": lambda t: 0}, "num_iterations"), ({"num_iterations": lambda t: 1.5}, "num_iterations")],
)  # fmt: skip
def test_configs_that_do_not_fit_the_run_are_refused(config, word):
    pipe = make_pipe()
    apply_fixed_point_sampling(pipe, FixedPointSamplingConfig(**config))
    with pytest.raises(ValueError, match=word):
        draw(pipe)


def test_unequal_timesteps_with_reuse_are_refused():
    pipe = make_pipe()
    apply_fixed_point_sampling(pipe, REUSE)
    pipe.scheduler.set_timesteps(2)
    inputs = {"hidden_states": torch.zeros(2, 1, 8, 8), "class_labels": torch.tensor([1, 2])}
    with pytest.raises(ValueError, match="timestep"):
        pipe.transformer(**inputs, timestep=torch.tensor([10, 20]))
    pipe.transformer(**inputs, timestep=torch.tensor([10, 10]))


def test_a_bare_model_needs_its_scheduler():
    pipe = make_pipe()
    with pytest.raises(TypeError, match="scheduler"):
        apply_fixed_point_sampling(pipe.transformer, REUSE)
    hook = apply_fixed_point_sampling(pipe.transformer, REUSE, scheduler=pipe.scheduler)
    draw(pipe)
    assert spent(hook) == [2] * 5


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="FixedPointDiT"):
        apply_fixed_point_sampling(faster_dit(), REUSE)


def test_calls_outside_a_run_are_refused():
    pipe = make_pipe()
    apply_fixed_point_sampling(pipe, REUSE)
    inputs = {"hidden_states": torch.zeros(1, 1, 8, 8), "timestep": 10, "class_labels": torch.tensor([1])}
    with pytest.raises(RuntimeError, match="set_timesteps"):
        pipe.transformer(**inputs)
    pipe.scheduler.set_timesteps(1)
    pipe.transformer(**inputs)
    with pytest.raises(RuntimeError, match="called 2 times"):
        pipe.transformer(**inputs)


def test_the_pipeline_is_not_kept_alive():
    pipe = make_pipe()
    model = pipe.transformer
    apply_fixed_point_sampling(pipe, REUSE)
    del pipe
    with pytest.raises(RuntimeError, match="no longer exists"):
        model(torch.zeros(1, 1, 8, 8), 10, torch.tensor([1]))
