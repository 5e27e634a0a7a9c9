"""Key steps found by dynamic programming against a search through all of them."""

import itertools

import pytest
import torch

from diffusers_fastdiff.numerics.propagation import cheapest_key_steps, forecast_weights, hold_errors, linear_errors

STEPS = 9


def run(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features that wander, and influences."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(STEPS, 30, generator=generator, dtype=torch.float64).cumsum(0) + 5
    return features, torch.rand(STEPS, generator=generator, dtype=torch.float64) + 0.1


def cost(features: torch.Tensor, influence: torch.Tensor, keys: tuple[int, ...], depth: int) -> float:
    """Written out: every step is forecast from the last key steps."""
    total = 0.0
    for step in range(STEPS):
        past = [key for key in keys if key <= step][::-1][:depth]
        forecast = sum(weight * features[key] for weight, key in zip(forecast_weights(past, step), past, strict=True))
        total += influence[step] * (forecast - features[step]).square().sum() / features[step].square().sum()
    return float(total)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("max_gap", [None, 3, 5])
def test_no_other_key_steps_cost_less(linear, count, max_gap):
    features, influence = run()
    gap = max_gap or STEPS
    if count * gap < STEPS:
        with pytest.raises(ValueError, match="num_key_steps"):
            cheapest_key_steps(features @ features.T, influence, count, linear, max_gap)
        return
    found = cheapest_key_steps(features @ features.T, influence, count, linear, max_gap)
    candidates = [(0, *rest) for rest in itertools.combinations(range(1, STEPS), count - 1)]
    candidates = [keys for keys in candidates if all(b - a <= gap for a, b in itertools.pairwise((*keys, STEPS)))]
    depth = 2 if linear and count >= 3 else 1
    best = min(cost(features, influence, keys, depth) for keys in candidates)
    assert tuple(found) in candidates
    assert cost(features, influence, tuple(found), depth) == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_errors_from_inner_products():
    features, _ = run()
    gram = features @ features.T
    held = (features[2] - features[6]).square().sum() / features[6].square().sum()
    assert hold_errors(gram)[2, 6] == pytest.approx(float(held))
    forecast = features[4] + (features[4] - features[1]) * (7 - 4) / (4 - 1)
    missed = (forecast - features[7]).square().sum() / features[7].square().sum()
    assert linear_errors(gram, 4)[1, 7 - 5] == pytest.approx(float(missed))


def test_forecasts_are_exact_for_polynomials():
    for degree in range(3):
        keys = [7, 4, 3][: degree + 1]
        weights = forecast_weights(keys, 10)
        for power in range(degree + 1):
            assert sum(weight * key**power for weight, key in zip(weights, keys, strict=True)) == pytest.approx(10**power)


@pytest.mark.parametrize("count", [0, 10])
def test_counts_that_do_not_fit_are_refused(count):
    features, influence = run()
    with pytest.raises(ValueError, match="num_key_steps"):
        cheapest_key_steps(features @ features.T, influence, count)
