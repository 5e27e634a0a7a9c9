"""Measured numbers with their 95 % intervals: a value -+ 1.96 standard errors.

The errors are about the images at hand: another training run of the same model varies more. An interval is centred on the
value, not on the resampled values, because resampled sets hold images twice and so have a larger bias of their own.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch


def estimate(value: float, standard_error: float | None) -> dict[str, Any]:
    """JSON-able: "value", and unless the error is unknown "standard_error" and "interval", [low, high]."""
    if standard_error is None:
        return {"value": value}
    reach = 1.96 * standard_error
    return {"value": value, "standard_error": standard_error, "interval": [value - reach, value + reach]}


def resamplings(count: int, times: int, seed: int = 0) -> Iterator[torch.Tensor]:
    """How often each of `count` images is drawn, (count,), when `count` are drawn with replacement; `times` such draws."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(times):
        yield torch.bincount(torch.randint(count, (count,), generator=generator), minlength=count).double()


def bootstrap_error(measure: Callable[[torch.Tensor], float], count: int, times: int, seed: int = 0) -> float:
    """Standard error of a number that a set of `count` images gives (Efron, Ann. Statist. 7, 1979).

    Args:
        measure: the number from how often each image counts, (count,).
        times: resampled sets, at least 2.
    """
    values = torch.tensor([measure(weights) for weights in resamplings(count, times, seed)], dtype=torch.float64)
    return float(values.std())


def mean_estimate(values: torch.Tensor) -> dict[str, Any]:
    """Estimate of the mean of one number for each image, (n,)."""
    return estimate(float(values.mean()), float(values.std(correction=0)) / len(values) ** 0.5)


def share_estimate(hits: torch.Tensor) -> dict[str, Any]:
    """Estimate of a share, from true or false for each image, (n,).

    The error is that of two more hits and two more misses (Agresti and Coull, Am. Stat. 52, 1998): all of 100 images is no
    proof that nothing ever fails.
    """
    count, hit = len(hits), float(hits.sum())
    share = (hit + 2) / (count + 4)
    error = (share * (1 - share) / (count + 4)) ** 0.5
    value = hit / count
    return estimate(value, error) | {"interval": [max(value - 1.96 * error, 0.0), min(value + 1.96 * error, 1.0)]}


def rms_estimate(squares: torch.Tensor) -> dict[str, Any]:
    """Estimate of the root of the mean of one squared error for each image, (n,)."""
    mean = mean_estimate(squares.double())
    root = mean["value"] ** 0.5
    return estimate(root, mean["standard_error"] / (2 * root) if root else 0.0)


def pooled(estimates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean of independent estimates of one number, as of several seeds; what has no error leaves the mean without one."""
    value = sum(each["value"] for each in estimates) / len(estimates)
    if any("standard_error" not in each for each in estimates):
        return estimate(value, None)
    return estimate(value, sum(each["standard_error"] ** 2 for each in estimates) ** 0.5 / len(estimates))
