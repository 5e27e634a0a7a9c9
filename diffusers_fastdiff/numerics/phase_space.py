"""Critically damped Langevin diffusion (CLD) in position x and velocity v.

Sources: Dockhorn, Vahdat and Kreis, arXiv 2112.07068 (the process and its SSCS sampler); Zhang et al., arXiv 2206.05564 (R).

`dx = beta v / M dt`, `dv = -beta (x + Gamma v / M) dt + sqrt(2 Gamma beta) dw` with `Gamma = 2 sqrt(M)`. All matrices depend on
time only through `D = int_0^t beta`. States hold all position channels, then all velocity channels: (B, 2C, ...).
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from .linear_sde import LinearProcess, Time, apply, as_time
from .quadrature import cumulative_integral


@dataclass(frozen=True)
class CLDProcess(LinearProcess):
    """Position and velocity, coupled in 2 x 2 blocks that all pixels share."""

    block: ClassVar[int] = 2

    inverse_mass: float = 4.0
    """1 / M."""
    beta_0: float = 4.0
    beta_1: float = 0.0
    """`beta = beta_0 + beta_1 t`."""
    gamma: float = 0.04
    """Variance of the velocity at the data, in units of its stationary variance M."""
    epsilon: float = 1e-6
    """Added to both variances at the data, so that the covariance can be inverted there."""

    def __post_init__(self):
        for name in ("inverse_mass", "beta_0", "epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if self.beta_0 + self.beta_1 * self.start_time <= 0:
            raise ValueError(f"`beta_1` ({self.beta_1}) must keep `beta_0 + beta_1 t` positive up to t = {self.start_time}.")
        if self.gamma < 0:
            raise ValueError(f"`gamma` must not be negative, got {self.gamma}.")

    @property
    def frequency(self) -> float:
        """w, `sqrt(1 / M)`; the rate at which the free motion decays."""
        return math.sqrt(self.inverse_mass)

    @property
    def friction(self) -> float:
        """Gamma, critical."""
        return 2 / self.frequency

    def beta(self, t: Time) -> torch.Tensor:
        return self.beta_0 + self.beta_1 * as_time(t)

    def beta_integral(self, t: Time) -> torch.Tensor:
        """D."""
        t = as_time(t)
        return self.beta_0 * t + self.beta_1 * t**2 / 2

    def drift(self, t: Time) -> torch.Tensor:
        matrix = [[0.0, self.inverse_mass], [-1.0, -self.friction * self.inverse_mass]]
        return self.beta(t)[..., None, None] * as_time(torch.tensor(matrix, dtype=torch.float64))

    def diffusion(self, t: Time) -> torch.Tensor:
        return self.beta(t)[..., None, None] * torch.diag(torch.tensor([0.0, 2 * self.friction], dtype=torch.float64))

    def transition(self, t: Time, s: Time) -> torch.Tensor:
        d = self.beta_integral(t) - self.beta_integral(s)
        z = self.frequency * d
        return (-z).exp()[..., None, None] * _matrix(1 + z, self.inverse_mass * d, -d, 1 - z)

    def added_covariance(self, t: Time, s: Time) -> torch.Tensor:
        """Covariance of `u_t` given `u_s`, t >= s: `Sigma_inf - Psi Sigma_inf Psi^T` without the cancellation."""
        return _matrix(*self._added(self.beta_integral(t) - self.beta_integral(s)))

    def covariance(self, t: Time) -> torch.Tensor:
        xx, xv, vv = self._moments(self.beta_integral(t))
        return _matrix(xx, xv, xv, vv)

    def cholesky(self, t: Time) -> torch.Tensor:
        xx, xv, vv = self._moments(self.beta_integral(t))
        a = xx.sqrt()
        return _matrix(a, torch.zeros_like(a), xv / a, (xx * vv - xv**2).sqrt() / a)

    def factor(self, t: Time) -> torch.Tensor:
        """`R = L Q` with a rotation Q; only its angle is not in closed form."""
        angle = _angle(self)(self.beta_integral(t))
        return self.cholesky(t) @ _matrix(angle.cos(), -angle.sin(), angle.sin(), angle.cos())

    def prior_factor(self) -> torch.Tensor:
        return torch.diag(torch.tensor([1.0, 1 / self.frequency], dtype=torch.float64))

    def check_state(self, state: torch.Tensor) -> None:
        if state.shape[1] % 2:
            raise ValueError(
                f"`state` needs an even number of channels, position and velocity, got shape {tuple(state.shape)}. Start from "
                "`lift(images)` or draw twice as many channels."
            )

    def lift(self, clean: torch.Tensor) -> torch.Tensor:
        """Velocity 0: that of the data is drawn inside R."""
        return torch.cat([clean, torch.zeros_like(clean)], dim=1)

    def project(self, state: torch.Tensor) -> torch.Tensor:
        self.check_state(state)
        return state.chunk(2, dim=1)[0]

    def _initial(self) -> tuple[float, float]:
        return self.epsilon, self.gamma / self.inverse_mass + self.epsilon

    def _added(self, d: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Entries (xx, xv, vx, vv) of the covariance that noise has built up from 0 after D = d."""
        z = 2 * self.frequency * d
        decay = (-z).exp()
        xx = torch.special.gammainc(torch.full_like(z, 3.0), z)  # 1 - exp(-z) (1 + z + z^2/2)
        xv = 2 * self.frequency * d**2 * decay
        vv = (-torch.expm1(-z) + decay * z * (1 - z / 2)) / self.inverse_mass
        return xx, xv, xv, vv

    def _moments(self, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Entries (xx, xv, vv) of `Psi Sigma_0 Psi^T + added`."""
        z, decay = self.frequency * d, (-2 * self.frequency * d).exp()
        (xx, xv, _, vv), (x, v) = self._added(d), self._initial()
        xx = xx + decay * ((1 + z) ** 2 * x + (self.inverse_mass * d) ** 2 * v)
        xv = xv + decay * (-(1 + z) * d * x + self.inverse_mass * d * (1 - z) * v)
        return xx, xv, vv + decay * (d**2 * x + (1 - z) ** 2 * v)


def mixed_score_offset(process: CLDProcess, state: torch.Tensor, t: Time, parametrization: str = "R") -> torch.Tensor:
    """`K^-1 (0, v)`, which a network with mixed score leaves out of its eps. `t`: one time, or (B,)."""
    velocity = torch.cat([torch.zeros_like(process.project(state)), state.chunk(2, dim=1)[1]], dim=1)
    return apply(process, torch.linalg.inv(process.noise_factor(t, parametrization)), velocity)


def _matrix(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.stack([a, b], dim=-1), torch.stack([c, d], dim=-1)], dim=-2)


@lru_cache(maxsize=16)
def _angle(process: CLDProcess):
    """Angle of Q as a function of D: `Q' Q^-1 = L^-1 (F L + G G^T L^-T / 2 - L')` has the off-diagonal entry `L_vv / (M L_xx)`.

    The integrand is sharp near D = 0, on the shortest of the scales on which position, velocity and noise reach their
    initial variances; nodes are even in `asinh(D / scale)`.
    """
    (x, v), w = process._initial(), process.frequency
    scale = min(math.sqrt(x / v) / process.inverse_mass, (6 * x) ** (1 / 3) / (2 * w), v * w / 4)

    def rate(d: torch.Tensor) -> torch.Tensor:
        xx, xv, vv = process._moments(d)
        return -process.inverse_mass * (xx * vv - xv**2).sqrt() / xx

    end = float(process.beta_integral(torch.tensor([process.start_time])).max())
    return cumulative_integral(rate, end, scale)
