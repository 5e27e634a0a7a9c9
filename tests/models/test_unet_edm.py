"""The U-Net of DDPM++, NCSN++ and ADM: structure, conditions, and what diffusers expects of a model."""

import math

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import attention_backend

from diffusers_fastdiff.conversion.edm_unet import convert_edm_unet, edm_unet_state_dict
from diffusers_fastdiff.models.unet_edm import ADM, NCSNPP, PRESETS, EDMUNet2DModel
from diffusers_fastdiff.numerics.preconditioning import Preconditioning
from diffusers_fastdiff.training.edm_loss import denoise, edm_loss

TINY = {
    "sample_size": 8,
    "model_channels": 16,
    "channel_mult": (1, 2),
    "layers_per_block": 1,
    "attention_resolutions": (4,),
    "num_classes": 5,
    "augment_dim": 3,
    "dropout": 0.1,
}
VARIANTS = {"ddpmpp": {}, "ncsnpp": NCSNPP, "adm": ADM | {"attention_head_dim": 8}}
every_variant = pytest.mark.parametrize("variant", VARIANTS)

PARAMETERS = {
    "cifar10-ddpmpp": 55_733_891,
    "cifar10-ncsnpp": 56_397_827,
    "ffhq-ddpmpp": 61_805_571,
    "ffhq-ncsnpp": 62_761_091,
    "afhqv2-ddpmpp": 61_805_571,
    "afhqv2-ncsnpp": 62_761_091,
    "imagenet64-adm": 295_899_267,
    "cld-cifar10": 107_597_318,
}
"""Published: 55.7 M and 56.4 M for CIFAR-10, 61.8 M and 62.8 M at 64x64, 296 M for ImageNet, 108 M for CLD."""


def unet(variant: str = "ddpmpp", seed: int = 0, **overrides) -> EDMUNet2DModel:
    torch.manual_seed(seed)
    return EDMUNet2DModel(**(TINY | VARIANTS[variant] | overrides))


def unet_inputs(batch_size: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(batch_size, 3, 8, 8, generator=generator),
        "timestep": torch.randn(batch_size, generator=generator),
        "class_labels": torch.randint(5, (batch_size,), generator=generator),
        "augment_labels": torch.randn(batch_size, 3, generator=generator),
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset):
    with torch.device("meta"):
        model = EDMUNet2DModel.from_preset(preset)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[preset]
    assert model.config.sample_size >> (len(model.down_blocks) - 1) == (4 if preset == "cld-cifar10" else 8)
    assert model.bottleneck is model.down_blocks[-1].resnets[-1]


def test_presets_can_be_changed():
    with torch.device("meta"):
        model = EDMUNet2DModel.from_preset("cifar10-ddpmpp", num_classes=10, dropout=0.0)
    assert model.null_label == 10
    assert model.config.dropout == 0
    assert model.config.augment_dim == 9
    with pytest.raises(ValueError, match="`preset` must be one of"):
        EDMUNet2DModel.from_preset("cifar10")


@torch.no_grad()
def test_adm_is_the_adm_of_diffusers():
    torch.manual_seed(0)
    reference = UNet2DModel(
        sample_size=16,
        block_out_channels=(128, 256),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        attention_head_dim=64,
        attn_norm_num_groups=32,
        norm_eps=1e-5,
        num_class_embeds=7,
        resnet_time_scale_shift="scale_shift",
    ).eval()
    model = EDMUNet2DModel(
        **ADM, sample_size=16, channel_mult=(1, 2), layers_per_block=1, attention_resolutions=(8,), num_classes=7
    )
    renamed = {}
    for key, value in reference.state_dict().items():
        for old, new in (
            ("time_embedding.", "time_embedder."),
            ("class_embedding.", "class_embedder."),
            ("down_blocks.0.downsamplers.0.", "down_blocks.1.downsampler."),
            ("up_blocks.0.upsamplers.0.", "up_blocks.1.upsampler."),
            ("mid_block.attentions.0.group_norm.", "mid_block.resnets.0.attn_norm."),
            ("mid_block.attentions.0.", "mid_block.resnets.0.attn."),
            ("conv_norm_out.", "output_layers.0.norm."),
            ("conv_out.", "output_layers.0.conv."),
        ):
            key = key.replace(old, new)
        if ".attentions." in key:
            key = key.replace(".group_norm.", ".attn_norm.") if ".group_norm." in key else key.replace("to_", "attn.to_", 1)
            key = key.replace(".attentions.", ".resnets.")
        renamed[key] = value.T if key == "class_embedder.weight" else value
    model.load_state_dict(renamed)
    sample, timestep, labels = torch.randn(2, 3, 16, 16), torch.tensor([3.7, 801.2]), torch.tensor([1, 6])
    torch.testing.assert_close(
        model.eval()(sample, timestep, labels).sample, reference(sample, timestep, labels).sample, rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_silent_branches_leave_the_standard_network():
    inputs = unet_inputs()
    expected = unet().eval()(**inputs).sample
    model = unet(encoder_type="skip", decoder_type="skip").eval()
    shared = {key: value for key, value in unet().state_dict().items() if not key.startswith("output_layers.")}
    assert all(
        "input_branch" in key or "output_layers" in key for key in model.load_state_dict(shared, strict=False).missing_keys
    )
    model.output_layers[1].load_state_dict(unet().output_layers[0].state_dict())
    assert not torch.allclose(model(**inputs).sample, expected)
    for module in (model.down_blocks[1].input_branch.conv, model.output_layers[0].conv):
        torch.nn.init.zeros_(module.weight)
        torch.nn.init.zeros_(module.bias)
    torch.testing.assert_close(model(**inputs).sample, expected)


@pytest.mark.parametrize("variant", [*VARIANTS, "skip"])
@torch.no_grad()
def test_conversion_there_and_back(variant):
    skip = {"encoder_type": "skip", "decoder_type": "skip", "resample_filter": (1, 3, 3, 1)}
    model = (unet(**skip) if variant == "skip" else unet(variant)).eval()
    original = edm_unet_state_dict(model)
    head_dim = {"attention_head_dim": model.config.attention_head_dim}
    for prefix in ("", "model."):
        converted = convert_edm_unet({f"{prefix}{key}": value for key, value in original.items()}, dropout=0.1, **head_dim)
        assert public(converted.config) == public(model.config)
        assert torch.equal(converted(**unet_inputs()).sample, model(**unet_inputs()).sample)


def test_conversion_refuses_what_it_does_not_know():
    original = edm_unet_state_dict(unet())
    with pytest.raises(ValueError, match="no encoder blocks"):
        convert_edm_unet({"weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="no place for"):
        convert_edm_unet(original | {"enc.8x8_block0.extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"has no 'enc\.8x8_block0\.norm0\.bias'"):
        convert_edm_unet({key: value for key, value in original.items() if key != "enc.8x8_block0.norm0.bias"})
    with pytest.raises(ValueError, match="does not fit"):
        convert_edm_unet(original | {"map_layer1.weight": torch.zeros(1)})


def public(config) -> dict:
    values = {key: value for key, value in config.items() if not key.startswith("_")}
    return {key: list(value) if isinstance(value, tuple | list) else value for key, value in values.items()}


@every_variant
@torch.no_grad()
def test_null_label_is_the_zero_vector(variant):
    model, inputs = unet(variant).eval(), unet_inputs()
    assert model.null_label == 5
    labelled = model(**inputs).sample
    null = model(**(inputs | {"class_labels": torch.tensor([5, 5])})).sample
    assert not torch.allclose(labelled, null)
    torch.nn.init.zeros_(model.class_embedder.weight)
    torch.testing.assert_close(model(**inputs).sample, null)


@torch.no_grad()
def test_no_augmentation_is_the_zero_vector():
    model, inputs = unet().eval(), unet_inputs()
    zeros = inputs | {"augment_labels": torch.zeros(2, 3)}
    assert not torch.allclose(model(**inputs).sample, model(**zeros).sample)
    assert torch.equal(model(**(inputs | {"augment_labels": None})).sample, model(**zeros).sample)


@torch.no_grad()
def test_labels_are_dropped_in_training_only():
    model, inputs = unet(class_dropout_prob=1.0, dropout=0.0), unet_inputs()
    null = inputs | {"class_labels": torch.tensor([5, 5])}
    assert torch.equal(model.train()(**inputs).sample, model(**null).sample)
    assert not torch.allclose(model.eval()(**inputs).sample, model(**null).sample)


@every_variant
@torch.no_grad()
def test_timestep_forms(variant):
    model, inputs = unet(variant).eval(), unet_inputs()
    inputs["timestep"] = torch.tensor([0.25, 0.25])
    expected = model(**inputs).sample
    for timestep in (0.25, torch.tensor(0.25), torch.tensor([0.25]), torch.tensor([0.25, 0.25], dtype=torch.float64)):
        assert torch.equal(model(**(inputs | {"timestep": timestep})).sample, expected)
    assert torch.equal(model(**inputs, return_dict=False)[0], expected)


@torch.no_grad()
def test_samples_do_not_influence_each_other():
    model, inputs = unet("ncsnpp").eval(), unet_inputs(3)
    whole = model(**inputs).sample
    alone = model(**{key: value[1:2] for key, value in inputs.items()}).sample
    torch.testing.assert_close(whole[1:2], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("sample", torch.zeros(2, 4, 8, 8)),
        ("sample", torch.zeros(2, 3, 8, 7)),
        ("timestep", torch.zeros(3)),
        ("class_labels", None),
        ("class_labels", torch.tensor([0, 6])),
        ("class_labels", torch.tensor([0])),
        ("augment_labels", torch.zeros(2, 4)),
    ],
)
def test_bad_input_is_refused(argument, value):
    with pytest.raises(ValueError, match=f"`{argument}`"):
        unet()(**(unet_inputs() | {argument: value}))


def test_labels_without_classes_are_refused():
    model = unet(num_classes=None, augment_dim=0)
    assert model.null_label is None
    for name in ("class_labels", "augment_labels"):
        given = {key: value for key, value in unet_inputs().items() if key in ("sample", "timestep", name)}
        with pytest.raises(ValueError, match=f"`{name}`"):
            model(**given)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("embedding_type", "learned"),
        ("encoder_type", "residuals"),
        ("decoder_type", "residual"),
        ("decoder_attention", "none"),
        ("class_embed_position", "input"),
        ("sample_size", 9),
        ("attention_resolutions", (16,)),
        ("resample_filter", (1, 2, 1)),
        ("class_dropout_prob", 1.5),
        ("attention_head_dim", 12),
    ],
)
def test_impossible_configurations_are_refused(argument, value):
    with pytest.raises(ValueError, match=f"`{argument}`"):
        unet(**{argument: value})


@every_variant
def test_gradient_checkpointing_changes_nothing(variant):
    gradients = []
    for is_enabled in (False, True):
        model = unet(variant).train()
        if is_enabled:
            model.enable_gradient_checkpointing()
        calls = []
        model.bottleneck.conv2.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(1)  # dropout
        model(**unet_inputs()).sample.square().mean().backward()
        assert len(calls) == 1 + is_enabled
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


@every_variant
def test_published_initialisation(variant):
    model = unet(variant)
    model.initialize_weights()
    frequencies = model.time_proj.frequencies.clone()
    with torch.no_grad():
        assert model.eval()(**unet_inputs()).sample.abs().max() < (1e-3 if variant != "adm" else 1e-12)
    xavier = math.sqrt(6 / (9 * 3 + 9 * 16))
    if variant != "adm":
        assert 0.9 * xavier < model.conv_in.weight.abs().max() <= xavier
        assert 0 < model.bottleneck.conv2.weight.abs().max() < 1e-5
        assert model.bottleneck.attn.to_q.weight.abs().max() <= math.sqrt(0.1 * 6 / 64)
        assert not model.conv_in.bias.any()
    torch.manual_seed(3)
    model.initialize_weights()
    first = model.conv_in.weight.clone()
    torch.manual_seed(3)
    model.initialize_weights()
    assert torch.equal(model.conv_in.weight, first)
    assert torch.equal(model.time_proj.frequencies, frequencies) == (variant != "ncsnpp")


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_saved_model_is_the_same_model(variant, dtype, tmp_path):
    model = unet(variant).eval().to(dtype)
    model.save_pretrained(tmp_path)
    loaded = EDMUNet2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert public(loaded.config) == public(model.config)
    for (name, saved), read in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(saved, read), name
    output = model(**unet_inputs()).sample
    assert output.dtype == dtype
    assert torch.equal(loaded(**unet_inputs()).sample, output)


@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision_stays_close(variant, dtype):
    model, inputs = unet(variant).eval(), unet_inputs()
    expected = model(**inputs).sample
    output = model.to(dtype)(**inputs).sample
    assert model.time_proj.frequencies.dtype == torch.float32
    assert output.dtype == dtype
    assert (output - expected).norm() < 0.03 * expected.norm()
    assert model.double().time_proj.frequencies.dtype == torch.float64


@every_variant
@torch.no_grad()
def test_autocast(variant):
    model, inputs = unet(variant).eval(), unet_inputs()
    expected = model(**inputs).sample
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs).sample
    assert (output - expected).norm() < 0.03 * expected.norm()


@every_variant
@torch.no_grad()
def test_layerwise_casting_runs(variant):
    model, inputs = unet(variant).eval(), unet_inputs()
    expected = model(**inputs).sample
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert (model(**inputs).sample - expected).norm() < 0.5 * expected.norm()


@every_variant
def test_channels_last(variant):
    model, inputs = unet(variant).eval(), unet_inputs()
    expected = model(**inputs).sample
    model.to(memory_format=torch.channels_last)
    inputs["sample"] = inputs["sample"].contiguous(memory_format=torch.channels_last)
    output = model(**inputs).sample
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    output.square().mean().backward()


@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_round_trip(use_dora, tmp_path):
    peft = pytest.importorskip("peft")
    model, inputs = unet("ncsnpp").eval(), unet_inputs()
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut", "time_emb_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False, use_dora=use_dora)
    with torch.no_grad():
        plain = model(**inputs).sample
        model.add_adapter(config)
        adapted = model(**inputs).sample
        assert not torch.allclose(plain, adapted, atol=1e-3)
        with pytest.raises(ValueError, match="unload adapters"):
            edm_unet_state_dict(model)
        model.save_lora_adapter(tmp_path)
        model.unload_lora()
        torch.testing.assert_close(model(**inputs).sample, plain)
        model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
        torch.testing.assert_close(model(**inputs).sample, adapted)
        if not use_dora:
            model.fuse_lora()
            torch.testing.assert_close(model(**inputs).sample, adapted, rtol=1e-3, atol=1e-3)


@every_variant
@torch.no_grad()
def test_attention_of_diffusers(variant):
    model, inputs = unet(variant).eval(), unet_inputs()
    expected = model(**inputs).sample
    attentions = [module for module in model.modules() if isinstance(module, AttentionModuleMixin)]
    assert len(model.attn_processors) == len(attentions) == (3 if variant != "adm" else 4)
    model.fuse_qkv_projections()
    assert all(hasattr(attention, "to_qkv") for attention in attentions)
    torch.testing.assert_close(model(**inputs).sample, expected)
    model.unfuse_qkv_projections()
    with attention_backend("native"):  # diffusers sets the backend for the whole process; this puts it back
        model.set_attention_backend("_native_math")
        torch.testing.assert_close(model(**inputs).sample, expected)


@every_variant
@torch.no_grad()
def test_compiles_without_graph_breaks(variant):
    model, inputs = unet(variant).eval(), unet_inputs()
    expected = model(**inputs).sample
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            torch.testing.assert_close(compiled(**inputs).sample, expected)


@torch.no_grad()
def test_repeated_blocks_compile():
    model, inputs = unet("ncsnpp").eval(), unet_inputs()
    expected = model(**inputs).sample
    torch.compiler.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(model(**inputs).sample, expected)


@pytest.mark.parametrize("kind", ["vp", "ve", "edm"])
@torch.no_grad()
def test_denoiser_keeps_the_dtype_of_the_samples(kind):
    model, inputs, preconditioning = unet().eval(), unet_inputs(), Preconditioning(kind, momentum=1.0)
    conditions = {key: inputs[key] for key in ("class_labels", "augment_labels")}
    expected = denoise(model, inputs["sample"], 0.7, preconditioning, **conditions)
    many = torch.full((2,), 0.7)
    torch.testing.assert_close(denoise(model, inputs["sample"], many, preconditioning, **conditions), expected)
    low = denoise(model.bfloat16(), inputs["sample"].double(), many.double(), preconditioning, **conditions)
    assert low.dtype == torch.float64
    assert (low - expected).norm() < 0.03 * expected.norm()


def test_loss():
    model, inputs, preconditioning = unet(dropout=0.0).train(), unet_inputs(), Preconditioning("edm", momentum=1.0)
    conditions = {key: inputs[key] for key in ("class_labels", "augment_labels")}
    clean, noise, sigma = inputs["sample"], torch.randn(2, 3, 8, 8), torch.tensor([0.05, 20.0])
    terms = edm_loss(model, clean, sigma, noise, preconditioning, **conditions)
    noisy = clean + sigma.reshape(2, 1, 1, 1) * noise
    error = (denoise(model, noisy, sigma, preconditioning, **conditions) - clean).square().mean((1, 2, 3))
    torch.testing.assert_close(terms.mse, error)
    torch.testing.assert_close(terms.total, error * preconditioning.loss_weight(sigma))
    bounded = edm_loss(model, clean, sigma, noise, preconditioning, max_weight=5.0, **conditions)
    torch.testing.assert_close(bounded.weight, terms.weight.clamp_max(5.0))
    assert bounded.weight[0] == 5
    bounded.total.mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_names_that_other_tools_read():
    stages = {type(block).__name__ for block in (*unet().down_blocks, unet().mid_block, *unet().up_blocks)}
    assert EDMUNet2DModel._supports_gradient_checkpointing
    assert set(EDMUNet2DModel._no_split_modules) == set(EDMUNet2DModel._repeated_blocks) == stages
