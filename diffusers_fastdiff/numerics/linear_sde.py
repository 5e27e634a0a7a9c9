"""Diffusion by a linear SDE, `du = F_t u dt + G_t dw`: its matrices, and how they act on images.

Source: Zhang, Tao and Chen, "gDDIM: generalized denoising diffusion implicit models", arXiv 2206.05564.

| symbol | meaning |
|---|---|
| `u` | state; data in the first entries of each block, see `LinearProcess.lift` |
| `F`, `G` | drift and diffusion |
| `Psi(t, s)` | transition of `du = F u dt` from time s to time t |
| `Sigma` | covariance of `u_t` given the data |
| `R` | factor of `Sigma = R R^T` with `dR/dt = F R + G G^T R^-T / 2`: eps is constant along the flow of point-mass data |
| `L` | lower Cholesky factor of `Sigma`, the baseline of the paper |
| `eps` | network output, `score = -K^-T eps` with K = R or L |

Every matrix is float64 on the CPU and has shape (..., *cells, k, k): k x k blocks (k = 2 for position and velocity), shared by
all pixels (`cells = ()`) or one for each frequency (`cells = (H, W)`), after the shape of the time it belongs to.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch

PARAMETRIZATIONS = ("R", "L")

Time: TypeAlias = float | torch.Tensor


def as_time(t: Time) -> torch.Tensor:
    """Float64 on the CPU, where the coefficients are computed. Draw training times there to spare the device a read."""
    return torch.as_tensor(t, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class LinearProcess(ABC):
    """One forward process. Times grow from the data, `origin`, to the noise, `start_time`, where sampling starts."""

    block: ClassVar[int] = 1
    """k, entries of the state for each entry of the data."""
    origin: ClassVar[float] = 0.0
    """Time of the data; R may behave like a square root there."""
    start_time: ClassVar[float] = 1.0
    end_time: ClassVar[float] = 1e-3
    """Where sampling stops by default, before the final denoising step."""

    @property
    def cells(self) -> tuple[int, ...]:
        return ()

    @abstractmethod
    def drift(self, t: Time) -> torch.Tensor:
        """F."""

    @abstractmethod
    def diffusion(self, t: Time) -> torch.Tensor:
        """G G^T."""

    @abstractmethod
    def transition(self, t: Time, s: Time) -> torch.Tensor:
        """Psi(t, s), from s to t; the two broadcast."""

    @abstractmethod
    def factor(self, t: Time) -> torch.Tensor:
        """R."""

    def cholesky(self, t: Time) -> torch.Tensor:
        """L."""
        return self.factor(t)

    def covariance(self, t: Time) -> torch.Tensor:
        """Sigma."""
        factor = self.factor(t)
        return factor @ factor.mT

    def signal(self, t: Time) -> torch.Tensor:
        """What the lifted data is multiplied by in the mean of `u_t`."""
        return self.transition(t, self.origin)

    def prior_factor(self) -> torch.Tensor:
        """Diagonal factor of the covariance that sampling starts from, (k, k)."""
        return torch.eye(self.block, dtype=torch.float64)

    def noise_factor(self, t: Time, parametrization: str = "R") -> torch.Tensor:
        """K, the factor that multiplies eps."""
        check_parametrization(parametrization)
        return self.factor(t) if parametrization == "R" else self.cholesky(t)

    def noise_drift(self, t: Time, parametrization: str = "R") -> torch.Tensor:
        """`G G^T K^-T`, so that `-G G^T score` is this times eps."""
        diffusion, factor = self.diffusion(t), self.noise_factor(t, parametrization)
        return diffusion / factor if self.block == 1 else torch.linalg.solve(factor, diffusion).mT

    def check_state(self, state: torch.Tensor) -> None:
        """Refuse states of a shape that the process cannot have."""
        del state

    def lift(self, clean: torch.Tensor) -> torch.Tensor:
        """Data (B, C, H, W) -> state at the data, (B, kC, H, W)."""
        return clean

    def project(self, state: torch.Tensor) -> torch.Tensor:
        """State (B, kC, H, W) -> its data part (B, C, H, W)."""
        return state

    def transform(self, state: torch.Tensor) -> torch.Tensor:
        """What the network sees -> the coordinates in which matrices are blocks. Orthonormal: white noise stays white."""
        return state

    def inverse_transform(self, state: torch.Tensor) -> torch.Tensor:
        """The way back from `transform`."""
        return state


def check_parametrization(parametrization: str) -> None:
    """Refuse anything but R and L."""
    if parametrization not in PARAMETRIZATIONS:
        raise ValueError(f"`parametrization` must be one of {PARAMETRIZATIONS}, got {parametrization!r}.")


def apply(process: LinearProcess, coefficient: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """A matrix times a state.

    Args:
        coefficient: (*cells, k, k), or (B, *cells, k, k) with one for each sample.
        state: (B, kC, ...), in the coordinates of `LinearProcess.transform`.
    """
    process.check_state(state)
    batch = coefficient.shape[: coefficient.ndim - 2 - len(process.cells)]
    shape = (*batch, *[1] * (state.ndim - len(batch) - len(process.cells)), *process.cells) if batch else process.cells
    # Numbers stay on the CPU: a 0-dimensional tensor may meet one on any device without a copy.
    rows = [[e.reshape(shape).to(state) if shape else e for e in row.unbind(-1)] for row in coefficient.unbind(-2)]
    if process.block == 1:
        return rows[0][0] * state
    parts = state.chunk(process.block, dim=1)
    return torch.cat([sum(e * part for e, part in zip(row, parts, strict=True)) for row in rows], dim=1)


def combine(process: LinearProcess, coefficients: Sequence[torch.Tensor], states: Sequence[torch.Tensor]) -> torch.Tensor:
    """`sum_j coefficients[j] states[j]` in at least float32, in the dtype of the first state. Arguments as in `apply`."""
    dtype = torch.promote_types(states[0].dtype, torch.float32)
    terms = (apply(process, c, s.to(dtype)) for c, s in zip(coefficients, states, strict=True))
    return sum(terms).to(states[0].dtype)


def add_noise(
    process: LinearProcess, clean: torch.Tensor, noise: torch.Tensor, t: Time, parametrization: str = "R"
) -> torch.Tensor:
    """`u_t = Psi(t, 0) u_0 + K_t eps`, in the coordinates of the network. The training target is `noise` for either K.

    Args:
        clean: data, (B, C, H, W).
        noise: standard normal, (B, kC, H, W).
        t: one time, or (B,).
    """
    coefficients = process.signal(t), process.noise_factor(t, parametrization)
    states = process.transform(process.lift(clean)), process.transform(noise)
    return process.inverse_transform(combine(process, coefficients, states))
