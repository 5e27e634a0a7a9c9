"""What images are compared with: data, of which everything can be computed, or a file of statistics."""

from dataclasses import dataclass, replace
from pathlib import Path

from .extractors import FeatureExtractor
from .feature_table import FeatureTable, extract_features
from .images import ImageSet, open_images
from .metrics import moments
from .processes import Processes, join_processes
from .statistics_file import Statistics, load_statistics, save_statistics


@dataclass(frozen=True)
class Reference:
    """Statistics for FID and sFID, and, if there are images, features for everything else."""

    statistics: Statistics
    table: FeatureTable | None = None


def open_reference(
    source: str | Path, resolution: int | None = None, split: str = "train", image_column: str | None = None
) -> ImageSet | tuple[Statistics, ImageSet | None]:
    """Look at a reference without extracting anything.

    Args:
        source: an .npz of statistics or images or both, or anything else that `images.open_images` reads.
        resolution, split, image_column: as there.
    """
    path = Path(source)
    if path.suffix != ".npz" or (statistics := load_statistics(path)) is None:
        return open_images(source, resolution, split, image_column)
    try:
        return statistics, open_images(path)
    except ValueError:  # statistics alone
        return statistics, None


def measure_reference(
    opened: ImageSet | tuple[Statistics, ImageSet | None],
    extractor: FeatureExtractor,
    image_shape: tuple[int, ...],
    cache_dir: str | Path,
    batch_size: int,
    num_workers: int = 0,
    made_by: str | None = None,
    state: Processes | None = None,
) -> Reference:
    """Extract or read what `open_reference` has found. Every process must call it.

    Args:
        image_shape: (C, H, W) of the images to compare with it.
        made_by: name of the extractor of statistics that do not say.

    Raises:
        ValueError: if the reference is of another extractor or resolution.
    """
    state = state or join_processes()
    statistics, images = (None, opened) if isinstance(opened, ImageSet) else opened
    if statistics is not None:
        statistics.check(extractor.identity, extractor.sizes, image_shape, made_by)
    if images is None:
        return Reference(statistics)
    if images.shape[1:] != tuple(image_shape[1:]):
        wanted, got = ("x".join(map(str, shape[1:])) for shape in (images.shape, image_shape))
        raise ValueError(f"{images.name} has images of {wanted} pixels, but the images at hand have {got}.")
    table = extract_features(images, extractor, cache_dir, batch_size, num_workers, state)
    if statistics is None:
        path = table.folder / "statistics.npz"
        if state.is_main_process and not path.is_file():
            save_statistics(path, statistics_of(table))
        state.wait_for_everyone()
        statistics = replace(load_statistics(path), source=images.name)
    return Reference(statistics, table)


def statistics_of(table: FeatureTable) -> Statistics:
    """Mean and covariance of the features of images."""
    return Statistics(
        source=table.info["source"],
        pooled=moments(table.pooled),
        spatial=moments(table.spatial),
        extractor=table.info["extractor"],
        image_shape=tuple(table.info["image_shape"]),
        num_images=len(table),
    )
