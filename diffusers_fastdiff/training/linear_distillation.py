"""Learning a linear multistep solver by back-propagation through all of its evaluations.

Every explicit solver with K evaluations is a `LinearSolver`; what is learned is where it evaluates, what it tells the network,
and how it combines the slopes. Training begins at a known solver: with all shifts at 0 the learned one is that solver.
"""

import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..numerics.linear_solver import LinearSolver
from ..numerics.sigma_grids import logsnr_grid
from ..numerics.solver_methods import Solver
from ..numerics.solvers import SolverRun
from .pipeline_denoiser import Conditions, PipelineDenoiser

INGREDIENTS = ("grid", "network", "weights", "decay")


class LearnableLinearSolver(nn.Module):
    """The numbers of a `LinearSolver` as shifts from a known solver on a learned grid.

    Shifts are relative, so that one learning rate fits all: of the grid and of the levels the network is told, in log sigma; of
    weights and decay, in units of the level reached before the step.

    Args:
        base: the known solver, of Euler, iPNDM or DPM-Solver++.
        sigmas: its grid, K levels and 0.
        ingredients: what is learned, any of `INGREDIENTS`; the rest keeps following the base.
    """

    def __init__(self, base: Solver, sigmas: list[float], ingredients: tuple[str, ...] = INGREDIENTS):
        super().__init__()
        if sigmas[-1] != 0:
            raise ValueError(f"`sigmas` must end at 0, got {sigmas}.")
        unknown = set(ingredients) - set(INGREDIENTS)
        if unknown or not ingredients:
            raise ValueError(f"`ingredients` must be some of {INGREDIENTS}, got {ingredients}.")
        self.base, self.count = base, len(sigmas) - 1
        self.register_buffer("log_sigmas", torch.tensor(sigmas[:-1], dtype=torch.float64).log())
        shapes = {"grid": (self.count,), "network": (self.count,), "weights": (self.count, self.count), "decay": (self.count,)}
        for name in INGREDIENTS:
            shift = nn.Parameter(torch.zeros(shapes[name], dtype=torch.float64), requires_grad=name in ingredients)
            self.register_parameter(f"{name}_shift", shift)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """`sigmas` (K,), `network_sigmas` (K,), `decay` (K,) and lower triangular `weights` (K, K); float64."""
        sigmas = (self.log_sigmas + self.grid_shift).exp()
        rows = self._base_rows(sigmas)
        decay = rows[:, 0] + self.decay_shift * sigmas / sigmas[0]
        weights = rows[:, 1:] + (self.weights_shift * sigmas[:, None]).tril()
        return sigmas, sigmas * self.network_shift.exp(), decay, weights

    def _base_rows(self, sigmas: torch.Tensor) -> torch.Tensor:
        """Each state of the base solver as a combination of the initial state and the slopes, (K, K + 1)."""
        run = SolverRun(self.base, [*sigmas.unbind(), 0.0])
        unit = torch.eye(self.count + 1, dtype=torch.float64, device=sigmas.device)
        x, rows = unit[0], []
        for slope in unit[1:]:
            x = run.follow(x, slope)
            rows.append(x)
        return torch.stack(rows)

    @torch.no_grad()
    def export(self) -> LinearSolver:
        """The solver as plain numbers."""
        sigmas, network_sigmas, decay, weights = (value.tolist() for value in self())
        return LinearSolver(sigmas, network_sigmas, decay, [row[: k + 1] for k, row in enumerate(weights)])


def follow_linear(
    denoiser: PipelineDenoiser,
    numbers: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    noise: torch.Tensor,
    conditions: Conditions,
    checkpointing: bool = False,
) -> torch.Tensor:
    """The result of a linear solver, differentiable in its numbers; takes the steps of `LinearRun`.

    Args:
        denoiser: what is sampled.
        numbers: of `LearnableLinearSolver.forward`.
        noise: standard normal, (B, C, H, W).
        conditions: of `denoiser.conditions`.
        checkpointing: compute each evaluation again in the backward pass instead of keeping its activations.
    """
    sigmas, network_sigmas, decay, weights = numbers
    start = x = denoiser.start(noise, sigmas[0])
    slopes: list[torch.Tensor] = []
    for k, level in enumerate(network_sigmas.unbind()):
        # The driver scales the sample for the level the network is told, so the slope is that of the network as it is.
        if checkpointing:
            slopes.append(checkpoint(denoiser.slope, x, level, conditions, use_reentrant=False))
        else:
            slopes.append(denoiser.slope(x, level, conditions))
        row = weights[k, : k + 1].to(x.dtype)
        x = decay[k].to(x.dtype) * start + torch.tensordot(row, torch.stack(slopes), dims=1)
    return x


def best_range(
    denoiser: PipelineDenoiser,
    base: Solver,
    num_evaluations: int,
    noise: torch.Tensor,
    choice: torch.Tensor,
    target: torch.Tensor,
    batch_size: int,
) -> tuple[list[float], float]:
    """Where to begin: the log-SNR-uniform grid on which the known solver comes nearest to the teacher.

    Tries ends at 75 % to 100 % and 1 % to 8 % of the time between the model's extreme noise levels.

    Returns:
        The grid, `num_evaluations` levels and 0, and its root mean squared error.
    """
    model = denoiser.noise_model
    low, high = (float(model.timestep(sigma)) for sigma in model.sigma_range)
    at = lambda share: float(model.sigma(low + share * (high - low)))  # noqa: E731
    best: tuple[list[float], float] = ([], math.inf)
    for first in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75):
        for last in (0.01, 0.02, 0.04, 0.06, 0.08):
            levels = logsnr_grid(num_evaluations, at(last), at(first)).tolist() if num_evaluations > 1 else [at(first)]
            solver = LearnableLinearSolver(base, [*levels, 0.0]).to(noise.device)
            error = linear_error(denoiser, solver, noise, choice, target, batch_size)
            if error < best[1]:
                best = ([*levels, 0.0], error)
    return best


@torch.no_grad()
def linear_error(
    denoiser: PipelineDenoiser,
    solver: LearnableLinearSolver,
    noise: torch.Tensor,
    choice: torch.Tensor,
    target: torch.Tensor,
    batch_size: int,
) -> float:
    """Root mean squared difference to the target, per element."""
    numbers, total = solver(), 0.0
    for rows in torch.arange(len(noise)).split(batch_size):
        end = follow_linear(denoiser, numbers, noise[rows], denoiser.conditions(choice[rows]))
        total += float((end - target[rows]).square().sum())
    return math.sqrt(total / target.numel())
