"""What users, saved pipelines and other tools rely on: names, imports, loading in a fresh process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline

import diffusers_fastdiff
from diffusers_fastdiff import PixelAutoencoder
from tests.local_hub_server import serve
from tests.models.tiny import faster_dit, fixed_point_dit

ROOT = Path(diffusers_fastdiff.__file__).parents[1]

LOAD = """
import sys, torch
import diffusers_fastdiff
from diffusers import {pipeline_class}
pipe = {pipeline_class}.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
pipe.transformer.eval()
generator = torch.Generator().manual_seed(0)
result = pipe([1, 2], guidance_scale=2.0, num_inference_steps=2, generator=generator, output_type="np")
torch.save(torch.from_numpy(result.images), sys.argv[2])
print(type(pipe.transformer).__module__, type(pipe.transformer).__name__)
"""


def fresh_process(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, "-c", code, *arguments], env=variables, capture_output=True, text=True)


def save_pipeline(make, folder: Path) -> torch.Tensor:
    pipe = DiTPipeline(make(in_channels=1, out_channels=1), PixelAutoencoder(1), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.eval()
    pipe.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    result = pipe([1, 2], guidance_scale=2.0, num_inference_steps=2, generator=generator, output_type="np")
    return torch.from_numpy(result.images)


def test_every_public_name_exists_and_is_documented():
    for name in diffusers_fastdiff.__all__:
        assert getattr(diffusers_fastdiff, name).__doc__, name


def test_components_are_recorded_under_the_name_of_the_package(tmp_path):
    save_pipeline(fixed_point_dit, tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers_fastdiff", "FixedPointDiTTransformer2DModel"]
    assert index["vae"] == ["diffusers_fastdiff", "PixelAutoencoder"]


@pytest.mark.parametrize("make", [fixed_point_dit, faster_dit])
@pytest.mark.parametrize("pipeline_class", ["DiTPipeline", "DiffusionPipeline"])
def test_saved_pipeline_loads_in_a_fresh_process(make, pipeline_class, tmp_path):
    expected = save_pipeline(make, tmp_path / "pipe")
    result = fresh_process(LOAD.format(pipeline_class=pipeline_class), str(tmp_path / "pipe"), str(tmp_path / "images"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[0] == "diffusers_fastdiff"
    assert torch.equal(torch.load(tmp_path / "images", weights_only=True), expected)


def test_pipeline_on_the_hub_loads_in_a_fresh_process(tmp_path):
    expected = save_pipeline(fixed_point_dit, tmp_path / "hub" / "org" / "name")
    endpoint, server = serve(tmp_path / "hub")
    try:
        result = fresh_process(
            LOAD.format(pipeline_class="DiTPipeline"), "org/name", str(tmp_path / "images"),
            HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0",
        )  # fmt: skip
    finally:
        server.shutdown()
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(tmp_path / "images", weights_only=True), expected)


def test_import_brings_in_nothing_optional_and_little_else():
    code = """
import json, sys, time
import diffusers, diffusers.models.transformers.dit_transformer_2d, diffusers.pipelines.dit.pipeline_dit, diffusers.loaders.peft
start = time.perf_counter()
import diffusers_fastdiff
print(json.dumps([time.perf_counter() - start, sorted(sys.modules)]))
"""
    result = fresh_process(code)
    assert result.returncode == 0, result.stderr
    seconds, modules = json.loads(result.stdout)
    roots = {module.partition(".")[0] for module in modules}
    assert not roots & {"datasets", "sklearn", "matplotlib", "tensorboard"}
    ours = [module for module in modules if module.startswith("diffusers_fastdiff")]
    assert not [m for m in ours if m.split(".")[1:2] and m.split(".")[1] in ("conversion", "evaluation", "training", "cli")]
    assert seconds < 5  # a leash, not a measurement: examples measure
