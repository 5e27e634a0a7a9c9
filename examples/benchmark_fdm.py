"""EDM, VP and VE with and without the momentum of FDM at equal budgets: quality against images seen and against evaluations.

    python examples/benchmark_fdm.py                              # all formulations, three seeds, on digits
    python examples/benchmark_fdm.py --formulations edm --seeds 0 --max_train_steps 3000

Every run trains a network of the same size with the same data order, noise draws, optimiser and average of weights, and differs
only in formulation and momentum. It writes its numbers when it ends, and is not repeated when the script is started again with
the same settings. Seeds are the outer loop: whatever is done when the script is stopped is a fair comparison.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm.auto import tqdm

from diffusers_fastdiff.errors import check_writable, require
from diffusers_fastdiff.evaluation.digits import evaluate_digits
from diffusers_fastdiff.evaluation.tables import write_table
from diffusers_fastdiff.models.unet_edm import EDMUNet2DModel
from diffusers_fastdiff.numerics.momentum import warmup_clamp
from diffusers_fastdiff.pipelines.pipeline_edm import EDMPipeline
from diffusers_fastdiff.schedulers.scheduling_fdm import FDMEDMScheduler, FDMVEScheduler, FDMVPScheduler
from diffusers_fastdiff.training.data import DigitsDataset, ShuffledBatches
from diffusers_fastdiff.training.edm_loss import edm_loss
from diffusers_fastdiff.training.edm_schedule import half_life_decay
from diffusers_fastdiff.training.randomness import BatchRandom, derive_seed

SCHEDULERS = {"vp": FDMVPScheduler, "ve": FDMVEScheduler, "edm": FDMEDMScheduler}
BATCH = 128


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formulations", nargs="+", choices=list(SCHEDULERS), default=["edm", "vp", "ve"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max_train_steps", type=int, default=300, help=f"of {BATCH} images each")
    parser.add_argument("--model_channels", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--warmup_steps", type=int, default=30, help="bound on loss weights, with momentum")
    parser.add_argument("--multiplier", type=float, default=1.0)
    parser.add_argument("--num_images", type=int, default=500)
    parser.add_argument("--curve_points", type=int, default=4, help="evaluations during training, the last one at the end")
    parser.add_argument("--curve_num_inference_steps", type=int, default=17)
    parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[5, 9, 17, 35], help="after training; odd")
    parser.add_argument("--output_dir", type=Path, default=Path("fdm-benchmark"))
    args = parser.parse_args()
    for count in (args.curve_num_inference_steps, *args.num_inference_steps):
        if count < 1 or count % 2 == 0:
            parser.error(f"--num_inference_steps must be odd for Heun's method, got {count}")
    return args


def one_run(args: argparse.Namespace, formulation: str, has_momentum: bool, seed: int) -> Iterator[dict]:
    """Train one network; yields a row for each evaluation."""
    scheduler = SCHEDULERS[formulation](multiplier=args.multiplier if has_momentum else None)
    torch.manual_seed(seed)
    model = EDMUNet2DModel(
        sample_size=8,
        in_channels=1,
        num_classes=10,
        model_channels=args.model_channels,
        channel_mult=(1, 2),
        layers_per_block=1,
        attention_resolutions=(4,),
        dropout=0.0,
    )
    model.initialize_weights()
    optimizer = torch.optim.Adam(model.parameters())
    average = {name: value.clone() for name, value in model.state_dict().items()}
    data = DigitsDataset()
    batches = iter(ShuffledBatches(len(data), BATCH, seed))
    due = {round(args.max_train_steps * (point + 1) / args.curve_points) for point in range(args.curve_points)}
    name = formulation.upper() + ("-FDM" if has_momentum else "")
    for step in tqdm(range(args.max_train_steps), desc=f"{name}, seed {seed}", mininterval=10):
        index = next(batches)
        random = BatchRandom(seed, step, BATCH, 0, BATCH)
        draws = random.normal() if formulation == "edm" else random.uniform()
        sigma, noise = scheduler.preconditioning.training_sigma(draws), random.normal(1, 8, 8)
        bound = warmup_clamp(step, args.warmup_steps if has_momentum else 0)
        labels = data.labels[index]
        loss = edm_loss(model, data.images[index], sigma, noise, scheduler.preconditioning, bound, class_labels=labels)
        loss.total.mean().backward()
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1, (step + 1) / 50)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = half_life_decay(step, BATCH, 10_000)
        for key, value in model.state_dict().items():
            average[key].lerp_(value, 1 - decay)
        if step + 1 in due:
            is_last = step + 1 == args.max_train_steps
            counts = {args.curve_num_inference_steps} | (set(args.num_inference_steps) if is_last else set())
            for count in sorted(counts):
                facts = {"formulation": name, "seed": seed, "images": (step + 1) * BATCH, "evaluations": count}
                yield facts | measure(model, average, scheduler, count, args.num_images, seed)


def measure(model, average: dict, scheduler, count: int, num_images: int, seed: int) -> dict:
    """Quality of the averaged weights at a number of evaluations."""
    trained = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(average)
    model.eval()
    pipe = EDMPipeline(model, scheduler)
    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(num_images) % 10
    images = pipe(
        labels,
        num_inference_steps=count,
        generator=[torch.Generator().manual_seed(derive_seed(seed, "image", index)) for index in range(num_images)],
        output_type="latent",
    ).images
    model.load_state_dict(trained)
    model.train()
    result = evaluate_digits(images.clamp(-1, 1), labels)
    return {key: result[key] for key in ("frechet_distance", "accuracy")}


def summarise(rows: list[dict]) -> list[dict]:
    """Mean and spread over the seeds."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["formulation"], row["images"], row["evaluations"]), []).append(row)
    table = []
    for (name, images, count), members in sorted(groups.items()):
        entry = {"formulation": name, "images": images, "evaluations": count, "seeds": len(members)}
        for key in ("frechet_distance", "accuracy"):
            values = [member[key] for member in members]
            entry |= {key: statistics.mean(values), f"{key} +-": statistics.stdev(values) if len(values) > 1 else 0.0}
        table.append(entry)
    return table


def write(args: argparse.Namespace, table: list[dict]) -> None:
    write_table(table, args.output_dir / "fdm")
    lines = ["| " + " | ".join(table[0]) + " |", "|" + "---|" * len(table[0])]
    for entry in table:
        cells = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in entry.values()]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *verdicts(args, table)]
    (args.output_dir / "fdm.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    plot(args, table)


def verdicts(args: argparse.Namespace, table: list[dict]) -> Iterator[str]:
    """For each formulation and point of comparison: better, worse, or not to be told apart by twice the standard error."""
    by_key = {(entry["formulation"], entry["images"], entry["evaluations"]): entry for entry in table}
    for formulation in args.formulations:
        for (name, images, count), plain in by_key.items():
            momentum = by_key.get((f"{formulation.upper()}-FDM", images, count))
            if name != formulation.upper() or momentum is None:
                continue
            difference = momentum["frechet_distance"] - plain["frechet_distance"]
            seeds = min(plain["seeds"], momentum["seeds"])
            error = ((plain["frechet_distance +-"] ** 2 + momentum["frechet_distance +-"] ** 2) / seeds) ** 0.5
            word = "better" if difference < 0 else "worse"
            if seeds < 2:
                word = "undecided, with one seed"
            elif abs(difference) <= 2 * error:
                word = "not to be told apart"
            yield (
                f"* {name}, {images:,} images, {count} evaluations: with momentum {word} "
                f"({momentum['frechet_distance']:.2f} against {plain['frechet_distance']:.2f}, {seeds} seeds)"
            )


def plot(args: argparse.Namespace, table: list[dict]) -> None:
    """Quality against images seen, and against evaluations after training."""
    plt = require("matplotlib.pyplot", "eval")
    figure, axes = plt.subplots(1, 2, figsize=(12, 5))
    last = max(entry["images"] for entry in table)
    panels = (
        ("images", [entry for entry in table if entry["evaluations"] == args.curve_num_inference_steps]),
        ("evaluations", [entry for entry in table if entry["images"] == last]),
    )
    for axis, (key, entries) in zip(axes, panels, strict=True):
        for color, formulation in enumerate(SCHEDULERS):
            for suffix, style in (("", "--"), ("-FDM", "-")):
                name = formulation.upper() + suffix
                points = [entry for entry in entries if entry["formulation"] == name]
                if points:
                    axis.errorbar(
                        [entry[key] for entry in points],
                        [entry["frechet_distance"] for entry in points],
                        [entry["frechet_distance +-"] for entry in points],
                        label=name,
                        linestyle=style,
                        color=f"C{color}",
                        marker="o",
                        capsize=3,
                    )
        axis.set(xlabel={"images": "training images seen"}.get(key, key), ylabel="Frechet distance", yscale="log")
        axis.legend()
    axes[0].set_title(f"{args.curve_num_inference_steps} evaluations")
    axes[1].set_title(f"after {last:,} images")
    figure.tight_layout()
    figure.savefig(args.output_dir / "fdm.png", dpi=110)
    plt.close(figure)


def main() -> None:
    args = parse_args()
    check_writable(args.output_dir / "runs", "--output_dir")
    require("matplotlib.pyplot", "eval")
    names = ("max_train_steps", "model_channels", "learning_rate", "warmup_steps", "multiplier", "num_images", "curve_points")
    settings = {name: getattr(args, name) for name in (*names, "curve_num_inference_steps", "num_inference_steps")}
    rows = []
    for seed in args.seeds:
        for formulation in args.formulations:
            for has_momentum in (False, True):
                path = args.output_dir / "runs" / f"{formulation}{'-fdm' if has_momentum else ''}-{seed}.json"
                stored = json.loads(path.read_text()) if path.exists() else None
                if stored is None or stored["settings"] != settings:
                    stored = {"settings": settings, "rows": list(one_run(args, formulation, has_momentum, seed))}
                    partial = path.with_suffix(".partial")
                    partial.write_text(json.dumps(stored, indent=1))
                    partial.replace(path)
                rows += stored["rows"]
        write(args, summarise(rows))


if __name__ == "__main__":
    main()
