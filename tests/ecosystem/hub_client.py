"""A user's process: loads what a JSON file lists, from wherever HF_ENDPOINT says, and saves outputs or errors.

python -m tests.ecosystem.hub_client tasks.json results
"""

import json
import sys
from pathlib import Path

import diffusers
import torch

import diffusers_fastdiff
from diffusers_fastdiff import AMEDScheduler
from diffusers_fastdiff.pretrained import open_pipeline


def run(task: dict):
    if task["class"] == "open_pipeline":
        loaded = open_pipeline(task["repo"], **task["options"])
    else:
        owner = diffusers_fastdiff if hasattr(diffusers_fastdiff, task["class"]) else diffusers
        loaded = getattr(owner, task["class"]).from_pretrained(task["repo"], **task["options"])
    if isinstance(loaded, diffusers.DiffusionPipeline):
        return draw(loaded)
    if isinstance(loaded, diffusers.ModelMixin):
        return torch.cat([value.flatten().float() for value in loaded.state_dict().values()])
    if loaded.predictor is not None:
        return torch.cat([value.flatten() for value in loaded.predictor.state_dict().values()])
    return loaded.sigmas


def draw(pipe: diffusers.DiffusionPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    steps = 5
    if isinstance(pipe.scheduler, AMEDScheduler):
        pipe.scheduler.attach(pipe)
        steps = 6
    generator = torch.Generator().manual_seed(0)
    call = {"class_labels": [1, 2], "guidance_scale": 2.0, "num_inference_steps": steps, "generator": generator}
    return torch.from_numpy(pipe(**call, output_type="np").images)


def main() -> None:
    results = {}
    for task in json.loads(Path(sys.argv[1]).read_text()):
        try:
            results[task["name"]] = run(task)
        except Exception as error:
            results[task["name"]] = f"{type(error).__name__}: {error}"
    torch.save(results, sys.argv[2])


if __name__ == "__main__":
    main()
