"""Draw many images, on any number of processes, as files.

    accelerate launch examples/sample_images.py --pipeline digits-dit --num_images 2000 --labels balanced --output_dir samples
    accelerate launch examples/sample_images.py --pipeline my-edm-folder --seeds 0-49999 --format npz --images_per_call 256
    accelerate launch examples/sample_images.py --pipeline digits-fpdm --num_images 500 --num_inference_steps 20 \
        --fixed_point '{"budget": 60, "reuse_solution": true}'
    accelerate launch examples/sample_images.py --pipeline digits-dit --num_images 500 --scheduler DPMSolverMultistepScheduler \
        --scheduler_options '{"use_karras_sigmas": true}' --faster_diffusion '{"every": 3}'
    accelerate launch examples/sample_images.py --pipeline my-sd-folder --num_images 100 --prompts captions.txt

Image k has a generator of its own, seeded with the k-th seed. The images are the same bytes for every number of processes and
every --batch_size, and after any number of interruptions: run the same command again to continue. They do depend, in the last
bit, on --images_per_call, the kind of device and the versions of the libraries, which sampling.json records.

Measure the result with `fastdiff evaluate <output_dir> --reference ...`.
"""

import argparse
import hashlib
import inspect
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from tqdm import tqdm

import diffusers_fastdiff
from diffusers_fastdiff import (
    FasterDiffusionConfig,
    FixedPointSamplingConfig,
    apply_faster_diffusion,
    apply_fixed_point_sampling,
    load_pretrained,
)
from diffusers_fastdiff.errors import check_writable, require
from diffusers_fastdiff.evaluation.image_store import FORMATS, ImageStore
from diffusers_fastdiff.evaluation.processes import join_processes
from diffusers_fastdiff.evaluation.report import versions
from diffusers_fastdiff.evaluation.sampling_plan import Call, choose_labels, parse_seeds, plan_calls, share
from diffusers_fastdiff.pretrained import available_pretrained
from diffusers_fastdiff.training.randomness import derive_seed

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# What does not change the images. All the rest must stay the same when a run is continued.
FREE_SETTINGS = ("output_dir", "batch_size")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, help="embedded name, folder or Hub name")
    parser.add_argument("--output_dir", type=Path, default=Path("samples"))
    parser.add_argument("--num_images", type=int)
    parser.add_argument("--seeds", help="such as 0-49999 or 1,2,10-19: one for each image; by default 0 to num_images - 1")
    parser.add_argument("--batch_size", type=int, default=64, help="images that a process draws at a time, then saves")
    parser.add_argument(
        "--images_per_call",
        type=int,
        default=8,
        help="images in a call of the pipeline, always exactly so many; part of what the images are. More is faster on a GPU",
    )
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["png"], help="npz is that of the ADM evaluation")
    parser.add_argument("--images_per_archive", type=int, default=1000, help="of tar archives")
    group = parser.add_argument_group("conditions")
    group.add_argument("--labels", nargs="+", default=["random"], help="random, balanced, or class numbers taken in turn")
    group.add_argument("--prompts", type=Path, help="text file with a prompt on each line, taken in turn")
    group.add_argument("--prompt_dataset", help="dataset on the Hub or on disk; row k is for image k")
    group.add_argument("--prompt_split", default="train")
    group.add_argument("--prompt_column", default="text")
    group = parser.add_argument_group("sampling")
    group.add_argument("--num_inference_steps", type=int, default=50)
    group.add_argument("--guidance_scale", type=float, help="by default that of the pipeline")
    group.add_argument("--call_options", type=json.loads, default={}, help="more arguments of the call: '{\"eta\": 0.5}'")
    group.add_argument("--scheduler", help="class, or folder of a saved scheduler (also a learned one), instead of its own")
    group.add_argument("--scheduler_options", type=json.loads, default={}, help="settings to change in its config, as JSON")
    group.add_argument("--faster_diffusion", type=json.loads, help="FasterDiffusionConfig as JSON: '{\"every\": 3}'")
    group.add_argument("--fixed_point", type=json.loads, help="FixedPointSamplingConfig as JSON: '{\"budget\": 60}'")
    group.add_argument("--dtype", choices=list(DTYPES), default="float32")
    group.add_argument("--cpu_threads", type=int, default=1, help="of each process; sums depend on it in the last bit")
    args = parser.parse_args()
    for name in ("batch_size", "images_per_call", "images_per_archive", "cpu_threads", "num_inference_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"`--{name}` must be at least 1, got {getattr(args, name)}.")
    return args


def find_class(name: str | list[str], kind: type) -> Any:
    """A pipeline or scheduler of this package or of diffusers."""
    name = name if isinstance(name, str) else name[-1]
    found = getattr(diffusers_fastdiff, name, None) or getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ValueError(
            f"{name!r} is no folder, and neither diffusers_fastdiff nor diffusers has a {kind.__name__} of that name."
        )
    return found


def open_pipeline(args: argparse.Namespace) -> DiffusionPipeline:
    """The pipeline with the scheduler and hooks that were asked for."""
    dtype = DTYPES[args.dtype]
    if args.pipeline in available_pretrained():
        pipe = load_pretrained(args.pipeline, torch_dtype=dtype)
    else:
        # The class is looked up here because `DiffusionPipeline.from_pretrained` knows only those of diffusers.
        cls = find_class(DiffusionPipeline.load_config(args.pipeline)["_class_name"], DiffusionPipeline)
        pipe = cls.from_pretrained(args.pipeline, torch_dtype=dtype, use_safetensors=True)
    scheduler = pipe.scheduler
    if args.scheduler is not None and Path(args.scheduler).is_dir():
        folder = Path(args.scheduler)
        folder = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
        config = json.loads((folder / "scheduler_config.json").read_text())
        scheduler = find_class(config["_class_name"], SchedulerMixin).from_pretrained(folder, **args.scheduler_options)
    elif args.scheduler is not None or args.scheduler_options:
        cls = type(scheduler) if args.scheduler is None else find_class(args.scheduler, SchedulerMixin)
        scheduler = cls.from_config(scheduler.config, **args.scheduler_options)
    if hasattr(scheduler, "attach"):  # learned solvers see the denoiser
        scheduler.attach(pipe)
    pipe.scheduler = scheduler
    if args.faster_diffusion is not None:
        apply_faster_diffusion(pipe, FasterDiffusionConfig(**args.faster_diffusion))
    if args.fixed_point is not None:
        apply_fixed_point_sampling(pipe, FixedPointSamplingConfig(**args.fixed_point))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def count_classes(pipe: DiffusionPipeline) -> int | None:
    """Classes of the denoiser; None for a model without."""
    config = (getattr(pipe, "transformer", None) or pipe.unet).config
    names = ("num_classes", "num_embeds_ada_norm", "num_class_embeds")
    return next((config[name] for name in names if config.get(name) is not None), None)


def describe_images(pipe: DiffusionPipeline, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seed and condition of each image."""
    seeds = parse_seeds(args.seeds, args.num_images)
    accepted = inspect.signature(pipe.__call__).parameters
    if "prompt" in accepted:
        if args.prompt_dataset is not None:
            dataset = require("datasets", "train").load_dataset(args.prompt_dataset, split=args.prompt_split)
            if args.prompt_column not in dataset.features or len(dataset) < len(seeds):
                raise ValueError(
                    f"`--prompt_dataset` must have a column {args.prompt_column!r} and {len(seeds)} rows; it has "
                    f"{sorted(dataset.features)} and {len(dataset)}."
                )
            prompts = [str(prompt) for prompt in dataset[: len(seeds)][args.prompt_column]]
        elif args.prompts is not None:
            prompts = args.prompts.read_text(encoding="utf-8").splitlines()
        else:
            raise ValueError(f"{type(pipe).__name__} needs prompts: give `--prompts` or `--prompt_dataset`.")
        if not prompts:
            raise ValueError(f"`--prompts` {str(args.prompts)!r} is empty.")
        return [{"seed": seed, "prompt": prompts[index % len(prompts)]} for index, seed in enumerate(seeds)]
    num_classes = count_classes(pipe)
    if "class_labels" in accepted and num_classes is not None:
        labels = choose_labels(args.labels, seeds, num_classes)
        return [{"seed": seed, "label": label} for seed, label in zip(seeds, labels, strict=True)]
    return [{"seed": seed} for seed in seeds]


def draw(pipe: DiffusionPipeline, call: Call, args: argparse.Namespace) -> list:
    """One call of the pipeline, with a generator for each image."""
    options = {"num_inference_steps": args.num_inference_steps, **args.call_options}
    if args.guidance_scale is not None:
        options["guidance_scale"] = args.guidance_scale
    first = call.rows[0]
    if "prompt" in first:
        options["prompt"] = [row["prompt"] for row in call.rows]
    elif "label" in first:
        options["class_labels"] = [row["label"] for row in call.rows]
    else:
        options["batch_size"] = len(call.rows)
    # On the CPU, so that the noise is the same on every device.
    # DiTPipeline hands them no further, so that schedulers with noise use the global generator.
    torch.manual_seed(derive_seed("call", *(row["seed"] for row in call.rows)))
    generators = [torch.Generator().manual_seed(row["seed"]) for row in call.rows]
    return pipe(generator=generators, output_type="pil", **options).images[: len(call.indices)]


def settings_of_run(pipe: DiffusionPipeline, rows: list, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Everything that the images depend on."""
    settings = {key: value for key, value in vars(args).items() if key not in FREE_SETTINGS}
    settings |= {key: str(value) for key, value in settings.items() if isinstance(value, Path)}
    weights = hashlib.blake2b(digest_size=16)
    learned = {"predictor": getattr(pipe.scheduler, "predictor", None)}  # of a learned solver
    for name, component in sorted((pipe.components | learned).items()):
        if isinstance(component, torch.nn.Module):
            for key, value in sorted(component.state_dict().items()):
                weights.update(f"{name}.{key}".encode())
                weights.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return settings | {
        "num_images": len(rows),
        "rows": hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest(),
        "weights": weights.hexdigest(),
        "scheduler_class": type(pipe.scheduler).__name__,
        "scheduler_config": {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": versions(),
        "command": shlex.join(["accelerate", "launch", *sys.argv]),
    }


def main() -> None:
    args = parse_args()
    state = join_processes()
    torch.backends.cudnn.deterministic = True
    torch.set_num_threads(args.cpu_threads)
    check_writable(args.output_dir, "--output_dir")
    pipe = open_pipeline(args)
    rows = describe_images(pipe, args)
    store = ImageStore(args.output_dir, rows, args.format, args.images_per_archive)
    settings = settings_of_run(pipe, rows, args, state.device)
    if state.is_main_process:
        store.start(settings)
    state.wait_for_everyone()
    finished = store.finished()
    calls = plan_calls(rows, args.images_per_call, finished)
    state.wait_for_everyone()  # nobody may finish an image before everybody has looked

    pipe.to(state.device)
    progress = tqdm(total=len(rows), initial=len(finished), desc="images", disable=not state.is_main_process)
    count, last_look = 0, 0.0

    def look(patience: float) -> int:
        """Count the images of all processes, at most once in `patience` seconds."""
        nonlocal count, last_look
        if time.monotonic() - last_look >= patience:
            count, last_look = len(store.finished()), time.monotonic()
            progress.update(count - progress.n)
        return count

    calls_at_a_time = -(-args.batch_size // args.images_per_call)
    for piece in share(calls, calls_at_a_time, state.process_index, state.num_processes):
        drawn = [(call, draw(pipe, call, args)) for call in piece]
        for call, pictures in drawn:
            for index, picture in zip(call.indices, pictures, strict=True):
                store.save(index, picture)
        look(patience=1)
    while look(patience=0) < len(rows):  # other processes; if one fails, the launcher ends all
        time.sleep(0.2)
    progress.close()
    state.wait_for_everyone()
    if state.is_main_process:
        store.pack()
        print(f"{len(rows)} images: {args.output_dir}")
    state.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from None
