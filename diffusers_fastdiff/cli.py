"""The `fastdiff` command."""

import argparse
import sys
import time
from pathlib import Path

import torch

from .errors import check_writable
from .evaluation.command import add_evaluate
from .hooks.fixed_point_sampling import FixedPointSamplingConfig, apply_fixed_point_sampling
from .pictures import labelled_grid
from .pretrained import available_pretrained, open_pipeline


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit status is 0, or 2 after a mistake of the user, which is explained in one line."""
    parser = argparse.ArgumentParser(prog="fastdiff", description="Fast diffusion models, from the command line.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_sample(commands)
    _add_convert(commands)
    _add_search_grid(commands)
    add_evaluate(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"fastdiff {args.command}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _add_sample(commands) -> None:
    parser = commands.add_parser("sample", help="draw a labelled grid of images", description=_sample.__doc__)
    parser.add_argument("--model", default="digits-fpdm", help="an embedded pipeline or a folder of a DiTPipeline")
    parser.add_argument("--labels", type=int, nargs="+", default=list(range(10)), help="classes to draw")
    parser.add_argument("--rows", type=int, default=4, help="images of each class")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=1.5, help="1 for none")
    parser.add_argument("--iteration_budget", type=int, help="fixed-point iterations of the whole run (fixed-point models)")
    parser.add_argument("--allocation", default="constant", help="how to spread them: constant, increasing or decreasing")
    parser.add_argument("--reuse_solution", action="store_true", help="start each step from the last solution")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("digits.png"))
    parser.set_defaults(run=_sample)


def _sample(args: argparse.Namespace) -> None:
    """Draw images of the given classes with a DiTPipeline and save them as one labelled picture."""
    import diffusers

    check_writable(args.output.parent, "--output")
    if args.rows < 1:
        raise ValueError(f"`--rows` must be at least 1, got {args.rows}.")
    pipe = open_pipeline(args.model)
    if not isinstance(pipe, diffusers.DiTPipeline):
        raise ValueError(
            f"`--model` must be a DiTPipeline such as {available_pretrained()}; {args.model!r} is a {type(pipe).__name__}."
        )
    if args.iteration_budget is not None or args.reuse_solution:
        config = FixedPointSamplingConfig(
            budget=args.iteration_budget, allocation=args.allocation, reuse_solution=args.reuse_solution
        )
        apply_fixed_point_sampling(pipe, config)
    labels = args.labels * args.rows
    counter = pipe.transformer.register_forward_pre_hook(lambda *_: evaluations.append(1))
    evaluations: list[int] = []
    start = time.perf_counter()
    pictures = pipe(
        labels,
        guidance_scale=args.guidance_scale,
        num_inference_steps=args.num_inference_steps,
        generator=torch.Generator().manual_seed(args.seed),
    ).images
    seconds = time.perf_counter() - start
    counter.remove()
    labelled_grid(pictures, list(map(str, labels)), columns=len(args.labels)).save(args.output)
    print(f"{len(pictures)} images, {len(evaluations)} model evaluations, {seconds:.1f} s: {args.output}")


def _add_search_grid(commands) -> None:
    parser = commands.add_parser("search-grid", help="search noise levels for few steps", description=_search_grid.__doc__)
    parser.add_argument("--model", default="digits-dit", help="embedded name, folder or Hub name of a pipeline")
    parser.add_argument("--num_inference_steps", type=int, default=6)
    parser.add_argument("--solver_order", type=int, default=3)
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="1 for none")
    parser.add_argument("--sigma_min", type=float, help="by default that of the model")
    parser.add_argument("--sigma_max", type=float, help="by default that of the model")
    parser.add_argument("--prompts_file", type=Path, help="text-to-image: one prompt in each line")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("output", type=Path, help="folder for an IPNDMMultistepScheduler with the grid")
    parser.set_defaults(run=_search_grid)


def _search_grid(args: argparse.Namespace) -> None:
    """Find the noise levels at which a model is best evaluated (GITS) and save an iPNDM scheduler that visits them."""
    from .schedulers.scheduling_ipndm import IPNDMMultistepScheduler
    from .training.pipeline_denoiser import PipelineDenoiser, search_pipeline_grid

    check_writable(args.output, "output")
    if args.num_inference_steps < 2:
        raise ValueError(f"`--num_inference_steps` must be at least 2, got {args.num_inference_steps}.")
    pipe = open_pipeline(args.model)
    plain = IPNDMMultistepScheduler.from_config(pipe.scheduler.config, solver_order=args.solver_order)
    prompts = args.prompts_file.read_text().splitlines() if args.prompts_file else None
    denoiser = PipelineDenoiser(pipe, plain.noise_model, args.guidance_scale, prompts)
    low, high = plain.noise_model.sigma_range
    ends = [high if args.sigma_max is None else args.sigma_max, low if args.sigma_min is None else args.sigma_min]
    sigmas = search_pipeline_grid(denoiser, ends, args.num_inference_steps, seed=args.seed)
    IPNDMMultistepScheduler.from_config(plain.config, sigmas=sigmas).save_pretrained(args.output)
    print(" ".join(f"{sigma:.4g}" for sigma in sigmas) + f": {args.output}")


def _add_convert(commands) -> None:
    parser = commands.add_parser(
        "convert", help="convert an original checkpoint to the layout of diffusers", description=_convert.__doc__
    )
    parser.add_argument("kind", choices=["amed", "dit", "edm", "fpdm"], help="what the checkpoint holds")
    parser.add_argument("checkpoint", type=Path, help="file: safetensors, a PyTorch file, or a pickle of EDM and FDM")
    parser.add_argument("output", type=Path, help="folder for the converted model")
    parser.add_argument("--weights", choices=["ema", "model"], default="ema", help="weights of a training checkpoint")
    parser.add_argument("--num_attention_heads", type=int, help="for widths that were not published")
    parser.add_argument("--num_iterations", type=int, help="fpdm: default iterations of the model")
    parser.add_argument(
        "--pre_post_timestep_conditioning",
        action=argparse.BooleanOptionalAction,
        help="fpdm: whether the outer layers see the timestep, where the checkpoint does not say so",
    )
    parser.add_argument("--flow", action="store_true", help="fpdm: trained with the original's rectified flow")
    parser.add_argument("--scale_dir", type=float, default=0.0, help="amed: half-width of the direction scale")
    parser.add_argument("--scale_time", type=float, default=0.0, help="amed: half-width of the time scale")
    parser.add_argument("--formulation", choices=["vp", "ve", "edm"], help="edm: where the file does not say so")
    parser.add_argument("--family", choices=["adm", "consistency"], help="edm: networks in ADM's names")
    parser.add_argument("--sample_size", type=int, help="edm: side of the images, for networks in ADM's names")
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> None:
    """Read an original checkpoint without executing anything in it and save it for `from_pretrained`."""
    from .conversion import convert_amed, convert_dit, convert_fpdm

    check_writable(args.output, "output")
    if args.kind == "edm":
        _convert_edm(args)
        return
    if args.kind == "amed":
        predictor = convert_amed(args.checkpoint, scale_dir=args.scale_dir, scale_time=args.scale_time)
        _save_model(predictor, args.output)
        return
    options = {"num_attention_heads": args.num_attention_heads, "weights": args.weights}
    if args.kind == "fpdm":
        options |= {
            "num_iterations": args.num_iterations,
            "pre_post_timestep_conditioning": args.pre_post_timestep_conditioning,
            "flow": args.flow,
        }
    model = (convert_fpdm if args.kind == "fpdm" else convert_dit)(args.checkpoint, **options)
    _save_model(model, args.output)


def _convert_edm(args: argparse.Namespace) -> None:
    """As a pipeline with the scheduler of its formulation."""
    import diffusers_fastdiff

    from .conversion import convert_edm

    converted = convert_edm(
        args.checkpoint, weights=args.weights, kind=args.formulation, family=args.family, sample_size=args.sample_size
    )
    config = converted.scheduler_config
    scheduler = getattr(diffusers_fastdiff, config["_class_name"]).from_config(config)
    diffusers_fastdiff.EDMPipeline(converted.unet, scheduler).save_pretrained(args.output)
    print(f"EDMPipeline, {converted.unet.num_parameters():,} parameters, {type(scheduler).__name__}: {args.output}")


def _save_model(model, output: Path) -> None:
    model.save_pretrained(output)
    print(f"{type(model).__name__}, {model.num_parameters():,} parameters: {output}")


if __name__ == "__main__":
    sys.exit(main())
