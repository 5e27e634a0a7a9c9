"""The training script of gDDIM as its users run it, and its loss against the published program."""

import runpy
import sys
from types import SimpleNamespace

import pytest
import torch

from diffusers_fastdiff import EDMUNet2DModel, GDDIMPipeline
from diffusers_fastdiff.numerics.blur import BlurProcess, dct2, idct2
from diffusers_fastdiff.numerics.phase_space import CLDProcess
from diffusers_fastdiff.training import model_card
from diffusers_fastdiff.training.gddim_loss import gddim_loss, training_times
from tests.golden.recordings import recordings
from tests.golden.test_gddim import cases, channels_first, pack, toy_network
from tests.training.scripts import TWO_PROCESSES, Training, losses
from tests.training.test_pieces import save_images

TRAINING = Training(
    "train_gddim.py", "unet/diffusion_pytorch_model.safetensors",
    "--model_channels=8", "--train_batch_size=4", "--max_train_steps=6", "--learning_rate=1e-2", "--logging_steps=1",
    "--checkpointing_steps=2", "--validation_steps=0", "--ema_decay=0.9",
)  # fmt: skip
train = TRAINING.fixture()


# ---- the loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recording", recordings("cld_training"))
@pytest.mark.parametrize("mixed_score", [False, True])
def test_loss_is_that_of_the_published_program(recording, mixed_score):
    for case in cases(recording):
        part = case.group("img/")
        net = toy_network(recording.info["procedure"])
        terms = gddim_loss(
            lambda sample, timestep, net=net: SimpleNamespace(sample=net(sample, timestep)),
            channels_first(part["x0"]),
            pack(part["z"]),
            part["t"],
            part["labels"],
            case.process,
            mixed_score=mixed_score,
        )
        assert len(terms.parts) == 2
        expected = part[f"loss_mixed{mixed_score:d}_mean"].item()
        assert terms.total.mean().item() == pytest.approx(expected, rel=1e-4)  # their table of R is interpolated


def test_loss_of_the_perfect_network_is_zero():
    """For blur in the pixels that the network sees: what it has to predict there is the noise itself."""
    process, clean = BlurProcess(image_size=(8, 8), sigma_max=2.0), torch.rand(3, 1, 8, 8)
    noise, time = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.5, 0.9])

    def network(sample, timestep):
        spectrum = dct2(sample) - process.signal(time)[:, None, ..., 0, 0] * dct2(clean)
        eps = spectrum / process.factor(time)[:, None, ..., 0, 0]
        return SimpleNamespace(sample=idct2(eps))

    terms = gddim_loss(network, clean, noise, time, 999 * time, process)
    assert terms.total.max() < 1e-9


def test_training_times_and_what_random_fourier_features_see():
    times = training_times(torch.tensor([0.0, 1.0]))
    assert times.tolist() == pytest.approx([1e-5, 1.0])
    assert times.dtype == torch.float64
    seen = {}

    def network(sample, timestep):
        seen["timestep"] = timestep
        return SimpleNamespace(sample=sample)

    arguments = torch.zeros(2, 1, 4, 4), torch.zeros(2, 2, 4, 4), torch.tensor([0.5, 1.0]), torch.tensor([499.5, 999.0])
    for kind, expected in (("positional", arguments[3]), ("fourier", arguments[3].log())):
        gddim_loss(network, *arguments, CLDProcess(), embedding_type=kind)
        torch.testing.assert_close(seen["timestep"], expected)


# ---- the script ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ["--process=cld", "--validation_steps=2", "--num_validation_images=3", "--validation_num_inference_steps=3"],
        ["--process=cld", "--mixed_score", "--parametrization=L", "--process_parameters", "gamma=0.1", "beta_1=2"],
        ["--process=blur", "--unconditional", "--save_precision=float16", "--report_to=tensorboard"],
        ["--process=blur", "--process_parameters", "sigma_max=3", "--mixed_precision=bf16", "--gradient_checkpointing"],
        ["--process=vp", "--no-use_ema", "--lr_scheduler=cosine", "--max_grad_norm=1"],
    ],
    ids=lambda flags: " ".join(flags[:2]),
)
def test_every_kind_of_model_ends_in_a_working_pipeline(train, flags):
    folder = train("--max_train_steps=2", *flags)
    pipe = GDDIMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    labels = None if "--unconditional" in flags else [1, 2]
    images = pipe(labels, batch_size=2, num_inference_steps=3, output_type="np").images
    assert images.shape == (2, 8, 8, 1)
    assert (folder / "samples" / "0000002.png").exists() == ("--validation_steps=2" in flags)
    card = (folder / "README.md").read_text()
    assert "GDDIMPipeline.from_pretrained" in card
    assert "accelerate launch" in card
    parameters = pipe.scheduler.forward_process
    if "sigma_max=3" in flags:
        assert (parameters.sigma_max, parameters.image_size) == (3.0, (8, 8))
    if "gamma=0.1" in flags:
        assert (parameters.gamma, parameters.beta_1) == (0.1, 2.0)
        assert pipe.scheduler.config.mixed_score
        assert pipe.scheduler.config.network_parametrization == "L"


def test_training_goes_on_from_a_saved_network(train, tmp_path):
    base = train("--max_train_steps=1", output_dir=tmp_path / "base")
    more = train(
        f"--pretrained_model_name_or_path={base}", "--max_train_steps=1", "--learning_rate=1e-9", "--no-use_ema",
        output_dir=tmp_path / "more",
    )  # fmt: skip
    TRAINING.assert_same_weights(base, more, tolerance=1e-6)


def test_published_configuration(train, tmp_path):
    """The preset sets network and optimisation; flags that are given as well win. Run at a hundredth of its size."""
    namespace = runpy.run_path(str(TRAINING.script))
    preset = namespace["PRESETS"]["cifar10"]
    published = {
        "train_batch_size": 128, "learning_rate": 2e-4, "lr_warmup_steps": 5000, "max_grad_norm": 1.0, "ema_decay": 0.9999,
        "random_flip": True, "unconditional": True,
    }  # fmt: skip
    assert {key: preset[key] for key in published} == published
    sys.argv = ["train_gddim.py", "--preset=cifar10", "--train_batch_size=2", f"--output_dir={tmp_path}"]
    args = namespace["parse_args"]()
    assert (args.train_batch_size, args.learning_rate, args.process, args.mixed_score) == (2, 2e-4, "cld", False)
    with torch.device("meta"):
        network = EDMUNet2DModel.from_preset(namespace["NETWORKS"]["cifar10"], in_channels=6)
    config = network.config
    assert (config.model_channels, tuple(config.channel_mult), config.layers_per_block) == (128, (1, 2, 2, 2), 8)
    assert (config.dropout, config.embedding_type, tuple(config.attention_resolutions)) == (0.1, "fourier", (16,))
    assert 1.0e8 < network.num_parameters() < 1.2e8


def test_own_images(train, tmp_path):
    save_images(tmp_path / "images", count=4)
    folder = train(f"--train_data_dir={tmp_path / 'images'}", "--resolution=16", "--process=blur", "--max_train_steps=1")
    pipe = GDDIMPipeline.from_pretrained(folder)
    assert pipe.unet.config.in_channels == 3
    assert pipe.scheduler.forward_process.image_size == (16, 16)


def test_accumulation_is_one_large_batch(train, tmp_path):
    whole = train(output_dir=tmp_path / "whole")
    rounds = train("--train_batch_size=2", "--gradient_accumulation_steps=2", output_dir=tmp_path / "rounds")
    torch.testing.assert_close(losses(whole), losses(rounds), rtol=1e-3, atol=1e-4)


def test_killed_run_goes_on_as_if_nothing_had_happened(train, tmp_path):
    flags, parts = ["--max_train_steps=16"], tmp_path / "parts"
    TRAINING.kill_at_a_checkpoint(parts, *flags)
    assert not (parts / TRAINING.weights).exists()
    whole = train(*flags, output_dir=tmp_path / "whole")
    train(*flags, "--resume_from_checkpoint=latest", output_dir=parts)
    TRAINING.assert_same_weights(whole, parts)
    assert losses(whole) == losses(parts)
    with pytest.raises(SystemExit, match="seed"):
        train(*flags, "--seed=5", "--resume_from_checkpoint=latest", output_dir=parts)


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(train, tmp_path):
    TRAINING.run(tmp_path / "pair", "--train_batch_size=2", launcher=TWO_PROCESSES)
    whole = train(output_dir=tmp_path / "whole")
    torch.testing.assert_close(losses(whole), losses(tmp_path / "pair"), rtol=1e-3, atol=1e-4)


def test_upload(train, monkeypatch):
    """What reaches the Hub: the pipeline with its card, not the checkpoints."""
    calls = {}
    monkeypatch.setattr(
        model_card, "create_repo", lambda name, **options: calls.update(name=name) or SimpleNamespace(repo_id=name)
    )
    monkeypatch.setattr(model_card, "upload_folder", lambda **options: calls.update(options))
    folder = train("--max_train_steps=2", "--push_to_hub", "--hub_model_id=org/name")
    assert calls["name"] == calls["repo_id"] == "org/name"
    assert calls["folder_path"] == folder
    assert "checkpoint-*" in calls["ignore_patterns"]
    assert 'from_pretrained("org/name")' in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--max_train_steps=0"], "max_train_steps"),
        (["--process_parameters", "gamma"], "process_parameters"),
        (["--process_parameters", "mass=1"], "process_parameters"),
        (["--process_parameters", "gamma=-1"], "gamma"),
        (["--process=blur", "--mixed_score"], "mixed_score"),
        (["--vae=x"], "vae"),
        (["--resolution=9"], "resolution"),
        (["--attention_resolutions", "5"], "attention_resolutions"),
        (["--resume_from_checkpoint=checkpoint-9"], "resume_from_checkpoint"),
        (["--output_dir=/proc/nowhere"], "output_dir"),
        (["--learning_rate=1e30", "--max_train_steps=3"], "learning_rate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_flags_are_refused_in_one_line(train, flags, word, tmp_path):
    TRAINING.assert_refused(train, flags, word, tmp_path)
