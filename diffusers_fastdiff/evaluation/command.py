"""`fastdiff evaluate`. Several processes: `accelerate launch -m diffusers_fastdiff.cli evaluate ...`."""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME

from ..errors import check_writable
from .clip_score import clip_scores
from .extractors import EXTRACTORS, load_extractor
from .feature_table import extract_features
from .images import ImageSet, open_images
from .processes import join_processes
from .reference import measure_reference, open_reference
from .report import METRICS, EvaluationConfig, check_count, evaluate
from .statistics_file import save_statistics


def add_evaluate(commands) -> None:
    """Add the command to the subparsers of `fastdiff`."""
    parser = commands.add_parser("evaluate", help="measure images: FID, KID and so on", description=run.__doc__)
    parser.add_argument("images", help="folder, .tar, .zip or .npz of images, 'digits', or 'hub:NAME'")
    parser.add_argument("--reference", default="digits", help="the same, or an .npz of statistics (ours, EDM's or ADM's)")
    parser.add_argument("--reference_extractor", choices=EXTRACTORS, help="what made statistics that do not say")
    parser.add_argument("--extractor", choices=EXTRACTORS, default="digits-classifier")
    parser.add_argument("--extractor_weights", type=Path, help="safetensors file of an Inception network")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, help="by default all that the data allow")
    parser.add_argument("--bootstrap", type=int, default=20, help="resampled sets for standard errors, 0 for none")
    parser.add_argument("--kid_subsets", type=int, default=100)
    parser.add_argument("--kid_subset_size", type=int, default=1000)
    parser.add_argument("--inception_score_splits", type=int, default=10)
    parser.add_argument("--neighbours", type=int, default=3, help="of precision and recall")
    parser.add_argument("--precision_recall_size", type=int, default=10_000, help="most images of either set")
    parser.add_argument("--seed", type=int, default=0, help="of subsets, splits and resampling")
    parser.add_argument("--prompts", type=Path, help="text file, a line for each image; by default of metadata.jsonl")
    parser.add_argument("--clip_model", help="folder or Hub name of a CLIP model, for the CLIP score")
    parser.add_argument("--resolution", type=int, help="of datasets, which are resized and cropped")
    parser.add_argument("--dataset_split", default="train")
    parser.add_argument("--image_column", help="of datasets")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read images, for each process")
    parser.add_argument("--cache_dir", type=Path, default=Path(HF_HOME) / "diffusers_fastdiff", help="for features")
    parser.add_argument("--save_statistics", type=Path, help="write those of the reference to this .npz")
    parser.add_argument("--output", type=Path, help="write the result to this JSON file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure images against a reference and print the numbers with their intervals; --output keeps every setting, too."""
    state = join_processes()
    for option, path in (("--output", args.output), ("--save_statistics", args.save_statistics)):
        if path is not None:
            check_writable(path.parent, option)
    check_writable(args.cache_dir, "--cache_dir")
    if args.batch_size < 1:
        raise ValueError(f"`--batch_size` must be at least 1, got {args.batch_size}.")
    names = EvaluationConfig.__dataclass_fields__.keys() & vars(args).keys()
    config = EvaluationConfig(**{name: getattr(args, name) for name in names} | {"metrics": args.metrics and (*args.metrics,)})
    extractor = load_extractor(args.extractor, args.extractor_weights)
    data = (args.resolution, args.dataset_split, args.image_column)
    images, opened = open_images(args.images, *data), open_reference(args.reference, *data)
    prompts = _prompts(args, images)
    extractor.check(images.shape, images.name)
    for each in (images, opened):
        if isinstance(each, ImageSet):
            check_count(config, len(each), extractor.sizes, each.name)

    reference = measure_reference(
        opened, extractor, images.shape, args.cache_dir, args.batch_size, args.num_workers, args.reference_extractor, state
    )
    table = extract_features(images, extractor, args.cache_dir, args.batch_size, args.num_workers, state)
    if not state.is_main_process:
        return
    if args.save_statistics is not None:
        save_statistics(args.save_statistics, reference.statistics)
    scores = None
    if prompts is not None and args.clip_model is not None:
        scores = clip_scores(images, prompts, args.clip_model, args.batch_size, state.device)
    result = evaluate(table, reference, config, scores)
    result |= {"command": shlex.join(["fastdiff", *sys.argv[1:]]), "clip_model": args.clip_model, "sampling": _sampling(args)}
    _print(result)
    if args.output is not None:
        partial = args.output.with_name(f".{args.output.name}.tmp-{os.getpid()}")
        partial.write_text(json.dumps(result, indent=2) + "\n")
        os.replace(partial, args.output)


def _prompts(args: argparse.Namespace, images: ImageSet) -> list[str] | None:
    prompts = images.prompts if args.prompts is None else args.prompts.read_text(encoding="utf-8").splitlines()
    if prompts is not None and len(prompts) != len(images):
        raise ValueError(f"`--prompts` must have a line for each of the {len(images)} images, got {len(prompts)}.")
    if args.clip_model is not None and prompts is None:
        raise ValueError("`--clip_model` needs prompts: give `--prompts`, a text file with a line for each image.")
    return prompts


def _sampling(args: argparse.Namespace) -> dict[str, Any] | None:
    """How the images were drawn, if examples/sample_images.py has drawn them."""
    source = Path(args.images)
    path = (source if source.is_dir() else source.parent) / "sampling.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _print(result: dict[str, Any]) -> None:
    print(f"{result['num_images']} images, extractor {result['extractor']}, reference {result['reference']['source']}")
    for name, numbers in result["metrics"].items():
        interval = numbers.get("interval")
        print(f"{name:16} {numbers['value']:10.5g}" + (f"   [{interval[0]:.5g}, {interval[1]:.5g}]" if interval else ""))
    for name, reason in result["left_out"].items():
        print(f"{name:16} left out: {reason}")
    if result["noise_floor"] is not None:
        floor = {name: value for name, value in result["noise_floor"].items() if name != "num_images"}
        text = ", ".join(f"{name} {value:.5g}" for name, value in floor.items())
        print(f"noise floor (two halves of the reference, {result['noise_floor']['num_images']} images each): {text}")
