"""Intervals hold the truth as often as they say, and the bootstrap agrees with closed forms."""

import pytest
import torch

from diffusers_fastdiff.evaluation.digits import digit_estimates, evaluate_digits
from diffusers_fastdiff.evaluation.intervals import (
    bootstrap_error,
    estimate,
    mean_estimate,
    pooled,
    rms_estimate,
    share_estimate,
)
from diffusers_fastdiff.training.data import DigitsDataset


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def covers(results: list[dict], truth: float) -> float:
    return sum(low <= truth <= high for low, high in (each["interval"] for each in results)) / len(results)


def test_intervals_hold_the_truth():
    draws = normal(2000, 200)
    assert covers([mean_estimate(row) for row in draws], 0.0) == pytest.approx(0.95, abs=0.02)
    assert covers([rms_estimate(row.square()) for row in draws], 1.0) == pytest.approx(0.95, abs=0.025)
    rare = torch.rand(2000, 200, generator=torch.Generator().manual_seed(1)) < 0.02
    assert covers([share_estimate(row) for row in rare], 0.02) >= 0.93


def test_bootstrap_is_the_closed_form():
    values = normal(400)
    by_resampling = bootstrap_error(lambda weights: float(weights @ values / weights.sum()), 400, times=2000)
    assert by_resampling == pytest.approx(mean_estimate(values)["standard_error"], rel=0.05)
    squares = values.square()
    by_resampling = bootstrap_error(lambda weights: float((weights @ squares / weights.sum()).sqrt()), 400, times=2000)
    assert by_resampling == pytest.approx(rms_estimate(squares)["standard_error"], rel=0.06)


def test_all_is_not_certain():
    result = share_estimate(torch.ones(100, dtype=torch.bool))
    assert result["value"] == result["interval"][1] == 1
    assert 0.93 < result["interval"][0] < 0.99


def test_pooling():
    both = pooled([estimate(1.0, 0.3), estimate(3.0, 0.4)])
    assert both["value"] == 2
    assert both["standard_error"] == pytest.approx(0.25)
    assert pooled([estimate(1.0, None), estimate(3.0, 0.4)]) == {"value": 2.0}


def test_digits():
    digits = DigitsDataset()
    images, labels = digits.images[:300], digits.labels[:300]
    plain, estimates = evaluate_digits(images, labels), digit_estimates(images, labels, bootstrap=20)
    assert {name: each["value"] for name, each in estimates.items()} == {k: v for k, v in plain.items() if k != "num_images"}
    assert 0 < estimates["frechet_distance"]["standard_error"] < estimates["frechet_distance"]["value"]
