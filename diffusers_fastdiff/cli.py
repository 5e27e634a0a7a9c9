"""The `fastdiff` command."""

import argparse
import contextlib
import io
import json
import os
import runpy
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from .errors import check_writable
from .evaluation.command import add_evaluate
from .hooks.fixed_point_sampling import FixedPointSamplingConfig, apply_fixed_point_sampling
from .pictures import labelled_grid
from .pretrained import available_pretrained, available_solvers, load_pretrained, open_pipeline

_EXAMPLES = """\
examples:
  fastdiff info                                                    what is embedded
  fastdiff sample --model digits-dit --solver digits-dit-lms-5 --guidance_scale 1 --output digits.png
  fastdiff sample --model digits-edm --num_inference_steps 11 --guidance_scale 1 --output - > digits.png
  fastdiff train-solver --student lms --nfe 5 --output_dir my-solver
  fastdiff search-grid my-grid --model digits-dit --num_inference_steps 6
  fastdiff convert edm edm-cifar10-32x32-cond-vp.pkl my-edm        reads the pickle, executes nothing in it
  fastdiff evaluate samples --reference digits --json | jq .metrics

exit status: 0, or 2 after a mistake, which is explained in one line on standard error.
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit status is 0, or 2 after a mistake of the user, which is explained in one line."""
    parser = argparse.ArgumentParser(
        prog="fastdiff",
        description="Fast diffusion models, from the command line.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_sample(commands)
    _add_train_solver(commands)
    _add_convert(commands)
    _add_search_grid(commands)
    add_evaluate(commands)
    _add_info(commands)
    commands.choices["evaluate"].set_defaults(run=_evaluate)
    for name, command in commands.choices.items():
        if name != "train-solver":  # which hands every flag on
            command.add_argument("--json", action="store_true", help="print the result as one JSON object")
    args, flags = parser.parse_known_args(argv)
    if args.command == "train-solver":
        args.flags = flags
    elif flags:
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(flags)}")
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"fastdiff {args.command}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        print(f"fastdiff {args.command}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _report(args: argparse.Namespace, text: str, facts: dict[str, Any]) -> None:
    print(json.dumps(facts, indent=2) if args.json else text)


def _open(name: str):
    """A pipeline; whatever a damaged folder makes diffusers raise is a mistake of the user."""
    try:
        return open_pipeline(name)
    except (AttributeError, KeyError, RuntimeError) as error:
        raise ValueError(f"The model {name!r} cannot be loaded: {error}") from error


def _add_sample(commands) -> None:
    parser = commands.add_parser("sample", help="draw a labelled grid of images", description=_sample.__doc__)
    parser.add_argument("--model", default="digits-fpdm", help="embedded name, folder or Hub name of a pipeline with labels")
    parser.add_argument("--labels", type=int, nargs="+", default=list(range(10)), help="classes to draw")
    parser.add_argument("--rows", type=int, default=4, help="images of each class")
    parser.add_argument("--num_inference_steps", type=int, help="by default 25, or what --solver was learned for")
    parser.add_argument("--guidance_scale", type=float, default=1.5, help="1 for none")
    parser.add_argument("--solver", help="embedded name, folder or Hub name of a learned solver (AMEDScheduler)")
    parser.add_argument("--iteration_budget", type=int, help="fixed-point iterations of the whole run (fixed-point models)")
    parser.add_argument("--allocation", default="constant", help="how to spread them: constant, increasing or decreasing")
    parser.add_argument("--reuse_solution", action="store_true", help="start each step from the last solution")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("digits.png"), help="picture; - writes PNG to standard output")
    parser.set_defaults(run=_sample)


def _sample(args: argparse.Namespace) -> None:
    """Draw images of the given classes with a pipeline that takes labels and save them as one labelled picture."""
    to_pipe = args.output == Path("-")
    if to_pipe and args.json:
        raise ValueError("`--json` and `--output -` cannot both have standard output: give a file.")
    if not to_pipe:
        check_writable(args.output.parent, "--output")
    if args.rows < 1:
        raise ValueError(f"`--rows` must be at least 1, got {args.rows}.")
    pipe = _sampling_pipeline(args)
    labels = args.labels * args.rows
    model = getattr(pipe, "transformer", None) or pipe.unet
    evaluations: list[int] = []
    counter = model.register_forward_pre_hook(lambda *_: evaluations.append(1))
    start = time.perf_counter()
    pictures = pipe(
        labels,
        guidance_scale=args.guidance_scale,
        num_inference_steps=args.num_inference_steps,
        generator=torch.Generator().manual_seed(args.seed),
    ).images
    seconds = time.perf_counter() - start
    counter.remove()
    picture = labelled_grid(pictures, list(map(str, labels)), columns=len(args.labels))
    if to_pipe:
        data = io.BytesIO()
        picture.save(data, "PNG")
        sys.stdout.buffer.write(data.getvalue())
        return
    picture.save(args.output)
    text = f"{len(pictures)} images, {len(evaluations)} model evaluations, {seconds:.1f} s: {args.output}"
    facts = {"images": len(pictures), "labels": labels, "model_evaluations": len(evaluations), "seconds": round(seconds, 3)}
    _report(args, text, facts | {"output": str(args.output)})


def _sampling_pipeline(args: argparse.Namespace):
    """The pipeline with its solver and budget."""
    import diffusers

    from . import AMEDScheduler, EDMPipeline, GDDIMPipeline

    pipe = _open(args.model)
    if not isinstance(pipe, (diffusers.DiTPipeline, EDMPipeline, GDDIMPipeline)):
        raise ValueError(
            "`--model` must be a DiTPipeline, EDMPipeline or GDDIMPipeline such as "
            f"{available_pretrained()}; {args.model!r} is a {type(pipe).__name__}."
        )
    if args.solver is not None:
        is_embedded = args.solver in available_solvers()
        solver = load_pretrained(args.solver) if is_embedded else AMEDScheduler.from_pretrained(args.solver)
        solver.attach(pipe)
        if args.num_inference_steps is None:
            args.num_inference_steps = (solver.config.fitted_to or {}).get("num_inference_steps")
    if args.num_inference_steps is None:
        args.num_inference_steps = 25
    if args.iteration_budget is not None or args.reuse_solution:
        config = FixedPointSamplingConfig(
            budget=args.iteration_budget, allocation=args.allocation, reuse_solution=args.reuse_solution
        )
        apply_fixed_point_sampling(pipe, config)
    return pipe


def _add_train_solver(commands) -> None:
    parser = commands.add_parser(
        "train-solver", help="learn a few-step solver for a model", description=_train_solver.__doc__, add_help=False
    )
    parser.set_defaults(run=_train_solver)


def _train_solver(args: argparse.Namespace) -> None:
    """The script examples/train_amed.py with its flags; several processes: `accelerate launch` it."""
    folders = (Path(__file__).parent / "examples", Path(__file__).parents[1] / "examples")  # of the wheel, of the source tree
    script = next((folder / "train_amed.py" for folder in folders if (folder / "train_amed.py").is_file()), None)
    if script is None:
        raise ValueError("this installation has no training script: run examples/train_amed.py of the source tree.")
    as_json = "--json" in args.flags
    # The script reads its flags from here, also for the command in the card it writes.
    previous, sys.argv = sys.argv, [str(script), *(flag for flag in args.flags if flag != "--json")]
    try:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            names = runpy.run_path(str(script), run_name="fastdiff_train_solver")
            output_dir = names["parse_args"]().output_dir
            names["main"]()
    finally:
        sys.argv = previous
    if as_json:
        report = json.loads((Path(output_dir) / "report.json").read_text())
        print(json.dumps(report | {"output_dir": str(output_dir)}, indent=2))


def _evaluate(args: argparse.Namespace) -> None:
    """With --json, what --output would hold goes to standard output and the table to standard error."""
    from .evaluation.command import run

    if not args.json:
        run(args)
        return
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        wanted, args.output = args.output, args.output or Path(folder) / "result.json"
        run(args)
        result = args.output.read_text() if args.output.is_file() else None  # only the main process has one
        args.output = wanted
    if result is not None:
        print(result, end="")


def _add_info(commands) -> None:
    parser = commands.add_parser("info", help="what is embedded, what a folder holds", description=_info.__doc__)
    parser.add_argument("name", nargs="?", help="embedded name or folder; without, everything that is embedded")
    parser.set_defaults(run=_info)


def _info(args: argparse.Namespace) -> None:
    """Tell classes, sizes and what a solver was learned for, from JSON and headers alone: nothing is built or executed."""
    import diffusers

    from . import __version__
    from .folder_info import describe, describe_embedded, summarize

    if args.name is not None:
        facts = describe(args.name)
        _report(args, f"{args.name}: {summarize(facts)}", facts)
        return
    versions = {"diffusers_fastdiff": __version__, "diffusers": diffusers.__version__, "torch": torch.__version__}
    embedded = describe_embedded()
    lines = [", ".join(f"{name} {version}" for name, version in versions.items())]
    lines += [f"{name:28} {summarize(facts)}" for name, facts in embedded.items()]
    _report(args, "\n".join(lines), {"versions": versions, "embedded": embedded})


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
    pipe = _open(args.model)
    plain = IPNDMMultistepScheduler.from_config(pipe.scheduler.config, solver_order=args.solver_order)
    prompts = args.prompts_file.read_text().splitlines() if args.prompts_file else None
    denoiser = PipelineDenoiser(pipe, plain.noise_model, args.guidance_scale, prompts)
    low, high = plain.noise_model.sigma_range
    ends = [high if args.sigma_max is None else args.sigma_max, low if args.sigma_min is None else args.sigma_min]
    sigmas = search_pipeline_grid(denoiser, ends, args.num_inference_steps, seed=args.seed)
    IPNDMMultistepScheduler.from_config(plain.config, sigmas=sigmas).save_pretrained(args.output)
    text = " ".join(f"{sigma:.4g}" for sigma in sigmas) + f": {args.output}"
    _report(args, text, {"sigmas": list(sigmas), "output": str(args.output)})


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
        _save_model(args, predictor)
        return
    options = {"num_attention_heads": args.num_attention_heads, "weights": args.weights}
    if args.kind == "fpdm":
        options |= {
            "num_iterations": args.num_iterations,
            "pre_post_timestep_conditioning": args.pre_post_timestep_conditioning,
            "flow": args.flow,
        }
    model = (convert_fpdm if args.kind == "fpdm" else convert_dit)(args.checkpoint, **options)
    _save_model(args, model)


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
    parameters = converted.unet.num_parameters()
    text = f"EDMPipeline, {parameters:,} parameters, {type(scheduler).__name__}: {args.output}"
    facts = {"class": "EDMPipeline", "parameters": parameters, "scheduler": type(scheduler).__name__}
    _report(args, text, facts | {"output": str(args.output)})


def _save_model(args: argparse.Namespace, model) -> None:
    model.save_pretrained(args.output)
    parameters = model.num_parameters()
    text = f"{type(model).__name__}, {parameters:,} parameters: {args.output}"
    _report(args, text, {"class": type(model).__name__, "parameters": parameters, "output": str(args.output)})


if __name__ == "__main__":
    sys.exit(main())
