"""What Faster Diffusion saves and what it costs, beside the plain model and beside the obvious alternatives, in one run.

    python examples/benchmark_faster_diffusion.py                                   # everything that fits this machine
    python examples/benchmark_faster_diffusion.py --parts counts                    # operations and memory; needs no memory
    python examples/benchmark_faster_diffusion.py --parts quality --samplers ddim:50
    python examples/benchmark_faster_diffusion.py --parts timing --shapes dit-xl-256 --whole_runs   # for a GPU

counts: operations and stored features of published models, from shapes alone. timing: seconds of random weights. quality: on
the embedded digits model, deviation from the plain run against time, for Faster Diffusion, for the same sampler with fewer
steps, and for the caches of diffusers that run on a DiT. On a CPU, seconds are processor time of this process.
"""

import argparse
import ast
import contextlib
import io
import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.hooks import (
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
)

from diffusers_fastdiff import (
    FasterDiffusionConfig,
    FasterDiffusionDiTTransformer2DModel,
    apply_faster_diffusion,
    load_pretrained,
    remove_faster_diffusion,
)
from diffusers_fastdiff.errors import check_writable, require
from diffusers_fastdiff.evaluation.tables import report
from diffusers_fastdiff.hooks.faster_diffusion_calibration import KeyStepCalibration

PARTS = ("counts", "timing", "quality")
METHODS = ("fewer", "faster", "caches")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SAMPLERS = {"ddim": DDIMScheduler, "dpmsolver++": DPMSolverMultistepScheduler, "ddpm": DDPMScheduler}
XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SHAPES: dict[str, tuple[type, dict, int]] = {  # class, config, side of the latents
    "dit-xl-256": (FasterDiffusionDiTTransformer2DModel, {"out_channels": 8, "sample_size": 32}, 32),
    "dit-xl-512": (FasterDiffusionDiTTransformer2DModel, {"out_channels": 8, "sample_size": 64}, 64),
    "sd15": (UNet2DConditionModel, {"cross_attention_dim": 768}, 64),
    "sdxl": (UNet2DConditionModel, XL, 128),
    "dit-small": (  # as deep as XL
        FasterDiffusionDiTTransformer2DModel,
        {"out_channels": 8, "sample_size": 8, "num_attention_heads": 4, "attention_head_dim": 24},
        8,
    ),
}
STEPS = {"dit-xl-256": 250, "dit-xl-512": 250, "dit-small": 250, "sd15": 50, "sdxl": 50}
PUBLISHED = {250: "dit-250", 50: "sd-50"}


def seconds() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def make_model(shape: str, device: str) -> torch.nn.Module:
    cls, config, _ = SHAPES[shape]
    with torch.device(device):
        return cls(**config).eval()


def make_inputs(shape: str, model: torch.nn.Module, batch_size: int, device: str) -> dict[str, Any]:
    """Of a guided batch of `batch_size` images."""
    rows, side = 2 * batch_size, SHAPES[shape][2]
    latents = torch.randn(rows, 4, side, side, device=device)
    if isinstance(model, FasterDiffusionDiTTransformer2DModel):
        return {"hidden_states": latents, "class_labels": torch.zeros(rows, dtype=torch.long, device=device)}
    inputs = {
        "sample": latents,
        "encoder_hidden_states": torch.randn(rows, 77, model.config.cross_attention_dim, device=device),
    }
    if model.config.addition_embed_type == "text_time":
        added = {"text_embeds": (rows, 1280), "time_ids": (rows, 6)}
        inputs["added_cond_kwargs"] = {name: torch.zeros(size, device=device) for name, size in added.items()}
    return inputs


# ---- counts --------------------------------------------------------------------------------------------------------------


def counts(shapes: list[str], batch_size: int) -> Iterator[dict]:
    """Predicted from operations: what wall-clock would be if nothing else took time."""
    for shape in shapes:
        model, steps = make_model(shape, "meta"), STEPS[shape]
        inputs = make_inputs(shape, model, batch_size, "meta")
        inputs["timestep"] = torch.zeros(2 * batch_size, device="meta")
        schedules = {f"published ({PUBLISHED[steps]})": {"key_steps": PUBLISHED[steps]}, "every 2": {"every": 2},
                     "every 5": {"every": 5}}  # fmt: skip
        if steps == 250:
            schedules["measured"] = {"key_steps": lambda count: range(71)}  # only their number matters here
        for name, options in schedules.items():
            hook = apply_faster_diffusion(model, FasterDiffusionConfig(**options), scheduler=DDIMScheduler())
            summary = hook.summary(steps, inputs)
            yield {
                "model": shape, "GFLOP for a call": f"{summary.operations / 1e9:.0f}",
                "encoder": f"{summary.encoder_share:.1%}",
                "key steps": f"{name}: {len(summary.key_steps)} of {steps}",
                "predicted speed-up": f"{1 / summary.compute_share:.3f}",
                "stored features MiB": f"{summary.feature_bytes / 2**20:.1f}", "images": batch_size,
            }  # fmt: skip


# ---- timing --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def timing(shapes: list[str], batch_size: int, whole_runs: bool, repeats: int) -> Iterator[dict]:
    """Calls with and without encoder, and the run they make; with `whole_runs` also the run itself, serial and batched."""
    for shape in shapes:
        model, steps = make_model(shape, DEVICE), STEPS[shape]
        inputs, scheduler = make_inputs(shape, model, batch_size, DEVICE), DDIMScheduler()
        configs = {"plain": None, "published": {"key_steps": PUBLISHED[steps]}, "every 5": {"every": 5}}
        pieces = call_seconds(model, inputs, scheduler, repeats)
        for name, options in configs.items():
            hook = None
            if options is not None:
                hook = apply_faster_diffusion(model, FasterDiffusionConfig(**options), scheduler=scheduler)
            keys = steps if hook is None else len(hook.config.key_steps_of(steps))
            expected = keys * pieces["plain" if hook is None else "key"] + (steps - keys) * pieces["decode"]
            row = {"model": shape, "images": batch_size, "key steps": f"{name}: {keys} of {steps}",
                   "plain call s": f"{pieces['plain']:.3f}", "key call s": f"{pieces['key']:.3f}",
                   "other call s": f"{pieces['decode']:.3f}",
                   "speed-up from calls": f"{steps * pieces['plain'] / expected:.2f}",
                   "run s": "", "batched run s": "", "peak MiB": ""}  # fmt: skip
            if whole_runs:
                row["run s"] = f"{run_seconds(model, inputs, scheduler, steps):.2f}"
                if options is not None:
                    hook = apply_faster_diffusion(model, FasterDiffusionConfig(**options, batched=True), scheduler=scheduler)
                    row["batched run s"] = f"{run_seconds(model, inputs, scheduler, steps):.2f}"
                if DEVICE == "cuda":
                    row["peak MiB"] = f"{torch.cuda.max_memory_allocated() / 2**20:.0f}"
            remove_faster_diffusion(model)
            yield row


def call_seconds(model: torch.nn.Module, inputs: dict, scheduler: DDIMScheduler, repeats: int) -> dict[str, float]:
    """Least times of single calls."""
    times: dict[str, list[float]] = {"plain": [], "key": [], "decode": []}
    for name in ("plain", "faster"):
        if name == "faster":
            apply_faster_diffusion(model, FasterDiffusionConfig(every=2), scheduler=scheduler)
        scheduler.set_timesteps(2 * repeats + 2, device=DEVICE)
        for index, timestep in enumerate(scheduler.timesteps):
            start = seconds()
            model(**inputs, timestep=timestep.expand(num_rows(inputs)))
            kind = name if name == "plain" else ("key", "decode")[index % 2]
            if index > 1:  # the first calls warm up
                times[kind].append(seconds() - start)
    remove_faster_diffusion(model)
    return {name: min(values) for name, values in times.items()}


def num_rows(inputs: dict[str, Any]) -> int:
    return next(value for value in inputs.values() if torch.is_tensor(value)).shape[0]


def run_seconds(model: torch.nn.Module, inputs: dict, scheduler: DDIMScheduler, steps: int) -> float:
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    scheduler.set_timesteps(steps, device=DEVICE)
    start = seconds()
    for timestep in scheduler.timesteps:
        model(**inputs, timestep=timestep.expand(num_rows(inputs)))
    return seconds() - start


# ---- quality -------------------------------------------------------------------------------------------------------------


class Sampler:
    """The embedded model under one sampler, always from the same noise."""

    def __init__(self, name: str, num_images: int, guidance_scale: float):
        self.name, self.num_images, self.guidance_scale = name, num_images, guidance_scale
        self.pipe = self.fresh_pipe()

    def fresh_pipe(self) -> Any:
        pipe = load_pretrained("digits-dit-deep").to(DEVICE)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = SAMPLERS[self.name].from_config(pipe.scheduler.config, timestep_spacing="trailing")
        return pipe

    def __call__(self, steps: int, seed: int = 0, pipe: Any = None) -> torch.Tensor:
        torch.manual_seed(seed)  # the pipeline hands no generator to stochastic schedulers
        images = (pipe or self.pipe)(
            [index % 10 for index in range(self.num_images)],
            guidance_scale=self.guidance_scale,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).images
        return torch.from_numpy(images)

    def timed(self, steps: int, repeats: int, pipe: Any = None) -> tuple[torch.Tensor, float]:
        """Images and the best time of some runs."""
        times = []
        for _ in range(repeats):
            start = seconds()
            images = self(steps, pipe=pipe)
            times.append(seconds() - start)
        return images, min(times)


def quality(sampler: Sampler, steps: int, args: argparse.Namespace) -> Iterator[dict]:
    """One row for each setting: relative deviation from the plain images, and time relative to the plain run."""
    sampler(2)  # warm up
    plain, plain_seconds = sampler.timed(steps, args.repeats)

    def row(method: str, setting: str, count: int = steps, pipe: Any = None, **more: Any) -> dict:
        images, spent = (plain, plain_seconds) if method == "plain" else sampler.timed(count, args.repeats, pipe)
        return {
            "method": method, "setting": setting, "seconds": round(spent, 3), "speed-up": round(plain_seconds / spent, 3),
            "deviation": round(float((images - plain).norm() / plain.norm()), 6), "key steps": count, "counted speed-up": "",
        } | more  # fmt: skip

    yield row("plain", f"{sampler.name}, {steps} steps")
    if "fewer" in args.methods and sampler.name != "ddpm":  # other steps draw other noise: no deviation to speak of
        for share in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
            yield row("fewer steps", f"{round(share * steps)} steps", round(share * steps))
    if "faster" in args.methods:
        for setting, options in faster_settings(sampler, steps, args):
            hook = apply_faster_diffusion(sampler.pipe, FasterDiffusionConfig(**options))
            result = row(f"Faster Diffusion, {options['propagation']}", setting)
            summary = hook.summary()
            remove_faster_diffusion(sampler.pipe)
            counted = round(1 / summary.compute_share, 3)
            yield result | {"key steps": len(summary.key_steps), "counted speed-up": counted}
    if "caches" in args.methods:
        for method, setting, pipe in caches(sampler, steps):
            yield row(method, setting, pipe=pipe, **{"key steps": ""})


def faster_settings(sampler: Sampler, steps: int, args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    if len(FasterDiffusionConfig(key_steps="dit-250").key_steps_of(steps)) < steps:
        yield "published (dit-250)", {"key_steps": "dit-250", "propagation": "hold"}
    for every in (2, 3, 5):
        for propagation in args.propagations:
            yield f"every {every}", {"every": every, "propagation": propagation}
    for share in args.encoder_shares:
        # with other noise than what is judged
        measured = KeyStepCalibration(sampler.pipe, lambda: sampler(steps, seed=1), encoder_share=share)
        for keys in args.key_shares:
            for propagation in args.propagations:
                schedule = measured.key_schedule(round(keys * steps), propagation)
                options = {"key_steps": schedule, "propagation": propagation, "encoder_share": share}
                yield f"measured, {len(schedule.key_steps)} key steps, encoder share {share:.3g}", options


def caches(sampler: Sampler, steps: int) -> Iterator[tuple[str, str, Any]]:
    """The caches of diffusers that do run on a DiT, each on a fresh pipeline."""
    ratios = magnitude_ratios(sampler, steps)
    for threshold, most in ((0.01, 1), (0.03, 2), (0.06, 3), (0.12, 3), (0.3, 5)):
        pipe = sampler.fresh_pipe()
        config = MagCacheConfig(threshold=threshold, max_skip_steps=most, num_inference_steps=steps, mag_ratios=ratios)
        apply_mag_cache(pipe.transformer, config)
        yield "MagCache", f"threshold {threshold}, at most {most}", pipe
    for skip in (2, 3, 5):
        for timesteps in ((100, 800), (-1, 1000)):
            pipe, current = sampler.fresh_pipe(), [0.0]
            pipe.transformer.register_forward_pre_hook(
                lambda _, arguments, values, current=current: current.__setitem__(0, float(values["timestep"].flatten()[0])),
                with_kwargs=True,
            )
            config = PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=skip,
                spatial_attention_timestep_skip_range=timesteps,
                current_timestep_callback=lambda current=current: current[0],
            )
            apply_pyramid_attention_broadcast(pipe.transformer, config)
            yield "PAB", f"range {skip}, timesteps {timesteps[0]} to {timesteps[1]}", pipe


def magnitude_ratios(sampler: Sampler, steps: int) -> list[float]:
    """MagCache's own calibration, which prints its result."""
    pipe, printed = sampler.fresh_pipe(), io.StringIO()
    apply_mag_cache(pipe.transformer, MagCacheConfig(calibrate=True, num_inference_steps=steps))
    with contextlib.redirect_stdout(printed):
        sampler(steps, seed=1, pipe=pipe)
    line = next(line for line in printed.getvalue().splitlines() if line.startswith("[") and "MagCache" not in line)
    return ast.literal_eval(line)


def verdict(rows: list[dict]) -> list[dict]:
    """For every alternative point: the least deviation that Faster Diffusion has in at most that time."""
    ours = [row for row in rows if row["method"].startswith("Faster")]
    lines = []
    for row in rows:
        if row["method"] == "plain" or row in ours or row["speed-up"] < 1.03:
            continue
        rivals = [our for our in ours if our["seconds"] <= row["seconds"]]
        best = min(rivals, key=lambda our: our["deviation"], default=None)
        lines.append({
            "alternative": f"{row['method']}: {row['setting']}", "speed-up": row["speed-up"], "deviation": row["deviation"],
            "Faster Diffusion": "none as fast" if best is None else f"{best['method']}, {best['setting']}",
            "its deviation": "" if best is None else best["deviation"],
            "is better": best is not None and best["deviation"] < row["deviation"],
        })  # fmt: skip
    return lines


# ---- reports -------------------------------------------------------------------------------------------------------------


def plot(rows: list[dict], path: Path) -> None:
    plt = require("matplotlib.pyplot", "eval")
    figure, axis = plt.subplots(figsize=(8, 6))
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] != "plain"):
        points = sorted((row["speed-up"], row["deviation"]) for row in rows if row["method"] == method)
        axis.plot(*zip(*points, strict=True), "o" if method.startswith("Faster") else "x--", label=method)
    axis.set(yscale="log", xlabel="speed-up", ylabel="relative deviation from the plain run")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def write_results(args: argparse.Namespace, measured: dict[str, list[dict]], path: Path) -> None:
    """Rows and verdicts as JSON; parts that are in the file already and were not measured now stay."""
    content = json.loads(path.read_text()) if path.exists() else {}
    for name, rows in measured.items():
        content[name] = {
            "command": shlex.join(["python", "examples/benchmark_faster_diffusion.py", *sys.argv[1:]]),
            "device": DEVICE, "threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows,
        }  # fmt: skip
        if name.startswith("quality"):
            content[name] |= {"model": "digits-dit-deep", "num_images": args.num_images}
            content[name] |= {"guidance_scale": args.guidance_scale, "verdict": verdict(rows)}
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="default: all for counts; what fits for timing")
    parser.add_argument("--batch_size", type=int, default=8, help="images, each guided, for counts and timing")
    parser.add_argument("--repeats", type=int, default=3, help="of each timed call or run")
    parser.add_argument("--whole_runs", action="store_true", help="time complete runs, not only their calls")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="of quality")
    parser.add_argument("--propagations", nargs="+", default=["hold", "taylor"])
    parser.add_argument("--key_shares", type=float, nargs="+", default=[0.45, 0.288, 0.2], help="of measured schedules")
    parser.add_argument("--encoder_shares", type=float, nargs="+", default=[18 / 28, 0.875], help="of measured schedules")
    parser.add_argument("--samplers", nargs="+", default=["ddim:50", "dpmsolver++:20", "ddpm:250"], help="name:steps")
    parser.add_argument("--num_images", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    parser.add_argument("--output_dir", default="benchmark-faster-diffusion")
    parser.add_argument("--results", help="put all rows into this JSON file as well")
    args = parser.parse_args()
    for spelled in args.samplers:
        name, _, steps = spelled.partition(":")
        if name not in SAMPLERS or not steps.isdigit():
            parser.error(f"--samplers must be name:steps with a name of {list(SAMPLERS)}, got {spelled!r}")
    folder = check_writable(args.output_dir)
    print(f"device {DEVICE}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    measured = {}
    if "counts" in args.parts:
        measured["counts"] = report("counts", counts(args.shapes or list(SHAPES), args.batch_size), folder)
    if "timing" in args.parts:
        shapes = args.shapes or (["dit-small"] if DEVICE == "cpu" else list(SHAPES))
        rows = timing(shapes, args.batch_size, args.whole_runs or DEVICE == "cuda", args.repeats)
        measured[f"timing {' '.join(shapes)}"] = report("timing", rows, folder)
    for spelled in args.samplers if "quality" in args.parts else ():
        name, _, steps = spelled.partition(":")
        sampler = Sampler(name, args.num_images, args.guidance_scale)
        rows = report(f"quality {spelled}", quality(sampler, int(steps), args), folder)
        report(f"verdict {spelled}", verdict(rows), folder)
        plot(rows, folder / f"quality-{name}-{steps}.png")
        measured[f"quality {spelled}"] = rows
    if args.results:
        write_results(args, measured, Path(args.results))


if __name__ == "__main__":
    main()
