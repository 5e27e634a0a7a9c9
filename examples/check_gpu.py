"""What only a GPU can show: offloading, low precision, compilation and timing of every kind of pipeline, in one table.

python examples/check_gpu.py            # needs CUDA; no download, the embedded models are enough
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTPipeline

from diffusers_fastdiff import (
    FasterDiffusionConfig,
    FixedPointSamplingConfig,
    apply_faster_diffusion,
    apply_fixed_point_sampling,
    load_pretrained,
)
from diffusers_fastdiff.errors import check_writable
from diffusers_fastdiff.evaluation.peak_memory import peak_memory
from diffusers_fastdiff.evaluation.tables import report

PIPELINES = {
    "digits-dit": None,
    "digits-dit, learned solver": lambda pipe: load_pretrained("digits-dit-amed-5").attach(pipe),
    "digits-dit-deep, Faster Diffusion": lambda pipe: apply_faster_diffusion(
        pipe, FasterDiffusionConfig(every=2, batched=True)
    ),
    "digits-fpdm, budget": lambda pipe: apply_fixed_point_sampling(
        pipe, FixedPointSamplingConfig(budget=10, reuse_solution=True)
    ),
    "digits-edm": None,
    "digits-cld": None,
}


def network(pipe) -> torch.nn.Module:
    return pipe.transformer if isinstance(pipe, DiTPipeline) else pipe.unet


def group_offload(pipe) -> None:
    network(pipe).enable_group_offload(
        onload_device=torch.device("cuda"), offload_device=torch.device("cpu"), offload_type="leaf_level", use_stream=True
    )


CHECKS: dict[str, tuple[Callable[[Any], Any], float]] = {
    "float32": (lambda pipe: pipe.to("cuda"), 1e-3),
    "bfloat16": (lambda pipe: pipe.to("cuda", torch.bfloat16), 0.2),
    "float16": (lambda pipe: pipe.to("cuda", torch.float16), 0.05),
    "model offload": (lambda pipe: pipe.enable_model_cpu_offload(), 1e-3),
    "sequential offload": (lambda pipe: pipe.enable_sequential_cpu_offload(), 1e-3),
    "group offload": (group_offload, 1e-3),
    "layerwise casting": (lambda pipe: network(pipe.to("cuda")).enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32), 0.5),
    "compiled": (lambda pipe: network(pipe.to("cuda")).compile(), 1e-2),
    "compiled blocks": (lambda pipe: network(pipe.to("cuda")).compile_repeated_blocks(fullgraph=True), 1e-2),
    "channels last": (lambda pipe: network(pipe.to("cuda")).to(memory_format=torch.channels_last), 1e-2),
}  # fmt: skip


def draw(pipe) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(k) for k in range(16)]
    options = {"num_inference_steps": 5, "guidance_scale": 1.0, "generator": generators, "output_type": "np"}
    return torch.from_numpy(pipe(class_labels=[k % 10 for k in range(16)], **options).images).float()


def opened(name: str):
    pipe = load_pretrained(name.partition(",")[0])
    pipe.set_progress_bar_config(disable=True)
    if PIPELINES[name] is not None:
        PIPELINES[name](pipe)
    return pipe


def rows(names: list[str]) -> Iterator[dict]:
    """Each check on each pipeline: its distance to the run on the CPU, and what it took."""
    for name in names:
        expected = draw(opened(name))
        for check, (prepare, tolerance) in CHECKS.items():
            pipe = opened(name)
            try:
                prepare(pipe)
                draw(pipe)
                start = time.perf_counter()
                images = draw(pipe)
                seconds = time.perf_counter() - start
                with peak_memory("cuda") as peak:
                    draw(pipe)
            except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
                reason = str(error).splitlines()[0][:80]
                yield {
                    "pipeline": name,
                    "check": check,
                    "result": f"refused: {reason}",
                    "difference": "",
                    "milliseconds": "",
                    "MiB": "",
                }
                continue
            difference = float((images - expected).square().mean().sqrt())
            verdict = "as on the CPU" if difference < tolerance else "DIFFERS"
            yield {"pipeline": name, "check": check, "result": verdict, "difference": difference,
                   "milliseconds": 1000 * seconds, "MiB": peak.bytes / 2**20}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipelines", nargs="+", choices=list(PIPELINES), default=list(PIPELINES))
    parser.add_argument("--output_dir", type=Path, default=Path("check-gpu"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: there is no CUDA device. tests/ecosystem/test_comforts.py checks what a CPU can show.")
    found = report("gpu", rows(args.pipelines), check_writable(args.output_dir))
    sys.exit(any(row["result"] == "DIFFERS" for row in found))


if __name__ == "__main__":
    main()
