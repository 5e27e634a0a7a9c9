"""What diffusers expects of every model: saving, precision, adapters, caches, attention, compilation."""

import copy

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel

from diffusers_fastdiff import FixedPointDiTTransformer2DModel, PixelAutoencoder
from tests.models.tiny import dit_inputs, faster_dit, fixed_point_dit

MODELS = {"fixed_point": fixed_point_dit, "faster": faster_dit}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)

CACHES = {
    "first_block": FirstBlockCacheConfig(threshold=1.0),
    "mag": MagCacheConfig(num_inference_steps=2, retention_ratio=0.0, threshold=100.0, mag_ratios=[1.0, 1.0]),
    "pab": PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500),
    "taylorseer": TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1, max_order=1),
}


def public(config) -> dict:
    return {key: value for key, value in config.items() if not key.startswith("_")}


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_saved_model_is_the_same_model(make, dtype, tmp_path):
    model, inputs = make().eval(), dit_inputs()
    model.to(dtype).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, torch_dtype=dtype)
    assert public(loaded.config) == public(model.config)
    inputs["hidden_states"] = inputs["hidden_states"].to(dtype)
    output = model(**inputs).sample
    assert output.dtype == dtype
    for (name, saved), read in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(saved, read), name
    # diffusers leaves the position table, which is not saved, in float32 when it loads and casts it with `to`.
    tolerance = 0 if dtype == torch.float32 else 0.02
    assert (loaded(**inputs).sample - output).norm() <= tolerance * output.norm()


@every_model
@torch.no_grad()
def test_tuple_and_dataclass_agree(make):
    model, inputs = make().eval(), dit_inputs()
    assert torch.equal(model(**inputs).sample, model(**inputs, return_dict=False)[0])


@every_model
def test_training_with_ema(make):
    model = make().train()
    ema = EMAModel(model.parameters())
    model(**dit_inputs()).sample.square().mean().backward()
    ema.step(model.parameters())


@torch.no_grad()
def test_low_precision_stays_close():
    model, inputs = fixed_point_dit().eval(), dit_inputs()
    expected = model(**inputs).sample
    low = model.to(torch.bfloat16)(**(inputs | {"hidden_states": inputs["hidden_states"].bfloat16()})).sample
    assert (low - expected).norm() < 0.03 * expected.norm()


@torch.no_grad()
def test_layerwise_casting_runs():
    model, inputs = fixed_point_dit().eval(), dit_inputs()
    expected = model(**inputs).sample
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    output = model(**inputs).sample
    assert (output - expected).norm() < 0.3 * expected.norm()


@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_round_trip(use_dora, tmp_path):
    peft = pytest.importorskip("peft")
    model, inputs = fixed_point_dit().eval(), dit_inputs()
    targets = ["to_q", "to_k", "to_v", "to_out.0", "state_proj", "merge_proj", "injection_out"]
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False, use_dora=use_dora)
    with torch.no_grad():
        plain = model(**inputs).sample
        model.add_adapter(config)
        adapted = model(**inputs).sample
        assert not torch.allclose(plain, adapted, atol=1e-3)
        model.save_lora_adapter(tmp_path)
        model.unload_lora()
        torch.testing.assert_close(model(**inputs).sample, plain)
        model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
        torch.testing.assert_close(model(**inputs).sample, adapted)
        if not use_dora:
            model.fuse_lora()
            torch.testing.assert_close(model(**inputs).sample, adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CACHES)
@torch.no_grad()
def test_caches_of_diffusers(name):
    model, inputs = fixed_point_dit().eval(), dit_inputs()
    moved = inputs | {"hidden_states": inputs["hidden_states"] + 1}
    expected, expected_moved = model(**inputs).sample, model(**moved).sample
    model.enable_cache(copy.copy(CACHES[name]))
    with pytest.raises(ValueError, match="already been enabled"):
        model.enable_cache(CACHES[name])
    with model.cache_context("run"):
        first = model(**inputs).sample
        second = model(**moved).sample
    if name in ("first_block", "mag"):  # the others act inside the fixed-point loop already in the first call
        torch.testing.assert_close(first, expected)
    assert second.isfinite().all()
    assert not torch.allclose(second, expected_moved, atol=1e-5)
    model._reset_stateful_cache()
    assert model(**inputs).sample.isfinite().all()  # without a context of the caller, as in DiTPipeline
    model.disable_cache()
    torch.testing.assert_close(model(**moved).sample, expected_moved)


@torch.no_grad()
def test_first_block_cache_skips_the_fixed_point():
    model, inputs = fixed_point_dit().eval(), dit_inputs()
    calls = []
    model.transformer_blocks[1].attn.register_forward_hook(lambda *_: calls.append(1))
    model.enable_cache(FirstBlockCacheConfig(threshold=1.0))
    with model.cache_context("run"):
        model(**inputs)
        assert len(calls) == 3
        model(**inputs)
        assert len(calls) == 3


def test_caches_without_outer_blocks_are_refused():
    with pytest.raises(ValueError, match="num_pre_layers"):
        fixed_point_dit(num_pre_layers=0).enable_cache(FirstBlockCacheConfig())


@torch.no_grad()
def test_fused_projections():
    model, inputs = fixed_point_dit().eval(), dit_inputs()
    expected = model(**inputs).sample
    model.fuse_qkv_projections()
    assert all(hasattr(m, "to_qkv") for m in model.modules() if isinstance(m, AttentionModuleMixin))
    torch.testing.assert_close(model(**inputs).sample, expected)
    model.unfuse_qkv_projections()
    assert torch.equal(model(**inputs).sample, expected)


def test_attention_processors_can_be_exchanged():
    model = fixed_point_dit()
    assert len(model.attn_processors) == 3
    model.set_attn_processor({key: AttnProcessor() for key in model.attn_processors})
    assert all(type(processor) is AttnProcessor for processor in model.attn_processors.values())
    with pytest.raises(ValueError, match="number of processors"):
        model.set_attn_processor({next(iter(model.attn_processors)): AttnProcessor()})


@torch.no_grad()
def test_attention_backend_can_be_chosen():
    model, inputs = fixed_point_dit().eval(), dit_inputs()
    expected = model(**inputs).sample
    with attention_backend("native"):  # set_attention_backend changes the process; this puts it back
        model.set_attention_backend("_native_math")
        torch.testing.assert_close(model(**inputs).sample, expected)
        model.reset_attention_backend()


@every_model
@torch.no_grad()
def test_compiles_without_graph_breaks(make):
    model, inputs = make().eval(), dit_inputs()
    expected = model(**inputs).sample
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            torch.testing.assert_close(compiled(**inputs).sample, expected)


@torch.no_grad()
def test_repeated_blocks_compile_once_for_all_iterations():
    model, inputs = fixed_point_dit().eval(), dit_inputs()
    expected = [model(**inputs, num_iterations=count).sample for count in (1, 2, 5)]
    torch.compiler.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        for count, output in zip((1, 2, 5), expected, strict=True):
            torch.testing.assert_close(model(**inputs, num_iterations=count).sample, output)


@torch.no_grad()
def test_pixel_autoencoder_is_the_identity(tmp_path):
    codec, images = PixelAutoencoder(1), torch.randn(2, 1, 8, 8)
    codec.save_pretrained(tmp_path)
    codec = PixelAutoencoder.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert codec.dtype == torch.float16
    assert torch.equal(codec.decode(codec.encode(images).latents).sample, images)
    assert torch.equal(codec(images, return_dict=False)[0], images)


def test_names_that_other_tools_read():
    model = FixedPointDiTTransformer2DModel
    assert model._supports_gradient_checkpointing
    assert set(model._repeated_blocks) == {type(block).__name__ for block in fixed_point_dit().transformer_blocks}
    assert set(model._no_split_modules) == set(model._repeated_blocks)
