"""What a denoising network predicts, and how one prediction is turned into another.

With `x_t = alpha * x_0 + sigma * noise` every prediction is a linear combination of `x_0` and `noise`:

| prediction_type | output | source |
|---|---|---|
| "epsilon" | `noise` | Ho et al. 2020 |
| "sample" | `x_0` | |
| "v_prediction" | `alpha * noise - sigma * x_0`, for `alpha^2 + sigma^2 = 1` | Salimans and Ho 2022, eq. (10) |
| "flow_prediction" | `noise - x_0`, for `alpha + sigma = 1` | Liu et al. 2022 (rectified flow, the sign of diffusers) |

All functions work on tensors of any shape; `alpha` and `sigma` are numbers or tensors that broadcast against the sample.
"""

from typing import TypeAlias

import torch

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")

Scalar: TypeAlias = float | torch.Tensor


def prediction_target(
    clean: torch.Tensor, noise: torch.Tensor, alpha: Scalar, sigma: Scalar, prediction_type: str
) -> torch.Tensor:
    """What the network should have said: the training target."""
    match prediction_type:
        case "epsilon":
            return noise
        case "sample":
            return clean
        case "v_prediction":
            return alpha * noise - sigma * clean
        case "flow_prediction":
            return noise - clean
    raise _unknown(prediction_type)


def to_denoised(output: torch.Tensor, noisy: torch.Tensor, alpha: Scalar, sigma: Scalar, prediction_type: str) -> torch.Tensor:
    """Network output -> `x_0`. An "epsilon" output says nothing about `x_0` at `alpha = 0`."""
    match prediction_type:
        case "epsilon":
            return (noisy - sigma * output) / alpha
        case "sample":
            return output
        case "v_prediction":
            return alpha * noisy - sigma * output
        case "flow_prediction":
            return noisy - sigma * output
    raise _unknown(prediction_type)


def to_epsilon(output: torch.Tensor, noisy: torch.Tensor, alpha: Scalar, sigma: Scalar, prediction_type: str) -> torch.Tensor:
    """Network output -> `noise`. A "sample" output says nothing about the noise at `sigma = 0`."""
    match prediction_type:
        case "epsilon":
            return output
        case "sample":
            return (noisy - alpha * output) / sigma
        case "v_prediction":
            return alpha * output + sigma * noisy
        case "flow_prediction":
            return noisy + alpha * output
    raise _unknown(prediction_type)


def _unknown(prediction_type: str) -> ValueError:
    return ValueError(f"`prediction_type` must be one of {PREDICTION_TYPES}, got {prediction_type!r}.")
