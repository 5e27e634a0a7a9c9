"""Sample with and without Faster Diffusion: a grid side by side, seconds, and how far the images are apart.

    python examples/sample_faster_diffusion.py --every 3 --propagation taylor
    python examples/sample_faster_diffusion.py --calibrate 14 --propagation taylor --save_schedule keys.json
    python examples/sample_faster_diffusion.py --schedule keys.json --propagation taylor
    python examples/sample_faster_diffusion.py --pretrained_model_name_or_path facebook/DiT-XL-2-256 --key_steps dit-250 \\
        --num_inference_steps 250 --scheduler ddpm --guidance_scale 1.5 --class_labels 207 360 --batched
    python examples/sample_faster_diffusion.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --prompt "a photo of an astronaut" --key_steps sd-50 --noise_injection 0.003 --noise_injection_below 0.5

The first group of commands needs no network.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler

from diffusers_fastdiff import (
    FasterDiffusionConfig,
    KeySchedule,
    apply_faster_diffusion,
    calibrate_key_steps,
    load_pretrained,
)
from diffusers_fastdiff.errors import check_writable
from diffusers_fastdiff.pictures import labelled_grid, to_pil
from diffusers_fastdiff.pretrained import available_pretrained

SCHEDULERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "dpmsolver++": DPMSolverMultistepScheduler}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", default="digits-dit-deep", help="embedded name, folder or Hub name")
    parser.add_argument("--class_labels", type=int, nargs="+", default=list(range(10)), help="for models with classes")
    parser.add_argument("--prompt", nargs="+", help="for text-to-image models, in place of labels")
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    parser.add_argument("--scheduler", choices=list(SCHEDULERS), help="default: that of the pipeline")
    when = parser.add_mutually_exclusive_group()
    when.add_argument("--every", type=int, help="run the encoder at every n-th step")
    when.add_argument("--key_steps", nargs="+", help="the steps, or the name of a published schedule")
    when.add_argument("--schedule", help="a saved schedule (JSON)")
    when.add_argument("--calibrate", type=int, metavar="N", help="measure the best N key steps first")
    parser.add_argument("--save_schedule", help="write the measured key steps to this JSON file")
    parser.add_argument("--encoder_share", type=float, help="share of a DiT's blocks that are encoder, default 18/28")
    parser.add_argument("--propagation", choices=["hold", "linear", "taylor"], default="hold")
    parser.add_argument("--batched", action="store_true", help="decode all steps up to the next key step at once")
    parser.add_argument("--max_batch", type=int, help="most rows of such a batch")
    parser.add_argument("--noise_injection", type=float, default=0.0, help="published: 0.003")
    parser.add_argument(
        "--noise_injection_below", type=float, default=0.3, help="published: 0.3 for DiT, 0.5 for text to image"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="faster-diffusion.png")
    args = parser.parse_args()
    if args.save_schedule and not args.calibrate:
        parser.error("--save_schedule saves what --calibrate measures: give both")
    return args


def load(args: argparse.Namespace) -> Any:
    name, dtype = args.pretrained_model_name_or_path, getattr(torch, args.dtype)
    load_any = load_pretrained if name in available_pretrained() else DiffusionPipeline.from_pretrained
    pipe = load_any(name, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    if args.scheduler:
        pipe.scheduler = SCHEDULERS[args.scheduler].from_config(pipe.scheduler.config)
    return pipe.to(args.device)


def draw(pipe: Any, args: argparse.Namespace, seed: int) -> tuple[torch.Tensor, float]:
    """Images (B, C, H, W) in [-1, 1], and seconds."""
    torch.manual_seed(seed)  # DiTPipeline hands no generator to stochastic schedulers
    condition = {"prompt": args.prompt} if args.prompt else {"class_labels": args.class_labels}
    start = time.perf_counter()
    images = pipe(
        **condition,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1, time.perf_counter() - start


def key_steps(pipe: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the config that say when the encoder runs."""
    if args.calibrate:
        schedule = calibrate_key_steps(
            pipe,
            lambda: draw(pipe, args, args.seed + 1)[0],
            args.calibrate,
            propagation=args.propagation,
            encoder_share=args.encoder_share,
        )
        if args.save_schedule:
            schedule.save(args.save_schedule)
        return {"key_steps": schedule}
    if args.schedule:
        return {"key_steps": KeySchedule.load(args.schedule)}
    if args.key_steps:
        is_name = len(args.key_steps) == 1 and not args.key_steps[0].isdigit()
        return {"key_steps": args.key_steps[0] if is_name else [int(step) for step in args.key_steps]}
    return {"every": args.every or 3}


def main() -> None:
    args = parse_args()
    check_writable(Path(args.output).parent, "--output")
    pipe = load(args)
    config = FasterDiffusionConfig(
        **key_steps(pipe, args),
        encoder_share=args.encoder_share,
        propagation=args.propagation,
        batched=args.batched,
        max_batch=args.max_batch,
        noise_injection=args.noise_injection,
        noise_injection_below=args.noise_injection_below,
    )
    config.key_steps_of(args.num_inference_steps)  # refuses key steps that do not fit before anything is computed
    draw(pipe, args, args.seed)  # warm up
    plain, plain_seconds = draw(pipe, args, args.seed)
    hook = apply_faster_diffusion(pipe, config)
    faster, seconds = draw(pipe, args, args.seed)
    print(hook.summary())
    labels = args.prompt or list(map(str, args.class_labels))
    named = [*(f"{label}" for label in labels), *(f"{label} fast" for label in labels)]
    labelled_grid(to_pil(torch.cat([plain, faster])), named, columns=len(labels)).save(args.output)
    deviation = float((faster - plain).norm() / (plain + 1).norm())
    print(
        f"{seconds:.2f} s instead of {plain_seconds:.2f} s ({plain_seconds / seconds:.2f}x), images differ by {deviation:.2%}"
    )
    print(f"above without, below with Faster Diffusion: {args.output}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, TypeError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
