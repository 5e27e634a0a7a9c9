"""Training of the EDM family: pieces, and the scripts as their users run them."""

import io
import json
import math
import runpy
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusers_fastdiff import EDMPipeline, FDMEDMScheduler, FDMVEScheduler, FDMVPScheduler
from diffusers_fastdiff.training.edm_augmentation import NUM_LABELS, augment
from diffusers_fastdiff.training.edm_schedule import half_life_decay, ramp_up_steps
from diffusers_fastdiff.training.prepare import fit
from diffusers_fastdiff.training.randomness import BatchRandom
from diffusers_fastdiff.training.zip_data import ZipDataset
from tests.training.scripts import TWO_PROCESSES, Training, losses, run_here

TRAINING = Training(
    "train_fdm.py", "unet/diffusion_pytorch_model.safetensors",
    "--model_channels=8", "--train_batch_size=4", "--max_train_steps=6", "--lr_ramp_up=16", "--logging_steps=1",
    "--checkpointing_steps=2", "--validation_steps=0", "--ema_half_life=20", "--warmup_steps=4",
)  # fmt: skip
train = TRAINING.fixture()


# -- pieces ---------------------------------------------------------------------------------------------------------------


def random(count: int, seed: int = 0) -> BatchRandom:
    return BatchRandom(seed, 0, count, 0, count)


def test_augmentation_keeps_mirrored_images_exact_and_tells_what_it_did():
    images = torch.rand(400, 3, 8, 8) * 2 - 1
    augmented, labels = augment(images, random(400), 0.15)
    assert labels.shape == (400, NUM_LABELS)
    assert augmented.abs().max() <= 1
    untouched = ~labels[:, 1:].any(1)
    for mirrored in (False, True):
        chosen = untouched & (labels[:, 0] == mirrored)
        assert torch.equal(augmented[chosen], images[chosen].flip(-1) if mirrored else images[chosen])
    assert 150 < labels[:, 0].sum() < 250  # always drawn
    for column in (2, 4, 7):
        assert 0.08 < float((labels[:, column] != 0).double().mean()) < 0.22
    assert torch.equal(augment(images, random(400), 0.15)[1], labels)
    plain, none = augment(images, random(400), 0.0)
    assert plain is images
    assert not none.any()


def test_augmentation_does_what_its_labels_say():
    """A smooth blob right of the centre, moved by each operation on its own; places in units of half a side, y down."""
    side = 33
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, side)] * 2, indexing="ij")
    blob = torch.exp(-((x - 0.3) ** 2 + y**2) / 0.01)
    images = (2 * blob - 1).expand(3000, 1, side, side)
    augmented, labels = augment(images, random(3000), 0.3)
    weight = (augmented[:, 0] + 1).clamp_min(0)
    total = weight.sum((1, 2)).clamp_min(1e-6)
    place = torch.stack([(weight * x).sum((1, 2)) / total, (weight * y).sum((1, 2)) / total], dim=1)

    def check(only: list[int], expected) -> None:
        others = [k for k in range(NUM_LABELS) if k not in only]
        chosen = ((labels[:, others] == 0).all(1) & labels[:, only].any(1) & (labels[:, 2:].abs() < 1.5).all(1)).nonzero()[:, 0]
        assert len(chosen) > 20
        targets = torch.stack([torch.tensor(expected(*labels[k, only].tolist())) for k in chosen])
        error = (place[chosen] - targets.reshape(len(chosen), -1, 2).movedim(1, 0)).norm(dim=-1)
        assert error.min(0).values.max() < 0.03

    check([0], lambda a: (-0.3, 0.0))
    check([2], lambda a: (0.3 * 2 ** (0.2 * a), 0.0))
    check([3, 4], lambda cos_minus_1, sin: (0.3 * (cos_minus_1 + 1), 0.3 * sin))
    check([7, 8], lambda a, b: (0.3 + a / 4, b / 4))

    def stretched(b_cos: float, b_sin: float) -> list[tuple[float, float]]:
        """The label leaves the common sign of b and its direction open, as published."""
        cos, sin = b_cos / math.hypot(b_cos, b_sin), b_sin / math.hypot(b_cos, b_sin)
        factors = [2 ** (0.2 * sign * math.hypot(b_cos, b_sin)) for sign in (1, -1)]
        return [(0.3 * (f * cos * cos + sin * sin / f), 0.3 * (f - 1 / f) * cos * sin) for f in factors]

    check([5, 6], stretched)


def test_schedules_count_images():
    assert half_life_decay(10**6, 100, 1000) == pytest.approx(0.5**0.1)
    assert half_life_decay(0, 100, 1000) == 0
    assert half_life_decay(10, 100, 1e9) == pytest.approx(0.5 ** (100 / 50))
    assert half_life_decay(10, 100, 1000, ramp_up=None) == pytest.approx(0.5**0.1)
    assert half_life_decay(40, 25, 1000) ** 4 == pytest.approx(half_life_decay(10, 100, 1000))
    assert ramp_up_steps(1000, 64) == 16


def test_crops():
    image = Image.new("RGB", (8, 4), "white")
    image.paste("black", (0, 0, 2, 4))
    assert min(low for low, _ in fit(image, 4, 4, "center").getextrema()) > 250
    assert fit(image, 8, 8, "center") is None
    wide = fit(image, 4, 2, "wide")
    assert wide.size == (4, 4)
    assert wide.getpixel((3, 0)) == (0, 0, 0)
    assert min(wide.getpixel((3, 1))) > 250
    assert fit(image, 4, 2, "none").size == (4, 2)
    with pytest.raises(ValueError, match="crop"):
        fit(image, 1, 1, "round")


# -- data -----------------------------------------------------------------------------------------------------------------


def write_images(folder: Path, sizes=((12, 12), (16, 10), (20, 12), (4, 4))) -> Path:
    for label, color in (("a", "red"), ("b", "blue")):
        (folder / label).mkdir(parents=True)
        for number, size in enumerate(sizes):
            Image.new("RGB", size, color).save(folder / label / f"{number}.png")
    return folder


def test_preparation_is_one_command(monkeypatch, tmp_path, capsys):
    folder, archive = write_images(tmp_path / "images"), tmp_path / "prepared.zip"
    run_here(monkeypatch, "prepare_images.py", f"--source={folder}", f"--dest={archive}", "--resolution=8")
    assert "6 images of 8 x 8 pixels, 2 too small" in capsys.readouterr().out
    data = ZipDataset(archive)
    assert len(data) == 6
    assert data.info.resolution == 8
    assert [int(data[index]["labels"]) for index in range(6)] == [0, 0, 0, 1, 1, 1]
    assert data[0]["images"][:, 0, 0].tolist() == [1, -1, -1]
    again = tmp_path / "again.zip"
    run_here(monkeypatch, "prepare_images.py", f"--source={archive}", f"--dest={again}", "--resolution=4x4", "--grayscale")
    assert ZipDataset(again).info.channels == 1
    assert [int(item["labels"]) for item in map(ZipDataset(again).__getitem__, range(6))] == [0, 0, 0, 1, 1, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.zip", "images", "prepared.zip"]
    for flags, word in (
        ([f"--source={folder}", "--dest=x.tar", "--resolution=8"], "dest"),
        ([f"--source={folder / 'a' / '0.png'}", f"--dest={archive}", "--resolution=8"], "source"),
        ([f"--source={folder}", f"--dest={archive}", "--resolution=big"], "resolution"),
        ([f"--source={folder}", f"--dest={tmp_path / 'none.zip'}", "--resolution=64"], "64 x 64"),
    ):
        with pytest.raises(SystemExit, match=word):
            run_here(monkeypatch, "prepare_images.py", *flags)
    assert not (tmp_path / "none.zip").exists()
    assert len(ZipDataset(archive)) == 6  # a failed run leaves the old file


def png(color: str = "red", size=(8, 8)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, color).save(content, format="png")
    return content.getvalue()


def test_archives(tmp_path):
    path = tmp_path / "x.zip"

    def write(**files: bytes | str) -> Path:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return path

    assert ZipDataset(write(**{"a/0.png": png(), "b/0.png": png()})).info.label_names == ("a", "b")
    assert ZipDataset(write(**{"0.png": png(), "1.png": png()})).info.label_names is None
    listed = json.dumps({"labels": [["0.png", 2], ["1.png", 0]]})
    data = ZipDataset(write(**{"0.png": png(), "1.png": png(), "dataset.json": listed}), 4)
    assert data.info.label_names == ("0", "1", "2")
    assert data[0]["images"].shape == (3, 4, 4)
    assert int(data[0]["labels"]) == 2
    for files, word in (
        ({"0.png": png(), "2.png": png(), "dataset.json": listed}, "2.png"),
        ({"notes.txt": "none"}, "no images"),
        ({"0.png": png(size=(4, 8))}, "resolution"),
    ):
        with pytest.raises(ValueError, match=word):
            ZipDataset(write(**files))
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="archive"):
        ZipDataset(path)


# -- the training script --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "scheduler", "multiplier"),
    [
        (["--validation_steps=2", "--num_validation_images=3", "--validation_num_inference_steps=3"], FDMEDMScheduler, 1.0),
        (["--precondition=vp", "--no-fdm", "--unconditional", "--save_precision=float16"], FDMVPScheduler, None),
        (["--precondition=ve", "--multiplier=2", "--augment_probability=0.15", "--no-use_ema"], FDMVEScheduler, 2.0),
        (["--no-fdm", "--gradient_checkpointing", "--mixed_precision=bf16", "--report_to=tensorboard"], FDMEDMScheduler, None),
    ],
    ids=["edm-fdm", "vp", "ve-fdm", "edm"],
)
def test_every_kind_of_model_ends_in_a_working_pipeline(train, flags, scheduler, multiplier):
    folder = train(*flags, "--max_train_steps=2")
    pipe = EDMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.scheduler) is scheduler
    assert pipe.scheduler.config.multiplier == multiplier
    labels = None if "--unconditional" in flags else [1]
    assert pipe(labels, num_inference_steps=3, output_type="np").images.shape == (1, 8, 8, 1)
    assert "images seen" in (folder / "README.md").read_text()
    assert (folder / "samples" / "0000002.png").exists() == ("--validation_steps=2" in flags)


def test_archives_and_presets(train, monkeypatch, tmp_path):
    """The published networks are too large for a test; their settings are not."""
    archive = tmp_path / "images.zip"
    run_here(
        monkeypatch, "prepare_images.py", f"--source={write_images(tmp_path / 'images')}", f"--dest={archive}", "--resolution=8"
    )
    folder = train(f"--train_data_dir={archive}", "--max_train_steps=2", "--random_flip", "--gradient_accumulation_steps=2")
    config = json.loads((folder / "unet" / "config.json").read_text())
    assert (config["in_channels"], config["num_classes"]) == (3, 2)
    defaults = runpy.run_path(str(TRAINING.script))
    monkeypatch.setattr(sys, "argv", ["x", "--preset=afhqv2-ncsnpp", "--augment_probability=0.2", f"--output_dir={tmp_path}"])
    args = defaults["parse_args"]()
    assert (args.learning_rate, args.train_batch_size, args.augment_probability) == (2e-4, 256, 0.2)
    assert "cld-cifar10" not in defaults["PRESETS"]


def test_going_on_with_a_saved_network(train, tmp_path):
    base = train("--precondition=vp", "--no-fdm", output_dir=tmp_path / "base")
    flags = [f"--pretrained_model_name_or_path={base}", "--precondition=vp"]
    further = train(*flags, "--no-fdm", "--max_train_steps=1", "--learning_rate=1e-9", output_dir=tmp_path / "further")
    TRAINING.assert_same_weights(base, further, tolerance=1e-5)
    with pytest.raises(SystemExit, match="multiplier None"):
        train(*flags, output_dir=tmp_path / "wrong")


def test_bound_on_the_weights_follows_the_step(train, tmp_path):
    """Without warm-up the first losses are larger, once it is over nothing differs but the weights learned until then."""
    bounded = losses(train("--warmup_steps=3", output_dir=tmp_path / "bounded"))
    free = losses(train("--warmup_steps=0", output_dir=tmp_path / "free"))
    assert bounded[0] < free[0]
    rounds = train(
        "--warmup_steps=3", "--train_batch_size=2", "--gradient_accumulation_steps=2", output_dir=tmp_path / "rounds"
    )
    torch.testing.assert_close(losses(rounds), bounded, rtol=1e-4, atol=1e-5)  # accumulation does not speed it up


def test_resumed_run_is_the_uninterrupted_one(train, tmp_path):
    flags = ["--augment_probability=0.3"]
    whole = train(*flags, output_dir=tmp_path / "whole")
    parts = tmp_path / "parts"
    train(*flags, "--max_train_steps=3", output_dir=parts)
    train(*flags, "--resume_from_checkpoint=latest", output_dir=parts)  # goes on after step 2, inside the warm-up
    TRAINING.assert_same_weights(whole, parts)
    assert losses(whole) == losses(parts)


@pytest.mark.slow
def test_killed_run_loses_nothing_but_the_steps_since_the_last_checkpoint(tmp_path):
    flags = ["--max_train_steps=30", "--checkpoints_total_limit=2", "--checkpointing_steps=1"]
    parts = tmp_path / "parts"
    TRAINING.run(tmp_path / "whole", *flags)
    for pause in (0.0, 0.13):
        TRAINING.kill_at_a_checkpoint(parts, *flags, pause=pause)
    TRAINING.run(parts, *flags, "--resume_from_checkpoint=latest")
    TRAINING.assert_same_weights(tmp_path / "whole", parts)


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    flags = ["--augment_probability=0.3"]
    TRAINING.run(tmp_path / "whole", *flags)
    TRAINING.run(tmp_path / "pair", "--train_batch_size=2", *flags, launcher=TWO_PROCESSES)
    torch.testing.assert_close(losses(tmp_path / "whole"), losses(tmp_path / "pair"), rtol=1e-4, atol=1e-5)
    TRAINING.assert_same_weights(tmp_path / "whole", tmp_path / "pair", tolerance=2e-3)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--max_train_steps=0"], "max_train_steps"),
        (["--multiplier=0"], "multiplier"),
        (["--augment_probability=2"], "augment_probability"),
        (["--class_dropout_prob=-1"], "class_dropout_prob"),
        (["--validation_num_inference_steps=4"], "validation_num_inference_steps"),
        (["--vae=x"], "vae"),
        (["--resolution=9"], "resolution"),
        (["--train_data_dir=nowhere.zip", "--resolution=8"], "train_data_dir"),
        (["--channel_mult", "1", "1", "1", "1", "1"], "sample_size"),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, list) else None,
)
def test_bad_flags_are_refused_in_one_line(train, flags, word, tmp_path):
    TRAINING.assert_refused(train, flags, word, tmp_path)
