import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiTPipeline

from diffusers_fastdiff import FixedPointDiTTransformer2DModel, FixedPointSolver, PixelAutoencoder
from tests.models.tiny import dit_inputs, fixed_point_dit


def test_published_size_is_pinned():
    """86,500,256 parameters against the 674,834,720 of DiT-XL/2 with shared embedders: 87.2 % fewer."""
    with torch.device("meta"):
        model = FixedPointDiTTransformer2DModel.from_preset("XL/2")
    assert model.num_parameters() == 86_500_256
    assert pytest.approx(0.872, abs=5e-4) == 1 - 86_500_256 / 674_834_720


def test_every_preset_has_the_published_shape():
    for size, (depth, dim, heads) in {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}.items():
        for patch in (2, 4, 8):
            with torch.device("meta"):
                config = FixedPointDiTTransformer2DModel.from_preset(f"{size}/{patch}", num_pre_layers=2).config
            assert config.num_attention_heads == heads
            assert config.num_attention_heads * config.attention_head_dim == dim
            assert (config.patch_size, config.num_iterations, config.out_channels) == (patch, depth - 3, 8)


@torch.no_grad()
def test_more_iterations_are_the_same_block_again():
    model, inputs = fixed_point_dit().eval(), dit_inputs()
    shared = model.transformer_blocks[1]
    calls = []
    shared.register_forward_hook(lambda *_: calls.append(1))
    for count in (1, 2, 7):
        calls.clear()
        output = model(**inputs, num_iterations=count)
        assert len(calls) == count
        assert output.num_iterations.tolist() == [count, count]
    once = model(**inputs, num_iterations=3)
    twice = model(**inputs, num_iterations=4, initial_solution=once.solution)
    torch.testing.assert_close(twice.sample, model(**inputs, num_iterations=7).sample)


@torch.no_grad()
def test_work_that_does_not_change_is_done_once_per_call():
    model, inputs = fixed_point_dit().eval(), dit_inputs()
    calls = {}
    for name in ("modulations.0", "modulations.1", "modulations.2", "injection_in", "injection_out", "time_embedder"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    model(**inputs, num_iterations=9)
    assert set(calls.values()) == {1}
    assert len(calls) == 6


@torch.no_grad()
def test_iterations_without_gradient_count_and_change_nothing_else():
    model, inputs = fixed_point_dit().eval(), dit_inputs()
    split, whole = model(**inputs, num_iterations=2, num_no_grad_iterations=4), model(**inputs, num_iterations=6)
    assert torch.equal(split.sample, whole.sample)
    assert split.num_iterations.tolist() == whole.num_iterations.tolist()


@pytest.mark.parametrize("autocast", [False, True])
def test_every_parameter_gets_a_gradient_after_iterations_without(autocast):
    """DDP needs no `find_unused_parameters`; autocast must not hand the gradient-free casts of the first iterations on."""
    model, inputs = fixed_point_dit().train(), dit_inputs(8)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = model(**inputs, num_iterations=2, num_no_grad_iterations=3).sample
    output.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_gradient_reaches_the_pre_blocks_through_the_injection_only():
    model, inputs = fixed_point_dit().eval(), dit_inputs()
    with torch.no_grad():
        model.injection_in.weight.zero_()
    model(**inputs, num_iterations=3).sample.sum().backward()
    assert model.transformer_blocks[0].attn.to_q.weight.grad.abs().max() == 0
    assert model.transformer_blocks[1].attn.to_q.weight.grad.abs().max() > 0


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = fixed_point_dit().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        torch.manual_seed(1)
        model(**dit_inputs(), num_iterations=3, num_no_grad_iterations=2).sample.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@torch.no_grad()
def test_outer_layers_ignore_the_timestep_when_told_to():
    inputs = dit_inputs() | {"timestep": torch.tensor([1, 1])}
    for sees_timestep in (True, False):
        model = fixed_point_dit(pre_post_timestep_conditioning=sees_timestep).eval()
        model.modulations[1].weight.zero_()  # the shared block always sees it; here it cannot
        same = torch.equal(model(**inputs).sample, model(**(inputs | {"timestep": torch.tensor([900, 900])})).sample)
        assert same is not sees_timestep


@torch.no_grad()
def test_null_label_of_the_pipeline_is_the_last_row():
    model, inputs = fixed_point_dit().eval(), dit_inputs()
    null = model(**(inputs | {"class_labels": torch.tensor([10, 10])})).sample
    assert torch.equal(model(**(inputs | {"class_labels": torch.tensor([1000, 1000])})).sample, null)
    assert not torch.equal(model(**inputs).sample, null)


def test_label_dropout_replaces_whole_samples_by_the_null_label():
    model, inputs = fixed_point_dit(class_dropout_prob=0.5), dit_inputs(64)
    inputs = {key: value[:1].expand(64, *value.shape[1:]) for key, value in inputs.items()}
    seen = []
    model.class_embedder.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0]))
    model.train()(**inputs)
    (labels,) = seen  # one embedder, one draw
    assert set(labels.tolist()) == {int(inputs["class_labels"][0]), 10}
    model.eval()(**inputs)
    assert torch.equal(seen[1], inputs["class_labels"])


@torch.no_grad()
def test_continuous_conditioning():
    model = fixed_point_dit(num_classes=None, conditioning_dim=5).eval()
    inputs = {key: value for key, value in dit_inputs().items() if key != "class_labels"}
    vectors = torch.randn(2, 5)
    assert not torch.equal(model(**inputs, conditioning=vectors).sample, model(**inputs, conditioning=-vectors).sample)
    dropping = fixed_point_dit(num_classes=None, conditioning_dim=5, class_dropout_prob=1.0).train()
    zeros = torch.zeros(2, 5)
    assert torch.equal(dropping(**inputs, conditioning=vectors).sample, dropping(**inputs, conditioning=zeros).sample)


def test_model_without_labels_runs_in_an_unconditional_pipeline():
    model = fixed_point_dit(num_classes=None, in_channels=1, out_channels=1).eval()
    pipe = DDIMPipeline(model, DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 8, 1)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("learned_variance", [False, True])
def test_stock_pipeline(guidance_scale, learned_variance):
    model = fixed_point_dit(in_channels=1, out_channels=2 if learned_variance else 1).eval()
    pipe = DiTPipeline(model, PixelAutoencoder(1), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    result = pipe([1, 2, 9], guidance_scale=guidance_scale, num_inference_steps=3, generator=generator, output_type="np")
    assert result.images.shape == (3, 8, 8, 1)


@torch.no_grad()
def test_timestep_may_be_a_number_or_a_tensor_and_need_not_be_whole():
    model, inputs = fixed_point_dit().eval(), dit_inputs()
    expected = model(**(inputs | {"timestep": torch.tensor([500, 500])})).sample
    for timestep in (500, 500.0, torch.tensor(500), torch.tensor([500])):
        torch.testing.assert_close(model(**(inputs | {"timestep": timestep})).sample, expected)
    assert not torch.allclose(model(**(inputs | {"timestep": 500.5})).sample, expected, atol=1e-5)


@torch.no_grad()
def test_solver_options_reach_the_fixed_point():
    model, inputs = fixed_point_dit().eval(), dit_inputs()
    output = model(**inputs, num_iterations=50, solver=FixedPointSolver(tolerance=1e-3), return_residuals=True)
    assert output.num_iterations.max() < 50
    assert output.residuals[-1].max() < 1e-3
    mixed = model(**inputs, num_iterations=50, solver=FixedPointSolver(tolerance=1e-3, anderson_depth=3))
    torch.testing.assert_close(mixed.sample, output.sample, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_stopping_each_sample_alone_does_not_depend_on_the_batch():
    model, inputs = fixed_point_dit().eval(), dit_inputs(4)
    arguments = {"num_iterations": 60, "solver": FixedPointSolver(tolerance=1e-4, stop="sample")}
    together = model(**inputs, **arguments)
    for index in range(4):
        alone = model(**{key: value[index : index + 1] for key, value in inputs.items()}, **arguments)
        assert alone.num_iterations[0] == together.num_iterations[index]
        torch.testing.assert_close(alone.sample[0], together.sample[index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "word"),
    [({"num_iterations": 0}, "num_iterations"), ({"num_pre_layers": -1}, "num_pre_layers"), ({"sample_size": 9}, "sample_size"),
     ({"conditioning_dim": 3}, "conditioning_dim"), ({"class_dropout_prob": 1.5}, "class_dropout_prob")],
)  # fmt: skip
def test_bad_configs_are_refused(config, word):
    with pytest.raises(ValueError, match=word):
        fixed_point_dit(**config)


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"num_iterations": 0}, "num_iterations"), ({"num_iterations": -3}, "num_iterations"),
     ({"num_no_grad_iterations": -1}, "num_no_grad_iterations"), ({"class_labels": torch.tensor([0, 11])}, "class_labels"),
     ({"class_labels": torch.tensor([-1, 0])}, "class_labels"), ({"class_labels": torch.tensor([1])}, "class_labels"),
     ({"class_labels": None}, "class_labels"), ({"conditioning": torch.zeros(2, 4)}, "conditioning"),
     ({"hidden_states": torch.zeros(2, 4, 16, 16)}, "hidden_states"),
     ({"hidden_states": torch.zeros(2, 3, 8, 8)}, "hidden_states"),
     ({"timestep": torch.tensor([1, 2, 3])}, "timestep"), ({"initial_solution": torch.zeros(3, 16, 16)}, "initial_solution")],
)  # fmt: skip
@torch.no_grad()
def test_bad_inputs_are_refused(changes, word):
    with pytest.raises(ValueError, match=word):
        fixed_point_dit().eval()(**(dit_inputs() | changes))


def test_labels_for_a_model_without_are_refused():
    with pytest.raises(ValueError, match="class_labels"):
        fixed_point_dit(num_classes=None)(**dit_inputs())


def test_solver_in_training_is_refused():
    with pytest.raises(ValueError, match="solver"):
        fixed_point_dit()(**dit_inputs(), solver=FixedPointSolver(tolerance=1e-3))


@pytest.mark.parametrize("preset", ["XXL/2", "S/3", "S", ""])
def test_unknown_presets_are_refused(preset):
    with pytest.raises(ValueError, match="preset"):
        FixedPointDiTTransformer2DModel.from_preset(preset)


def test_truncated_weights_are_refused(tmp_path):
    fixed_point_dit().save_pretrained(tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises((OSError, ValueError, RuntimeError, Exception)) as caught:
        FixedPointDiTTransformer2DModel.from_pretrained(tmp_path)
    assert "safetensors" in str(caught.value).lower() or "incomplete" in str(caught.value).lower()
