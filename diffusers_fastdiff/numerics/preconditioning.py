"""How a denoiser is built from a raw network in the VP, VE and EDM formulations, with or without momentum.

`D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)`, for `x = clean + sigma noise`. Sources: Karras et al., arXiv 2206.00364,
table 1; with momentum, `c_in` is the scale of `momentum.momentum_scale` (Wu et al., arXiv 2306.06991).

| kind | c_skip | c_out | c_in | c_noise | sigma in training |
|---|---|---|---|---|---|
| "vp" | 1 | -sigma | 1/sqrt(sigma^2 + 1) | (M - 1) t(sigma) | sigma(t), t uniform in [epsilon_t, 1] |
| "ve" | 1 | sigma | 1 | log(sigma / 2) | log-uniform in [sigma_min, sigma_max] |
| "edm" | sd^2/(sigma^2 + sd^2) | sigma sd/sqrt(sigma^2 + sd^2) | 1/sqrt(sigma^2 + sd^2) | log(sigma)/4 | log-normal |

Everything is computed in the dtype of `sigma`, numbers in float64.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeAlias

import torch

from .momentum import momentum_scale

KINDS = ("vp", "ve", "edm")
Sigma: TypeAlias = float | torch.Tensor
"""Noise level(s) in units of the data, > 0: a number, or a tensor of any shape."""


class Coefficients(NamedTuple):
    """Coefficients of the denoiser, each of the shape of `sigma`."""

    c_skip: torch.Tensor
    c_out: torch.Tensor
    c_in: torch.Tensor
    c_noise: torch.Tensor


@dataclass(frozen=True)
class Preconditioning:
    """Formulation of a denoiser; plain numbers, so that a config can hold them.

    Args:
        kind: "vp", "ve" or "edm".
        momentum: multiplier m of the momentum; None or 0 is the plain formulation. The published FDM-VE network has 1
            whatever it was trained with: its program ignores the multiplier there.
        sigma_min: smallest noise level, None for the published one: sigma(epsilon_t) in VP, 0.02 in VE, 0.002 in EDM.
        sigma_max: largest noise level, None for the published one: sigma(1) in VP, 100 in VE, 80 in EDM.
        sigma_data: standard deviation of the data (EDM).
        log_sigma_mean: mean of log(sigma) in training (EDM).
        log_sigma_std: standard deviation of log(sigma) in training (EDM).
        beta_d: slope of the noise rate (VP).
        beta_min: noise rate at t = 0 (VP).
        epsilon_t: smallest t (VP).
        num_timesteps: M, scale of `c_noise` (VP).
        noise_input_scale: factor of `c_noise`; 1000 in the U-Nets of consistency models (Song et al., arXiv 2303.01469).
    """

    kind: str = "edm"
    momentum: float | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    sigma_data: float = 0.5
    log_sigma_mean: float = -1.2
    log_sigma_std: float = 1.2
    beta_d: float = 19.9
    beta_min: float = 0.1
    epsilon_t: float = 1e-5
    num_timesteps: int = 1000
    noise_input_scale: float = 1.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"`kind` must be one of {KINDS}, got {self.kind!r}.")
        if self.momentum is not None and self.momentum < 0:
            raise ValueError(f"`momentum` must not be negative, got {self.momentum}: 0 or None is the plain formulation.")
        low, high = self.sigma_range
        if not 0 < low < high:
            raise ValueError(f"`sigma_min` must lie between 0 and `sigma_max`, got {low} and {high}.")

    @cached_property
    def sigma_range(self) -> tuple[float, float]:
        """Smallest and largest noise level."""
        match self.kind:
            case "vp":
                low, high = (float(vp_sigma(t, self.beta_d, self.beta_min)) for t in (self.epsilon_t, 1.0))
            case "ve":
                low, high = 0.02, 100.0
            case _:
                low, high = 0.002, 80.0
        return (
            low if self.sigma_min is None else self.sigma_min,
            high if self.sigma_max is None else self.sigma_max,
        )

    def at(self, sigma: Sigma) -> Coefficients:
        """Coefficients of the denoiser at noise level `sigma`."""
        sigma = _as_tensor(sigma)
        one = torch.ones_like(sigma)
        match self.kind:
            case "vp":
                c_skip, c_out, c_in = one, -sigma, (sigma**2 + 1).rsqrt()
                c_noise = (self.num_timesteps - 1) * vp_time(sigma, self.beta_d, self.beta_min)
            case "ve":
                c_skip, c_out, c_in, c_noise = one, sigma, one, (sigma / 2).log()
            case _:
                c_in = (sigma**2 + self.sigma_data**2).rsqrt()
                c_skip, c_out, c_noise = (self.sigma_data * c_in) ** 2, sigma * self.sigma_data * c_in, sigma.log() / 4
        if self.momentum:
            c_in = momentum_scale(sigma, *self.sigma_range, self.momentum)
        return Coefficients(c_skip, c_out, c_in, self.noise_input_scale * c_noise)

    def sigma(self, c_noise: Sigma) -> torch.Tensor:
        """Noise level that the network is told as `c_noise`: the inverse of that coefficient."""
        level = _as_tensor(c_noise) / self.noise_input_scale
        match self.kind:
            case "vp":
                return vp_sigma(level / (self.num_timesteps - 1), self.beta_d, self.beta_min)
            case "ve":
                return 2 * level.exp()
            case _:
                return (4 * level).exp()

    def loss_weight(self, sigma: Sigma) -> torch.Tensor:
        """Weight of the squared error of the denoiser, `1 / c_out^2`: 1/sigma^2 in VP and VE, `1/sigma^2 + 1/sd^2` in EDM."""
        return self.at(sigma).c_out ** -2

    def training_sigma(self, draws: torch.Tensor) -> torch.Tensor:
        """Noise levels of training samples.

        Args:
            draws: independent random numbers, uniform in [0, 1) for VP and VE, standard normal for EDM; any shape.
        """
        match self.kind:
            case "vp":
                return vp_sigma(1 + draws * (self.epsilon_t - 1), self.beta_d, self.beta_min)
            case "ve":
                low, high = self.sigma_range
                return low * (high / low) ** draws
            case _:
                return (self.log_sigma_mean + self.log_sigma_std * draws).exp()


def vp_sigma(t: Sigma, beta_d: float = 19.9, beta_min: float = 0.1) -> torch.Tensor:
    """VP noise level `sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)` at time t in (0, 1]."""
    t = _as_tensor(t)
    return (0.5 * beta_d * t**2 + beta_min * t).expm1().sqrt()


def vp_time(sigma: Sigma, beta_d: float = 19.9, beta_min: float = 0.1) -> torch.Tensor:
    """Inverse of `vp_sigma`, written without the cancellation at small noise levels."""
    exponent = (_as_tensor(sigma) ** 2).log1p()
    return 2 * exponent / ((beta_min**2 + 2 * beta_d * exponent).sqrt() + beta_min)


def _as_tensor(value: Sigma) -> torch.Tensor:
    return value if torch.is_tensor(value) else torch.tensor(value, dtype=torch.float64)
