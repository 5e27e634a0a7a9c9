"""Measure a digits pipeline and write the numbers, with everything needed to get them again, to a JSON file.

python examples/evaluate_digits.py --model digits-fpdm --output model_cards/results/digits-fpdm.json
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, DiTPipeline

from diffusers_fastdiff.errors import check_writable
from diffusers_fastdiff.evaluation.digits import digit_estimates
from diffusers_fastdiff.evaluation.intervals import pooled
from diffusers_fastdiff.evaluation.report import versions
from diffusers_fastdiff.pretrained import open_pipeline
from diffusers_fastdiff.training.randomness import derive_seed
from diffusers_fastdiff.training.validation import sample_latents


def draw(pipe: DiffusionPipeline, labels: torch.Tensor, steps: int, guidance_scale: float, seed: int) -> torch.Tensor:
    """Images of the given classes, (B, 1, 8, 8) in [-1, 1]; image k depends on seed and k only."""
    if not isinstance(pipe, DiTPipeline):
        generators = [torch.Generator().manual_seed(derive_seed(seed, "image", k)) for k in range(len(labels))]
        options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "pt"}
        return pipe(class_labels=labels, generator=generators, **options).images * 2 - 1
    model = pipe.transformer.eval()
    return sample_latents(
        lambda x, timestep, condition: model(x, timestep.expand(len(x)), class_labels=condition).sample,
        pipe.scheduler,
        (len(labels), 1, 8, 8),
        labels,
        torch.full_like(labels, model.null_label),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="embedded name or folder of a pipeline of digits")
    parser.add_argument("--num_images", type=int, default=2000, help="for each seed")
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[1.0, 1.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    check_writable(args.output.parent, "--output")

    pipe = open_pipeline(args.model)
    pipe.set_progress_bar_config(disable=True)
    model = pipe.transformer if isinstance(pipe, DiTPipeline) else pipe.unet
    labels = torch.arange(args.num_images) % 10

    results = []
    for scale in args.guidance_scales:
        runs = []
        for seed in args.seeds:
            images = draw(pipe, labels, args.num_inference_steps, scale, seed)
            runs.append(digit_estimates(images, labels))
            print(
                f"guidance {scale}, seed {seed}: " + ", ".join(f"{k} {v['value']:.4f}" for k, v in runs[-1].items()), flush=True
            )
        results.append({"guidance_scale": scale} | {name: pooled([run[name] for run in runs]) for name in runs[0]})
    report = {
        "command": " ".join(["python", *sys.argv]),
        "num_images": args.num_images,
        "seeds": args.seeds,
        "num_inference_steps": args.num_inference_steps,
        "scheduler": type(pipe.scheduler).__name__,
        "parameters": model.num_parameters(),
        "versions": versions(),
        "results": results,
    }
    args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
