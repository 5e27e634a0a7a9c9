"""Sample from a fixed-point diffusion model with any budget of iterations.

    python examples/sample_fpdm.py --num_inference_steps 20 --guidance_scale 4
    python examples/sample_fpdm.py --num_inference_steps 40 --num_iterations 3 --reuse_solution
    python examples/sample_fpdm.py --num_inference_steps 20 --budget 60 --allocation decreasing
    python examples/sample_fpdm.py --num_iterations 30 --tolerance 0.01 --stop sample --anderson_depth 3

`--sampler ancestral` draws from the reverse process with the variance the model has learned (models trained with
--learn_sigma); the pipeline of diffusers uses fixed variances only.
"""

import argparse
import time
from pathlib import Path

import torch
from diffusers import DiTPipeline

from diffusers_fastdiff import FixedPointSamplingConfig, FixedPointSolver, apply_fixed_point_sampling, load_pretrained
from diffusers_fastdiff.errors import check_writable
from diffusers_fastdiff.numerics.gaussian_diffusion import DiffusionSchedule, ancestral_step
from diffusers_fastdiff.pictures import labelled_grid, to_pil
from diffusers_fastdiff.pretrained import available_pretrained


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", default="digits-fpdm", help="embedded name, folder or Hub name")
    parser.add_argument("--class_labels", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--images_per_class", type=int, default=4)
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    parser.add_argument("--sampler", choices=["pipeline", "ancestral"], default="pipeline")
    parser.add_argument("--num_iterations", type=int, nargs="+", help="of every step, or a list with one entry for each step")
    parser.add_argument("--budget", type=int, help="iterations of the whole run")
    parser.add_argument("--allocation", choices=["constant", "increasing", "decreasing"], default="constant")
    parser.add_argument("--reuse_solution", action="store_true", help="start each step from the last solution")
    parser.add_argument("--tolerance", type=float, help="stop iterating below this relative residual")
    parser.add_argument("--stop", choices=["batch", "sample"], default="batch", help="what the tolerance stops")
    parser.add_argument("--anderson_depth", type=int, default=0, help="past iterates to mix, 0 for plain iteration")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="fpdm-samples.png")
    return parser.parse_args()


@torch.no_grad()
def sample_ancestral(pipe: DiTPipeline, labels: list[int], args: argparse.Namespace) -> list:
    """The reverse process with its learned variance, guided on all channels of the latents."""
    model, config = pipe.transformer, pipe.transformer.config
    if config.out_channels != 2 * config.in_channels:
        raise ValueError("`--sampler ancestral` needs a model with learned variance (trained with --learn_sigma).")
    generator = torch.Generator().manual_seed(args.seed)
    shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
    latents = torch.randn(shape, generator=generator).to(args.device)
    timesteps = torch.linspace(0, 999, args.num_inference_steps, dtype=torch.float64).round().long()
    schedule = DiffusionSchedule(pipe.scheduler.alphas_cumprod.double()).respaced(timesteps).to(args.device)
    labels = torch.tensor(labels, device=args.device)
    nulls = torch.full_like(labels, model.null_label)
    pipe.scheduler.set_timesteps(args.num_inference_steps)  # tells the hook that a run begins
    for index in reversed(range(args.num_inference_steps)):
        doubled, both = torch.cat([latents, latents]), torch.cat([labels, nulls])
        output = model(doubled, timesteps[index].to(args.device), both).sample
        conditional, unconditional = output.chunk(2)
        channels = config.in_channels
        guided = unconditional[:, :channels] + args.guidance_scale * (conditional - unconditional)[:, :channels]
        output = torch.cat([guided, conditional[:, channels:]], dim=1)
        noise = torch.randn(shape, generator=generator).to(args.device)
        where = torch.full((len(labels),), index, device=args.device)
        latents = ancestral_step(schedule, output, latents, where, noise, pipe.scheduler.config.prediction_type)
    return to_pil(pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample)


def main() -> None:
    args = parse_args()
    check_writable(Path(args.output).parent, "--output")
    name = args.pretrained_model_name_or_path
    pipe = load_pretrained(name) if name in available_pretrained() else DiTPipeline.from_pretrained(name)
    pipe.to(args.device)
    iterations = args.num_iterations[0] if args.num_iterations and len(args.num_iterations) == 1 else args.num_iterations
    solver = FixedPointSolver(tolerance=args.tolerance, stop=args.stop, anderson_depth=args.anderson_depth)
    config = FixedPointSamplingConfig(
        num_iterations=iterations,
        budget=args.budget,
        allocation=args.allocation,
        reuse_solution=args.reuse_solution,
        solver=solver,
    )
    hook = apply_fixed_point_sampling(pipe, config)

    labels = args.class_labels * args.images_per_class
    start = time.perf_counter()
    if args.sampler == "ancestral":
        pictures = sample_ancestral(pipe, labels, args)
    else:
        generator = torch.Generator().manual_seed(args.seed)
        pictures = pipe(
            labels,
            guidance_scale=args.guidance_scale,
            num_inference_steps=args.num_inference_steps,
            generator=generator,
        ).images
    seconds = time.perf_counter() - start
    labelled_grid(pictures, list(map(str, labels)), columns=len(args.class_labels)).save(args.output)
    spent = [round(float(counts.float().mean()), 1) for counts in hook.iterations_spent]
    print(f"iterations of each step (mean over the batch): {spent}, together {sum(spent):.0f}")
    print(f"{len(pictures)} images in {seconds:.1f} s: {args.output}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, TypeError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
