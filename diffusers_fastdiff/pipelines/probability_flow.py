"""The probability flow by an adaptive Runge-Kutta method: the reference, and what gDDIM saves."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..errors import require
from ..numerics.linear_sde import LinearProcess
from ..numerics.reverse_steps import reverse_drift


class FlowEnd(NamedTuple):
    """Where an adaptive run came out, and what it cost."""

    state: torch.Tensor
    num_evaluations: int


def integrate_probability_flow(
    process: LinearProcess,
    predict_eps: Callable[[torch.Tensor, float], torch.Tensor],
    state: torch.Tensor,
    start: float,
    end: float,
    tolerance: float,
    parametrization: str = "R",
) -> FlowEnd:
    """Dormand-Prince of order 5(4) from `start` down to `end`. The step size is that of the whole batch.

    Args:
        process: what is reversed; its data must lie at a finite time.
        predict_eps: `(state, t) -> eps`, both in the coordinates of `LinearProcess.transform`.
        state: (B, kC, ...), in these coordinates, best in float64.
        tolerance: relative and absolute, of each step.
        parametrization: K of eps, "R" or "L".

    Raises:
        ImportError: without `torchdiffeq`.
        ValueError: if `tolerance` is not in (0, 1), or below what the precision of `predict_eps` allows.
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"`ode_tolerance` must be inside (0, 1), got {tolerance}.")
    odeint = require("torchdiffeq", "ode").odeint
    num_evaluations = 0

    def slope(t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        nonlocal num_evaluations
        num_evaluations += 1
        return reverse_drift(process, state, predict_eps(state, t.item()), t.item(), parametrization=parametrization)

    times = torch.tensor([start, end], dtype=state.dtype, device=state.device)
    options = {"step_t": times[-1:]}  # no step beyond the end, where the matrices may not exist
    try:
        states = odeint(slope, state, times, rtol=tolerance, atol=tolerance, method="dopri5", options=options)
    except AssertionError as error:  # how torchdiffeq says that no step is small enough
        raise ValueError(
            f"`ode_tolerance` {tolerance} is out of reach ({error}). Take a larger one, or a network of higher precision."
        ) from None
    return FlowEnd(states[-1], num_evaluations)
