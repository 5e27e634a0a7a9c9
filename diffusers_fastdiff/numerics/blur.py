"""Blurring diffusion: isotropic noise, and a mean whose high frequencies fade first.

Sources: Hoogeboom and Salimans, arXiv 2209.05557 (the process); Zhang et al., arXiv 2206.05564 (its gDDIM).

Frequencies are those of the orthonormal DCT-II, `y = V^T x`. With `phi = (t + offset) / (1 + 2 offset) pi / 2`, frequency
(i, j) of an H x W image has the mean `cos(phi) d y` and the standard deviation `sin(phi)`, where
`d = (1 - d_min) exp(-lam tau) + d_min`, `lam = (pi i / H)^2 + (pi j / W)^2` and `tau = (sigma_max sin^2(pi t / 2))^2 / 2`.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from .linear_sde import LinearProcess, Time, as_time


@dataclass(frozen=True)
class BlurProcess(LinearProcess):
    """Numbers of each frequency: `cells = (H, W)`. Without blur, `sigma_max = 0`, it is the cosine VP process."""

    end_time: ClassVar[float] = 1e-5

    image_size: tuple[int, int] = (32, 32)
    """Height and width."""
    sigma_max: float = 10.0
    """Standard deviation of the Gaussian blur at t = 1 in pixels; 0 for none."""
    min_scale: float = 1e-3
    """d_min: what the blur leaves of every frequency, so that it can be undone."""
    offset: float = 0.004
    """Keeps the noise at t = 0, and the signal at t = 1, above zero."""
    max_noise_to_signal: float = 80.0
    """Where sampling starts, see `start_time`."""

    def __post_init__(self):
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(f"`image_size` must be a positive height and width, got {self.image_size}.")
        object.__setattr__(self, "image_size", tuple(self.image_size))  # a saved config holds a list
        if self.sigma_max < 0:
            raise ValueError(f"`sigma_max` must not be negative, got {self.sigma_max}.")
        if not 0 < self.min_scale <= 1:
            raise ValueError(f"`min_scale` must be inside (0, 1], got {self.min_scale}.")
        for name in ("offset", "max_noise_to_signal"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be positive and finite, got {getattr(self, name)}.")

    @property
    def cells(self) -> tuple[int, ...]:
        return self.image_size

    @property
    def start_time(self) -> float:  # type: ignore[override]  # depends on the instance, not on the class alone
        """Where `cos(phi_0) tan(phi) - sin(phi_0)`, the noise added since t = 0 relative to the signal, is its maximum."""
        return self.time_of(self.max_noise_to_signal)

    def time_of(self, noise_to_signal: float) -> float:
        """Inverse of `noise_to_signal`."""
        phi_0 = self._phase(0.0).item()
        phi = math.atan((noise_to_signal + math.sin(phi_0)) / math.cos(phi_0))
        return phi * 2 / math.pi * (1 + 2 * self.offset) - self.offset

    def noise_to_signal(self, t: Time) -> torch.Tensor:
        """Noise added since t = 0, relative to the signal; a variance-exploding clock."""
        phi_0 = self._phase(0.0)
        return phi_0.cos() * self._phase(t).tan() - phi_0.sin()

    def eigenvalues(self) -> torch.Tensor:
        """lam, (H, W)."""
        rows, columns = ((torch.arange(n, dtype=torch.float64) * math.pi / n) ** 2 for n in self.image_size)
        return rows[:, None] + columns

    def scale(self, t: Time) -> torch.Tensor:
        """d, (..., H, W)."""
        return (1 - self.min_scale) * self._decay(t) + self.min_scale

    def drift(self, t: Time) -> torch.Tensor:
        """`d log(cos(phi) d) / dt`."""
        t = as_time(t)
        dissipation_rate = self.sigma_max**2 * (math.pi * t / 2).sin() ** 2 * math.pi / 2 * (math.pi * t).sin()
        fading = self.eigenvalues() * dissipation_rate[..., None, None] * (1 - self.min_scale) * self._decay(t) / self.scale(t)
        return -(self._phase_rate * self._phase(t).tan()[..., None, None] + fading)[..., None, None]

    def diffusion(self, t: Time) -> torch.Tensor:
        """`d sin^2(phi) / dt - 2 F sin^2(phi)`."""
        phase = self._phase(t)
        growth = self._phase_rate * (2 * phase).sin()
        return growth[..., None, None, None, None] - 2 * self.drift(t) * self.factor(t) ** 2

    def transition(self, t: Time, s: Time) -> torch.Tensor:
        return self.signal(t) / self.signal(s)

    def signal(self, t: Time) -> torch.Tensor:
        return (self._phase(t).cos()[..., None, None] * self.scale(t))[..., None, None]

    def factor(self, t: Time) -> torch.Tensor:
        return self._phase(t).sin()[..., None, None, None, None].expand(*as_time(t).shape, *self.cells, 1, 1)

    def check_state(self, state: torch.Tensor) -> None:
        if tuple(state.shape[-2:]) != self.image_size:
            raise ValueError(
                f"`image_size` is {self.image_size}, but the state has shape {tuple(state.shape)}. Resize the images, or "
                "create the process with their size."
            )

    def transform(self, state: torch.Tensor) -> torch.Tensor:
        self.check_state(state)
        return dct2(state)

    def inverse_transform(self, state: torch.Tensor) -> torch.Tensor:
        self.check_state(state)
        return idct2(state)

    @property
    def _phase_rate(self) -> float:
        return math.pi / 2 / (1 + 2 * self.offset)

    def _phase(self, t: Time) -> torch.Tensor:
        return (as_time(t) + self.offset) * self._phase_rate

    def _decay(self, t: Time) -> torch.Tensor:
        tau = (self.sigma_max * (math.pi * as_time(t) / 2).sin() ** 2) ** 2 / 2
        return (-self.eigenvalues() * tau[..., None, None]).exp()


def dct2(x: torch.Tensor) -> torch.Tensor:
    """Orthonormal DCT-II over the last two axes."""
    rows, columns = (_dct_matrix(n).to(x) for n in x.shape[-2:])
    return rows @ x @ columns.mT


def idct2(y: torch.Tensor) -> torch.Tensor:
    """Inverse of `dct2`."""
    rows, columns = (_dct_matrix(n).to(y) for n in y.shape[-2:])
    return rows.mT @ y @ columns


@lru_cache(maxsize=16)
def _dct_matrix(n: int) -> torch.Tensor:
    """Row i is frequency i: `sqrt(2 / n) cos(pi (j + 1/2) i / n)`, the first one divided by `sqrt(2)`. Float64, (n, n)."""
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    matrix = (math.pi * (j + 0.5) * i / n).cos() * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix
