"""Statistics of feature vectors, in float64.

Features are tensors (n, d), or [`FeatureFile`]s, which look the same and stay on disk. The sums run over pieces of them, so
that memory does not grow with the number of images; torchmetrics, which the tests compare with, holds everything.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

_PIECE = 1024  # rows in memory at a time


class Moments(NamedTuple):
    """Mean (d,) and covariance (d, d), with n - 1 in its denominator, of n vectors; float64."""

    mean: torch.Tensor
    covariance: torch.Tensor


def pieces(features, size: int = _PIECE) -> Iterator[torch.Tensor]:
    """Consecutive rows as float64 on the CPU (not every device has float64), at most `size` at a time."""
    for start in range(0, len(features), size):
        yield features[start : start + size].cpu().double()


def moments(features, weights: torch.Tensor | None = None) -> Moments:
    """Mean and covariance of features (n, d).

    Args:
        weights: how often each row counts, (n,); the sum is the number of vectors.

    Raises:
        ValueError: with fewer than two vectors, or values that are no numbers.
    """
    if len(features.shape) != 2 or len(features) < 2:
        raise ValueError(f"Features must have shape (n, d) with n >= 2, got {tuple(features.shape)}.")
    weights = torch.ones(len(features)) if weights is None else weights
    mean = sum(weight @ piece for weight, piece in zip(_cut(weights), pieces(features), strict=True)) / weights.sum()
    if not bool(mean.isfinite().all()):
        raise ValueError("The features are not finite: an image or the extractor is damaged.")
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for weight, piece in zip(_cut(weights), pieces(features), strict=True):
        centred = piece - mean  # a second reading, which spares the difference of two large numbers
        covariance.addmm_(centred.T * weight, centred)
    return Moments(mean, covariance / (weights.sum().double() - 1))


def frechet_distance(features_a, features_b) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features (n, d): the FID for Inception features.

    `|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`, Heusel et al., arXiv 1706.08500, eq. (6). Biased upwards by about
    d / n: compare equal numbers of samples only.
    """
    return FrechetReference(moments(features_b)).distance(moments(features_a))


class FrechetReference:
    """One side of many Frechet distances: the square root of its covariance is taken once."""

    def __init__(self, reference: Moments):
        self.moments = reference
        values, vectors = torch.linalg.eigh(reference.covariance)
        self._root = vectors * values.clamp_min(0).sqrt() @ vectors.T

    def distance(self, other: Moments) -> float:
        """Frechet distance to `other`."""
        # tr (C_a C_b)^(1/2) = tr (R C_b R)^(1/2) with R = C_a^(1/2), which is symmetric and so has a real spectrum
        product = self._root @ other.covariance @ self._root
        cross = torch.linalg.eigvalsh(product).clamp_min(0).sqrt().sum()
        shift = (self.moments.mean - other.mean).square().sum()
        total = shift + self.moments.covariance.trace() + other.covariance.trace() - 2 * cross
        return max(float(total), 0.0)  # equal sets differ from 0 by rounding, to either side


def nearest_distances(queries: torch.Tensor, references: torch.Tensor, exclude_self: bool = False) -> torch.Tensor:
    """Euclidean distance of each query (n, ...) to the nearest reference (m, ...), (n,).

    Args:
        exclude_self: query k is reference k, which does not count: leave-one-out distances within a set.
    """
    distances = torch.cdist(queries.double().flatten(1), references.double().flatten(1))
    if exclude_self:
        distances.fill_diagonal_(torch.inf)
    return distances.min(dim=1).values


def inception_score(logits, groups: torch.Tensor | None = None, weights: torch.Tensor | None = None) -> torch.Tensor:
    """`exp E KL(p(y|x) || p(y))` of each group of images, float64. Salimans et al., arXiv 1606.03498, section 4.

    Args:
        logits: of a classifier, (n, classes).
        groups: number of the group of each image, (n,); by default all belong to one.
        weights: how often each image counts, (n,).
    """
    groups = torch.zeros(len(logits), dtype=torch.long) if groups is None else groups
    weights = torch.ones(len(logits)) if weights is None else weights
    num_groups = int(groups.max()) + 1
    counts = torch.zeros(num_groups, dtype=torch.float64)
    negative_entropy = torch.zeros(num_groups, dtype=torch.float64)
    marginal = torch.zeros(num_groups, logits.shape[1], dtype=torch.float64)
    for group, weight, piece in zip(groups.split(_PIECE), _cut(weights), pieces(logits), strict=True):
        log_p = piece.log_softmax(dim=1)
        p = log_p.exp()
        counts.index_add_(0, group, weight)
        negative_entropy.index_add_(0, group, weight * (p * log_p).sum(dim=1))
        marginal.index_add_(0, group, weight[:, None] * p)
    marginal = marginal / counts[:, None]
    return (negative_entropy / counts - torch.xlogy(marginal, marginal).sum(dim=1)).exp()


def kernel_distances(features_a, features_b, subsets: int, subset_size: int, seed: int) -> torch.Tensor:
    """Unbiased squared MMD with the kernel `(x.y / d + 1)^3`, for `subsets` random pairs of subsets, float64.

    Their mean is the KID. Binkowski et al., arXiv 1801.01401, section 4.

    Raises:
        ValueError: if a set has fewer vectors than `subset_size`.
    """
    smallest = min(len(features_a), len(features_b))
    if not 2 <= subset_size <= smallest:
        raise ValueError(f"`subset_size` must lie between 2 and {smallest}, the size of the smaller set, got {subset_size}.")
    generator = torch.Generator().manual_seed(seed)

    def draw(features) -> torch.Tensor:
        return features[torch.randperm(len(features), generator=generator)[:subset_size].sort().values].cpu().double()

    return torch.stack([_squared_mmd(draw(features_a), draw(features_b)) for _ in range(subsets)])


def covered(queries, references, neighbours: int = 3) -> torch.Tensor:
    """Whether each query lies in the manifold of the references: a ball around each, as wide as its k-th nearest neighbour.

    The mean over generated queries is the precision; the mean over real queries, with generated references, the recall.
    Kynkaanniemi et al., arXiv 1904.06991, eq. (1), with k = 3.

    Args:
        queries, references: (n, d) and (m, d).
        neighbours: k; a vector is not its own neighbour.

    Returns:
        Booleans, (n,).
    """
    if len(references) <= neighbours:
        raise ValueError(f"{neighbours} neighbours need more than {neighbours} reference images, got {len(references)}.")
    radii = torch.cat([_kth_distance(references, start, neighbours) for start in range(0, len(references), _PIECE)])
    found = torch.zeros(len(queries), dtype=torch.bool)
    for number, query in enumerate(pieces(queries)):
        rows = slice(number * _PIECE, number * _PIECE + len(query))
        for radius, reference in zip(radii.split(_PIECE), pieces(references), strict=True):
            found[rows] |= (torch.cdist(query, reference) <= radius).any(dim=1)
    return found


def _kth_distance(features, start: int, k: int) -> torch.Tensor:
    """Distance of the rows from `start` on to their k-th nearest neighbours, for one piece of rows."""
    rows = features[start : start + _PIECE].cpu().double()
    nearest = torch.full((len(rows), k), torch.inf, dtype=torch.float64)
    for number, piece in enumerate(pieces(features)):
        distances = torch.cdist(rows, piece)
        if number * _PIECE == start:
            distances.fill_diagonal_(torch.inf)
        nearest = torch.cat([nearest, distances], dim=1).topk(k, dim=1, largest=False).values
    return nearest.max(dim=1).values


def _squared_mmd(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    n, d = x.shape
    kernel_xx, kernel_yy, kernel_xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = kernel_xx.sum() - kernel_xx.trace() + kernel_yy.sum() - kernel_yy.trace()
    return within / (n * (n - 1)) - 2 * kernel_xy.mean()


def _cut(weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return weights.double().split(_PIECE)
