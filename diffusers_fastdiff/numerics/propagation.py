"""Propagated features: how to forecast one from earlier ones, and at which steps of a run to compute it anew.

Encoder propagation is from arXiv 2312.09608, where features are held and key steps chosen by hand. Here features change along a
measured run, and dynamic programming picks the key steps with the least forecast error. All that is needed of the features is
the matrix of their inner products, (T, T) float64 for T steps.
"""

from collections.abc import Sequence

import torch

from .gits import cheapest_steps


def forecast_weights(key_steps: Sequence[int], step: int) -> list[float]:
    """Weights of the features of `key_steps` in the polynomial through them, at `step`; together 1. With one: hold."""
    weights = []
    for key in key_steps:
        weight = 1.0
        for other in key_steps:
            if other != key:
                weight *= (step - other) / (key - other)
        weights.append(weight)
    return weights


def hold_errors(gram: torch.Tensor) -> torch.Tensor:
    """Squared distance of the features of step s from those of step i, as a share of the square at s: (T, T), entry (i, s)."""
    squares = gram.diagonal()
    return (squares[:, None] + squares - 2 * gram).clamp_min(0) / squares


def linear_errors(gram: torch.Tensor, key: int) -> torch.Tensor:
    """Errors, as in `hold_errors`, of the forecast of step s > key from the steps i < key and `key`: (key, T - key - 1), entry
    (i, s - key - 1)."""
    count, squares = len(gram), gram.diagonal()
    earlier, later = torch.arange(key), torch.arange(key + 1, count)
    slope = (later - key) / (key - earlier).double()[:, None]  # forecast: f_key + slope (f_key - f_i)
    a, b = 1 + slope, -slope
    squared = a**2 * squares[key] + b**2 * squares[:key, None] + squares[key + 1 :] + 2 * a * b * gram[:key, key, None]
    squared = squared - 2 * a * gram[key, key + 1 :] - 2 * b * gram[:key, key + 1 :]
    return squared.clamp_min(0) / squares[key + 1 :]


def cheapest_key_steps(
    gram: torch.Tensor, influence: torch.Tensor, num_key_steps: int, linear: bool = False, max_gap: int | None = None
) -> list[int]:
    """The key steps, 0 among them, with the smallest sum of squared forecast errors over all other steps.

    Args:
        gram: inner products of the features of all steps, (T, T).
        influence: how much an error of each step counts, (T,), not negative.
        num_key_steps: 1 to T.
        linear: forecast from the last two key steps instead of holding the last one (behind step 0 it is held).
        max_gap: most steps from one key step to the next; None for no limit.

    Raises:
        ValueError: if `num_key_steps` is out of range, or too small for `max_gap`.
    """
    count = len(gram)
    max_gap = count if max_gap is None else max_gap
    if not -(-count // max_gap) <= num_key_steps <= count:
        raise ValueError(f"`num_key_steps` must be {-(-count // max_gap)} to {count} in {count} steps, got {num_key_steps}.")
    gram, influence = gram.double(), influence.double()
    held = torch.cat([torch.zeros(count, 1, dtype=torch.float64), (hold_errors(gram) * influence).cumsum(1)], dim=1)
    costs = torch.zeros(count + 1, count + 1, dtype=torch.float64)  # (i, l): key step i serves the steps up to l - 1
    costs[:count] = held - held.diagonal(1)[:, None]
    places = torch.arange(count + 1)
    costs[places - places[:, None] > max_gap] = torch.inf
    if not linear or num_key_steps < 3:
        return cheapest_steps(costs, num_key_steps + 1, discount=1.0)[:-1]
    return _cheapest_pairs(gram, influence, num_key_steps, costs[0], max_gap)


def _cheapest_pairs(
    gram: torch.Tensor, influence: torch.Tensor, num_key_steps: int, first: torch.Tensor, max_gap: int
) -> list[int]:
    """As `cheapest_key_steps`, where what a key step costs depends on the one before: the state is the last two."""
    count = len(gram)
    costs = torch.full((count, count, count + 1), torch.inf, dtype=torch.float64)  # (j, i, l): keys i < j serve up to l - 1
    for key in range(1, count):
        errors = (linear_errors(gram, key) * influence[key + 1 :]).cumsum(1)
        costs[key, :key, key + 1] = 0.0
        costs[key, :key, key + 2 : key + max_gap + 1] = errors[:, : max_gap - 1]
    best = costs[:, :, count].T.clone()  # (i, j): cost of going on from there with no further key step
    choices = []
    for _ in range(num_key_steps - 2):
        total = costs[:, :, :count] + best[:, None, :]  # (j, i, l)
        values, choice = total.min(dim=2)
        best = values.T.contiguous()
        choices.append(choice)
    second = int((first[1:count] + best[0, 1:]).argmin()) + 1
    path = [0, second]
    for choice in reversed(choices):
        path.append(int(choice[path[-1], path[-2]]))
    return path
