"""Measure a digits pipeline and write the numbers, with everything needed to get them again, to a JSON file.

python examples/evaluate_digits.py --model digits-fpdm --output model_cards/results/digits-fpdm.json
"""

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path

import diffusers
import torch
from diffusers import DiTPipeline

import diffusers_fastdiff
from diffusers_fastdiff import load_pretrained
from diffusers_fastdiff.errors import check_writable
from diffusers_fastdiff.evaluation.digits import evaluate_digits
from diffusers_fastdiff.pretrained import available_pretrained
from diffusers_fastdiff.training.validation import sample_latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="embedded name or folder of a DiTPipeline of digits")
    parser.add_argument("--num_images", type=int, default=2000, help="for each seed")
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[1.0, 1.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    check_writable(args.output.parent, "--output")

    known = args.model in available_pretrained()
    pipe = load_pretrained(args.model) if known else DiTPipeline.from_pretrained(args.model)
    model = pipe.transformer.eval()
    labels = torch.arange(args.num_images) % 10
    nulls = torch.full_like(labels, model.null_label)

    def denoise(x: torch.Tensor, timestep: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return model(x, timestep.expand(len(x)), class_labels=condition).sample

    results = []
    for scale in args.guidance_scales:
        runs = []
        for seed in args.seeds:
            images = sample_latents(
                denoise,
                pipe.scheduler,
                (args.num_images, 1, 8, 8),
                labels,
                nulls,
                num_inference_steps=args.num_inference_steps,
                guidance_scale=scale,
                seed=seed,
            )
            runs.append(evaluate_digits(images, labels))
            print(f"guidance {scale}, seed {seed}: {runs[-1]}", flush=True)
        summary = {
            key: {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}
            for key in runs[0]
            if key != "num_images"
            for values in [[run[key] for run in runs]]
        }
        results.append({"guidance_scale": scale, **summary})
    report = {
        "command": " ".join(["python", *sys.argv]),
        "num_images": args.num_images,
        "seeds": args.seeds,
        "num_inference_steps": args.num_inference_steps,
        "scheduler": type(pipe.scheduler).__name__,
        "parameters": model.num_parameters(),
        "versions": {
            "diffusers_fastdiff": diffusers_fastdiff.__version__,
            "diffusers": diffusers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "results": results,
    }
    args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
