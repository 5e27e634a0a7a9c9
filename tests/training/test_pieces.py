"""Losses, random numbers, data order, initialisation and latents of the training scripts."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from diffusers_fastdiff.numerics.gaussian_diffusion import DiffusionSchedule, linear_betas
from diffusers_fastdiff.training.data import DigitsDataset, ImageDataset, ShuffledBatches, image_to_tensor
from diffusers_fastdiff.training.fixed_point import draw_iterations
from diffusers_fastdiff.training.initialization import initialize_dit
from diffusers_fastdiff.training.latents import LatentDataset, cache_latents, sample_posterior
from diffusers_fastdiff.training.losses import diffusion_loss, rectified_flow_loss, rectified_flow_noise
from diffusers_fastdiff.training.randomness import BatchRandom
from tests.models.tiny import dit_inputs, faster_dit, fixed_point_dit

SCHEDULE = DiffusionSchedule.from_betas(linear_betas())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_perfect_predictions_have_no_error(prediction_type):
    clean, noise = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    timestep = torch.tensor([1, 400, 999])
    alpha, sigma = (SCHEDULE.at(name, timestep, clean) for name in ("alpha", "sigma"))
    output = noise if prediction_type == "epsilon" else alpha * noise - sigma * clean
    assert diffusion_loss(output, clean, noise, timestep, SCHEDULE, prediction_type).total.max() < 1e-20
    with_variance = torch.cat([output, -torch.ones_like(output)], dim=1)  # -1: the posterior variance itself
    terms = diffusion_loss(with_variance, clean, noise, timestep, SCHEDULE, prediction_type)
    assert terms.variational_bound.abs().max() < 1e-8


def test_learned_variance_does_not_pull_on_the_mean():
    clean, noise = torch.randn(2, 2, 1, 4, 4)
    output = torch.randn(2, 2, 4, 4, requires_grad=True)
    terms = diffusion_loss(output, clean, noise, torch.tensor([5, 500]), SCHEDULE)
    terms.variational_bound.sum().backward()
    assert output.grad[:, :1].abs().max() == 0
    assert output.grad[:, 1:].abs().max() > 0


def test_rectified_flow_points_from_data_to_noise():
    clean, noise = torch.randn(2, 2, 1, 4, 4)
    assert rectified_flow_loss(noise - clean, clean, noise).total.max() == 0
    torch.testing.assert_close(rectified_flow_noise(clean, noise, torch.tensor([0, 500]))[1], (clean[1] + noise[1]) / 2)


def test_draws_do_not_depend_on_how_the_batch_is_split():
    whole = BatchRandom(3, 7, 8, 0, 8)
    parts = [BatchRandom(3, 7, 8, start, start + 2) for start in (0, 2, 4, 6)]
    for draw in (lambda r: r.normal(2, 3), lambda r: r.uniform(), lambda r: r.integers(1000)):
        torch.testing.assert_close(draw(whole), torch.cat([draw(part) for part in parts]), rtol=0, atol=0)
    assert not torch.equal(BatchRandom(3, 8, 8, 0, 8).normal(), BatchRandom(3, 7, 8, 0, 8).normal())
    assert not torch.equal(BatchRandom(4, 7, 8, 0, 8).normal(), BatchRandom(3, 7, 8, 0, 8).normal())


def test_dropped_conditions_are_dropped_whole():
    vectors = torch.ones(1000, 4)
    dropped = BatchRandom(0, 0, 1000, 0, 1000).drop(vectors, 0.3, 0.0)
    rows = dropped.sum(dim=1)
    assert set(rows.tolist()) == {0.0, 4.0}
    assert 0.2 < (rows == 0).double().mean() < 0.4
    assert torch.equal(BatchRandom(0, 0, 3, 0, 3).drop(torch.arange(3), 0.0, 9), torch.arange(3))


def test_flips_mirror_whole_images():
    images = torch.arange(2.0).expand(100, 1, 1, 2)
    flipped = BatchRandom(0, 0, 100, 0, 100).flip(images)
    assert 20 < (flipped[:, 0, 0, 0] == 1).sum() < 80
    assert torch.equal(flipped.sum(dim=(1, 2, 3)), torch.ones(100))


def read(batches: ShuffledBatches, count: int) -> list[list[int]]:
    iterator = iter(batches)
    return [next(iterator) for _ in range(count)]


def test_each_pass_reads_every_sample_once_in_a_new_order():
    indices = [index for batch in read(ShuffledBatches(10, 4, seed=1), 5) for index in batch]
    assert sorted(indices[:10]) == sorted(indices[10:]) == list(range(10))
    assert indices[:10] != indices[10:]


def test_data_order_can_be_taken_up_anywhere_and_split():
    expected = read(ShuffledBatches(10, 4, seed=1), 8)
    assert read(ShuffledBatches(10, 4, seed=1, first_round=5), 3) == expected[5:]
    halves = [read(ShuffledBatches(10, 2, seed=1, rank=rank, world_size=2), 8) for rank in (0, 1)]
    assert [first + second for first, second in zip(*halves, strict=True)] == expected


def test_iteration_draws():
    draws = [draw_iterations(0, step, (0, 3), (1, 4)) for step in range(300)]
    assert {no_grad for no_grad, _ in draws} == {0, 1, 2, 3}
    assert {grad for _, grad in draws} == {1, 2, 3, 4}
    assert draws == [draw_iterations(0, step, (0, 3), (1, 4)) for step in range(300)]
    for ranges in (((-1, 2), (1, 2)), ((3, 2), (1, 2)), ((0, 2), (0, 2)), ((0, 2), (3, 2))):
        with pytest.raises(ValueError, match="range"):
            draw_iterations(0, 0, *ranges)


@pytest.mark.parametrize("make", [fixed_point_dit, faster_dit])
def test_initialised_model_predicts_zero_and_can_learn(make):
    model = make()
    initialize_dit(model)
    output = model(**dit_inputs()).sample
    assert output.abs().max() == 0
    (output - 1).square().mean().backward()
    assert model.proj_out_2.bias.grad.abs().max() > 0
    embedding = next(module for module in model.modules() if isinstance(module, torch.nn.Embedding))
    assert embedding.weight.std().item() == pytest.approx(0.02, rel=0.3)


def test_injection_is_initialised_as_one_matrix():
    model = fixed_point_dit(num_attention_heads=8, attention_head_dim=16)
    initialize_dit(model)
    bound = (6 / (4 * 128)) ** 0.5
    for weight in (model.transformer_blocks[1].state_proj.weight, model.injection_out.weight):
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_digits():
    data = DigitsDataset()
    assert len(data) == 1797
    assert data.info.label_names == tuple("0123456789")
    assert data[0]["images"].shape == (1, 8, 8)
    assert data.images.min() == -1
    assert data.images.max() == 1


def save_images(folder, count=4, size=(20, 16)) -> None:
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for index in range(count):
            pixels = np.full((size[1], size[0], 3), 40 * index, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{index}.png")


def test_image_folder(tmp_path):
    save_images(tmp_path / "images")
    data = ImageDataset(None, str(tmp_path / "images"), resolution=8)
    assert len(data) == 8
    assert data.info.label_names == ("cat", "dog")
    assert (data.info.channels, data.info.resolution) == (3, 8)
    item = data[1]
    assert item["images"].shape == (3, 8, 8)
    torch.testing.assert_close(item["images"], torch.full((3, 8, 8), 40 / 127.5 - 1))
    with pytest.raises(ValueError, match="no column 'caption'"):
        ImageDataset(None, str(tmp_path / "images"), resolution=8, label_column="caption")


def test_images_are_cropped_in_the_middle():
    pixels = np.zeros((4, 8), dtype=np.uint8)
    pixels[:, 2:6] = 255
    assert torch.equal(image_to_tensor(Image.fromarray(pixels), 4), torch.ones(1, 4, 4))


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=2, block_out_channels=(4, 4), norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


@torch.no_grad()
def test_cached_latents_are_those_of_the_vae(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_fastdiff.training.latents._SHARD", 3)
    save_images(tmp_path / "images")
    images, vae, source = ImageDataset(None, str(tmp_path / "images"), resolution=8), tiny_vae(), {"data": "a"}
    cache_latents(images, vae, tmp_path / "latents", source, batch_size=2, random_flip=True)
    data = LatentDataset(tmp_path / "latents")
    assert len(data) == 16
    for index, flip in ((5, False), (13, True)):
        image = images[5]["images"]
        expected = vae.encode((image.flip(-1) if flip else image)[None]).latent_dist.parameters[0]
        torch.testing.assert_close(data[index]["moments"], expected, rtol=1e-5, atol=1e-5)
        assert data[index]["labels"] == images[5]["labels"]
    moments, noise = data[0]["moments"][None], torch.zeros(1, 2, 4, 4)
    torch.testing.assert_close(sample_posterior(moments, noise, 0.5), moments[:, :2] * 0.5)

    # An interrupted computation goes on: only the missing file is made again.
    files = sorted((tmp_path / "latents").glob("latents-*"))
    stamps = {file: file.stat().st_mtime_ns for file in files}
    files[2].unlink()
    cache_latents(images, vae, tmp_path / "latents", source, batch_size=2, random_flip=True)
    assert [file for file in files if file.stat().st_mtime_ns != stamps[file]] == [files[2]]
    with pytest.raises(ValueError, match="latents_dir"):
        cache_latents(images, vae, tmp_path / "latents", {"data": "b"}, batch_size=2, random_flip=True)
