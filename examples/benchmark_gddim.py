"""Error and quality of gDDIM and of other samplers against evaluations of the network, all in one run.

    python examples/benchmark_gddim.py                         # some minutes on a laptop
    python examples/benchmark_gddim.py --parts mixture         # coefficients | mixture | trained

* coefficients: seconds for the matrices of a run, computed anew, and what twice the quadrature changes in them.
* mixture: a mixture of Gaussians under critically damped Langevin diffusion (CLD), for which the network is known exactly.
  `error` is the rms difference of the positions from the probability flow (Runge-Kutta at 1e-9), for deterministic samplers;
  `distance` the sliced Wasserstein distance from exact samples, whose own value says what so many samples can resolve.
* trained: the embedded digits models. `error` is that of the images from the adaptive Runge-Kutta run from the same noise.

Every sampler runs through `GDDIMScheduler`. The mixture is sampled down to t = 1e-3, without the denoising step.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from diffusers_fastdiff import GDDIMScheduler, load_pretrained
from diffusers_fastdiff.errors import check_writable, require
from diffusers_fastdiff.evaluation.digits import evaluate_digits
from diffusers_fastdiff.evaluation.tables import report
from diffusers_fastdiff.numerics import exponential_integrator
from diffusers_fastdiff.numerics.phase_space import CLDProcess
from diffusers_fastdiff.numerics.time_grids import hybrid_grid
from diffusers_fastdiff.pipelines.probability_flow import integrate_probability_flow

PARTS = ("coefficients", "mixture", "trained")
EULER, SSCS = {"sampler": "euler_maruyama"}, {"sampler": "sscs", "stochasticity": 1.0}
POWER, CHOLESKY = {"time_grid": "power"}, {"time_grid": "power", "parametrization": "L"}
SAMPLERS = (
    {f"gDDIM order {order}": {"order": order} for order in range(4)}
    | {f"gDDIM order {order}, power grid": {"order": order} | POWER for order in range(4)}
    | {f"gDDIM order {order}, power grid, PEC": {"order": order, "corrector": "pec"} | POWER for order in (0, 1, 2)}
    | {f"gDDIM order {order}, power grid, PECE": {"order": order, "corrector": "pece"} | POWER for order in (1, 2)}
    | {f"Cholesky order {order}": {"order": order} | CHOLESKY for order in (0, 1, 2)}
    | {"Euler, probability flow": EULER | POWER}
    | {f"gDDIM order {order}, lambda 1": {"order": order, "stochasticity": 1.0} for order in (0, 2)}
    | {"gDDIM order 2, lambda 0.3": {"order": 2, "stochasticity": 0.3}}
    | {"Euler-Maruyama": EULER | POWER | {"stochasticity": 1.0}, "SSCS": SSCS | POWER}
)
BLUR_SAMPLERS = {name: options for name, options in SAMPLERS.items() if "Cholesky" not in name and "SSCS" not in name}
Rows = Iterator[dict]


def coefficients(counts: list[int]) -> Rows:
    process = CLDProcess()
    process.factor(0.5)  # its table is made once per process
    for count in counts:
        times = hybrid_grid(1.0, 1e-3, count)
        for order in (0, 3):
            exponential_integrator._coefficients.cache_clear()
            start = time.perf_counter()
            run = exponential_integrator.step_coefficients(process, times, min(order, count - 1))
            seconds = time.perf_counter() - start
            nodes = 2 * max(48, min(256, 1024 // count))
            double = exponential_integrator.step_coefficients(process, times, min(order, count - 1), num_nodes=nodes)
            change = (run.predictor - double.predictor).abs().max().item()
            yield {"steps": count, "order": order, "seconds": f"{seconds:.4f}", "twice the nodes change": f"{change:.1e}"}


# ---- the exact mixture ---------------------------------------------------------------------------------------------------


class Mixture:
    """`x ~ mean_k + std N(0, 1)` in D dimensions, with equal weights, and the eps of its CLD."""

    def __init__(self, num_components: int = 5, dimension: int = 6, std: float = 0.2, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.means = torch.rand(num_components, dimension, generator=generator, dtype=torch.float64) * 2.4 - 1.2
        self.std, self.generator = std, generator

    def draw(self, count: int) -> torch.Tensor:
        which = torch.randint(len(self.means), (count,), generator=self.generator)
        return self.means[which] + self.std * torch.randn(
            count, self.means.shape[1], generator=self.generator, dtype=torch.float64
        )

    def eps(self, process: CLDProcess, u: torch.Tensor, t: float) -> torch.Tensor:
        """(B, 2D) -> (B, 2D): minus `R^T` times the score."""
        pairs, signal = torch.stack(u.chunk(2, dim=1), dim=-1), process.signal(t)[:, 0]
        precision = torch.linalg.inv(process.covariance(t) + self.std**2 * signal[:, None] * signal)
        gaps = pairs[:, None] - self.means[:, :, None] * signal
        pulls = gaps @ precision
        share = (-(pulls * gaps).sum((2, 3)) / 2).softmax(dim=1)
        eps = (share[..., None, None] * pulls).sum(1) @ process.factor(t)
        return torch.cat(eps.unbind(-1), dim=1)


def mixture(counts: list[int], num_samples: int, tolerances: list[float]) -> Rows:
    data, process = Mixture(), CLDProcess()
    dimension = data.means.shape[1]
    noise = torch.randn(num_samples, 2 * dimension, 1, 1, generator=data.generator, dtype=torch.float64)
    start, exact = GDDIMScheduler(process="cld").prior(noise), data.draw(num_samples)
    flow = lambda tolerance: integrate_probability_flow(  # noqa: E731
        process, lambda u, t: data.eps(process, u.flatten(1), t).reshape(u.shape), start, 1.0, 1e-3, tolerance
    )
    reference = process.project(flow(1e-9).state).flatten(1)

    def row(name: str, x: torch.Tensor, evaluations: int, error: str = "") -> dict:
        distance = f"{sliced_distance(x, exact):.4f}"
        return {"sampler": name, "evaluations": evaluations, "error": error, "distance": distance}

    yield row("exact samples", data.draw(num_samples), 0)
    yield row("probability flow", reference, 0, "0")
    for name, options in SAMPLERS.items():
        for count in counts:
            x = process.project(run_mixture(data, start, count, options)).flatten(1)
            error = "" if options.get("stochasticity") else f"{(x - reference).square().mean().sqrt():.3g}"
            yield row(name, x, count, error)
    for tolerance in tolerances:
        state, count = flow(tolerance)
        x = process.project(state).flatten(1)
        yield row("Runge-Kutta 5(4)", x, count, f"{(x - reference).square().mean().sqrt():.3g}")


def run_mixture(data: Mixture, start: torch.Tensor, count: int, options: dict) -> torch.Tensor:
    scheduler = GDDIMScheduler(process="cld", denoise=False, **options)
    scheduler.set_timesteps(count)
    state, generator = start, torch.Generator().manual_seed(1)
    for timestep in scheduler.timesteps:
        t = scheduler.time_of(timestep).item()
        eps = data.eps(scheduler.forward_process, state.flatten(1), t).reshape(state.shape)
        state = scheduler.step(eps, timestep, state, generator=generator).prev_sample
    return state


def sliced_distance(x: torch.Tensor, y: torch.Tensor, num_directions: int = 128) -> float:
    """Mean Wasserstein-1 distance of projections on random directions of two sets of equal size (n, d)."""
    directions = torch.randn(x.shape[1], num_directions, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    directions = directions / directions.norm(dim=0)
    first, second = ((z @ directions).sort(dim=0).values for z in (x, y))
    return (first - second).abs().mean().item()


# ---- trained models ------------------------------------------------------------------------------------------------------


def trained(names: list[str], counts: list[int], num_images: int, seeds: list[int], tolerances: list[float]) -> Rows:
    for name in names:
        pipe = load_pretrained(name)
        pipe.set_progress_bar_config(disable=True)
        config, labels = pipe.scheduler.config, torch.arange(num_images) % 10
        shape = (num_images, pipe.unet.config.in_channels, 8, 8)
        noises = {seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds}
        starts = {seed: pipe.scheduler.prior(noise) for seed, noise in noises.items()}

        def draw(seed: int, pipe=pipe, labels=labels, starts=starts, **options):
            generator = torch.Generator().manual_seed(seed)
            return pipe(labels, latents=starts[seed], generator=generator, output_type="pt", **options)

        exact = {seed: draw(seed, ode_tolerance=min(tolerances)) for seed in seeds}
        for tolerance in tolerances:
            runs = exact if tolerance == min(tolerances) else {seed: draw(seed, ode_tolerance=tolerance) for seed in seeds}
            yield quality_row(name, f"Runge-Kutta 5(4), {tolerance:g}", runs, exact, labels)
        for sampler, options in (SAMPLERS if config.process == "cld" else BLUR_SAMPLERS).items():
            pipe.scheduler = GDDIMScheduler.from_config(config, **({"stochasticity": 0.0} | options))
            for count in counts:
                runs = {seed: draw(seed, num_inference_steps=count) for seed in seeds}
                yield quality_row(name, sampler, runs, exact, labels, is_random=options.get("stochasticity", 0) > 0)


def quality_row(model: str, sampler: str, runs: dict, exact: dict, labels: torch.Tensor, is_random: bool = False) -> dict:
    """Means and spreads over the seeds."""
    results = [evaluate_digits(run.images * 2 - 1, labels) for run in runs.values()]
    spent = statistics.mean(run.num_evaluations for run in runs.values())
    errors = [(runs[seed].images - exact[seed].images).square().mean().sqrt().item() for seed in runs]
    row = {"model": model, "sampler": sampler, "evaluations": f"{spent:.0f}"}
    row["error"] = "" if is_random else f"{statistics.mean(errors):.3g}"
    for key in ("frechet_distance", "accuracy"):
        values = [result[key] for result in results]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        row |= {key: f"{statistics.mean(values):.4f}", f"{key} +-": f"{spread:.4f}"}
    return row


# ---- reports -------------------------------------------------------------------------------------------------------------


def plot(rows: list[dict], columns: tuple[str, ...], path: Path) -> None:
    """One panel for each column, a curve for each sampler."""
    plt = require("matplotlib.pyplot", "eval")
    figure, axes = plt.subplots(1, len(columns), figsize=(8 * len(columns), 6))
    name_of = lambda row: "Runge-Kutta 5(4)" if row["sampler"].startswith("Runge-Kutta") else row["sampler"]  # noqa: E731
    names = list(dict.fromkeys(name_of(row) for row in rows if float(row["evaluations"]) > 0))
    for axis, column in zip(axes, columns, strict=True):
        for index, name in enumerate(names):
            own = [row for row in rows if name_of(row) == name and row[column] and float(row[column]) > 0]
            points = sorted((float(row["evaluations"]), float(row[column])) for row in own)
            style = {"color": f"C{index % 10}", "linestyle": ("-", "--", ":")[index // 10 % 3]}
            style["linewidth"] = 3 if name in [f"gDDIM order {order}" for order in range(4)] else 1
            axis.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=4, label=name, **style)
        axis.set(xscale="log", yscale="log", xlabel="evaluations of the network", ylabel=column)
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--evaluations", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--num_samples", type=int, default=10_000, help="of the mixture")
    parser.add_argument("--models", nargs="+", default=["digits-cld", "digits-blur"], help="embedded models")
    parser.add_argument("--num_images", type=int, default=500, help="for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ode_tolerances", type=float, nargs="+", default=[1e-2, 1e-4])
    parser.add_argument("--output_dir", default="benchmark-gddim")
    args = parser.parse_args()
    if min(args.evaluations) < 2:
        raise SystemExit("error: `--evaluations` must be at least 2: the denoising step is one of them.")
    folder = check_writable(args.output_dir)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if "coefficients" in args.parts:
        report("coefficients", coefficients(args.evaluations), folder)
    if "mixture" in args.parts:
        rows = report("mixture", mixture(args.evaluations, args.num_samples, args.ode_tolerances), folder)
        plot(rows, ("error", "distance"), folder / "mixture.png")
    if "trained" in args.parts:
        rows = report(
            "trained", trained(args.models, args.evaluations, args.num_images, args.seeds, args.ode_tolerances), folder
        )
        for name in args.models:
            own = [row for row in rows if row["model"] == name]
            plot(own, ("error", "frechet_distance"), folder / f"{name}.png")


if __name__ == "__main__":
    main()
