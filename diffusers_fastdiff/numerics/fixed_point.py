"""Fixed-point iteration: how the work is spread over a sampling run, and how one problem is solved.

Source: Bai and Melas-Kyriazi, "Fixed Point Diffusion Models", arXiv 2401.08741, sections 3.2 to 3.4; Anderson mixing as in
Walker and Ni, "Anderson acceleration for fixed-point iterations" (2011), eq. (2.1).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

ALLOCATIONS = ("constant", "increasing", "decreasing")

Step = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""`step(z, rows)` applies the map once. `rows` says which samples of the batch `z` holds; None means all of them."""


def allocate_iterations(
    budget: int,
    num_steps: int,
    allocation: str = "constant",
    ratio: tuple[float, float] = (0.5, 1.5),
) -> tuple[int, ...]:
    """Spread `budget` iterations over `num_steps` sampling steps; every step gets at least one.

    Each step gets one iteration and a share of the rest in proportion to a weight that is constant or linear in the noise
    level. The list is rounded up on its less noisy half and down on the other, and the border moves until the sum fits, so
    the sum may stay below the budget but never exceeds it.

    Args:
        budget: iterations of the whole run, at least `num_steps`.
        num_steps: model evaluations of the run, at least 1.
        allocation: "constant", "increasing" (more iterations at noisier steps, so most at the start of sampling) or
            "decreasing" (most at the end).
        ratio: weights of the cheapest and the dearest step, both > 0.

    Returns:
        Iterations in the order of sampling, from noise to data.

    Raises:
        ValueError: if an argument is out of range, above all a budget that leaves a step without an iteration.
    """
    if num_steps < 1:
        raise ValueError(f"`num_steps` must be at least 1, got {num_steps}.")
    if budget < num_steps:
        raise ValueError(
            f"`budget` ({budget}) must be at least the number of sampling steps ({num_steps}), because every step needs one "
            "fixed-point iteration. Raise the budget or take fewer steps."
        )
    if allocation not in ALLOCATIONS:
        raise ValueError(f"`allocation` must be one of {ALLOCATIONS}, got {allocation!r}.")
    if min(ratio) <= 0:
        raise ValueError(f"`ratio` must be two positive weights, got {ratio}.")

    low, high = ratio
    first, last = {"constant": (1.0, 1.0), "increasing": (low, high), "decreasing": (high, low)}[allocation]
    # float32 on purpose: the published tables round values that are integers in exact arithmetic.
    weights = torch.linspace(first, last, num_steps, dtype=torch.float32)
    shares = 1 + (budget - num_steps) * weights / weights.sum()
    position = torch.arange(num_steps)
    for border in range(num_steps // 2, -1, -1):
        table = torch.where(position < border, shares.ceil(), shares.floor()).long()
        if int(table.sum()) <= budget:
            break
    return tuple(table.flip(0).tolist())


def relative_residual(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """`|new - old| / |new|` of each sample in at least float32; (B, ...) -> (B,)."""
    dtype = torch.promote_types(new.dtype, torch.float32)
    change, size = (new - old).to(dtype).flatten(1), new.to(dtype).flatten(1)
    return change.norm(dim=1) / size.norm(dim=1).clamp_min(torch.finfo(dtype).tiny)


@dataclass(frozen=True)
class FixedPointSolver:
    """How one fixed-point problem is solved. The default is plain iteration for a given number of steps."""

    tolerance: float | None = None
    """Stop when the relative residual falls below this; None runs all iterations. Costs one device read per iteration."""
    stop: str = "batch"
    """"batch" stops when every sample is below the tolerance, "sample" drops each sample from the batch on its own."""
    anderson_depth: int = 0
    """Past iterates that Anderson mixing combines, 0 for plain iteration."""
    anderson_ridge: float = 1e-4
    """Tikhonov term of the mixing weights, relative to the mean squared residual."""

    def __post_init__(self):
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(f"`tolerance` must be positive or None, got {self.tolerance}.")
        if self.stop not in ("batch", "sample"):
            raise ValueError(f"`stop` must be 'batch' or 'sample', got {self.stop!r}.")
        if self.anderson_depth < 0 or self.anderson_depth == 1:
            raise ValueError(f"`anderson_depth` must be 0 (off) or at least 2, got {self.anderson_depth}.")
        if not self.anderson_ridge > 0:
            raise ValueError(f"`anderson_ridge` must be positive, got {self.anderson_ridge}.")


class FixedPointSolution(NamedTuple):
    """What `solve` found."""

    state: torch.Tensor
    """(B, N, D)."""
    num_iterations: torch.Tensor
    """Map evaluations of each sample, (B,) integers."""
    residuals: torch.Tensor | None
    """Relative residual of each iteration and sample, (K, B); NaN once a sample has stopped. None unless asked for."""


@dataclass
class _AndersonHistory:
    """The last `depth` pairs (z, f(z)) of each sample, newest last."""

    depth: int
    ridge: float
    states: list[torch.Tensor] = field(default_factory=list)
    images: list[torch.Tensor] = field(default_factory=list)

    def mix(self, state: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Affine combination of the images that makes the combined residual smallest, for each sample."""
        self.states, self.images = [*self.states, state][-self.depth :], [*self.images, image][-self.depth :]
        dtype = torch.promote_types(image.dtype, torch.float32)
        images = torch.stack(self.images, dim=1).to(dtype).flatten(2)  # (B, m, n)
        gaps = images - torch.stack(self.states, dim=1).to(dtype).flatten(2)
        gram = gaps @ gaps.mT
        scale = gram.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(torch.finfo(dtype).tiny)
        gram = gram / scale[:, None, None] + self.ridge * torch.eye(gram.shape[-1], dtype=dtype, device=gram.device)
        weights = torch.linalg.solve_ex(gram, torch.ones_like(gram[..., :1]))[0]  # no error check: it would synchronise
        weights = weights / weights.sum(dim=1, keepdim=True)
        return (weights.mT @ images).view(image.shape).to(image.dtype)

    def keep(self, rows: torch.Tensor) -> None:
        self.states, self.images = [s[rows] for s in self.states], [i[rows] for i in self.images]


def solve(
    step: Step,
    state: torch.Tensor,
    num_iterations: int,
    solver: FixedPointSolver | None = None,
    return_residuals: bool = False,
) -> FixedPointSolution:
    """Iterate `z <- step(z)` at most `num_iterations` times.

    Args:
        step: the map, see `Step`.
        state: start, (B, N, D).
        num_iterations: limit for each sample, >= 0.
        solver: stopping and acceleration; None is plain iteration with no residuals and no device read.
        return_residuals: also record the residual of every iteration.
    """
    solver = solver or FixedPointSolver()
    batch_size = state.shape[0]
    history = _AndersonHistory(solver.anderson_depth, solver.anderson_ridge) if solver.anderson_depth else None
    counts = torch.full((batch_size,), num_iterations, device=state.device)
    residuals: list[torch.Tensor] = []
    rows: torch.Tensor | None = None  # samples still iterating; None means all
    current = state
    for iteration in range(num_iterations):
        image = step(current, rows)
        if return_residuals or solver.tolerance is not None:
            residual = relative_residual(image, current)
            residuals.append(residual if rows is None else _scatter_rows(residual, rows, batch_size))
        current = image if history is None else history.mix(current, image)
        if solver.tolerance is None:
            continue
        done = residual < solver.tolerance
        if solver.stop == "batch":
            if bool(done.all()):
                counts.fill_(iteration + 1)
                break
        elif bool(done.any()):
            rows = torch.arange(batch_size, device=state.device) if rows is None else rows
            state = state.index_copy(0, rows, current)
            counts[rows[done]] = iteration + 1
            going = (~done).nonzero().flatten()
            rows, current = rows[going], current[going]
            if history is not None:
                history.keep(going)
            if rows.numel() == 0:
                break
    state = current if rows is None else state.index_copy(0, rows, current)
    return FixedPointSolution(state, counts, torch.stack(residuals) if return_residuals and residuals else None)


def _scatter_rows(values: torch.Tensor, rows: torch.Tensor, batch_size: int) -> torch.Tensor:
    return values.new_full((batch_size,), torch.nan).index_copy(0, rows, values)
