"""Statistics of feature vectors, in float64."""

import torch


def frechet_distance(features_a: torch.Tensor, features_b: torch.Tensor) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features (n, d): the FID for Inception features.

    `|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`, Heusel et al., arXiv 1706.08500, eq. (6). Biased upwards by about
    d / n: compare equal numbers of samples only.
    """
    mean_a, covariance_a = _moments(features_a)
    mean_b, covariance_b = _moments(features_b)
    root_a = _symmetric_root(covariance_a)
    # tr (C_a C_b)^(1/2) = tr (R C_b R)^(1/2) with R = C_a^(1/2), which is symmetric and so has a real spectrum
    cross = torch.linalg.eigvalsh(root_a @ covariance_b @ root_a).clamp_min(0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross)


def nearest_distances(queries: torch.Tensor, references: torch.Tensor, exclude_self: bool = False) -> torch.Tensor:
    """Euclidean distance of each query (n, ...) to the nearest reference (m, ...), (n,).

    Args:
        exclude_self: query k is reference k, which does not count: leave-one-out distances within a set.
    """
    distances = torch.cdist(queries.double().flatten(1), references.double().flatten(1))
    if exclude_self:
        distances.fill_diagonal_(torch.inf)
    return distances.min(dim=1).values


def _moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"Features must have shape (n, d) with n >= 2, got {tuple(features.shape)}.")
    features = features.double()
    return features.mean(0), features.T.cov()


def _symmetric_root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T
