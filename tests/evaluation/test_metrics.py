"""Every number against another implementation on the same features, and against closed forms."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.metrics.pairwise import pairwise_distances, polynomial_kernel
from sklearn.neighbors import NearestNeighbors
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from diffusers_fastdiff.evaluation.feature_file import FeatureFile
from diffusers_fastdiff.evaluation.metrics import (
    FrechetReference,
    Moments,
    covered,
    frechet_distance,
    inception_score,
    kernel_distances,
    moments,
)

REAL_ROWS, FAKE_ROWS, COLUMNS = 2500, 1300, 24


class Given(torch.nn.Module):
    """An extractor for torchmetrics whose images are the features."""

    num_features = COLUMNS

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


@pytest.fixture(scope="module")
def features() -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated features away from the origin, like those of a network."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator)
    real = torch.randn(REAL_ROWS, COLUMNS, generator=generator) @ mixing + 5
    fake = 1.1 * torch.randn(FAKE_ROWS, COLUMNS, generator=generator) @ mixing + 5.3
    return real, fake


@pytest.fixture(params=["tensor", "file"])
def stored(request, features, tmp_path):
    """The features in memory and on disk."""
    if request.param == "tensor":
        return features
    files = []
    for name, values in zip(("real", "fake"), features, strict=True):
        file = FeatureFile.create(tmp_path / f"{name}.npy", *values.shape)
        for start in range(0, len(values), 700):
            file.write(start, values[start : start + 700])
        files.append(file)
    return tuple(files)


def updated(metric, real, fake):
    metric.set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return metric.compute()


def test_frechet_distance_equals_torchmetrics(stored, features):
    expected = updated(FrechetInceptionDistance(feature=Given()), *features)
    assert frechet_distance(stored[1], stored[0]) == pytest.approx(float(expected), rel=1e-6)


def test_kid_equals_torchmetrics_and_scikit_learn(features):
    real, fake = (values[:FAKE_ROWS] for values in features)
    ours = kernel_distances(fake, real, subsets=1, subset_size=FAKE_ROWS, seed=0)
    theirs, _ = updated(KernelInceptionDistance(feature=Given(), subsets=1, subset_size=FAKE_ROWS), real, fake)
    assert float(ours.mean()) == pytest.approx(float(theirs), rel=1e-6)

    x, y = (values.double().numpy() for values in (real, fake))
    xx, yy, xy = (polynomial_kernel(a, b, degree=3, gamma=1 / COLUMNS, coef0=1) for a, b in ((x, x), (y, y), (x, y)))
    within = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (xx, yy))
    assert float(ours.mean()) == pytest.approx(within - 2 * xy.mean(), rel=1e-6)


def test_kid_of_subsets_surrounds_that_of_everything(stored):
    subsets = kernel_distances(stored[1], stored[0], subsets=30, subset_size=600, seed=1)
    everything = kernel_distances(stored[1], stored[0], subsets=1, subset_size=FAKE_ROWS, seed=1)
    assert len(set(subsets.tolist())) == 30
    assert abs(float(subsets.mean() - everything)) < 3 * float(subsets.std()) / math.sqrt(30) + float(subsets.std()) / 2


def test_inception_score_equals_torchmetrics(stored, features):
    logits = features[0].double()
    metric = InceptionScore(feature=Given(), splits=1)
    metric.set_dtype(torch.float64)
    groups = torch.arange(REAL_ROWS) * 10 // REAL_ROWS
    expected = []
    for number in range(10):
        metric.reset()
        metric.update(logits[groups == number])
        expected.append(float(metric.compute()[0]))
    assert inception_score(stored[0], groups).tolist() == pytest.approx(expected, rel=1e-6)


def test_precision_and_recall_equal_scikit_learn(stored, features):
    real, fake = (values.double().numpy() for values in features)

    def reference(queries, manifold, k):
        radii = NearestNeighbors(n_neighbors=k + 1, algorithm="brute").fit(manifold).kneighbors(manifold)[0][:, -1]
        return (pairwise_distances(queries, manifold) <= radii).any(axis=1)

    for queries, manifold, arrays in ((stored[1], stored[0], (fake, real)), (stored[0], stored[1], (real, fake))):
        ours = covered(queries, manifold, neighbours=3)
        assert 0.05 < ours.double().mean() < 0.999
        assert ours.tolist() == reference(*arrays, 3).tolist()


def test_frechet_distance_of_known_gaussians():
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(2, 6, 6, generator=generator, dtype=torch.float64)
    a, b = (Moments(torch.full((6,), float(k)).double(), factor @ factor.T) for k, factor in enumerate(factors))
    root = np.real(scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy()))
    expected = 6 + float(a.covariance.trace() + b.covariance.trace()) - 2 * np.trace(root)
    assert FrechetReference(a).distance(b) == pytest.approx(expected, rel=1e-9)
    assert FrechetReference(b).distance(a) == pytest.approx(expected, rel=1e-9)

    scaled = Moments(a.mean, 4 * a.covariance)  # commuting covariances: sum of (sqrt(a) - sqrt(b))^2
    assert FrechetReference(a).distance(scaled) == pytest.approx(float(a.covariance.trace()), rel=1e-9)
    assert FrechetReference(a).distance(a) == pytest.approx(0, abs=1e-9)


def test_weights_are_repetitions(features):
    real = features[0][:1100]
    weights = torch.bincount(torch.randint(len(real), (len(real),), generator=torch.Generator().manual_seed(0)), minlength=1100)
    repeated = real.repeat_interleave(weights, dim=0)
    for ours, theirs in zip(moments(real, weights), moments(repeated), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert float(inception_score(real, weights=weights)) == pytest.approx(float(inception_score(repeated)), rel=1e-12)


def test_moments_are_accurate_far_from_the_origin():
    """A difference of sums of squares in float32, or float64 for larger offsets, would lose all digits."""
    values = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(moments(values + 1e8).covariance, values.T.cov(), rtol=1e-6, atol=1e-6)


def test_wrong_features_are_refused(features):
    with pytest.raises(ValueError, match="n >= 2"):
        moments(features[0][:1])
    with pytest.raises(ValueError, match="not finite"):
        moments(torch.full((5, 2), torch.nan))
    with pytest.raises(ValueError, match="`subset_size` must lie between 2 and 1300"):
        kernel_distances(features[0], features[1], 1, 1301, 0)
    with pytest.raises(ValueError, match="3 neighbours need more than 3"):
        covered(features[0], features[1][:3])
