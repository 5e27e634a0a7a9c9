"""GITS: choose few noise levels out of many so that large steps cost little (Chen et al., arXiv 2405.11326).

A teacher runs over a fine grid. The cost of a jump from level i to level j is what one Euler step with the teacher's slope at
i misses the teacher's state at j by; dynamic programming finds the cheapest chain of jumps. Differences from the published
program: the teacher never takes the analytical first step (there it makes the first jump look free), and with that option the
grid always gets its additional point.
"""

from collections.abc import Callable

import torch

from .noise_levels import Sigma
from .solver_methods import Solver
from .solvers import SolverRun, solve

METRICS = ("dev", "l1", "l2")


def jump_costs(
    states: torch.Tensor, slopes: torch.Tensor, sigmas: torch.Tensor | list[float], metric: str = "dev"
) -> torch.Tensor:
    """Cost of every jump, (T, T) float64, zero on and below the diagonal.

    Args:
        states: of the teacher at every level, (T, B, C, H, W).
        slopes: used by the teacher at every level but the last, (T - 1, B, C, H, W).
        sigmas: the levels, (T,).
        metric: "l1" or "l2", norms of the miss; "dev", by how much farther from the straight line between the ends of the
            trajectory the jump lands than the teacher is (can be negative).
    """
    if metric not in METRICS:
        raise ValueError(f"`metric` must be one of {METRICS}, got {metric!r}.")
    states, slopes = states.double().flatten(2), slopes.double().flatten(2)
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64)
    last = len(states) - 1
    chord = torch.nn.functional.normalize(states[-1] - states[0], dim=-1)

    def deviation(points: torch.Tensor) -> torch.Tensor:
        offset = states[-1] - points
        return (offset - (offset * chord).sum(-1, keepdim=True) * chord).norm(dim=-1)

    costs = torch.zeros(len(states), len(states), dtype=torch.float64)
    teacher = deviation(states)
    for i in range(last):
        jumps = states[i] + (sigmas[i + 1 :] - sigmas[i]).reshape(-1, 1, 1) * slopes[i]
        if metric == "dev":
            costs[i, i + 1 :] = (deviation(jumps) - teacher[i + 1 :]).mean(-1)
        else:
            costs[i, i + 1 :] = (jumps - states[i + 1 :]).norm(p=int(metric[1]), dim=-1).mean(-1)
    return costs


def cheapest_steps(costs: torch.Tensor, num_points: int, discount: float = 1.15) -> list[int]:
    """Indices of `num_points` levels, the first and the last among them, with the smallest total cost.

    Args:
        costs: (T, T), entry (i, j) for the jump from i to j > i.
        num_points: 2 to T.
        discount: the k-th jump counts `discount^(k - 1)` times its cost; above 1, late jumps weigh more.
    """
    last = len(costs) - 1
    if not 2 <= num_points <= last + 1:
        raise ValueError(f"`num_points` must be 2 to {last + 1}, got {num_points}.")
    cost = costs.double()
    forbidden = torch.ones_like(cost, dtype=torch.bool).tril()
    cost = cost.masked_fill(forbidden, torch.inf)
    best = torch.full((last + 1,), torch.inf, dtype=torch.float64)  # cost of going on from each level in 0, 1, 2, ... jumps
    best[last] = 0.0
    choices = []
    for _ in range(num_points - 1):
        total = cost + discount * best
        best, choice = total.min(dim=1)
        choices.append(choice)
    path = [0]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return path


def search_grid(
    denoiser: Callable[[torch.Tensor, Sigma], torch.Tensor],
    start: torch.Tensor,
    teacher_sigmas: list[float],
    num_points: int,
    teacher: Solver | None = None,
    metric: str = "dev",
    discount: float = 1.15,
) -> list[float]:
    """The best `num_points` levels of a fine grid for a model.

    Args:
        denoiser: `D(x, sigma)`.
        start: warm-up states at `teacher_sigmas[0]`, (B, C, H, W); the cost is their mean.
        teacher_sigmas: fine grid; published: 61 levels.
        num_points: levels to keep, both ends among them.
        teacher: published: iPNDM of order 4.
        metric, discount: see `jump_costs` and `cheapest_steps`.
    """
    states, slopes = teacher_trajectory(denoiser, start, teacher_sigmas, teacher or Solver("ipndm", 4))
    path = cheapest_steps(jump_costs(states, slopes, teacher_sigmas, metric), num_points, discount)
    return [teacher_sigmas[index] for index in path]


@torch.no_grad()
def teacher_trajectory(
    denoiser: Callable[[torch.Tensor, Sigma], torch.Tensor],
    start: torch.Tensor,
    sigmas: list[float],
    teacher: Solver,
    analytical_first_step: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """States at every level, (T, B, C, H, W), and the model's slopes at all but the last, (T - 1, B, C, H, W)."""
    run, x = SolverRun(teacher, sigmas), start
    states, slopes = [start], []
    while not run.is_done:
        begins, sigma = not run.is_second_half, run.sigma
        if run.interval == 0 and begins and analytical_first_step:
            slopes.append(x / (1 + sigma**2) ** 0.5)
            x = run.skip_evaluation(x)
        else:
            denoised = denoiser(x, run.network_sigma)
            if begins:
                slopes.append((x - denoised) / sigma)
            x = run.advance(x, denoised)
        if not run.is_second_half:
            states.append(x)
    return torch.stack(states), torch.stack(slopes)


def add_second_point(
    denoiser: Callable[[torch.Tensor, Sigma], torch.Tensor],
    start: torch.Tensor,
    grid: list[float],
    teacher_sigmas: list[float],
    target: torch.Tensor,
    student: Solver,
) -> list[float]:
    """Put one more level behind the first one, so that the analytical first step costs no evaluation of the grid.

    Tries all levels of the teacher between the first two of the grid (their geometric mean if there are none) and keeps the
    one with which the student ends nearest to `target`.
    """
    between = [sigma for sigma in teacher_sigmas if grid[1] < sigma < grid[0]] or [(grid[0] * grid[1]) ** 0.5]
    candidates = [[grid[0], sigma, *grid[1:]] for sigma in between]

    def error(candidate: list[float]) -> float:
        with torch.no_grad():
            end = solve(denoiser, start, candidate, student, analytical_first_step=True)
        return float((end - target).flatten(1).norm(dim=1).mean())

    return min(candidates, key=error)
