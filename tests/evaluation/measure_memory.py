"""Evaluate many images with features of the size of Inception's, and print what it took.

python tests/evaluation/measure_memory.py 50000 folder
"""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

from diffusers_fastdiff.evaluation.extractors import FeatureExtractor, Features
from diffusers_fastdiff.evaluation.feature_table import extract_features
from diffusers_fastdiff.evaluation.images import open_images
from diffusers_fastdiff.evaluation.reference import measure_reference, open_reference
from diffusers_fastdiff.evaluation.report import EvaluationConfig, evaluate


class RandomProjection(FeatureExtractor):
    """Random features of 8x8 images, as many as Inception has."""

    name, sizes = "random-projection", (2048, 2023, 1008)

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(3 * 64, sum(self.sizes), generator=generator) / 8)

    def forward(self, images: torch.Tensor) -> Features:
        return Features(*(images.flatten(1) / 127.5 @ self.weight).relu().split(self.sizes, dim=1))


def write_images(path: Path, count: int, seed: int) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    with open(path, "wb") as file:
        np.savez(file, arr_0=pixels)
    return path


def main(count: int, folder: Path) -> None:
    paths = [write_images(folder / f"{seed}.npz", count, seed) for seed in (0, 1)]
    start = time.perf_counter()
    extractor = RandomProjection()
    images = open_images(paths[0])
    reference = measure_reference(open_reference(paths[1]), extractor, images.shape, folder / "cache", 256)
    table = extract_features(images, extractor, folder / "cache", 256)
    result = evaluate(table, reference, EvaluationConfig(bootstrap=2))
    print(
        json.dumps(
            {
                "num_images": result["num_images"],
                "metrics": {name: value["value"] for name, value in result["metrics"].items()},
                "seconds": round(time.perf_counter() - start),
                "peak_mebibytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            }
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
