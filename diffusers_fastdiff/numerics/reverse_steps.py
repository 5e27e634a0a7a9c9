"""Steps of other samplers for the same reverse processes: what gDDIM is compared with, and the final denoising step.

Sources: Song et al., arXiv 2011.13456 (probability flow, Euler-Maruyama); Dockhorn et al., arXiv 2112.07068 (SSCS).

Everywhere `state`, `eps` and `noise` are (B, kC, ...) in the coordinates of `LinearProcess.transform`, and
`score = -K_t^-T eps`, K = R or L.
"""

import torch

from .linear_sde import LinearProcess, combine
from .phase_space import CLDProcess


def reverse_drift(
    process: LinearProcess,
    state: torch.Tensor,
    eps: torch.Tensor,
    t: float,
    stochasticity: float = 0.0,
    parametrization: str = "R",
) -> torch.Tensor:
    """`F u - (1 + lambda^2) / 2 G G^T score`, per unit of (increasing) time; with lambda = 0 the probability-flow ODE."""
    if stochasticity < 0:
        raise ValueError(f"`stochasticity` (lambda) must be at least 0, got {stochasticity}.")
    gain = (1 + stochasticity**2) / 2 * process.noise_drift(t, parametrization)
    return combine(process, [process.drift(t), gain], [state, eps])


def euler_maruyama_step(
    process: LinearProcess,
    state: torch.Tensor,
    eps: torch.Tensor,
    noise: torch.Tensor | None,
    t: float,
    t_next: float,
    stochasticity: float = 1.0,
    parametrization: str = "R",
) -> torch.Tensor:
    """From t to t_next < t. `noise`: standard normal, or None for a step without."""
    drift = reverse_drift(process, state, eps, t, stochasticity, parametrization)
    state = state + (t_next - t) * drift
    if noise is None:
        return state
    # G is diagonal in every process here.
    spread = stochasticity * (process.diffusion(t) * (t - t_next)).sqrt()
    return state + combine(process, [spread], [noise])


def denoising_step(
    process: LinearProcess, state: torch.Tensor, eps: torch.Tensor, t: float, parametrization: str = "R"
) -> torch.Tensor:
    """Euler step of the reverse SDE from t to the data, without noise. Worth one network evaluation at the end of a run."""
    if process.origin == float("-inf"):
        raise ValueError("The data of this process is at -inf, out of reach of an Euler step. End `times` there instead.")
    return state - (t - process.origin) * reverse_drift(process, state, eps, t, 1.0, parametrization)


def sscs_free_step(process: CLDProcess, state: torch.Tensor, noise: torch.Tensor, t: float, t_next: float) -> torch.Tensor:
    """Exact step of the part of the reverse SDE without score: the forward process with the sign of v turned round.

    Half of a symmetric splitting step (SSCS) goes from t to the time where half of `int beta` is left; see `sscs_middle`.
    """
    flip = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    transition = flip @ process.transition(t, t_next) @ flip
    factor = torch.linalg.cholesky(flip @ process.added_covariance(t, t_next) @ flip)
    return combine(process, [transition, factor], [state, noise])


def sscs_score_step(
    process: CLDProcess, state: torch.Tensor, eps: torch.Tensor, t: float, t_next: float, parametrization: str = "R"
) -> torch.Tensor:
    """`v += 2 Gamma int beta (score_v + v / M)` over the whole step; `eps` is that of `state` at time t."""
    amount = 2 * process.friction * (process.beta_integral(t) - process.beta_integral(t_next))
    velocity = torch.diag(torch.tensor([0.0, 1.0], dtype=torch.float64))
    score = -torch.linalg.inv(process.noise_factor(t, parametrization)).mT
    gain = torch.eye(2, dtype=torch.float64) + amount * process.inverse_mass * velocity
    return combine(process, [gain, amount * velocity @ score], [state, eps])


def sscs_middle(process: CLDProcess, t: float, t_next: float) -> float:
    """The time that halves `int beta` between t and t_next."""
    target = float(process.beta_integral(t) + process.beta_integral(t_next)) / 2
    root = (process.beta_0**2 + 2 * process.beta_1 * target) ** 0.5
    return 2 * target / (process.beta_0 + root)
