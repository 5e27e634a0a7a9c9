"""Sample from a critically damped Langevin (CLD), blurring or variance-preserving model with gDDIM.

    python examples/sample_gddim.py --num_inference_steps 20
    python examples/sample_gddim.py --pretrained_model_name_or_path digits-blur --order 0
    python examples/sample_gddim.py --stochasticity 0.5 --num_inference_steps 50
    python examples/sample_gddim.py --sampler sscs --stochasticity 1 --time_grid power --num_inference_steps 200
    python examples/sample_gddim.py --ode_tolerance 1e-4               # adaptive Runge-Kutta, needs torchdiffeq
    python examples/sample_gddim.py --class_labels 3 --trajectory trajectory.png

`--trajectory` draws the way of the first image: what it and its velocity look like over time, and the paths of single pixels in
the plane of position and velocity.
"""

import argparse
import time
from pathlib import Path

import torch

from diffusers_fastdiff import GDDIMPipeline, GDDIMScheduler, load_pretrained
from diffusers_fastdiff.errors import check_writable, require
from diffusers_fastdiff.pictures import labelled_grid
from diffusers_fastdiff.pretrained import available_pretrained

SCHEDULER_FLAGS = (
    "order", "corrector", "stochasticity", "parametrization", "sampler", "time_grid", "end_time", "denoise",
)  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", default="digits-cld", help="embedded name, folder or Hub name")
    parser.add_argument("--class_labels", type=int, nargs="+", help="by default every class of the model")
    parser.add_argument("--images_per_class", type=int, default=4)
    parser.add_argument("--num_inference_steps", type=int, default=50, help="evaluations of the network")
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    group = parser.add_argument_group("scheduler (by default as saved with the model)")
    group.add_argument("--order", type=int, help="0 to 3")
    group.add_argument("--corrector", choices=["pec", "pece"])
    group.add_argument("--stochasticity", type=float, help="lambda: 0 for the probability flow, 1 for the reverse process")
    group.add_argument("--parametrization", choices=["R", "L"], help="L, the Cholesky factor, for comparison")
    group.add_argument("--sampler", choices=["gddim", "euler_maruyama", "sscs"])
    group.add_argument("--time_grid", choices=["power", "hybrid"])
    group.add_argument("--end_time", type=float)
    group.add_argument("--denoise", action=argparse.BooleanOptionalAction, help="last evaluation for a step to the data")
    parser.add_argument("--ode_tolerance", type=float, help="adaptive Runge-Kutta in place of the scheduler")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="gddim-samples.png")
    parser.add_argument("--trajectory", help="picture of the way of the first image; needs matplotlib")
    return parser.parse_args()


def draw_trajectory(pipe: GDDIMPipeline, states: torch.Tensor, path: Path, num_columns: int = 9, num_pixels: int = 8) -> None:
    """`states` (N + 1, kC, H, W) of one image."""
    plt = require("matplotlib.pyplot", "eval")
    scheduler, is_cld = pipe.scheduler, pipe.scheduler.forward_process.block == 2
    times = [*scheduler.time_of(scheduler.timesteps).tolist(), 0.0 if scheduler.has_denoising_step else scheduler.final_time]
    parts = {"position x": states[:, : states.shape[1] // 2], "velocity v": states[:, states.shape[1] // 2 :]}
    if not is_cld:
        parts = {"image": states}
    figure = plt.figure(figsize=(1.25 * num_columns, 8 if is_cld else 1.8), layout="constrained")
    upper, *lower = figure.subfigures(2, 1, height_ratios=[2.8, 5]) if is_cld else [figure]
    axes = upper.subplots(len(parts), num_columns, squeeze=False)
    for (name, part), row in zip(parts.items(), axes, strict=True):
        low, high = part.amin(), part.amax()
        for place, axis in zip(torch.linspace(0, len(times) - 1, num_columns).round().int().tolist(), row, strict=True):
            limits = {"vmin": -1.5, "vmax": 1.5} if name != "image" else {"vmin": max(low, -3), "vmax": min(high, 3)}
            axis.imshow(part[place].mean(0).numpy(), cmap="gray", **limits)
            axis.set(xticks=[], yticks=[])
            if row is axes[0]:
                axis.set_title(f"t = {times[place]:.3g}", fontsize=9)
        row[0].set_ylabel(name)
    if is_cld:
        upper.suptitle("From noise at t = 1 to the image: the velocity moves the pixels, and both come to rest together.")
        paths = [part.flatten(1) for part in parts.values()]
        draw_phase_plane(lower[0], *paths, scheduler.forward_process.prior_factor(), num_pixels)
    figure.savefig(path, dpi=120)


def draw_phase_plane(figure, x: torch.Tensor, v: torch.Tensor, prior: torch.Tensor, num_pixels: int) -> None:
    """Paths of some pixels, `x` and `v` (N + 1, pixels), from the brightest to the darkest."""
    axis = figure.subplots()
    chosen = x[-1].argsort()[torch.linspace(0, x.shape[1] - 1, min(num_pixels, x.shape[1])).round().long()]
    colors = require("matplotlib", "eval").colormaps["coolwarm"]
    for pixel in chosen.tolist():
        color, across, up = colors(float(x[-1, pixel].clamp(-1, 1) / 2 + 0.5)), x[:, pixel].tolist(), v[:, pixel].tolist()
        axis.plot(across, up, color=color, linewidth=1.2)
        axis.plot(across[0], up[0], "o", color=color, markersize=4)
        axis.plot(across[-1], up[-1], "s", color=color, markersize=6, markeredgecolor="black")
    angle = torch.linspace(0, 2 * torch.pi, 100)
    for radius in (1, 2):
        spread = radius * float(prior[1, 1])
        label = "prior, 1 and 2 standard deviations" if radius == 1 else None
        axis.plot((radius * angle.cos()).tolist(), (spread * angle.sin()).tolist(), color="gray", linestyle=":", label=label)
    axis.plot([], [], "o", color="gray", label="noise: x and v are independent")
    axis.plot([], [], "s", color="gray", markeredgecolor="black", label="image: v is nearly 0; colour: grey level")
    axis.axhline(0, color="black", linewidth=0.5)
    axis.set(xlabel="position x", ylabel="velocity v", title="Pixels in phase space")
    axis.legend(fontsize=8, loc="upper right")


def main() -> None:
    args = parse_args()
    for output in filter(None, (args.output, args.trajectory)):
        check_writable(Path(output).parent, "--output")
    name = args.pretrained_model_name_or_path
    pipe = load_pretrained(name) if name in available_pretrained() else GDDIMPipeline.from_pretrained(name)
    if not isinstance(pipe, GDDIMPipeline):
        raise ValueError(f"`--pretrained_model_name_or_path` {name!r} is no GDDIMPipeline but a {type(pipe).__name__}.")
    changes = {flag: getattr(args, flag) for flag in SCHEDULER_FLAGS if getattr(args, flag) is not None}
    pipe.scheduler = GDDIMScheduler.from_config(pipe.scheduler.config, **changes)
    pipe.to(args.device)
    if args.trajectory and args.ode_tolerance is not None:
        raise ValueError("`--trajectory` shows the steps of the scheduler; leave out `--ode_tolerance`.")

    null = pipe.unet.null_label
    labels = (args.class_labels or list(range(null))) * args.images_per_class if null is not None else None
    start = time.perf_counter()
    result = pipe(
        labels,
        batch_size=None if labels else args.images_per_class,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=torch.Generator().manual_seed(args.seed),
        output_trajectory=args.trajectory is not None,
        ode_tolerance=args.ode_tolerance,
    )
    seconds = time.perf_counter() - start
    columns = len(labels) // args.images_per_class if labels else 10
    labelled_grid(result.images, [str(label) for label in labels] if labels else None, columns).save(args.output)
    print(f"{len(result.images)} images with {result.num_evaluations} evaluations each in {seconds:.1f} s: {args.output}")
    if args.trajectory:
        draw_trajectory(pipe, result.trajectory[:, 0], Path(args.trajectory))
        print(f"trajectory of the first image: {args.trajectory}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ImportError) as error:
        raise SystemExit(f"error: {error}") from None
