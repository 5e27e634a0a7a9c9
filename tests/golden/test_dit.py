"""Converted DiT weights against the original program, to 1e-5 relative."""

import pytest
import torch
from diffusers import DiTTransformer2DModel

from diffusers_fastdiff import FasterDiffusionDiTTransformer2DModel
from diffusers_fastdiff.conversion import convert_dit
from tests.golden.recordings import assert_relative, recordings


@pytest.mark.parametrize("recording", recordings("dit_forward"))
@pytest.mark.parametrize("model_class", [FasterDiffusionDiTTransformer2DModel, DiTTransformer2DModel])
@torch.no_grad()
def test_forward(recording, model_class):
    heads, inputs = recording.info["config"]["num_heads"], recording.group("in.")
    model = convert_dit(recording.group("state."), num_attention_heads=heads, model_class=model_class)
    blocks = []
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda _, __, output: blocks.append(output))
    sample = model(inputs["x"], inputs["t"], inputs["y"]).sample
    assert_relative(sample, recording.tensors["out.eval"], 1e-5)
    assert_relative(torch.stack(blocks), recording.tensors["mid.block_outputs"], 1e-5)


@pytest.mark.parametrize("recording", recordings("dit_forward"))
@torch.no_grad()
def test_only_our_class_stays_exact_when_saved(recording, tmp_path):
    heads, inputs, expected = recording.info["config"]["num_heads"], recording.group("in."), recording.tensors["out.eval"]
    errors = {}
    for model_class in (FasterDiffusionDiTTransformer2DModel, DiTTransformer2DModel):
        convert_dit(recording.group("state."), num_attention_heads=heads, model_class=model_class).save_pretrained(tmp_path)
        sample = model_class.from_pretrained(tmp_path)(inputs["x"], inputs["t"], inputs["y"]).sample
        errors[model_class] = float((sample - expected).abs().max() / expected.abs().max())
    assert errors[FasterDiffusionDiTTransformer2DModel] < 1e-5
    assert errors[DiTTransformer2DModel] > 0.05
