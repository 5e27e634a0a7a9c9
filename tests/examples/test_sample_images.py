"""The sampling script as its users run it."""

import errno
import io
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import PartialState
from PIL import Image

from diffusers_fastdiff import (
    AMEDPredictor,
    AMEDScheduler,
    EDMPipeline,
    EDMUNet2DModel,
    FDMEDMScheduler,
    GDDIMPipeline,
    GDDIMScheduler,
    load_pretrained,
)
from diffusers_fastdiff.evaluation import image_store
from diffusers_fastdiff.evaluation.image_store import ImageStore
from diffusers_fastdiff.evaluation.images import open_images
from diffusers_fastdiff.evaluation.sampling_plan import choose_labels, parse_seeds, plan_calls, share
from tests.hooks.tiny_pipelines import stable_diffusion

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "sample_images.py"
PLAIN = ("--pipeline=digits-dit", "--num_images=21", "--num_inference_steps=2")


def command(output_dir: Path, *flags: str, launcher: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, *launcher, str(SCRIPT), f"--output_dir={output_dir}", *flags]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run_here(output_dir: Path, *flags: str) -> Path:
    """Run the script in this process."""
    PartialState._reset_state()
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command(output_dir, *flags)[1:])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        finally:
            PartialState._reset_state()
            torch.set_num_threads(threads)
    return output_dir


@pytest.fixture
def sample(tmp_path):
    return lambda *flags, output_dir=tmp_path / "out": run_here(output_dir, *flags)


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, bytes]:
    """The images of `PLAIN`, from one process."""
    folder = run_here(tmp_path_factory.mktemp("expected"), *PLAIN)
    assert len(pictures(folder)) == 21
    assert len(set(pictures(folder).values())) == 21
    return pictures(folder)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_does_not_change_a_byte(sample, expected, batch_size):
    assert pictures(sample(*PLAIN, f"--batch_size={batch_size}")) == expected


def test_two_processes_draw_what_one_does(tmp_path, expected):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29571")
    result = subprocess.run(
        command(tmp_path, *PLAIN, "--batch_size=1", launcher=launcher), env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("21 images") == 1  # they know of each other
    assert "21/21" in result.stderr  # the bar counts the images of both
    assert pictures(tmp_path) == expected


def test_a_run_goes_on_where_it_stopped(sample, expected, tmp_path, monkeypatch):
    written, save = [], ImageStore.save

    def interrupted(self, index, picture):
        if len(written) in (3, 11, 12):
            written.append(None)
            raise KeyboardInterrupt
        written.append(index)
        save(self, index, picture)

    monkeypatch.setattr(ImageStore, "save", interrupted)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            sample(*PLAIN)
        assert set(pictures(tmp_path / "out").items()) < set(expected.items())
    (tmp_path / "out" / ".incomplete-1-000005.png").write_bytes(b"half")
    assert pictures(sample(*PLAIN)) == expected
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir() if path.suffix != ".png") == [".json", ".jsonl"]
    calls = written.copy()
    assert pictures(sample(*PLAIN)) == expected
    assert written == calls  # nothing is drawn again


@pytest.mark.slow
def test_three_kills_change_nothing(tmp_path):
    flags = ("--pipeline=digits-dit", "--num_images=400", "--num_inference_steps=25", "--format", "png", "npz")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(command(whole, *flags), env=environment(), check=True, capture_output=True)
    chance = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(command(broken, *flags), env=environment(), stderr=subprocess.DEVNULL)
        while len(pictures(broken)) == 0:
            time.sleep(0.05)
        time.sleep(chance.uniform(0.1, 1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (broken / "images.npz").exists()
    subprocess.run(command(broken, *flags), env=environment(), check=True, capture_output=True)
    assert pictures(broken) == pictures(whole)
    assert (broken / "images.npz").read_bytes() == (whole / "images.npz").read_bytes()
    assert {path.name for path in broken.iterdir()} == {path.name for path in whole.iterdir()}


def test_other_settings_do_not_mix(sample, tmp_path, capsys):
    sample(*PLAIN)
    with pytest.raises(SystemExit, match=r"other settings: num_inference_steps \(2, now 3\).*another `--output_dir`"):
        sample(*PLAIN, "--num_inference_steps=3")
    strangers = tmp_path / "strangers"
    strangers.mkdir()
    Image.new("L", (8, 8)).save(strangers / "000000.png")
    with pytest.raises(SystemExit, match="holds images of something else"):
        sample(*PLAIN, output_dir=strangers)


def test_archives_hold_the_images(sample, expected):
    folder = sample(*PLAIN, "--format", "tar", "npz", "--images_per_archive=10", "--labels", "balanced")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == [k % 10 for k in range(21)]
    assert not pictures(folder)
    found = {}
    for number in range(3):
        with tarfile.open(folder / f"images-{number:05}-of-00003.tar") as archive:
            found |= {member.name: archive.extractfile(member).read() for member in archive}
    assert json.loads(found["000013.json"]) == {"seed": 13, "label": 3}
    with np.load(folder / "images.npz", allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert (images.shape, images.dtype, labels.tolist()) == ((21, 8, 8, 3), np.uint8, [k % 10 for k in range(21)])
    for index in range(21):
        picture = Image.open(io.BytesIO(found[f"{index:06}.png"])).convert("RGB")
        np.testing.assert_array_equal(np.asarray(picture), images[index])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    sample(*PLAIN, "--format", "tar", "npz", "--images_per_archive=10", "--labels", "balanced")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_image_is_that_of_its_generator(sample, expected):
    """The picture that a plain call of the pipeline with this seed and label gives."""
    folder = sample(*PLAIN, "--images_per_call=1", "--seeds=0-19,77", "--labels", "7")
    pipe = load_pretrained("digits-dit")
    pipe.set_progress_bar_config(disable=True)
    picture = pipe([7], generator=torch.Generator().manual_seed(77), num_inference_steps=2).images[0]
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "000020.png")), np.asarray(picture))


@pytest.mark.parametrize(
    "flags",
    [
        ["--pipeline=digits-fpdm", '--fixed_point={"budget": 6, "reuse_solution": true, "solver_": 0}'],
        ["--pipeline=digits-fpdm", '--fixed_point={"budget": 6, "reuse_solution": true}'],
        ["--pipeline=digits-dit", '--faster_diffusion={"every": 2}', "--scheduler=DPMSolverMultistepScheduler"],
        ["--pipeline=digits-dit", "--scheduler=DDPMScheduler", "--guidance_scale=1"],
        ["--pipeline=digits-dit", '--scheduler_options={"timestep_spacing": "trailing"}'],
    ],
)
def test_methods(sample, flags, tmp_path):
    settings = (*flags, "--num_images=11", "--num_inference_steps=4", "--images_per_call=4")
    if "solver_" in flags[1]:
        with pytest.raises(SystemExit, match="solver_"):
            sample(*settings)
        return
    drawn = [pictures(sample(*settings, f"--batch_size={size}", output_dir=tmp_path / str(size))) for size in (1, 64)]
    assert drawn[0] == drawn[1]
    plain = pictures(sample(flags[0], *settings[-3:], output_dir=tmp_path / "plain"))
    assert plain != drawn[0]


def test_learned_scheduler_from_a_folder(sample, tmp_path):
    config = load_pretrained("digits-dit").scheduler.config
    AMEDScheduler.from_config(config, student="ipndm").save_pretrained(tmp_path / "solver")
    folder = sample(*PLAIN[:2], "--num_inference_steps=4", f"--scheduler={tmp_path / 'solver'}")
    assert json.loads((folder / "sampling.json").read_text())["scheduler_class"] == "AMEDScheduler"
    assert len(pictures(folder)) == 21


def test_solver_that_sees_the_denoiser(sample, tmp_path):
    """Its predictor reads the bottleneck of every image."""
    config = load_pretrained("digits-dit").scheduler.config
    scheduler = AMEDScheduler.from_config(config, mode="attached", sigmas=[80.0, 10.0, 2.0, 0.1])
    torch.manual_seed(0)
    scheduler.predictor = AMEDPredictor(scale_dir=0.05, scale_time=0.1).eval()
    scheduler.save_pretrained(tmp_path / "solver")
    flags = (*PLAIN[:2], "--num_inference_steps=6", f"--scheduler={tmp_path / 'solver'}")
    drawn = [pictures(sample(*flags, f"--batch_size={size}", output_dir=tmp_path / str(size))) for size in (1, 64)]
    assert drawn[0] == drawn[1]
    scheduler.predictor = AMEDPredictor(scale_dir=0.05, scale_time=0.1).eval()
    scheduler.save_pretrained(tmp_path / "solver")
    assert pictures(sample(*flags, output_dir=tmp_path / "other")) != drawn[0]


def test_models_with_and_without_classes(sample, tmp_path):
    for name, unet, scheduler, pipeline, label in (
        ("gddim", {"in_channels": 2}, GDDIMScheduler(process="cld"), GDDIMPipeline, None),
        ("edm", {"in_channels": 3, "num_classes": 4}, FDMEDMScheduler(), EDMPipeline, 2),
    ):
        torch.manual_seed(0)
        model = EDMUNet2DModel(
            sample_size=8, model_channels=8, channel_mult=(1,), layers_per_block=1, attention_resolutions=(), **unet
        )
        pipeline(model.eval(), scheduler).save_pretrained(tmp_path / name)
        flags = (f"--pipeline={tmp_path / name}", "--num_images=3", "--num_inference_steps=3", "--labels", "2")
        folder = sample(*flags, output_dir=tmp_path / f"{name}-images")
        assert len(set(pictures(folder).values())) == 3
        row = json.loads((folder / "metadata.jsonl").read_text().splitlines()[2])
        assert row == {"file_name": "000002.png", "seed": 2} | ({} if label is None else {"label": label})


def test_prompts(sample, tmp_path):
    (tmp_path / "parts").mkdir()
    stable_diffusion(tmp_path / "parts").save_pretrained(tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("a b\nc\n")
    folder = sample(
        f"--pipeline={tmp_path / 'sd'}", f"--prompts={tmp_path / 'prompts.txt'}", "--num_images=3", "--images_per_call=2",
        "--num_inference_steps=2", "--guidance_scale=3", '--call_options={"negative_prompt": ["d", "d"]}',
    )  # fmt: skip
    assert open_images(folder).prompts == ["a b", "c", "a b"]
    data = tmp_path / "captions"
    data.mkdir()
    (data / "train.csv").write_text("caption\nx\ny z\n")
    flags = (f"--pipeline={tmp_path / 'sd'}", f"--prompt_dataset={data}", "--num_inference_steps=2")
    folder = sample(*flags, "--prompt_column=caption", "--num_images=2", output_dir=tmp_path / "from-data")
    assert open_images(folder).prompts == ["x", "y z"]
    with pytest.raises(SystemExit, match=r"must have a column 'text' and 2 rows; it has \['caption'\] and 2"):
        sample(*flags, "--num_images=2", output_dir=tmp_path / "other")
    with pytest.raises(SystemExit, match="StableDiffusionPipeline needs prompts"):
        sample(f"--pipeline={tmp_path / 'sd'}", "--num_images=3", output_dir=tmp_path / "other")


@pytest.mark.parametrize("victim", ["000011.png", "images.npz", "images-00000-of-00001.tar"])
def test_full_disk_keeps_what_is_finished(sample, expected, tmp_path, monkeypatch, victim):
    class FullDisk(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    def open_on_full_disk(path, mode):
        if path.name.endswith(victim):
            path.touch()
            return FullDisk()
        return open(path, mode)

    monkeypatch.setattr(image_store, "open", open_on_full_disk, raising=False)
    flags = (*PLAIN, "--format", "png", "npz", "tar")
    with pytest.raises(SystemExit, match=f"{victim} cannot be written .No space left on device.*kept: make room"):
        sample(*flags)
    finished = pictures(tmp_path / "out")
    assert finished == expected if victim.startswith("images") else finished.items() < expected.items()
    assert not list((tmp_path / "out").glob(".incomplete*"))
    monkeypatch.undo()
    assert pictures(sample(*flags)) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pipeline=digits-dit"], "`--num_images` must be at least 1"),
        (["--pipeline=digits-dit", "--num_images=3", "--labels", "10"], r"numbers in 0 \.\. 9, got \['10'\]"),
        (
            ["--pipeline=digits-dit", "--num_images=3", "--scheduler=NoSuchScheduler"],
            "'NoSuchScheduler' is no folder, and neither",
        ),
        (["--pipeline=digits-dit", "--num_images=3", "--scheduler=DiTPipeline"], "has a SchedulerMixin of that name"),
        (["--pipeline=digits-dit", "--num_images=3", "--batch_size=0"], "`--batch_size` must be at least 1"),
        (["--pipeline=digits-dit", "--num_images=3", "--seeds=0-9"], "are 10 seeds, but `--num_images` is 3"),
    ],
)
def test_wrong_settings_are_refused(sample, tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message):
        sample(*flags)
    assert not pictures(tmp_path / "out")


def test_seeds():
    assert parse_seeds("3,10-12", None) == [3, 10, 11, 12]
    assert parse_seeds(None, 3) == [0, 1, 2]
    for text in ("a", "1,1", "5-3", "", "1-2-3"):
        with pytest.raises(ValueError, match="`--seeds`"):
            parse_seeds(text, None)


def test_random_labels_belong_to_their_seeds():
    labels = choose_labels(["random"], list(range(2000)), 10)
    assert choose_labels(["random"], [1999, 4], 10) == [labels[1999], labels[4]]
    assert np.bincount(labels, minlength=10).min() > 150
    assert choose_labels(["3", "5"], [0, 1, 2], 10) == [3, 5, 3]


def test_every_image_is_in_one_call_at_its_place():
    rows = [{"seed": seed} for seed in range(21)]
    calls = plan_calls(rows, 8)
    assert [index for call in calls for index in call.indices] == list(range(21))
    assert all(len(call.rows) == 8 for call in calls)
    assert [row["seed"] for row in calls[2].rows] == [16, 17, 18, 19, 20, 20, 20, 20]
    assert [call.indices.start for call in plan_calls(rows, 8, finished=[*range(8), 9, *range(16, 20)])] == [8, 16]
    shared = [list(share(calls, 2, rank, 2)) for rank in (0, 1)]
    assert [[call.indices.start for call in piece] for pieces in shared for piece in pieces] == [[0, 8], [16]]
