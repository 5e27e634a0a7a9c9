import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from diffusers_fastdiff import FasterDiffusionDiTTransformer2DModel, PixelAutoencoder
from tests.models.tiny import dit_inputs, faster_dit


@torch.no_grad()
def test_stock_weights_give_stock_outputs(tmp_path):
    torch.manual_seed(0)
    stock = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, out_channels=8, num_layers=2, sample_size=8
    ).eval()
    stock.save_pretrained(tmp_path)
    ours = FasterDiffusionDiTTransformer2DModel.from_pretrained(tmp_path).eval()
    assert torch.equal(ours(**dit_inputs()).sample, stock(**dit_inputs()).sample)


def test_guidance_works_with_few_classes():
    pipe = DiTPipeline(faster_dit(in_channels=1, out_channels=1), PixelAutoencoder(1), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.eval()
    assert len(pipe([3, 4], guidance_scale=2.0, num_inference_steps=2).images) == 2


def test_label_dropout_is_the_same_in_all_blocks():
    model, inputs = faster_dit(class_dropout_prob=0.5, num_layers=4).train(), dit_inputs(32)
    seen = []
    for block in model.transformer_blocks:
        embedding = block.norm1.emb.class_embedder.embedding_table
        embedding.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0]))
    model(**inputs)
    assert 0 < (seen[0] == 10).sum() < 32
    assert all(torch.equal(labels, seen[0]) for labels in seen)


def test_output_channels_are_in_the_config():
    assert faster_dit(out_channels=None).config.out_channels == 4  # DiTPipeline divides it by 2


@pytest.mark.parametrize("labels", [torch.tensor([0, 11]), torch.tensor([-1, 0]), torch.tensor([0]), None])
def test_bad_labels_are_refused(labels):
    with pytest.raises(ValueError, match="class_labels"):
        faster_dit()(**(dit_inputs() | {"class_labels": labels}))
