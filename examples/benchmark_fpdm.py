"""What the fixed-point DiT saves and what it costs, measured beside the plain DiT in one run.

    python examples/benchmark_fpdm.py                    # everything, some minutes on a laptop
    python examples/benchmark_fpdm.py --parts loop       # parameters | memory | loop | quality

Parameters and saved activations are counted (exact on any machine); peak memory needs a GPU. Quality is measured on the
embedded digits models: each sampler gets a number of transformer-block evaluations for a whole image, and the plain DiT spends
them on fewer steps.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from diffusers_fastdiff import (
    FasterDiffusionDiTTransformer2DModel,
    FixedPointDiTTransformer2DModel,
    FixedPointSamplingConfig,
    FixedPointSolver,
    apply_fixed_point_sampling,
    load_pretrained,
)
from diffusers_fastdiff.errors import check_writable, require
from diffusers_fastdiff.evaluation.digits import evaluate_digits
from diffusers_fastdiff.evaluation.tables import report
from diffusers_fastdiff.models.fixed_point_dit_blocks import FixedPointDiTBlock
from diffusers_fastdiff.models.transformer_fixed_point_dit import read_preset
from diffusers_fastdiff.training.validation import sample_latents

PARTS = ("parameters", "memory", "loop", "quality")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIGITS = {"num_attention_heads": 4, "attention_head_dim": 24, "in_channels": 1, "out_channels": 1, "sample_size": 8}


def models(size: str) -> tuple[FixedPointDiTTransformer2DModel, FasterDiffusionDiTTransformer2DModel]:
    """A fixed-point DiT with one pre and one post block, and the plain DiT it stands for."""
    if size == "digits":
        config, depth, classes = DIGITS | {"patch_size": 2}, 8, 10
    else:
        depth, dim, heads, patch = read_preset(size)
        config = {"num_attention_heads": heads, "attention_head_dim": dim // heads, "patch_size": patch, "out_channels": 8}
        classes = 1000
    plain = FasterDiffusionDiTTransformer2DModel(**config, num_layers=depth, num_embeds_ada_norm=classes, class_dropout_prob=0)
    fixed_point = FixedPointDiTTransformer2DModel(**config, num_iterations=depth - 2, num_classes=classes, class_dropout_prob=0)
    return fixed_point, plain


def inputs(model: torch.nn.Module, batch_size: int) -> dict[str, torch.Tensor]:
    config, generator = model.config, torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(
            batch_size, config.in_channels, config.sample_size, config.sample_size, generator=generator
        ).to(DEVICE),
        "timestep": torch.full((batch_size,), 500, device=DEVICE),
        "class_labels": (torch.arange(batch_size) % 10).to(DEVICE),
    }


def parameters(sizes: list[str]) -> Iterator[dict]:
    for size in sizes:
        with torch.device("meta"):
            fixed_point, plain = models(size)
        embedders = sum(p.numel() for p in plain.transformer_blocks[0].norm1.emb.parameters())
        shared = plain.num_parameters() - (len(plain.transformer_blocks) - 1) * embedders  # one set, as in the original
        ours = fixed_point.num_parameters()
        yield {"size": size, "fixed point": ours, "DiT": shared, "DiT in diffusers": plain.num_parameters(),
               "fewer than DiT": f"{1 - ours / shared:.1%}"}  # fmt: skip


def saved_bytes(model: torch.nn.Module, arguments: dict, draw: dict) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, weights not counted."""
    own = {weight.untyped_storage().data_ptr() for weight in (*model.parameters(), *model.buffers())}
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**arguments, **draw).sample
    total = sum(storage.nbytes() for storage in saved.values())
    del output
    return total


def memory(sizes: list[str]) -> Iterator[dict]:
    """At equal computed depth: pre block, iterations without and with gradient, post block = layers of the DiT."""
    for size in sizes:
        fixed_point, plain = (model.to(DEVICE).train() for model in models(size))
        depth, batch_size = len(plain.transformer_blocks), 64 if size == "digits" else 2
        longest = 12 if size != "digits" else 4  # iterations with gradient are uniform in 1 .. longest
        runs = {"DiT": (plain, [{}])}
        runs["fixed point, average draw"] = (
            fixed_point,
            [{"num_iterations": k, "num_no_grad_iterations": depth - 2 - k} for k in range(1, longest + 1)],
        )
        runs["fixed point, longest draw"] = (fixed_point, runs["fixed point, average draw"][1][-1:])
        reference = {}
        for name, (model, draws) in runs.items():
            arguments = inputs(model, batch_size)
            timed = draws if DEVICE == "cuda" or size == "digits" else []  # a step of XL/2 takes minutes without a GPU
            row = {
                "saved": [saved_bytes(model, arguments, d) for d in draws],
                "seconds": [training_seconds(model, arguments, d) for d in timed],
                "peak": [peak_bytes(model, arguments, d) for d in timed],
            }
            row = {key: statistics.mean(values) if values else 0.0 for key, values in row.items()}
            reference = reference or row
            yield {
                "size": size, "batch": batch_size, "model": name, "saved activations MiB": f"{row['saved'] / 2**20:.0f}",
                "less": f"{1 - row['saved'] / reference['saved']:.1%}",
                "peak GPU MiB": f"{row['peak'] / 2**20:.0f}" if row["peak"] else "no GPU",
                "steps per second": f"{1 / row['seconds']:.2f}" if timed else "no GPU",
                "speed-up": f"{reference['seconds'] / row['seconds']:.2f}x" if timed else "no GPU",
            }  # fmt: skip


def training_seconds(model: torch.nn.Module, arguments: dict, draw: dict, repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        model(**arguments, **draw).sample.square().mean().backward()
        synchronize()
        times.append(time.perf_counter() - start)
    model.zero_grad(set_to_none=True)
    return min(times)


def peak_bytes(model: torch.nn.Module, arguments: dict, draw: dict) -> int:
    """Peak of one training step above what lies on the GPU before it; 0 without a GPU."""
    if DEVICE != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(**arguments, **draw).sample.square().mean().backward()
    model.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated() - before


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def loop(sizes: list[str]) -> Iterator[dict]:
    """The fixed-point loop with what is constant in it computed once, as the published program has it, and all inside."""
    for size in sizes:
        model = models(size)[0].to(DEVICE).eval()
        for batch_size in (1, 16):
            variants = loop_variants(model, batch_size)
            outputs = {name: run() for name, run in variants.items()}
            times: dict[str, list[float]] = {name: [] for name in variants}
            for _ in range(15):
                for name, run in variants.items():
                    synchronize()
                    start = time.perf_counter()
                    run()
                    synchronize()
                    times[name].append(time.perf_counter() - start)
            best = {name: min(values) for name, values in times.items()}
            for name, output in outputs.items():
                difference = (output - outputs["hoisted"]).norm() / outputs["hoisted"].norm()
                yield {
                    "size": size, "batch": batch_size, "loop": name, "ms": f"{1e3 * best[name]:.2f}",
                    "hoisted is faster": f"{best[name] / best['hoisted']:.2f}x", "difference": f"{difference:.0e}",
                }  # fmt: skip


def loop_variants(model: FixedPointDiTTransformer2DModel, batch_size: int) -> dict[str, Callable[[], torch.Tensor]]:
    config = model.config
    index, count = config.num_pre_layers, min(config.num_iterations, 8)
    block, dim = model.transformer_blocks[index], config.num_attention_heads * config.attention_head_dim
    tokens = (config.sample_size // config.patch_size) ** 2
    start = torch.randn(batch_size, tokens, dim, device=DEVICE)
    timestep, labels = torch.full((batch_size,), 500, device=DEVICE), torch.zeros(batch_size, dtype=torch.long, device=DEVICE)
    weight = torch.cat([block.state_proj.weight, model.injection_out.weight], dim=1)

    def condition() -> torch.Tensor:
        embedding = model._embed_timestep(timestep, batch_size, start)
        return F.silu(embedding + model.class_embedder(labels))

    def unhoisted_step(state: torch.Tensor, injected: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        merged = F.linear(torch.cat([state, injected], dim=-1), weight, model.injection_out.bias)
        merged = block.merge_proj(F.gelu(merged, approximate="tanh"))
        return FixedPointDiTBlock.forward(block, merged, model._modulation(index, embedding))

    def hoisted() -> torch.Tensor:
        state, injection = start, model.injection_out(model.injection_in(start))
        modulation = model._modulation(index, condition())
        for _ in range(count):
            state = block(state, modulation, injection)
        return state

    def published() -> torch.Tensor:
        state, injected, embedding = start, model.injection_in(start), condition()
        for _ in range(count):
            state = unhoisted_step(state, injected, embedding)
        return state

    def nothing_hoisted() -> torch.Tensor:
        state = start
        for _ in range(count):
            state = unhoisted_step(state, model.injection_in(start), condition())
        return state

    return {"hoisted": hoisted, "as published": published, "nothing hoisted": nothing_hoisted}


def quality(num_images: int, seeds: list[int], budgets: list[int], solver: str) -> Iterator[dict]:
    """Samples at a given number of block evaluations for a whole image, without guidance."""
    plain, fixed_point = load_pretrained("digits-dit-deep"), load_pretrained("digits-fpdm")
    depth = plain.transformer.config.num_layers
    outer = fixed_point.transformer.config.num_pre_layers + fixed_point.transformer.config.num_post_layers
    for budget in budgets:
        yield from measure("plain DiT, fewer steps", plain, budget // depth, None, num_images, seeds, solver, depth)
        for iterations in (1, 2, 3, 4, fixed_point.transformer.config.num_iterations):
            steps = budget // (outer + iterations)
            if steps < 1:
                continue
            total = budget - outer * steps
            options = {
                "constant": {"budget": total},
                "increasing": {"budget": total, "allocation": "increasing"},
                "decreasing": {"budget": total, "allocation": "decreasing"},
                "constant, reuse": {"budget": total, "reuse_solution": True},
                "decreasing, reuse": {"budget": total, "allocation": "decreasing", "reuse_solution": True},
                "Anderson": {"budget": total, "solver": FixedPointSolver(anderson_depth=3)},
                "Anderson, reuse": {"budget": total, "solver": FixedPointSolver(anderson_depth=3), "reuse_solution": True},
            }
            for name, option in options.items():
                config = FixedPointSamplingConfig(**option)
                yield from measure(f"fixed point, {name}", fixed_point, steps, config, num_images, seeds, solver, outer)
    for tolerance in (0.3, 0.1, 0.03):
        for reuse in (False, True):
            stop = FixedPointSolver(tolerance=tolerance, stop="sample")
            config = FixedPointSamplingConfig(num_iterations=20, solver=stop, reuse_solution=reuse)
            name = f"fixed point, tolerance {tolerance}{', reuse' if reuse else ''}"
            yield from measure(name, fixed_point, 10, config, num_images, seeds, solver, outer)


def measure(name, pipe, steps, config, num_images, seeds, solver, outer) -> Iterator[dict]:
    """One row: mean and spread over the seeds. `outer` blocks of each step are not fixed-point iterations."""
    if steps < 1:
        return
    schedulers = {"ddim": DDIMScheduler, "dpmsolver++": DPMSolverMultistepScheduler}
    pipe.scheduler = schedulers[solver].from_config(pipe.scheduler.config, timestep_spacing="trailing")
    hook = apply_fixed_point_sampling(pipe, config) if config is not None else None
    labels, results, spent = torch.arange(num_images) % 10, [], []
    for seed in seeds:
        images = sample_latents(
            lambda x, t, c: pipe.transformer(x, t.expand(len(x)), class_labels=c).sample,
            pipe.scheduler, (num_images, 1, 8, 8), labels, labels, num_inference_steps=steps, seed=seed,
        )  # fmt: skip
        iterations = sum(float(counts.float().mean()) for counts in hook.iterations_spent) if hook else 0.0
        spent.append(iterations + outer * steps)
        results.append(evaluate_digits(images, labels))
    row = {"sampler": name, "steps": steps, "block evaluations": f"{statistics.mean(spent):.0f}"}
    for key in ("frechet_distance", "accuracy"):
        values = [result[key] for result in results]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        row |= {key: f"{statistics.mean(values):.4f}", f"{key} +-": f"{spread:.4f}"}
    yield row


def plot(rows: list[dict], path: Path) -> None:
    """Frechet distance against block evaluations; for each sampler the best of its step counts at each budget."""
    plt = require("matplotlib.pyplot", "eval")
    best: dict[str, dict[int, float]] = {}
    for row in rows:
        curve, where = best.setdefault(row["sampler"], {}), int(row["block evaluations"])
        curve[where] = min(curve.get(where, float("inf")), float(row["frechet_distance"]))
    figure, axis = plt.subplots(figsize=(9, 6))
    for name, curve in best.items():
        points = sorted(curve.items())
        axis.plot(*zip(*points, strict=True), marker="o", linewidth=3 if name.startswith("plain") else 1, label=name)
    axis.set(xscale="log", yscale="log", xlabel="block evaluations for an image", ylabel="Frechet distance")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sizes", nargs="+", default=["digits", "XL/2"], help="digits, or a preset such as S/8")
    parser.add_argument("--num_images", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=int, nargs="+", default=[24, 40, 64, 96, 160])
    parser.add_argument("--solver", choices=["ddim", "dpmsolver++"], default="ddim")
    parser.add_argument("--output_dir", default="benchmark-fpdm")
    args = parser.parse_args()
    folder = check_writable(args.output_dir)
    print(f"device {DEVICE}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    if "parameters" in args.parts:
        report("parameters", parameters(args.sizes), folder)
    if "memory" in args.parts:
        report("memory", memory(args.sizes), folder)
    if "loop" in args.parts:
        report("loop", loop(args.sizes), folder)
    if "quality" in args.parts:
        rows = report("quality", quality(args.num_images, args.seeds, args.budgets, args.solver), folder)
        plot(rows, folder / "quality.png")


if __name__ == "__main__":
    main()
