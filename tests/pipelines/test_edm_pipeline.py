"""`EDMPipeline`: labels, guidance, one generator for each image, outputs, saving."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_fastdiff import (
    AMEDPredictor,
    AMEDScheduler,
    EDMPipeline,
    EDMUNet2DModel,
    FDMEDMScheduler,
    FDMVEScheduler,
    FDMVPScheduler,
    IPNDMMultistepScheduler,
)


def unet(seed: int = 0, **overrides) -> EDMUNet2DModel:
    torch.manual_seed(seed)
    config = {"sample_size": 8, "in_channels": 1, "num_classes": 4, "model_channels": 8, "channel_mult": (1, 2)}
    config |= {"layers_per_block": 1, "attention_resolutions": (4,), "dropout": 0.0}
    return EDMUNet2DModel(**(config | overrides)).eval()


def pipeline(scheduler=None, **overrides) -> EDMPipeline:
    pipe = EDMPipeline(unet(**overrides), scheduler or FDMEDMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def draw(pipe: EDMPipeline, labels=(0, 1, 2), **options) -> torch.Tensor:
    settings = {"num_inference_steps": 5, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    return pipe(None if labels is None else list(labels), **(settings | options)).images


@pytest.mark.parametrize("scheduler", [FDMEDMScheduler(), FDMVPScheduler(), FDMVEScheduler(), FDMEDMScheduler(s_churn=20.0)])
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(scheduler):
    pipe = pipeline(scheduler)
    whole = draw(pipe, generator=seeds(7, 8, 9))
    alone = draw(pipe, labels=[1], generator=seeds(8))
    torch.testing.assert_close(whole[1:2], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole[0], whole[1])
    more = draw(pipe, labels=[0, 1, 2, 3])  # one generator: image k depends on k only
    torch.testing.assert_close(more[:3], draw(pipe), rtol=1e-4, atol=1e-4)
    assert torch.equal(draw(pipe), draw(pipe))


def test_outputs_are_the_same_pictures():
    pipe = pipeline()
    latent = draw(pipe)
    array = draw(pipe, output_type="np")
    tensor = draw(pipe, output_type="pt")
    pictures = draw(pipe, output_type="pil")
    assert latent.shape == tensor.shape == (3, 1, 8, 8)
    assert array.shape == (3, 8, 8, 1)
    torch.testing.assert_close(tensor, (latent / 2 + 0.5).clamp(0, 1))
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.asarray(pictures[1]), (array[1, :, :, 0] * 255).round().astype("uint8"))
    (as_tuple,) = pipe([0, 1, 2], num_inference_steps=5, output_type="pt", return_dict=False, generator=seeds(1, 2, 3))
    assert as_tuple.shape == (3, 1, 8, 8)


def test_latents_are_standard_noise_and_keep_their_precision():
    pipe = pipeline()
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    single = draw(pipe, latents=noise)
    double = draw(pipe, latents=noise.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-3)
    assert torch.equal(noise, torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(3)))


def test_guidance_by_the_dropped_label():
    pipe = pipeline()
    calls = []
    pipe.unet.register_forward_pre_hook(lambda module, inputs: calls.append((len(inputs[0]), inputs[2].tolist())))
    plain = draw(pipe)
    assert calls == [(3, [0, 1, 2])] * 5
    calls.clear()
    guided = draw(pipe, guidance_scale=2.0)
    assert calls == [(6, [0, 1, 2, 4, 4, 4])] * 5
    null = draw(pipe, labels=[4, 4, 4], guidance_scale=3.0)  # guided away from itself
    torch.testing.assert_close(null, draw(pipe, labels=[4, 4, 4]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, guided)


def test_guidance_by_a_weaker_model(tmp_path):
    strong, weak = unet(0), unet(1, model_channels=4)
    pipe = EDMPipeline(strong, FDMEDMScheduler(), weak)
    pipe.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(pipe, guidance_scale=0.0), draw(EDMPipeline(weak, FDMEDMScheduler())), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(draw(pipe), draw(EDMPipeline(strong, FDMEDMScheduler())))
    guided = draw(pipe, guidance_scale=2.0)
    pipe.save_pretrained(tmp_path)
    loaded = EDMPipeline.from_pretrained(tmp_path)
    assert torch.equal(draw(loaded, guidance_scale=2.0), guided)
    with pytest.raises(ValueError, match="num_classes"):
        EDMPipeline(strong, FDMEDMScheduler(), unet(num_classes=3))


def test_it_guides_denoisers(tmp_path):
    """Guiding the raw outputs is guiding the denoised images: one Euler step to 0 is the denoised image."""
    pipe = pipeline(FDMEDMScheduler(solver="euler"))
    noise = torch.randn(3, 1, 8, 8)
    conditional = draw(pipe, latents=noise, num_inference_steps=1)
    null = draw(pipe, labels=[4, 4, 4], latents=noise, num_inference_steps=1)
    guided = draw(pipe, latents=noise, num_inference_steps=1, guidance_scale=2.5)
    torch.testing.assert_close(guided, null + 2.5 * (conditional - null), rtol=1e-3, atol=1e-3)


def test_unconditional_saved_and_loaded(tmp_path):
    pipe = pipeline(FDMVPScheduler(multiplier=2.0), num_classes=None)
    expected = draw(pipe, labels=None, batch_size=2)
    pipe.save_pretrained(tmp_path)
    loaded = EDMPipeline.from_pretrained(tmp_path)
    assert loaded.guidance_unet is None
    assert isinstance(loaded.scheduler, FDMVPScheduler)
    assert loaded.scheduler.config.multiplier == 2.0
    assert torch.equal(draw(loaded, labels=None, batch_size=2), expected)
    assert len(draw(pipe, labels=None)) == 1


def test_learned_variance_is_left_out():
    assert draw(pipeline(out_channels=2)).shape == (3, 1, 8, 8)


@pytest.mark.parametrize("scheduler", [DDIMScheduler(clip_sample=False), IPNDMMultistepScheduler()])
def test_discrete_schedules_fit_as_well(scheduler):
    """ADM networks with 1000 timesteps need no formulation of the EDM family."""
    pipe, sizes = pipeline(scheduler, out_channels=2), []
    pipe.unet.register_forward_pre_hook(lambda module, inputs: sizes.append(float(inputs[0].std())))
    assert bool(draw(pipe, num_inference_steps=4, guidance_scale=2.0).isfinite().all())
    assert len(sizes) == 4
    assert sizes[0] == pytest.approx(1.0, abs=0.2)


def test_half_precision():
    pipe = pipeline().to(dtype=torch.bfloat16)
    images = draw(pipe)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, draw(pipeline()), rtol=0.3, atol=0.3)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_learned_solvers_run_in_it(guidance_scale):
    scheduler = FDMEDMScheduler(multiplier=1.5)
    untrained = AMEDScheduler.from_config(scheduler.config, student="dpm2")
    expected = draw(pipeline(untrained), num_inference_steps=6, guidance_scale=guidance_scale)
    torch.manual_seed(0)
    attached = AMEDScheduler.from_config(scheduler.config, student="dpm2", mode="attached")
    attached.predictor = AMEDPredictor()
    pipe = pipeline(scheduler)
    attached.attach(pipe)
    predicted = draw(pipe, num_inference_steps=6, guidance_scale=guidance_scale)
    assert bool(predicted.isfinite().all())
    assert predicted.shape == expected.shape
    assert not torch.allclose(predicted, expected)
    alone = draw(pipe, labels=[0], num_inference_steps=6, guidance_scale=guidance_scale)
    torch.testing.assert_close(alone, predicted[:1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"labels": None}, "class_labels"),
        ({"labels": [0, 5]}, "class_labels"),
        ({"labels": [0.5]}, "class_labels"),
        ({"batch_size": 4}, "batch_size"),
        ({"latents": torch.zeros(3, 3, 8, 8)}, "latents"),
        ({"output_type": "jpeg"}, "output_type"),
        ({"num_inference_steps": 6}, "num_inference_steps"),
        ({"generator": seeds(1, 2)}, "generator"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_wrong_input_is_refused_by_name(options, word):
    with pytest.raises(ValueError, match=word):
        draw(pipeline(), **options)


def test_guidance_needs_something_to_go_away_from():
    with pytest.raises(ValueError, match="guidance_scale"):
        draw(pipeline(num_classes=None), labels=None, guidance_scale=2.0)
    with pytest.raises(ValueError, match="class_labels"):
        draw(pipeline(num_classes=None), labels=[1])
    with pytest.raises(ValueError, match="out_channels"):
        pipeline(out_channels=3)
