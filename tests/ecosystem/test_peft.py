"""LoRA with the loaders of diffusers: training changes the adapter alone; saved, fused and swapped it is the same function."""

import pytest
import torch

from tests.ecosystem.folders import edm_unet
from tests.models.tiny import dit_inputs, fixed_point_dit

peft = pytest.importorskip("peft")

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv2", "time_emb_proj"]


def edm_inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(2, 1, 8, 8, generator=generator),
        "timestep": torch.tensor([0.5, -0.5]),
        "class_labels": torch.tensor([1, 2]),
    }


CASES = {
    "fixed_point": (lambda: fixed_point_dit(class_dropout_prob=0.0), dit_inputs, ATTENTION),
    "unet_edm": (lambda: edm_unet(num_classes=10), edm_inputs, ATTENTION),
    "unet_edm_convolutions": (lambda: edm_unet(num_classes=10), edm_inputs, ATTENTION + CONVOLUTIONS),
}


@pytest.fixture(params=CASES)
def case(request):
    """A model in evaluation mode, its inputs, and what LoRA adapts in it."""
    make, make_inputs, targets = CASES[request.param]
    return make().eval(), make_inputs(), targets


def add_lora(model, targets: list[str], seed: int = 0, rank: int = 4, name: str = "default") -> None:
    """An adapter that changes the output, as if it had been trained."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False)
    model.add_adapter(config, adapter_name=name)


@torch.no_grad()
def output_of(model, inputs) -> torch.Tensor:
    return model(**inputs).sample


def load(model, folder, **options) -> None:
    model.load_lora_adapter(folder, prefix=None, use_safetensors=True, **options)


def test_one_training_step_changes_the_adapter_alone(case, tmp_path):
    model, inputs, targets = case
    plain = output_of(model, inputs)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    model.requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets))
    assert torch.equal(output_of(model, inputs), plain)  # an adapter begins as no change
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)

    model.train()
    optimizer = torch.optim.AdamW(trained.values(), lr=0.05)
    torch.manual_seed(0)
    model(**inputs).sample.square().mean().backward()
    for name, value in trained.items():
        assert value.grad is not None, name
        if "lora_B" in name:
            assert value.grad.abs().max() > 0, name
    optimizer.step()
    model.eval()

    adapted = output_of(model, inputs)
    assert (adapted - plain).abs().max() > 1e-3
    for name, value in model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, base[name.replace(".base_layer", "")]), name
    model.save_lora_adapter(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    model.unload_lora()
    assert torch.equal(output_of(model, inputs), plain)
    load(model, tmp_path)
    torch.testing.assert_close(output_of(model, inputs), adapted)


def test_an_adapter_fits_the_model_read_from_disk(case, tmp_path):
    model, inputs, targets = case
    model.save_pretrained(tmp_path / "model")
    add_lora(model, targets)
    model.save_lora_adapter(tmp_path / "lora")
    adapted = output_of(model, inputs)
    fresh = type(model).from_pretrained(tmp_path / "model").eval()
    load(fresh, tmp_path / "lora")
    torch.testing.assert_close(output_of(fresh, inputs), adapted)


def test_fused_is_adapted_and_unfused_is_plain(case):
    model, inputs, targets = case
    plain = output_of(model, inputs)
    add_lora(model, targets)
    adapted = output_of(model, inputs)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    base = {name: value.clone() for name, value in model.named_parameters() if "base_layer.weight" in name}
    model.fuse_lora()
    torch.testing.assert_close(output_of(model, inputs), adapted, rtol=1e-4, atol=1e-4)
    for name, value in base.items():
        assert (model.get_parameter(name) - value).abs().max() > 1e-3, name
    model.unfuse_lora()
    for name, value in base.items():
        torch.testing.assert_close(model.get_parameter(name), value, msg=name)
    torch.testing.assert_close(output_of(model, inputs), adapted, rtol=1e-4, atol=1e-4)
    model.disable_lora()
    torch.testing.assert_close(output_of(model, inputs), plain, rtol=1e-4, atol=1e-4)
    model.enable_lora()
    torch.testing.assert_close(output_of(model, inputs), adapted, rtol=1e-4, atol=1e-4)


def test_two_adapters_are_weighted_and_deleted(case):
    model, inputs, targets = case
    plain = output_of(model, inputs)
    alone = {}
    for seed, name in enumerate(("first", "second")):
        add_lora(model, targets, seed, name=name)
        model.set_adapters(name)
        alone[name] = output_of(model, inputs)
    model.set_adapters(["first", "second"], [1.0, 0.0])
    torch.testing.assert_close(output_of(model, inputs), alone["first"])
    model.set_adapters(["first", "second"], [0.0, 0.0])
    torch.testing.assert_close(output_of(model, inputs), plain)
    model.delete_adapters("first")
    model.set_adapters("second")
    torch.testing.assert_close(output_of(model, inputs), alone["second"])


@pytest.mark.parametrize("ranks", [(4, 4), (4, 2), (2, 4)])
def test_hot_swap(case, ranks, tmp_path):
    model, inputs, targets = case
    expected = []
    for number, rank in enumerate(ranks):
        add_lora(model, targets, seed=number, rank=rank)
        expected.append(output_of(model, inputs))
        model.save_lora_adapter(tmp_path / str(number))
        model.unload_lora()
    assert not torch.allclose(*expected, atol=1e-3)
    model.enable_lora_hotswap(target_rank=max(ranks))
    load(model, tmp_path / "0", adapter_name="default")
    torch.testing.assert_close(output_of(model, inputs), expected[0])
    places = {name: value.data_ptr() for name, value in model.named_parameters()}
    load(model, tmp_path / "1", adapter_name="default", hotswap=True)
    torch.testing.assert_close(output_of(model, inputs), expected[1])
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == places  # what a compiled model needs


def test_a_hot_swap_needs_an_adapter_to_replace(case, tmp_path):
    model, _, targets = case
    add_lora(model, targets)
    model.save_lora_adapter(tmp_path)
    model.unload_lora()
    with pytest.raises(ValueError, match="hotswap"):
        load(model, tmp_path, adapter_name="nothing", hotswap=True)
