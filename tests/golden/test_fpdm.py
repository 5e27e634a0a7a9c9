"""The fixed-point DiT and its diffusion against the published program, to 1e-5 relative."""

import re

import pytest
import torch

from diffusers_fastdiff.conversion import convert_fpdm
from diffusers_fastdiff.numerics.fixed_point import allocate_iterations
from diffusers_fastdiff.numerics.gaussian_diffusion import (
    DiffusionSchedule,
    ancestral_step,
    ddim_step,
    linear_betas,
    rescale_zero_terminal_snr,
    reverse_distribution,
)
from diffusers_fastdiff.training.losses import diffusion_loss, rectified_flow_loss, rectified_flow_noise
from tests.golden.recordings import Recording, assert_relative, recordings

TOLERANCE = 1e-5


def model_of(recording: Recording, state_prefix: str = "state."):
    config = recording.info["config"]
    return convert_fpdm(
        recording.group(state_prefix),
        num_attention_heads=config["num_heads"],
        num_iterations=1,
        pre_post_timestep_conditioning=config["fixed_point_pre_post_timestep_conditioning"],
    )


def schedule_of(name: str) -> DiffusionSchedule:
    betas = linear_betas()
    return DiffusionSchedule.from_betas(rescale_zero_terminal_snr(betas) if "zero_snr" in name else betas)


def prediction_type_of(name: str) -> str:
    return "v_prediction" if name.startswith("v_") else "epsilon"


@pytest.mark.parametrize("recording", recordings("fpdm_forward*"))
@torch.no_grad()
def test_forward(recording):
    model, inputs = model_of(recording), recording.group("in.")
    outputs = recording.group("out.iters_")
    assert outputs
    for count, expected in outputs.items():
        sample = model(inputs["x"], inputs["t"], inputs["y"], num_iterations=int(count)).sample
        assert_relative(sample, expected, TOLERANCE)


@pytest.mark.parametrize("recording", recordings("fpdm_forward*"))
@torch.no_grad()
def test_iterates_and_injection(recording):
    model, inputs = model_of(recording), recording.group("in.")
    prefix = next(key for key in recording.tensors if key.startswith("mid")).partition(".")[0]
    expected = recording.group(f"{prefix}.")
    seen = {}
    model.injection_in.register_forward_hook(lambda _, __, output: seen.update(injection=output))
    shared = model.transformer_blocks[model.config.num_pre_layers]
    iterates, merged = [], []
    shared.register_forward_hook(lambda _, __, output: iterates.append(output))
    shared.merge_proj.register_forward_hook(lambda _, __, output: merged.append(output))
    model(inputs["x"], inputs["t"], inputs["y"], num_iterations=len(expected["iterates"]))
    assert_relative(seen["injection"], expected["injection"], TOLERANCE)
    assert_relative(torch.stack(iterates), expected["iterates"], TOLERANCE)
    assert_relative(torch.stack(merged), expected["fc2_out"], TOLERANCE)


@pytest.mark.parametrize("recording", recordings("fpdm_forward*"))
@torch.no_grad()
def test_reuse(recording):
    model, reuse = model_of(recording), recording.group("reuse.")
    count = int(re.search(r"(\d+) iterations per call", recording.info["tensors"]["reuse.*"])[1])
    first = model(reuse["x1"], reuse["t1"], reuse["y"], num_iterations=count)
    second = model(reuse["x2"], reuse["t2"], reuse["y"], num_iterations=count, initial_solution=first.solution)
    cold = model(reuse["x2"], reuse["t2"], reuse["y"], num_iterations=count)
    for output, name in ((first, "1"), (second, "2"), (cold, "2_cold")):
        assert_relative(output.sample, reuse[f"out{name}"], TOLERANCE)
        assert_relative(output.solution, reuse[f"solution{name}"], TOLERANCE)


def guide(output: torch.Tensor, scale: float) -> torch.Tensor:
    """The reference guides three channels only; DiTPipeline, and so we, guide all of the latent."""
    conditional, unconditional = output.chunk(2)
    guided = unconditional + scale * (conditional - unconditional)
    return torch.cat([torch.cat([guided[:, :3], half[:, 3:]], dim=1) for half in (conditional, unconditional)])


@pytest.mark.parametrize("recording", recordings("fpdm_forward*"))
@torch.no_grad()
def test_guided_forward_with_reuse(recording):
    model, cfg, reuse = model_of(recording), recording.group("cfg."), recording.group("cfg_reuse.")
    text = recording.info["tensors"]
    scale = float(re.search(r"forward_with_cfg\(x,t,y,([\d.]+)\)", text["cfg.*"])[1])
    plain, with_reuse = (int(re.search(r"(\d+) iterations", text[key])[1]) for key in ("cfg.*", "cfg_reuse.*"))

    def double(x: torch.Tensor) -> torch.Tensor:
        return x.chunk(2)[0].repeat(2, 1, 1, 1)

    output = model(double(cfg["x"]), cfg["t"], cfg["y"], num_iterations=plain).sample
    assert_relative(output, cfg["plain_model_out"], TOLERANCE)
    assert_relative(guide(output, scale), cfg["out"], TOLERANCE)
    first = model(double(cfg["x"]), cfg["t"], cfg["y"], num_iterations=with_reuse)
    second = model(double(reuse["x2"]), reuse["t2"], cfg["y"], num_iterations=with_reuse, initial_solution=first.solution)
    assert_relative(guide(first.sample, scale), reuse["out1"], TOLERANCE)
    assert_relative(guide(second.sample, scale), reuse["out2"], TOLERANCE)


@pytest.mark.parametrize("recording", recordings("fpdm_gradients*"))
def test_gradients(recording):
    inputs = recording.group("in.")
    for prefix in recording.info["results"]:
        no_grad, grad = map(int, re.fullmatch(r"ng(\d+)_wg(\d+)\.", prefix).groups())
        model = model_of(recording).train()
        model.register_to_config(class_dropout_prob=recording.info["config"]["class_dropout_prob"])
        x = inputs["x"].clone().requires_grad_()
        sample = model(x, inputs["t"], inputs["y"], num_iterations=grad, num_no_grad_iterations=no_grad).sample
        loss = sample.square().mean()
        loss.backward()
        expected = recording.group(prefix)
        assert_relative(sample, expected["out"], TOLERANCE)
        assert_relative(loss, expected["loss"], TOLERANCE)
        assert_relative(x.grad, expected["grad_x"], TOLERANCE)
        # Gradients of the original parameters, moved to our names like weights.
        original = recording.group(f"{prefix}grad.") | {"pos_embed": recording.tensors["state.pos_embed"]}
        config = recording.info["config"]
        moved = convert_fpdm(
            original,
            num_attention_heads=config["num_heads"],
            num_iterations=1,
            pre_post_timestep_conditioning=config["fixed_point_pre_post_timestep_conditioning"],
        )
        whole = max(parameter.norm() for parameter in moved.parameters())
        for (name, parameter), reference in zip(model.named_parameters(), moved.parameters(), strict=True):
            # In the norm, because the largest element of some recorded gradients is off by 2e-5 from a float64 computation.
            # The bias of the keys has no influence on the softmax; its gradient is rounding alone.
            size = whole if name.endswith("to_k.bias") else reference.norm()
            assert (parameter.grad - reference).norm() <= TOLERANCE * size, name


@pytest.mark.parametrize("recording", recordings("fpdm_budget"))
def test_budgets(recording):
    rows = recording.info["rows"] + recording.info["other_ratio_rows"]
    assert rows
    for row in rows:
        allocation = "constant" if row["type"] == "fixed" else row["type"]
        table = allocate_iterations(row["budget"], row["total_steps"], allocation, tuple(row.get("ratio", (0.5, 1.5))))
        assert list(table) == row["consumed_first_to_last_one_get_per_step"]


@pytest.mark.parametrize("recording", recordings("fpdm_diffusion_losses"))
def test_schedules(recording):
    for name in ("linear", "zero_snr"):
        schedule, expected = schedule_of(name), recording.group(f"sched.{name}.")
        ours = {
            "betas": schedule.betas,
            "alphas_cumprod": schedule.alphas_cumprod,
            "posterior_variance": schedule.posterior_variance,
            "posterior_log_variance_clipped": schedule.posterior_log_variance_clipped,
            "posterior_mean_coef1": schedule.posterior_mean_clean,
            "posterior_mean_coef2": schedule.posterior_mean_noisy,
            "snr": schedule.snr,
            "v_loss_weight": schedule.snr * schedule.sigma,
        }
        for key, value in ours.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-10, atol=0)


@pytest.mark.parametrize("recording", recordings("fpdm_diffusion_losses"))
def test_losses(recording):
    inputs = recording.group("in.")
    clean, noise, timestep = inputs["x_start"], inputs["noise"], inputs["t"]
    for name in recording.info["results"]:
        expected = recording.group(f"{name}.")
        channels = expected["grad_model_output"].shape[1]
        output = inputs["model_output_8ch"][:, :channels].clone().requires_grad_()
        if name == "flow":
            # Deliberate difference: our velocity points from data to noise, as in diffusers; the output is negated.
            noisy, terms = rectified_flow_noise(clean, noise, timestep), rectified_flow_loss(-output, clean, noise)
        else:
            schedule = schedule_of(name)
            noisy = schedule.add_noise(clean, noise, timestep)
            terms = diffusion_loss(output, clean, noise, timestep, schedule, prediction_type_of(name))
        terms.total.mean().backward()
        assert_relative(noisy, expected["x_t"], TOLERANCE)
        assert_relative(terms.total, expected["loss"], TOLERANCE)
        assert_relative(output.grad, expected["grad_model_output"], TOLERANCE)
        if "mse" in expected:
            assert_relative(terms.mse, expected["mse"], TOLERANCE)
        if "vb" in expected:
            assert_relative(terms.variational_bound, expected["vb"], TOLERANCE)


@pytest.mark.parametrize("recording", recordings("fpdm_diffusion_losses"))
def test_velocity_weightings(recording):
    inputs, alternatives = recording.group("in."), recording.group("weights_alt.")
    assert alternatives
    for key, expected in alternatives.items():
        name, weighting, _ = key.split(".")
        output = inputs["model_output_8ch"][:, : inputs["noise"].shape[1]]
        terms = diffusion_loss(
            output, inputs["x_start"], inputs["noise"], inputs["t"], schedule_of(name), "v_prediction", weighting
        )
        assert_relative(terms.mse, expected, TOLERANCE)


@pytest.mark.parametrize("recording", recordings("fpdm_reverse_steps"))
def test_reverse_steps(recording):
    inputs = recording.group("in.")
    for name, maps in recording.info["timestep_maps"].items():
        if name == "flow":
            continue  # an Euler step, see test_rectified_flow_step
        expected, timesteps = recording.group(f"{name}."), torch.tensor(maps["timestep_map"])
        schedule, index = schedule_of(name).respaced(timesteps), inputs["index"]
        key = next(key for key in inputs if key.startswith("model_output"))
        output = inputs[key] if "learned" in name else inputs[key][:, : inputs["noise"].shape[1]]
        noisy = inputs[next(key for key in ("x", "x_t", "sample") if key in inputs)]
        arguments = (schedule, output, noisy, index)
        reverse = reverse_distribution(*arguments, prediction_type_of(name))
        assert_relative(reverse.mean, expected["mean"], TOLERANCE)
        assert_relative(reverse.log_variance, expected["log_variance"], TOLERANCE)
        assert_relative(reverse.denoised, expected["pred_xstart"], TOLERANCE)
        ancestral = ancestral_step(*arguments, inputs["noise"], prediction_type_of(name))
        assert_relative(ancestral, expected["ddpm_sample"], TOLERANCE)
        assert torch.equal(timesteps[index], expected["timestep_seen_by_model"])
        if "ddim_eta0_sample" in expected:
            ddim = ddim_step(*arguments, prediction_type_of(name))
            assert_relative(ddim, expected["ddim_eta0_sample"], TOLERANCE)


@pytest.mark.parametrize("recording", recordings("fpdm_sampling"))
@torch.no_grad()
def test_sampling(recording):
    text, inputs = recording.info["what"], recording.group("in.")
    scale = float(re.search(r"CFG ([\d.]+)", text)[1])
    count = int(re.search(r"(\d+) iterations per step", text)[1])
    timesteps = torch.tensor(recording.info["info"]["map"])
    schedule = schedule_of("linear").respaced(timesteps)
    runs = recording.group("ddpm.") | {}
    assert runs
    model = model_of(recording)
    for reuse in (False, True):
        for kind in ("ddpm", "ddim"):
            trajectory, sample, solution = recording.tensors[f"{kind}.reuse_{reuse}.trajectory"], inputs["latent"], None
            for number, index in enumerate(reversed(range(len(timesteps)))):
                where = torch.full((len(sample),), index)
                result = model(
                    sample.chunk(2)[0].repeat(2, 1, 1, 1),
                    timesteps[where],
                    inputs["y"],
                    num_iterations=count,
                    initial_solution=solution,
                )
                solution = result.solution if reuse else None
                output = guide(result.sample, scale)
                if kind == "ddpm":
                    sample = ancestral_step(schedule, output, sample, where, inputs["noise_pool"][number], "epsilon")
                else:
                    sample = ddim_step(schedule, output, sample, where, "epsilon")
                assert_relative(sample, trajectory[number], TOLERANCE)
