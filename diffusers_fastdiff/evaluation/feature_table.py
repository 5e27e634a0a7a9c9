"""Features of a set of images, extracted by several processes at once and kept on disk."""

import json
import os
import shutil
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from .extractors import FeatureExtractor
from .feature_file import FeatureFile
from .images import ImageSet
from .processes import Processes, join_processes

_PARTS = ("pooled", "spatial", "logits")


class FeatureTable:
    """Three matrices in a folder: `pooled` (n, d), `spatial` (n, s) and `logits` (n, classes), row k for image k.

    Args:
        folder: that `extract_features` has finished.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.info = json.loads((self.folder / "info.json").read_text())
        """Extractor, shape of the images, their source and fingerprint."""
        self.pooled, self.spatial, self.logits = (FeatureFile(self.folder / f"{part}.npy") for part in _PARTS)

    def __len__(self) -> int:
        return len(self.pooled)


def extract_features(
    images: ImageSet,
    extractor: FeatureExtractor,
    cache_dir: str | Path,
    batch_size: int = 64,
    num_workers: int = 0,
    state: Processes | None = None,
) -> FeatureTable:
    """Features of all images, from the cache or computed. Every process must call it.

    Batches hold the same images however many processes there are, and the last one is filled up, so neither changes a feature.

    Args:
        cache_dir: where features live, in a folder named after the content of the images and the identity of the extractor.
        batch_size: images in a batch; features may depend on it in the last bit.
        num_workers: processes that read images, for each process.

    Raises:
        ValueError: if the images do not suit the extractor, or one cannot be decoded.
        OSError: if the disk is full; the sets that were finished before stay in the cache.
    """
    state = state or join_processes()
    extractor.check(images.shape, images.name)
    folder = Path(cache_dir) / f"{images.fingerprint}-{extractor.identity}-{batch_size}"
    partial = folder.with_name(folder.name + ".incomplete")
    if (folder / "info.json").is_file():
        state.wait_for_everyone()
        return FeatureTable(folder)
    if state.is_main_process:
        _prepare(partial, len(images), extractor.sizes)
    state.wait_for_everyone()
    files = [FeatureFile(partial / f"{part}.npy") for part in _PARTS]

    starts = range(0, len(images), batch_size)[state.process_index :: state.num_processes]
    order = [min(start + k, len(images) - 1) for start in starts for k in range(batch_size)]
    loader = DataLoader(Subset(images, order), batch_size, num_workers=num_workers)
    extractor = extractor.to(state.device).eval()
    for start, batch in tqdm(
        zip(starts, loader, strict=True), f"features of {images.name}", len(starts), disable=not state.is_main_process
    ):
        count = min(batch_size, len(images) - start)
        for file, values in zip(files, extractor(batch.to(state.device)), strict=True):
            file.write(start, values[:count])
    state.wait_for_everyone()
    if state.is_main_process:
        info = {
            "source": images.name,
            "fingerprint": images.fingerprint,
            "image_shape": list(images.shape),
            "extractor": extractor.identity,
        }
        (partial / "info.json").write_text(json.dumps(info, indent=2))
        os.replace(partial, folder)
    state.wait_for_everyone()
    return FeatureTable(folder)


def _prepare(folder: Path, rows: int, sizes: tuple[int, ...]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        for part, size in zip(_PARTS, sizes, strict=True):
            FeatureFile.create(folder / f"{part}.npy", rows, size)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(
            f"The features need {4 * rows * sum(sizes) / 2**20:.0f} MiB in {folder.parent} ({error.strerror}). Make room, or "
            "choose another `--cache_dir`."
        ) from error


def even_odd(table: FeatureTable) -> tuple[torch.Tensor, torch.Tensor]:
    """Row numbers of two halves of equal size, shuffled: data in the order of its classes would differ between halves."""
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
    half = len(table) // 2
    return order[:half].sort().values, order[half : 2 * half].sort().values
