"""All methods and their combinations against diffusers' own schedulers, on the embedded digits models, in one run.

    python examples/benchmark_all.py --quick                  # less than five minutes on two cores
    python examples/benchmark_all.py                          # more images, seeds and step counts
    python examples/benchmark_all.py --models digits-dit --output_dir again     # a finished row is not measured again

Each row is a model, a scheduler with a number of steps, and what is applied besides: a learned solver, Faster Diffusion, or
a budget of fixed-point iterations. All start from the same noise, image k from a generator of its own. Columns:

* calls, blocks: evaluations of the network and of its blocks for an image, counted, not computed from the settings.
* error: rms difference per element from the model's own images after `--reference_steps` plain steps; with `low` and `high`,
  the 95 % interval of the bootstrap over images. It says how well the model's probability flow was solved, not how good the
  model is; that is `frechet_distance`, in the features of the embedded classifier.
* milliseconds: for an image in a batch, the median over the seeds. The rows take turns, so that a machine which is busy for a
  while is so for all of them; learned solvers cost nothing more here, their training is paid before.
* MiB: peak of the tensors alive in a run with a batch of `--memory_batch_size`.
* error / calls, error / time: error divided by that of the best plain scheduler of diffusers with at most as many calls, and
  with at most 5 % more time, which is what two runs of the same row differ by. Above 1, diffusers is better; empty where it
  has nothing as cheap.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import DiTPipeline
from diffusers.models.attention import FeedForward
from tqdm.auto import tqdm

from diffusers_fastdiff import (
    FasterDiffusionConfig,
    FDMEDMScheduler,
    FixedPointSamplingConfig,
    GDDIMScheduler,
    IPNDMMultistepScheduler,
    apply_faster_diffusion,
    apply_fixed_point_sampling,
    load_pretrained,
    remove_faster_diffusion,
    remove_fixed_point_sampling,
)
from diffusers_fastdiff.errors import check_writable, require
from diffusers_fastdiff.evaluation.digits import digit_estimates
from diffusers_fastdiff.evaluation.intervals import pooled, rms_estimate
from diffusers_fastdiff.evaluation.peak_memory import peak_memory
from diffusers_fastdiff.evaluation.tables import report, write_table
from diffusers_fastdiff.models.unet_edm_blocks import EDMResnetBlock
from diffusers_fastdiff.pretrained import available_solvers
from diffusers_fastdiff.training.randomness import derive_seed

BLOCKS = (FeedForward, EDMResnetBlock)  # a transformer block has one; a block that is skipped does not get to it
MODELS = ("digits-dit", "digits-dit-deep", "digits-fpdm", "digits-edm")
STEPS = {
    "digits-dit": (3, 5, 7, 10, 20),
    "digits-dit-deep": (5, 10, 20, 50),
    "digits-fpdm": (5, 10, 20),
    "digits-edm": (5, 9, 17),
}
QUICK_STEPS = {"digits-dit": (3, 5, 10), "digits-dit-deep": (10, 20), "digits-fpdm": (5, 10), "digits-edm": (5, 9)}


class Row(NamedTuple):
    """One way to draw."""

    model: str
    scheduler: str
    extra: str
    """What is applied besides, "" for nothing."""
    steps: int
    make: Callable[[Any], None]
    """Sets the scheduler of a pipeline."""
    apply: Callable[[Any], None] | None = None

    @property
    def name(self) -> str:
        return " | ".join((self.model, self.scheduler, self.extra, str(self.steps)))

    @property
    def is_plain_diffusers(self) -> bool:
        return self.scheduler in _DIFFUSERS and not self.extra


def scheduler_from(cls: type, **options) -> Callable[[Any], None]:
    def make(pipe) -> None:
        pipe.scheduler = cls.from_config(pipe.scheduler.config, **options)

    return make


def edm_scheduler(cls: type) -> Callable[[Any], None]:
    """Made anew: diffusers' EDM schedulers do not take the Nones in the config of ours for their own defaults."""

    def make(pipe) -> None:
        pipe.scheduler = cls(sigma_data=pipe.scheduler.config.sigma_data)

    return make


_DIT = {"clip_sample": False, "timestep_spacing": "linspace"}
_DIFFUSERS = {
    "DDIM": scheduler_from(diffusers.DDIMScheduler, **(_DIT | {"timestep_spacing": "trailing"})),
    "DPM++(2M)": scheduler_from(diffusers.DPMSolverMultistepScheduler, **_DIT),
    "DPM++(2M) Karras": scheduler_from(diffusers.DPMSolverMultistepScheduler, **_DIT, use_karras_sigmas=True),
    "DPM++(2M) Lu": scheduler_from(diffusers.DPMSolverMultistepScheduler, **_DIT, use_lu_lambdas=True),
    "DPM++(3M)": scheduler_from(diffusers.DPMSolverMultistepScheduler, **_DIT, solver_order=3),
    "UniPC": scheduler_from(diffusers.UniPCMultistepScheduler, **_DIT),
    "DEIS": scheduler_from(diffusers.DEISMultistepScheduler, **_DIT),
    "EDM Euler": edm_scheduler(diffusers.EDMEulerScheduler),
    "EDM DPM++(2M)": edm_scheduler(diffusers.EDMDPMSolverMultistepScheduler),
}
_EDM_NAMES = ("EDM Euler", "EDM DPM++(2M)")
_OURS = {
    "iPNDM(3)": scheduler_from(IPNDMMultistepScheduler, solver_order=3),
    "gDDIM order 2": scheduler_from(GDDIMScheduler, order=2, timestep_spacing="trailing"),
}
_OURS_EDM = {
    "FDM-EDM Heun": scheduler_from(FDMEDMScheduler, solver="heun"),
    "FDM-EDM DPM++(2M)": scheduler_from(FDMEDMScheduler, solver="dpmpp_multistep"),
    "FDM-EDM iPNDM": scheduler_from(FDMEDMScheduler, solver="ipndm"),
    "iPNDM(3)": scheduler_from(IPNDMMultistepScheduler, solver_order=3),
}


def propagation(every: int, method: str = "hold") -> tuple[str, Callable]:
    config = FasterDiffusionConfig(every=every, propagation=method)
    return f"Faster Diffusion, every {every}, {method}", lambda pipe: apply_faster_diffusion(pipe, config)


def iterations(share: float, allocation: str, reuse: bool, steps: int, full: int) -> tuple[str, Callable]:
    budget = max(steps, round(share * full * steps))
    config = FixedPointSamplingConfig(budget=budget, allocation=allocation, reuse_solution=reuse)
    name = f"{budget / steps:g} iterations a step, {allocation}{', reuse' if reuse else ''}"
    return name, lambda pipe: apply_fixed_point_sampling(pipe, config)


def learned(model: str, steps: int) -> Iterator[tuple[str, Callable]]:
    """Embedded solvers without guidance for this number of evaluations."""
    for name in available_solvers():
        fitted = load_pretrained(name).config.fitted_to
        if (fitted["model_id"], fitted["num_inference_steps"], fitted["guidance_scale"]) == (model, steps, 1.0):
            yield name, lambda pipe, name=name: load_pretrained(name).attach(pipe)


def rows(model: str, counts: tuple[int, ...]) -> Iterator[Row]:
    """Everything that is measured on a model."""
    is_edm = model == "digits-edm"
    theirs = {name: make for name, make in _DIFFUSERS.items() if (name in _EDM_NAMES) == is_edm}
    ours = _OURS_EDM if is_edm else _OURS
    strong = "FDM-EDM DPM++(2M)" if is_edm else "DPM++(2M)"
    full = load_pretrained(model).transformer.config.num_iterations if model == "digits-fpdm" else 0
    for steps in counts:
        for name, make in (theirs | ours).items():
            yield Row(model, name, "", steps, make)
        solvers = dict(learned(model, steps))
        for name, make in solvers.items():
            yield Row(model, name, "", steps, make)
        combined = {strong: (theirs | ours)[strong]} | {name: make for name, make in solvers.items() if "lms" in name}
        for name, make in combined.items():
            for every, method in ((2, "hold"), (2, "taylor"), (3, "taylor")):
                if steps > every + 1:
                    yield Row(model, name, *_placed(propagation(every, method), steps, make))
        if full:
            for share, allocation, reuse in (
                (2 / 3, "constant", False), (0.5, "constant", True), (0.5, "decreasing", True), (1 / 3, "decreasing", True),
            ):  # fmt: skip
                for name in ("DDIM", strong):
                    extra = iterations(share, allocation, reuse, steps, full)
                    yield Row(model, name, *_placed(extra, steps, theirs[name]))


def _placed(extra: tuple[str, Callable], steps: int, make: Callable) -> tuple:
    return extra[0], steps, make, extra[1]


# ---- measuring -----------------------------------------------------------------------------------------------------------


class Sampler:
    """A pipeline that every row of a model goes through."""

    def __init__(self, model: str, device: str):
        self.pipe = load_pretrained(model).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.network = self.pipe.transformer if isinstance(self.pipe, DiTPipeline) else self.pipe.unet
        self.own_scheduler, self.device = self.pipe.scheduler, device

    def set(self, row: Row) -> None:
        remove_faster_diffusion(self.pipe)
        remove_fixed_point_sampling(self.pipe)
        if hasattr(self.pipe.scheduler, "detach"):
            self.pipe.scheduler.detach()
        self.pipe.scheduler = self.own_scheduler
        row.make(self.pipe)
        if row.apply is not None:
            row.apply(self.pipe)

    def draw(self, steps: int, seed: int, count: int) -> torch.Tensor:
        """(count, 1, 8, 8) in [-1, 1], on the CPU."""
        generators = [torch.Generator().manual_seed(derive_seed(seed, "image", k)) for k in range(count)]
        options = {"num_inference_steps": steps, "guidance_scale": 1.0, "generator": generators, "output_type": "np"}
        images = self.pipe(class_labels=[k % 10 for k in range(count)], **options).images
        return torch.from_numpy(images).permute(0, 3, 1, 2)[:, :1] * 2 - 1

    def count(self, steps: int) -> tuple[int, int]:
        """Calls of the network and of its blocks for an image."""
        calls, blocks = [], []
        handles = [self.network.register_forward_hook(lambda *_: calls.append(1))]
        for module in self.network.modules():
            if isinstance(module, BLOCKS):
                handles.append(module.register_forward_hook(lambda *_: blocks.append(1)))
        self.draw(steps, 0, 1)
        for handle in handles:
            handle.remove()
        return len(calls), len(blocks)


def measure(sampler: Sampler, row: Row, seed: int, target: torch.Tensor, args: argparse.Namespace) -> dict:
    """One row at one seed."""
    sampler.set(row)
    sampler.draw(row.steps, 0, 2)  # warm-up
    start = time.perf_counter()
    images = sampler.draw(row.steps, seed, len(target))  # ends on the CPU, so the device is done, too
    seconds = time.perf_counter() - start
    record = {"seconds": seconds / len(target)}
    record["error"] = rms_estimate((images - target).square().flatten(1).mean(1))
    labels = torch.arange(len(target)) % 10
    record["frechet_distance"] = digit_estimates(images, labels, bootstrap=20)["frechet_distance"]
    if seed == args.seeds[0]:
        record["calls"], record["blocks"] = sampler.count(row.steps)
        with peak_memory(sampler.device) as peak:
            sampler.draw(row.steps, 0, args.memory_batch_size)
        record["MiB"] = peak.bytes / 2**20
    return record


def summarise(row: Row, records: list[dict]) -> dict[str, Any]:
    entry = {"model": row.model, "scheduler": row.scheduler, "besides": row.extra, "by": "ours", "steps": row.steps}
    entry["by"] = "diffusers" if row.is_plain_diffusers else "ours"
    entry |= {key: records[0][key] for key in ("calls", "blocks", "MiB")}
    entry["milliseconds"] = 1000 * statistics.median_low(record["seconds"] for record in records)
    for key in ("error", "frechet_distance"):
        number = pooled([record[key] for record in records])
        entry |= {key: number["value"], f"{key} low": number["interval"][0], f"{key} high": number["interval"][1]}
    return entry


def with_verdicts(entries: list[dict]) -> list[dict]:
    """Adds the ratios to the best of diffusers at equal cost; see the top of the file."""
    for entry in entries:
        for column, cost, slack in (("error / calls", "calls", 1.0), ("error / time", "milliseconds", 1.05)):
            peers = [
                peer["error"]
                for peer in entries
                if peer["model"] == entry["model"] and peer["by"] == "diffusers" and peer[cost] <= slack * entry[cost]
            ]
            entry[column] = entry["error"] / min(peers) if peers and entry["by"] == "ours" else ""
    return entries


def fingerprint(args: argparse.Namespace) -> dict[str, Any]:
    """What a kept measurement depends on besides its row and seed."""
    return {"num_images": args.num_images, "reference_steps": args.reference_steps, "device": args.device,
            "memory_batch_size": args.memory_batch_size}  # fmt: skip


def benchmark(model: str, args: argparse.Namespace, kept: dict[str, dict], save: Callable[[], None]) -> list[dict]:
    """All rows of a model; finished measurements are taken from `kept`, new ones put there."""
    sampler, plan = Sampler(model, args.device), list(rows(model, args.steps or (QUICK_STEPS if args.quick else STEPS)[model]))
    progress = tqdm(total=len(plan) * len(args.seeds), desc=model)
    for seed in args.seeds:
        missing = [row for row in plan if f"{row.name} | {seed}" not in kept]
        if missing:
            make = _OURS_EDM["FDM-EDM DPM++(2M)"] if model == "digits-edm" else _DIFFUSERS["DPM++(2M)"]
            fine = Row(model, "reference", "", args.reference_steps, make)
            sampler.set(fine)
            target = sampler.draw(fine.steps, seed, args.num_images)
        progress.update(len(plan) - len(missing))
        for row in missing:
            kept[f"{row.name} | {seed}"] = measure(sampler, row, seed, target, args)
            save()
            progress.update()
    return [summarise(row, [kept[f"{row.name} | {seed}"] for seed in args.seeds]) for row in plan]


# ---- results -------------------------------------------------------------------------------------------------------------


def frontier(points: list[dict]) -> list[dict]:
    """Those that nothing beats in both time and error, by time."""
    best: list[dict] = []
    for entry in sorted(points, key=lambda entry: (entry["milliseconds"], entry["error"])):
        if not best or entry["error"] < best[-1]["error"]:
            best.append(entry)
    return best


KINDS = {  # colour and marker in the plot
    "diffusers": ("tab:gray", "o"),
    "schedulers of this package": ("tab:blue", "s"),
    "learned solvers": ("tab:red", "*"),
    "Faster Diffusion": ("tab:green", "^"),
    "fixed-point budgets": ("tab:orange", "D"),
}


def kind(entry: dict) -> str:
    """Legend of a row in the plot."""
    if entry["besides"]:
        return "Faster Diffusion" if "Faster" in entry["besides"] else "fixed-point budgets"
    if entry["scheduler"].startswith("digits-"):
        return "learned solvers"
    return "diffusers" if entry["by"] == "diffusers" else "schedulers of this package"


def plot(entries: list[dict], path: Path) -> None:
    """Error against time, a panel for each model; lines join what nothing beats."""
    plt, ticker = require("matplotlib.pyplot", "eval"), require("matplotlib.ticker", "eval")
    models = list(dict.fromkeys(entry["model"] for entry in entries))
    columns = min(2, len(models))
    shape = (-(-len(models) // columns), columns)
    figure, axes = plt.subplots(*shape, figsize=(6.5 * shape[1], 5 * shape[0]), squeeze=False, layout="constrained")
    for axis in axes.flat[len(models) :]:
        axis.remove()
    for axis, model in zip(axes.flat, models, strict=False):
        own = [entry for entry in entries if entry["model"] == model and entry["error"] < 1]
        for label, (color, marker) in KINDS.items():
            points = [entry for entry in own if kind(entry) == label]
            axis.scatter([e["milliseconds"] for e in points], [e["error"] for e in points], c=color, marker=marker, s=45,
                         label=label, zorder=3)  # fmt: skip
        stock = [entry for entry in own if entry["by"] == "diffusers"]
        for points, color, label in ((stock, "tab:gray", "best of diffusers"), (own, "black", "best of all")):
            line = frontier(points)
            axis.plot([e["milliseconds"] for e in line], [e["error"] for e in line], color=color, linewidth=1.2, label=label)
        axis.set(xscale="log", yscale="log", xlabel="milliseconds for an image", ylabel="error to the reference", title=model)
        for each in (axis.xaxis, axis.yaxis):
            each.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            each.set_major_formatter("{x:g}")
            each.set_minor_formatter(ticker.NullFormatter())
        axis.grid(alpha=0.3, which="both")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=80)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, nargs="+", help="of every model, instead of those chosen for each")
    parser.add_argument("--num_images", type=int, default=500, help="for each seed; more than the 64 features of the metric")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--reference_steps", type=int, default=400)
    parser.add_argument("--memory_batch_size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--quick", action="store_true", help="fewer steps to try, 150 images, 2 seeds, a reference of 100 steps"
    )
    parser.add_argument("--output_dir", default="benchmark-all", help="rows that are finished there are kept")
    args = parser.parse_args()
    if args.quick:
        args.num_images, args.seeds, args.reference_steps = 150, [0, 1], 100
    if args.num_images <= 64:
        parser.error(f"--num_images must be more than the 64 features of the metric, got {args.num_images}")
    if min(args.steps or [2]) < 2 or args.reference_steps < 2 * max(args.steps or [50]):
        parser.error("--steps must be at least 2, and --reference_steps twice as many as the most of them")
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds must differ, got {args.seeds}")
    return args


def main() -> None:
    args = parse_args()
    folder = check_writable(args.output_dir)
    path, settings = folder / "measurements.json", fingerprint(args)
    stored = json.loads(path.read_text()) if path.exists() else {}
    kept = stored["measured"] if stored.get("settings") == settings else {}

    def save() -> None:
        partial = path.with_suffix(".incomplete")
        partial.write_text(json.dumps({"settings": settings, "measured": kept}))
        partial.replace(path)

    entries = [entry for model in args.models for entry in benchmark(model, args, kept, save)]
    with_verdicts(entries)
    for model in args.models:
        chosen = [entry for entry in entries if entry["model"] == model]
        report(model, sorted(chosen, key=lambda entry: (entry["calls"], entry["error"])))
    write_table(entries, folder / "benchmark-all", settings=settings | {"seeds": args.seeds})
    plot(entries, folder / "benchmark-all.png")


if __name__ == "__main__":
    main()
