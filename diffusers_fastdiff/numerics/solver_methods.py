"""The methods a `SolverRun` can follow, and what AMED adds to them.

Sources: Karras et al., arXiv 2206.00364 (Euler, Heun); Lu et al., arXiv 2206.00927 and 2211.01095 (DPM-Solver-2,
DPM-Solver++); Zhou et al., arXiv 2312.00094 (AMED).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .multistep import MAX_ORDER, StepWeights, dpmpp_order, dpmpp_weights, ipndm_v_weights, ipndm_weights
from .noise_levels import Sigma

TWO_STAGE = ("heun", "dpm2", "amed")
SOLVERS = ("euler", *TWO_STAGE, *MAX_ORDER)


class AMEDCoefficients(NamedTuple):
    """What AMED learns about one interval: numbers, or one for each sample as (B, 1, 1, 1)."""

    r: Sigma = 0.5
    """Position of the evaluation inside the interval, `sigma_next^r sigma^(1-r)`, in (0, 1)."""
    scale_dir: Sigma = 1.0
    """Factor of the second half's update."""
    scale_time: Sigma = 1.0
    """Factor of the noise level that the network is told at the midpoint."""


@dataclass(frozen=True)
class Solver:
    """A method and its options.

    Args:
        name: one of `SOLVERS`.
        order: highest order of the multistep methods: 1 to 4 for iPNDM, 1 to 3 for DPM-Solver++.
        data_prediction: DPM-Solver++ on denoised samples rather than on slopes.
        lower_order_final: let the order of DPM-Solver++ fall to 1 towards the end.
        threshold_quantile: dynamic thresholding of denoised samples in DPM-Solver++ with data prediction (arXiv 2205.11487):
            each sample is clipped at this quantile of its own values, at least at 1, and divided by it. None for none.
        true_third_order: correct DPM-Solver++ of order 3, see `multistep.dpmpp_weights`.
    """

    name: str
    order: int = 1
    data_prediction: bool = True
    lower_order_final: bool = True
    threshold_quantile: float | None = None
    true_third_order: bool = False

    def __post_init__(self):
        if self.name not in SOLVERS:
            raise ValueError(f"The solver must be one of {SOLVERS}, got {self.name!r}.")
        highest = MAX_ORDER.get(self.name)
        if highest is not None and not 1 <= self.order <= highest:
            raise ValueError(f"The order of {self.name!r} must be 1 to {highest}, got {self.order}.")

    @property
    def has_memory(self) -> bool:
        """Whether a step uses earlier intervals."""
        return self.name in MAX_ORDER

    def value(self, x: torch.Tensor, slope: torch.Tensor, sigma: Sigma) -> torch.Tensor:
        """What the method remembers of an evaluation: the slope or the denoised sample."""
        if self.name != "dpmpp" or not self.data_prediction:
            return slope
        denoised = x - like(sigma, x) * slope
        return denoised if self.threshold_quantile is None else dynamic_threshold(denoised, self.threshold_quantile)

    def weights(self, sigmas: list[Sigma], sigma_next: Sigma, substep: int, num_substeps: int) -> StepWeights:
        """Of the step from `sigmas[0]` to `sigma_next`; `sigmas` are those of the remembered values, newest first."""
        order = min(self.order, len(sigmas))
        match self.name:
            case "ipndm":
                return ipndm_weights(sigmas, sigma_next, order)
            case "ipndm_v":
                return ipndm_v_weights(sigmas, sigma_next, order)
            case "dpmpp":
                order = min(order, dpmpp_order(substep, num_substeps, self.order, self.lower_order_final))
                ends_at_zero = not isinstance(sigma_next, torch.Tensor) and sigma_next == 0
                order = 1 if ends_at_zero else order
                return dpmpp_weights(sigmas, sigma_next, order, self.data_prediction, self.true_third_order)
        return ipndm_weights(sigmas, sigma_next, 1)


def dynamic_threshold(denoised: torch.Tensor, quantile: float) -> torch.Tensor:
    """Clip each sample at a quantile of its absolute values, at least at 1, and divide by it."""
    sizes = denoised.abs().flatten(1).to(torch.promote_types(denoised.dtype, torch.float32))
    limit = torch.quantile(sizes, quantile, dim=1).clamp_min(1).to(denoised.dtype)
    limit = limit.reshape(-1, *[1] * (denoised.ndim - 1))
    return denoised.clamp(-limit, limit) / limit


def like(value: Sigma, x: torch.Tensor) -> Sigma:
    """A coefficient in the dtype of `x`; numbers stay as they are."""
    return value.to(x.dtype) if isinstance(value, torch.Tensor) else value
