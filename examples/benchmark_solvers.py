"""Few-step solvers side by side: distance to a 1000-step reference from the same noise, and the sample metric.

    python examples/benchmark_solvers.py                                  # embedded digits, every solver
    python examples/benchmark_solvers.py --model mixture                  # data whose denoiser is known exactly
    python examples/benchmark_solvers.py --model <folder or Hub name> --learned my-solver --num_images 64

Conventions: the budget is the number of evaluations of the guided model (two network rows with guidance); Heun counts both
of its evaluations, AFS (the analytical first step) none. All solvers start from the same noise, which no learned solver was
trained on, and searched peers were not searched on.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from diffusers import DDIMScheduler
from tqdm.auto import tqdm

from diffusers_fastdiff import AMEDScheduler, IPNDMMultistepScheduler, load_pretrained
from diffusers_fastdiff.errors import check_writable, require
from diffusers_fastdiff.evaluation.digits import digit_estimates
from diffusers_fastdiff.evaluation.intervals import pooled, rms_estimate
from diffusers_fastdiff.evaluation.tables import report, write_table
from diffusers_fastdiff.numerics.linear_solver import as_linear_solver
from diffusers_fastdiff.numerics.sigma_grids import logsnr_grid, make_grid
from diffusers_fastdiff.numerics.solver_methods import Solver
from diffusers_fastdiff.numerics.solvers import SolverRun, solve
from diffusers_fastdiff.pretrained import available_solvers, open_pipeline
from diffusers_fastdiff.training.pipeline_denoiser import PipelineDenoiser
from diffusers_fastdiff.training.randomness import BatchRandom, derive_seed

REFERENCE_EVALUATIONS = 1000
NOTE = (
    "Error: root mean squared difference per element to a {reference}-evaluation reference over {images} images of each of "
    "the seeds {seeds}, guidance {guidance}; low and high: 95 % interval of the bootstrap over images. "
    "Evaluations are counted, with AFS where a solver has it."
)


class Mixture:
    """Nine Gaussians in 16 dimensions behind a table of timesteps, in place of a network."""

    sample_shape = (1, 4, 4)

    def __init__(self):
        self.scheduler = DDIMScheduler(clip_sample=False)
        self.noise_model = AMEDScheduler.from_config(self.scheduler.config).noise_model
        self._means = torch.randn(9, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def draw(self, random: BatchRandom) -> torch.Tensor:
        return random.integers(1)

    def conditions(self, choice: torch.Tensor) -> dict:
        return {}

    def start(self, noise: torch.Tensor, sigma: float) -> torch.Tensor:
        return noise / self.noise_model.state_scale(sigma).to(noise)

    def bind(self, conditions: dict) -> Callable:
        def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
            scaled = x * self.noise_model.input_scale(sigma).to(x)
            return x - sigma * self.predict(scaled, torch.as_tensor(self.noise_model.timestep(sigma)), conditions)

        return denoise

    def predict(self, scaled: torch.Tensor, timestep: torch.Tensor, conditions: dict) -> torch.Tensor:
        sigma = self.noise_model.sigma(timestep.double()).reshape(-1, 1)
        x, total = scaled.double().flatten(1) * (1 + sigma**2).sqrt(), 0.3**2 + sigma**2
        weights = torch.softmax(-torch.cdist(x, self._means).square() / (2 * total), dim=1)
        mean = (0.3**2 * x + sigma**2 * (weights @ self._means)) / total
        return ((x - mean) / sigma).to(scaled.dtype).reshape(scaled.shape)


class Entry(NamedTuple):
    """One solver at one budget."""

    name: str
    family: str
    """"stock" (training-free, as it comes), "ours" (training-free, here), "searched" (range and grid tuned), "learned"."""
    scheduler: object
    steps: int
    """What `set_timesteps` is given."""


def stock(config: dict, nfe: int) -> Iterator[Entry]:
    """diffusers' schedulers with their grid options."""
    spaced = {"timestep_spacing": "linspace"}
    grids = {"": {}, " trailing": {"timestep_spacing": "trailing"}, " Karras": {"use_karras_sigmas": True} | spaced,
             " Lu": {"use_lu_lambdas": True} | spaced}  # fmt: skip
    for spacing in ("leading", "trailing", "linspace"):
        yield entry("DDIM " + spacing, "DDIMScheduler", config, nfe, timestep_spacing=spacing)
    for grid, options in grids.items():
        yield entry(f"DPM++(2M){grid}", "DPMSolverMultistepScheduler", config, nfe, **options)
        yield entry(f"DPM++(3M){grid}", "DPMSolverMultistepScheduler", config, nfe, solver_order=3, **options)
        if "Lu" not in grid:
            yield entry(f"UniPC{grid}", "UniPCMultistepScheduler", config, nfe, **options)
            yield entry(f"DEIS{grid}", "DEISMultistepScheduler", config, nfe, **options)
    if nfe % 2:
        yield entry("Heun", "HeunDiscreteScheduler", config, (nfe + 1) // 2)
        yield entry("Heun Karras", "HeunDiscreteScheduler", config, (nfe + 1) // 2, use_karras_sigmas=True)


def entry(name: str, class_name: str, config: dict, steps: int, **options) -> Entry:
    options = {"clip_sample": False} | options
    return Entry(name, "stock", getattr(diffusers, class_name).from_config(config, **options), steps)


def ours(config: dict, nfe: int) -> Iterator[Entry]:
    for variable in (False, True):
        for order in (2, 3, 4):
            name = f"iPNDM{'_v' if variable else ''}({order})"
            scheduler = IPNDMMultistepScheduler.from_config(config, solver_order=order, variable_step=variable)
            yield Entry(name, "ours", scheduler, nfe)
    if nfe % 2 == 0:
        yield Entry("DPM-Solver-2", "ours", AMEDScheduler.from_config(config, student="dpm2", sigma_schedule="logsnr"), nfe)


def learned(model: str, nfe: int, guidance: float, folders: list[str]) -> Iterator[Entry]:
    """Embedded and given solvers that fit the model, budget and guidance."""
    found = [(name, load_pretrained(name)) for name in available_solvers()]
    found += [(Path(folder).name, AMEDScheduler.from_pretrained(folder)) for folder in folders]
    for name, scheduler in found:
        fitted = scheduler.config.fitted_to or {}
        fits = {"num_inference_steps": nfe, "guidance_scale": guidance, "model_id": model}
        if all(fitted.get(key) == value for key, value in fits.items()):
            yield Entry(name, "learned", scheduler, nfe)


def searched(denoiser, config: dict, nfe: int, noise: torch.Tensor, choice: torch.Tensor, target: torch.Tensor) -> Entry:
    """The best training-free solver with the best range and grid for it, on noise of its own."""
    model = denoiser.noise_model
    low, high = (float(model.timestep(sigma)) for sigma in model.sigma_range)
    at = lambda share: float(model.sigma(low + share * (high - low)))  # noqa: E731
    best: tuple[float, str, list[float], Solver] | None = None
    methods = [("dpmpp", 2), ("dpmpp", 3), ("ipndm", 2), ("ipndm", 3), ("ipndm_v", 2), ("ipndm_v", 3)]
    grids = [("logsnr", None), ("polynomial", 5.0), ("polynomial", 9.0), ("time_uniform", 1.0)]
    ranges = [(first, last) for first in (1.0, 0.9, 0.8, 0.75) for last in (0.01, 0.02, 0.04)]
    for first, last in tqdm(ranges, desc=f"Searching peers at {nfe}", leave=False):
        for kind, rho in grids:
            sigmas = [*make_grid(kind, nfe, at(last), at(first), rho).tolist(), 0.0]
            for method in methods:
                solver = Solver(*method)
                end = solve_batches(denoiser, noise, choice, sigmas, solver)
                error = float((end - target).square().mean().sqrt())
                if best is None or error < best[0]:
                    best = (error, f"{method[0]}({method[1]}) {kind} {rho or ''}", sigmas, solver)
    _, name, sigmas, solver = best
    linear = as_linear_solver(lambda: SolverRun(solver, sigmas)).to_dict()
    scheduler = AMEDScheduler.from_config(config, student="lms", linear_solver=linear)
    return Entry(f"searched: {name.strip()} {sigmas[0]:.3g}..{sigmas[-2]:.3g}", "searched", scheduler, nfe)


@torch.no_grad()
def solve_batches(denoiser, noise, choice, sigmas: list[float], solver: Solver, batch_size: int = 256) -> torch.Tensor:
    parts = []
    for rows in torch.arange(len(noise)).split(batch_size):
        denoise = denoiser.bind(denoiser.conditions(choice[rows]))
        parts.append(solve(denoise, denoiser.start(noise[rows], sigmas[0]), sigmas, solver))
    return torch.cat(parts)


@torch.no_grad()
def run_scheduler(denoiser, pipe, item: Entry, noise, choice, batch_size: int = 256) -> tuple[torch.Tensor, int]:
    """Samples of a scheduler, driven as a pipeline drives it, and the evaluations it took."""
    scheduler, parts, evaluations = item.scheduler, [], 0
    if getattr(scheduler.config, "mode", None) == "attached":
        scheduler.attach(pipe)
    for rows in torch.arange(len(noise)).split(batch_size):
        scheduler.set_timesteps(item.steps)
        x, conditions, evaluations = noise[rows] * scheduler.init_noise_sigma, denoiser.conditions(choice[rows]), 0
        for timestep in scheduler.timesteps:
            output = denoiser.predict(scheduler.scale_model_input(x, timestep), timestep, conditions)
            x = scheduler.step(output, timestep, x).prev_sample
            evaluations += 1
        parts.append(x)
    if getattr(scheduler.config, "mode", None) == "attached":
        scheduler.detach()
    return torch.cat(parts), evaluations


def draw(denoiser, seed: int, purpose: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = BatchRandom(derive_seed(seed, "benchmark", purpose), 0, count, 0, count)
    choice = denoiser.draw(random)
    return random.normal(*denoiser.sample_shape), choice


def reference(denoiser, noise, choice, evaluations: int, cache: Path | None) -> torch.Tensor:
    if cache is not None and cache.exists():
        return torch.load(cache, weights_only=True)
    sigmas = [*logsnr_grid(evaluations, *denoiser.noise_model.sigma_range).tolist(), 0.0]
    end = solve_batches(denoiser, noise, choice, sigmas, Solver("dpmpp", 2))
    if cache is not None:
        torch.save(end, cache)
    return end


def measure(args, denoiser, pipe, item: Entry, sets: dict[int, tuple]) -> dict:
    """One row of the table."""
    squares, distances, seconds, evaluations = [], [], [], 0
    for noise, choice, target in sets.values():
        begin = time.perf_counter()
        end, evaluations = run_scheduler(denoiser, pipe, item, noise, choice)
        seconds.append(time.perf_counter() - begin)
        squares.append((end - target).square().flatten(1).mean(1))
        if args.model.startswith("digits"):
            distances.append(digit_estimates(end, choice)["frechet_distance"])
    row = {"solver": item.name, "family": item.family, "evaluations": evaluations}
    row |= with_interval("error", rms_estimate(torch.cat(squares))) | {"seconds": statistics.mean(seconds)}
    return row | (with_interval("frechet_distance", pooled(distances)) if distances else {})


def with_interval(name: str, number: dict) -> dict:
    low, high = number["interval"]
    return {name: number["value"], f"{name} low": low, f"{name} high": high}


def verdict(rows: list[dict], budgets: list[int]) -> Iterator[dict]:
    """The best of each family at each budget, and what learning is worth."""
    kinds = {"training-free": ("stock", "ours"), "searched": ("searched",), "learned": ("learned",)}
    for nfe in budgets:
        best = {}
        for kind, families in kinds.items():
            rivals = [row for row in rows if row["evaluations"] == nfe and row["family"] in families]
            best[kind] = min(rivals, key=lambda row: row["error"], default=None)
        row = {"evaluations": nfe}
        for family, winner in best.items():
            row[f"best {family}"] = f"{winner['solver']}: {winner['error']:.4f}" if winner else "-"
        for family in ("training-free", "searched"):
            pair = best["learned"], best[family]
            row[f"learned / {family}"] = f"{pair[0]['error'] / pair[1]['error']:.2f}" if all(pair) else "-"
        yield row


def step_costs(config: dict, shape: tuple[int, ...] = (1, 4, 64, 64), runs: int = 40) -> Iterator[dict]:
    """Time of one `step` on latents of Stable Diffusion; the smallest of several runs of 6 evaluations each."""
    linear = as_linear_solver(lambda: SolverRun(Solver("dpmpp", 2), [*logsnr_grid(6, 0.08, 20.0).tolist(), 0.0])).to_dict()
    schedulers = {
        "diffusers DPM-Solver++(2M)": diffusers.DPMSolverMultistepScheduler.from_config(config),
        "diffusers DPM-Solver++(3M)": diffusers.DPMSolverMultistepScheduler.from_config(config, solver_order=3),
        "iPNDM(3)": IPNDMMultistepScheduler.from_config(config, solver_order=3),
        "AMED": AMEDScheduler.from_config(config),
        "AMED dpmpp": AMEDScheduler.from_config(config, student="dpmpp"),
        "AMED lms": AMEDScheduler.from_config(config, student="lms", linear_solver=linear),
    }
    output = torch.randn(shape)
    best = dict.fromkeys(schedulers, float("inf"))
    for _ in range(runs):
        for name, scheduler in schedulers.items():
            scheduler.set_timesteps(6)
            x, times = torch.randn(shape), []
            for timestep in scheduler.timesteps:
                begin = time.perf_counter()
                x = scheduler.step(output, timestep, x).prev_sample
                times.append(time.perf_counter() - begin)
            best[name] = min(best[name], statistics.mean(times))
    first = next(iter(best.values()))
    for name, seconds in best.items():
        yield {"scheduler": name, "microseconds per step": f"{1e6 * seconds:.0f}", "relative": f"{seconds / first:.2f}"}


def plot(rows: list[dict], path: Path) -> None:
    plt = require("matplotlib.pyplot", "eval")
    figure, axis = plt.subplots(figsize=(9, 6))
    styles = {"stock": (0.8, "grey"), "ours": (0.8, "tab:blue"), "searched": (2, "tab:orange"), "learned": (2, "tab:red")}
    for family, (width, color) in styles.items():
        names = dict.fromkeys(row["solver"] for row in rows if row["family"] == family)
        if family in ("searched", "learned"):  # their names differ between budgets
            names = {family: None} if names else {}
        for number, name in enumerate(names):
            chosen = [r for r in rows if r["family"] == family and (name in (family, r["solver"]))]
            best = {
                n: min(r["error"] for r in chosen if r["evaluations"] == n) for n in sorted({r["evaluations"] for r in chosen})
            }
            label = {"stock": "diffusers", "ours": "iPNDM family"}.get(family, f"best {family}") if number == 0 else None
            axis.plot(list(best), list(best.values()), marker="o", linewidth=width, color=color, label=label)
    axis.set(xscale="log", yscale="log", xlabel="model evaluations", ylabel="error to the reference")
    budgets = sorted({row["evaluations"] for row in rows})
    axis.set_xticks(budgets, budgets)
    axis.set_xticks([], minor=True)
    axis.set_ylim(top=1.5)  # Heun diverges with few steps
    axis.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits-dit", help="embedded name, folder or Hub name of a pipeline, or 'mixture'")
    parser.add_argument("--nfe", type=int, nargs="+", default=[3, 5, 7, 10, 20])
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--num_images", type=int, default=512, help="for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--reference_evaluations", type=int, default=REFERENCE_EVALUATIONS)
    parser.add_argument("--learned", nargs="*", default=[], help="folders of learned solvers, besides the embedded ones")
    parser.add_argument("--search_peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--search_images", type=int, default=64, help="noise that peers are searched on")
    parser.add_argument("--step_costs", action="store_true", help="only measure what one `step` costs")
    parser.add_argument("--prompts_file", help="text-to-image: one prompt in each line")
    parser.add_argument("--output_dir", default="benchmark-solvers")
    args = parser.parse_args()
    if args.step_costs:
        report("cost of `step`, latents 1 x 4 x 64 x 64", step_costs(DDIMScheduler().config))
        return
    folder = check_writable(args.output_dir)
    if args.model == "mixture":
        pipe, denoiser = None, Mixture()
        config = denoiser.scheduler.config
    else:
        pipe = open_pipeline(args.model)
        config = pipe.scheduler.config
        prompts = Path(args.prompts_file).read_text().splitlines() if args.prompts_file else None
        noise_model = AMEDScheduler.from_config(config).noise_model
        denoiser = PipelineDenoiser(pipe, noise_model, args.guidance_scale, prompts)
    tag = f"{Path(args.model).name}-g{args.guidance_scale:g}"
    sets = {}
    for seed in tqdm(args.seeds, desc="References"):
        noise, choice = draw(denoiser, seed, "test", args.num_images)
        cache = folder / f"reference-{tag}-{seed}-{args.num_images}-{args.reference_evaluations}.pt"
        sets[seed] = (noise, choice, reference(denoiser, noise, choice, args.reference_evaluations, cache))
    search = draw(denoiser, 0, "search", args.search_images)
    search_target = reference(denoiser, *search, 100, None) if args.search_peers else None

    rows = []
    for nfe in args.nfe:
        items = [*stock(config, nfe), *ours(config, nfe), *learned(args.model, nfe, args.guidance_scale, args.learned)]
        if args.search_peers and nfe <= 10:  # with many evaluations range and grid matter little
            items.append(searched(denoiser, config, nfe, *search, search_target))
        new = [measure(args, denoiser, pipe, item, sets) for item in tqdm(items, desc=f"{nfe} evaluations")]
        new = [row for row in new if row["error"] == row["error"]]  # some orders of diffusers' solvers give NaN at few steps
        report(f"{tag}, {nfe} evaluations", sorted(new, key=lambda row: row["error"]))
        rows += new
    results = report("best of each kind", verdict(rows, args.nfe))
    note = NOTE.format(
        reference=args.reference_evaluations, seeds=args.seeds, images=args.num_images, guidance=args.guidance_scale
    )
    print(f"\n{note}")
    write_table(rows, folder / tag, note=note, best=results)
    plot(rows, folder / f"{tag}.png")


if __name__ == "__main__":
    main()
