"""All metrics of a set of images, each with an interval and everything needed to get it again."""

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from tqdm import tqdm

import diffusers_fastdiff

from .feature_file import FeatureFile, FeatureRows
from .feature_table import FeatureTable, even_odd
from .intervals import estimate, mean_estimate, resamplings
from .metrics import FrechetReference, Moments, covered, inception_score, kernel_distances, moments
from .reference import Reference

METRICS = ("fid", "sfid", "inception_score", "precision", "recall", "kid", "clip_score")
_NEED_DATA = {"precision", "recall", "kid"}


@dataclass(frozen=True)
class EvaluationConfig:
    """Choices that a number depends on."""

    metrics: tuple[str, ...] | None = None
    """Some of `METRICS`; None for all that the data allow."""
    bootstrap: int = 20
    """Resampled sets of images for the standard errors of FID, sFID and Inception Score; 0 for none."""
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    """At most half of the smaller set is taken."""
    inception_score_splits: int = 10
    neighbours: int = 3
    """Of precision and recall."""
    precision_recall_size: int = 10_000
    """Most images of either set, evenly spaced; work grows with the square."""
    seed: int = 0
    """Of subsets, splits and resampling."""

    def __post_init__(self):
        for name in self.metrics or ():
            if name not in METRICS:
                raise ValueError(f"`metrics` must be some of {METRICS}, got {name!r}.")
        for name in ("kid_subsets", "kid_subset_size", "inception_score_splits", "neighbours", "precision_recall_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.bootstrap < 0 or self.bootstrap == 1:
            raise ValueError(f"`bootstrap` must be 0, or at least 2 for a spread, got {self.bootstrap}.")


def evaluate(
    table: FeatureTable, reference: Reference, config: EvaluationConfig, clip_scores: torch.Tensor | None = None
) -> dict[str, Any]:
    """Metrics of the images of `table` against a reference.

    Intervals: see `intervals`. Standard errors come from the bootstrap over images: by resampling for FID, sFID and Inception
    Score, in closed form for means (precision, recall, CLIP score; the manifolds are kept). That of KID comes from the spread
    of its subsets.

    Args:
        clip_scores: of each image, see `clip_score.clip_scores`.

    Returns:
        JSON-able: "metrics" with value, standard error and interval; "left_out" with reasons; "noise_floor", the metrics
        between two halves of the reference, below which differences mean nothing; settings and versions.

    Raises:
        ValueError: if a metric that was asked for cannot be computed, or there are no more images than features.
    """
    check_count(config, len(table), (table.pooled.shape[1], table.spatial.shape[1]), table.info["source"])
    chosen, left_out = _choose_metrics(reference, config, clip_scores)
    values = _frechet_and_inception(table, reference, config, chosen)
    if "kid" in chosen:
        values["kid"] = _kid(table.pooled, reference.table.pooled, config)
    values |= {name: _coverage(name, table, reference.table, config) for name in ("precision", "recall") if name in chosen}
    if "clip_score" in chosen:
        values["clip_score"] = mean_estimate(clip_scores)
    return {
        "num_images": len(table),
        "images": table.info,
        "reference": {
            "source": reference.statistics.source,
            "num_images": reference.statistics.num_images,
            "extractor": reference.statistics.extractor or "not recorded in the file",
        },
        "extractor": table.info["extractor"],
        "metrics": {name: values[name] for name in METRICS if name in values},
        "left_out": left_out,
        "noise_floor": None if reference.table is None else _noise_floor(reference.table, config, chosen),
        "settings": asdict(config),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of everything that numbers may depend on."""
    packages = ("accelerate", "diffusers", "numpy", "pillow", "torch", "transformers")
    found = {"diffusers_fastdiff": diffusers_fastdiff.__version__, "python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _choose_metrics(reference: Reference, config: EvaluationConfig, clip_scores) -> tuple[set[str], dict[str, str]]:
    reasons: dict[str, str] = {}
    if reference.table is None:
        reasons |= dict.fromkeys(_NEED_DATA, f"{reference.statistics.source} holds statistics only; give images")
    if reference.statistics.spatial is None:
        reasons["sfid"] = f"{reference.statistics.source} has no statistics of spatial features"
    if clip_scores is None:
        reasons["clip_score"] = "needs prompts and `--clip_model`"
    for name in config.metrics or ():
        if name in reasons:
            raise ValueError(f"{name!r} cannot be computed: {reasons[name]}.")
    chosen = set(config.metrics or METRICS) - reasons.keys()
    return chosen, {name: reason for name, reason in reasons.items() if config.metrics is None}


def check_count(config: EvaluationConfig, count: int, sizes: tuple[int, ...], source: str) -> None:
    """Refuse a set that is too small for the chosen metrics.

    Args:
        count: images of the set.
        sizes: of the pooled and the spatial features.
        source: of the images, for the message.

    Raises:
        ValueError: if FID or sFID would have a singular covariance.
    """
    for name, features in zip(("fid", "sfid"), sizes, strict=False):
        if name in (config.metrics or METRICS) and count <= features:
            others = [metric for metric in METRICS if metric not in ("fid", "sfid")]
            raise ValueError(
                f"{name!r} needs more images than the extractor has features: {source} has {count} images, and there are "
                f"{features} features, so the covariance is singular. Take more images, or choose `--metrics` from {others}."
            )


def _frechet_and_inception(table: FeatureTable, reference: Reference, config: EvaluationConfig, chosen: set[str]):
    """Values of FID, sFID and Inception Score, whose standard errors share the resampled sets."""
    measures: dict[str, Callable[[torch.Tensor | None], float]] = {}
    sides = {"fid": (table.pooled, reference.statistics.pooled), "sfid": (table.spatial, reference.statistics.spatial)}
    for name, (features, statistics) in sides.items():
        if name in chosen:
            measures[name] = _frechet(features, statistics)
    groups = _groups(len(table), config)
    if "inception_score" in chosen:
        measures["inception_score"] = lambda weights: float(inception_score(table.logits, groups, weights).mean())
    points = {name: measure(None) for name, measure in measures.items()}
    samples: dict[str, list[float]] = {name: [] for name in measures}
    for weights in tqdm(
        resamplings(len(table), config.bootstrap, config.seed), "bootstrap", config.bootstrap, disable=not measures
    ):
        for name, measure in measures.items():
            samples[name].append(measure(weights))
    spread = {name: torch.tensor(values, dtype=torch.float64).std().item() for name, values in samples.items() if values}
    return {name: estimate(point, spread.get(name)) for name, point in points.items()}


def _frechet(features: FeatureFile, statistics: Moments) -> Callable[[torch.Tensor | None], float]:
    reference = FrechetReference(statistics)
    return lambda weights: reference.distance(moments(features, weights))


def _groups(count: int, config: EvaluationConfig) -> torch.Tensor:
    """A random partition into groups of equal size, for the Inception Score."""
    splits = min(config.inception_score_splits, count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.seed))
    groups = torch.empty(count, dtype=torch.long)
    groups[order] = torch.arange(count) * splits // count
    return groups


def _kid(features, reference, config: EvaluationConfig) -> dict[str, Any]:
    smallest = min(len(features), len(reference))
    size = min(config.kid_subset_size, max(2, smallest // 2))
    distances = kernel_distances(features, reference, config.kid_subsets, size, config.seed)
    error = None
    if len(distances) > 1:  # the spread of a mean over m images, scaled to all of them
        error = float(distances.std()) * (size / smallest) ** 0.5
    return estimate(float(distances.mean()), error) | {"subset_size": size}


def _coverage(name: str, table: FeatureTable, reference: FeatureTable, config: EvaluationConfig) -> dict[str, Any]:
    generated, real = (_spaced(side.pooled, config.precision_recall_size) for side in (table, reference))
    queries, manifold = (generated, real) if name == "precision" else (real, generated)
    return mean_estimate(covered(queries, manifold, config.neighbours).double()) | {"num_images": [len(generated), len(real)]}


def _spaced(features: FeatureFile, count: int) -> FeatureFile | FeatureRows:
    """At most `count` rows from all over the set, which may be in the order of its classes."""
    return features if len(features) <= count else FeatureRows(features, torch.arange(count) * len(features) // count)


def _noise_floor(table: FeatureTable, config: EvaluationConfig, chosen: set[str]) -> dict[str, Any]:
    """FID, sFID and KID of one half of the data against the other."""
    first, second = even_odd(table)
    result: dict[str, Any] = {"num_images": len(first)}
    for name, features in (("fid", table.pooled), ("sfid", table.spatial)):
        if name in chosen:
            sides = [torch.zeros(len(table)).index_fill(0, half, 1) for half in (first, second)]
            a, b = (moments(features, weights) for weights in sides)
            result[name] = FrechetReference(b).distance(a)
    if "kid" in chosen:
        size = min(config.kid_subset_size, max(2, len(first) // 2))
        a, b = (FeatureRows(table.pooled, half) for half in (first, second))
        result["kid"] = float(kernel_distances(a, b, config.kid_subsets, size, config.seed).mean())
    return result
