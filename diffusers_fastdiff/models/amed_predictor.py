"""The AMED predictor: where to evaluate inside a sampling interval, and by how much to correct (arXiv 2312.00094, figure 4).

Differences from the published program: the output is a named triple with neutral values, and hyper-parameters of the sampler
live on the scheduler. The time embedding keeps its raw noise levels and single-precision frequencies, so that published
weights fit.
"""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ..numerics.solver_methods import AMEDCoefficients

FEATURE_SIZE = 8
"""Height and width of the map the predictor looks at."""


class AMEDPredictor(ModelMixin, ConfigMixin):
    r"""Predicts `AMEDCoefficients` for each sample from a bottleneck feature map and the two ends of the interval.

    Args:
        hidden_dim: width of the map's encoder.
        feature_dim: numbers the map is reduced to.
        time_channels: channels of the embedding of each noise level, even.
        scale_dir: the predicted direction scale lies in `[1 - scale_dir, 1 + scale_dir]`; 0 fixes it at 1.
        scale_time: likewise for the scale of the noise level that the network is told.
    """

    @register_to_config
    def __init__(
        self,
        hidden_dim: int = 128,
        feature_dim: int = 4,
        time_channels: int = 8,
        scale_dir: float = 0.01,
        scale_time: float = 0.0,
    ):
        super().__init__()
        for name, value in (("scale_dir", scale_dir), ("scale_time", scale_time)):
            if not 0 <= value < 1:
                raise ValueError(f"`{name}` must lie in [0, 1), got {value}.")
        exponents = torch.arange(time_channels // 2, dtype=torch.float32) / (time_channels // 2 - 1)
        self.register_buffer("frequencies", (1 / 10000) ** exponents, persistent=False)
        self.time_layer = nn.Linear(time_channels, time_channels)
        self.feature_layer_1 = nn.Linear(FEATURE_SIZE**2, hidden_dim)
        self.feature_layer_2 = nn.Linear(hidden_dim, feature_dim)
        width = feature_dim + 2 * time_channels
        self.r_head = nn.Linear(width, 1)
        self.scale_dir_head = nn.Linear(width, 1) if scale_dir > 0 else None
        self.scale_time_head = nn.Linear(width, 1) if scale_time > 0 else None
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Published initialisation: Xavier-uniform embedding, He-normal layers with unit gain, zero biases."""
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.time_layer.weight)

    @torch.no_grad()
    def initialize_neutral(self) -> None:
        """Begin as the plain solver: r = 1/2 and scales 1 for every sample, so that learning can only improve on it."""
        for head in (self.r_head, self.scale_dir_head, self.scale_time_head):
            if head is not None:
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)

    def forward(self, features: torch.Tensor, sigma: float, sigma_next: float) -> AMEDCoefficients:
        """Coefficients of the interval from `sigma` to `sigma_next`.

        Args:
            features: (B, 8, 8), channel mean of the denoiser's bottleneck at `sigma`; zeros where no evaluation was made.
            sigma, sigma_next: noise levels, numbers.

        Returns:
            Tensors of shape (B, 1, 1, 1), and the number 1 for a scale that is switched off.
        """
        if features.ndim != 3 or tuple(features.shape[1:]) != (FEATURE_SIZE, FEATURE_SIZE):
            raise ValueError(f"`features` must have shape (B, {FEATURE_SIZE}, {FEATURE_SIZE}), got {tuple(features.shape)}.")
        weight = self.r_head.weight
        encoded = self.feature_layer_2(F.silu(self.feature_layer_1(features.flatten(1).to(weight.dtype))))
        times = torch.cat([self._embed(sigma), self._embed(sigma_next)]).expand(len(encoded), -1)
        code = torch.cat([encoded, times], dim=1)

        def scale(head: nn.Linear | None, half_width: float) -> torch.Tensor | float:
            if head is None:
                return 1.0
            return (torch.sigmoid(head(code)) * 2 * half_width + 1 - half_width).reshape(-1, 1, 1, 1)

        return AMEDCoefficients(
            r=torch.sigmoid(self.r_head(code)).reshape(-1, 1, 1, 1),
            scale_dir=scale(self.scale_dir_head, self.config.scale_dir),
            scale_time=scale(self.scale_time_head, self.config.scale_time),
        )

    def _embed(self, sigma: float) -> torch.Tensor:
        """(time_channels,): sines, then cosines, of the raw noise level."""
        angles = self.frequencies.to(self.time_layer.weight.dtype) * sigma
        return F.silu(self.time_layer(torch.cat([angles.sin(), angles.cos()])))
