"""The training script as its users run it."""

import json

import pytest
import torch
from diffusers import DiTPipeline

import diffusers_fastdiff  # noqa: F401
from tests.training.scripts import TWO_PROCESSES, Training, losses
from tests.training.test_pieces import save_images, tiny_vae

TRAINING = Training(
    "train_fpdm.py", "transformer/diffusion_pytorch_model.safetensors",
    "--num_attention_heads=2", "--attention_head_dim=8", "--num_layers=4", "--train_batch_size=4", "--max_train_steps=6",
    "--learning_rate=1e-2", "--max_no_grad_iterations=2", "--max_grad_iterations=2", "--logging_steps=1",
    "--checkpointing_steps=2", "--validation_steps=0", "--ema_decay=0.9",
)  # fmt: skip
train = TRAINING.fixture()


@pytest.mark.parametrize(
    "flags",
    [
        ["--validation_steps=2", "--num_validation_images=3", "--validation_num_inference_steps=2"],
        ["--learn_sigma", "--lr_scheduler=cosine", "--max_grad_norm=1", "--gradient_checkpointing"],
        ["--prediction_type=v_prediction", "--zero_terminal_snr", "--no-pre_post_timestep_conditioning"],
        ["--prediction_type=flow_prediction", "--num_pre_layers=2", "--no-use_ema", "--mixed_precision=bf16"],
        ["--baseline_dit", "--save_precision=float16"],
        ["--unconditional", "--report_to=tensorboard"],
    ],
    ids=lambda flags: flags[0].lstrip("-"),
)
def test_every_kind_of_model_ends_in_a_working_pipeline(train, flags):
    folder = train(*flags, "--max_train_steps=2")
    pipe = DiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    labels = [0, 0] if "--unconditional" in flags else [1, 2]
    images = pipe(labels, guidance_scale=2.0, num_inference_steps=3, output_type="np").images
    assert images.shape == (2, 8, 8, 1)
    assert "accelerate launch" in (folder / "README.md").read_text()
    assert (folder / "samples" / "0000002.png").exists() == ("--validation_steps=2" in flags)


def test_latents_are_cached_and_encoded_on_the_fly_alike(train, tmp_path):
    save_images(tmp_path / "images", count=6)
    tiny_vae().save_pretrained(tmp_path / "vae")
    data = [f"--train_data_dir={tmp_path / 'images'}", "--resolution=16", f"--vae={tmp_path / 'vae'}"]
    cached = train(*data, f"--latents_dir={tmp_path / 'latents'}", output_dir=tmp_path / "cached")
    direct = train(*data, output_dir=tmp_path / "direct")
    TRAINING.assert_same_weights(cached, direct, tolerance=1e-4)
    assert len(list((tmp_path / "latents").glob("*.safetensors"))) == 1


def test_continuous_conditioning(train, tmp_path):
    folder = tmp_path / "images"
    save_images(folder, count=2)
    rows = [{"file_name": str(path.relative_to(folder)), "vector": [1.0, 2.0, 3.0]} for path in sorted(folder.rglob("*.png"))]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    output = train(
        f"--train_data_dir={folder}", "--resolution=8", "--conditioning_column=vector", "--validation_steps=2",
        "--max_train_steps=2", "--num_validation_images=2", "--validation_num_inference_steps=2",
    )  # fmt: skip
    assert json.loads((output / "transformer" / "config.json").read_text())["conditioning_dim"] == 3
    assert (output / "samples" / "0000002.png").exists()


def test_lora_continues_from_a_saved_model(train, tmp_path):
    base = train(output_dir=tmp_path / "base")
    adapter = train(f"--pretrained_model_name_or_path={base}", "--lora_rank=2", output_dir=tmp_path / "adapter")
    assert not (adapter / "transformer").exists()
    pipe = DiTPipeline.from_pretrained(base)
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    pipe.transformer.load_lora_adapter(adapter, prefix=None, use_safetensors=True)
    updates = [value for name, value in pipe.transformer.state_dict().items() if "lora_B" in name]
    assert len(updates) == 4 * 3
    assert all(update.abs().max() > 0 for update in updates)
    for name, value in pipe.transformer.state_dict().items():
        if "lora" not in name:
            assert torch.equal(value, before[name.replace(".base_layer", "")])


def test_accumulation_is_one_large_batch(train, tmp_path):
    whole = train(output_dir=tmp_path / "whole")
    rounds = train("--train_batch_size=2", "--gradient_accumulation_steps=2", output_dir=tmp_path / "rounds")
    torch.testing.assert_close(losses(whole), losses(rounds), rtol=1e-4, atol=1e-5)
    TRAINING.assert_same_weights(whole, rounds, tolerance=2e-3)


def test_resumed_run_is_the_uninterrupted_one(train, tmp_path):
    whole = train(output_dir=tmp_path / "whole")
    parts = tmp_path / "parts"
    train("--max_train_steps=3", output_dir=parts)
    train("--resume_from_checkpoint=latest", output_dir=parts)  # goes on after step 2
    TRAINING.assert_same_weights(whole, parts)
    assert losses(whole) == losses(parts)


def test_killed_run_loses_nothing_but_the_steps_since_the_last_checkpoint(tmp_path):
    """Killed in the middle of whatever the process does, several times over."""
    flags, parts = ["--max_train_steps=40", "--checkpoints_total_limit=2"], tmp_path / "parts"
    TRAINING.run(tmp_path / "whole", *flags)
    for pause in (0.0, 0.13):
        TRAINING.kill_at_a_checkpoint(parts, *flags, pause=pause)
    TRAINING.run(parts, *flags, "--resume_from_checkpoint=latest")
    TRAINING.assert_same_weights(tmp_path / "whole", parts)
    assert not list(parts.glob(".incomplete-*"))


def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    TRAINING.run(tmp_path / "whole")
    TRAINING.run(tmp_path / "pair", "--train_batch_size=2", launcher=TWO_PROCESSES)
    torch.testing.assert_close(losses(tmp_path / "whole"), losses(tmp_path / "pair"), rtol=1e-4, atol=1e-5)
    TRAINING.assert_same_weights(tmp_path / "whole", tmp_path / "pair", tolerance=2e-3)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--max_train_steps=0"], "max_train_steps"),
        (["--learning_rate=-1"], "learning_rate"),
        (["--min_grad_iterations=0"], "grad_range"),
        (["--zero_terminal_snr"], "zero_terminal_snr"),
        (["--prediction_type=flow_prediction", "--learn_sigma"], "learn_sigma"),
        (["--lora_rank=2"], "pretrained_model_name_or_path"),
        (["--latents_dir=x"], "vae"),
        (["--resolution=9"], "resolution"),
        (["--preset=XXL/2"], "preset"),
        (["--resume_from_checkpoint=checkpoint-9"], "resume_from_checkpoint"),
        (["--output_dir=/proc/nowhere"], "output_dir"),
        (["--num_layers=2"], "num_iterations"),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, list) else None,
)
def test_bad_flags_are_refused_in_one_line(train, flags, word, tmp_path):
    TRAINING.assert_refused(train, flags, word, tmp_path)


def test_checkpoint_of_another_run_is_refused(train, tmp_path):
    train()
    with pytest.raises(SystemExit, match="seed"):
        train("--seed=5", "--resume_from_checkpoint=latest")
