"""Offloading, device maps, memory formats, casting and compilation, with the hooks and without, as far as a CPU can tell."""

import pytest
import torch
from diffusers.hooks import apply_group_offloading

from diffusers_fastdiff import (
    FasterDiffusionConfig,
    FixedPointSamplingConfig,
    FixedPointSolver,
    apply_faster_diffusion,
    apply_fixed_point_sampling,
)
from tests.ecosystem.folders import MODELS, edm_pipeline, edm_unet
from tests.hooks import tiny_pipelines as tiny
from tests.models.tiny import dit_inputs, fixed_point_dit
from tests.test_combinations import fixed_point_pipeline

NETWORKS = {
    "fixed_point": dit_inputs,
    "faster": dit_inputs,
    "unet_edm": lambda: {"sample": torch.ones(2, 1, 8, 8), "timestep": torch.tensor([0.1, 0.2])},
}
CPU = torch.device("cpu")


@torch.no_grad()
def run(model, name: str) -> torch.Tensor:
    return model(**NETWORKS[name]()).sample


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offloading(name, kind):
    model = MODELS[name]().eval()
    expected = run(model, name)
    if name == "faster":  # as diffusers' DiT, whose output layer looks into the first block
        with pytest.raises(ValueError, match="group offloading"):
            model.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=kind, num_blocks_per_group=1)
        return
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=kind, num_blocks_per_group=1)
    assert torch.equal(run(model, name), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_device_maps(name, tmp_path):
    model = MODELS[name]().eval()
    model.save_pretrained(tmp_path)
    expected = run(model, name)
    assert torch.equal(run(type(model).from_pretrained(tmp_path, device_map={"": "cpu"}).eval(), name), expected)
    parts = {part: "disk" if index % 2 else "cpu" for index, (part, _) in enumerate(model.named_children())}
    split = type(model).from_pretrained(tmp_path, device_map=parts, offload_folder=tmp_path / "disk").eval()
    torch.testing.assert_close(run(split, name), expected)


def test_channels_last():
    model = edm_unet()
    expected = run(model, "unet_edm")
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(run(model, "unet_edm"), expected, rtol=1e-4, atol=1e-5)


def offload(model) -> None:
    apply_group_offloading(model, onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def cast(model) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def compile_blocks(model) -> None:
    model.compile_repeated_blocks(backend="eager")


HOOKS = {
    "propagation": (lambda folder: tiny.dit(), lambda pipe: apply_faster_diffusion(pipe, FasterDiffusionConfig(every=2))),
    "propagation, EDM": (
        lambda folder: edm_pipeline(),
        lambda pipe: apply_faster_diffusion(pipe, FasterDiffusionConfig(every=2)),
    ),
    "iterations": (
        fixed_point_pipeline,
        lambda pipe: apply_fixed_point_sampling(pipe, FixedPointSamplingConfig(num_iterations=2, reuse_solution=True)),
    ),
}


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("comfort", [offload, cast, compile_blocks])
@pytest.mark.parametrize("hook_first", [True, False])
def test_hooks_with_comforts(name, comfort, hook_first, tmp_path):
    """In either order, and the same images as the comfort alone gives with the hook's plain counterpart removed."""
    make, apply = HOOKS[name]
    images = []
    for use_comfort in (False, True):
        pipe = tiny.quiet(make(tmp_path))
        network = getattr(pipe, "transformer", None) or pipe.unet
        if comfort is cast and not use_comfort:
            network.to(torch.bfloat16).float()  # the weights that casting leaves, up to the layers it keeps
        if hook_first:
            apply(pipe)
        if use_comfort:
            comfort(network)
        if not hook_first:
            apply(pipe)
        options = {"class_labels": [1, 2], "output_type": "latent"} if name.endswith("EDM") else {}
        images.append(tiny.draw(pipe, 5, **options))
        assert torch.equal(tiny.draw(pipe, 5, **options), images[-1])
    torch.testing.assert_close(*images, rtol=0.1 if comfort is cast else 1e-4, atol=0.3 if comfort is cast else 1e-4)


def test_budgets_do_not_compile_again():
    """One graph for the iterated block, whatever the budget, the steps and the way of stopping."""
    torch._dynamo.reset()
    model = fixed_point_dit().eval()
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    counters = torch._dynamo.utils.counters
    counters.clear()
    with torch.no_grad():
        model(**dit_inputs(), num_iterations=2)
        first = counters["stats"]["unique_graphs"]
        for count in (1, 3, 7):
            model(**dit_inputs(seed=count), num_iterations=count)
        model(**dit_inputs(), num_iterations=4, solver=FixedPointSolver(tolerance=1e-9))
    assert counters["stats"]["unique_graphs"] == first > 0
    assert not counters["graph_break"]
