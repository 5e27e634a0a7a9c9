"""What [`GDDIMScheduler`] decides before a run: the times it visits, what each evaluation of the network is for, and how its
output becomes eps.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import NamedTuple

import torch

from ..numerics.exponential_integrator import StepCoefficients
from ..numerics.linear_sde import LinearProcess
from ..numerics.time_grids import hybrid_grid, power_grid

CORRECTORS = (None, "pec", "pece")
SPACINGS = ("linspace", "leading", "trailing")
GRIDS = {"power": power_grid, "hybrid": hybrid_grid}


class Evaluation(NamedTuple):
    """What one output of the network is used for, in this order. Step i goes from point i of the grid to point i + 1."""

    point: int
    """Where on the grid the network is evaluated."""
    correct: int | None = None
    """A step that is taken again, now that eps at its end is known."""
    advance: int | None = None
    """The step that is taken; one behind the last of the grid is the end of the run, the denoising step if there is one."""


def plan_evaluations(count: int, corrector: str | None, has_end: bool) -> list[Evaluation]:
    """`count` evaluations in order.

    Args:
        count: of evaluations, at least 1.
        corrector: None; "pec" uses the evaluation at the predicted point for the correction and for the next step; "pece"
            evaluates the network again at the corrected point.
        has_end: whether the last point of the grid is evaluated for its own sake, and not only to correct the last step.
    """
    if corrector != "pece":
        return [Evaluation(k, k - 1 if corrector and k else None, k) for k in range(count)]
    last = count // 2 if has_end else (count + 1) // 2
    plan = [Evaluation(0, None, 0)]
    for k in range(1, last + 1):
        plan += [Evaluation(k, k - 1, None), Evaluation(k, None, k)]
    if has_end and count == 2 * last:  # one evaluation is left for the last point
        plan[-2:] = [Evaluation(last, last - 1, last)]
    return plan[:count]


def time_grid(kind: str, start: float, end: float, num_steps: int, parameters: dict[str, float]) -> torch.Tensor:
    """`num_steps + 1` decreasing times, see `numerics.time_grids`; a single time for no step."""
    if num_steps == 0:
        return torch.tensor([start], dtype=torch.float64)
    if num_steps == 1:  # both grids are their ends, but "hybrid" has no room for two parts
        kind, parameters = "power", {}
    try:
        return GRIDS[kind](start, end, num_steps, **parameters)
    except TypeError as error:
        raise ValueError(f"`time_grid_parameters` {parameters} do not fit `time_grid={kind!r}`: {error}.") from None


def ddim_timesteps(spacing: str, count: int, num_train_timesteps: int, offset: int) -> torch.Tensor:
    """Integer timesteps from noise to data as `DDIMScheduler` spaces them, (count,)."""
    if not 1 <= count <= num_train_timesteps:
        raise ValueError(f"`num_inference_steps` must be between 1 and {num_train_timesteps}, got {count}.")
    match spacing:
        case "linspace":
            return torch.linspace(0, num_train_timesteps - 1, count, dtype=torch.float64).round().long().flip(0)
        case "leading":
            return (torch.arange(count) * (num_train_timesteps // count)).flip(0) + offset
        case "trailing":
            ends = num_train_timesteps - torch.arange(count, dtype=torch.float64) * num_train_timesteps / count
            return ends.round().long() - 1
    raise ValueError(f"`timestep_spacing` must be one of {SPACINGS}, got {spacing!r}.")


class OutputConversion(NamedTuple):
    """`eps = output_gain @ output + state_gain @ state`, matrices for each of N evaluations, (N, k, k)."""

    output_gain: torch.Tensor
    state_gain: torch.Tensor


def output_conversion(
    process: LinearProcess,
    times: Sequence[float] | torch.Tensor,
    prediction_type: str,
    parametrization: str,
    network_parametrization: str,
    mixed_score: bool,
) -> OutputConversion | None:
    """How outputs of the network become eps of the sampler; None if they are it.

    Args:
        times: of the evaluations, (N,).
        prediction_type: "epsilon"; on variance-preserving processes also "v_prediction" and "sample".
        parametrization: K of the sampler, "R" or "L", with `score = -K^-T eps`.
        network_parametrization: K of the network.
        mixed_score: the network leaves `K^-1 (0, v)` out of its eps.
    """
    times = torch.as_tensor(times, dtype=torch.float64)
    if prediction_type != "epsilon":
        return _from_data_prediction(process, times, prediction_type)
    if process.block == 1 or (parametrization == network_parametrization and not mixed_score):
        return None
    inside, outside = process.noise_factor(times, network_parametrization), process.noise_factor(times, parametrization)
    gain = torch.linalg.solve(inside, outside).mT  # outside^T inside^-T
    velocity = torch.diag(torch.tensor([0.0, float(mixed_score)], dtype=torch.float64))
    return OutputConversion(gain, gain @ torch.linalg.inv(inside) @ velocity)


def _from_data_prediction(process: LinearProcess, times: torch.Tensor, prediction_type: str) -> OutputConversion:
    """`eps = alpha v + sigma x` and `eps = (x - alpha x_0) / sigma`."""
    alpha, sigma = process.signal(times), process.factor(times)
    if prediction_type == "v_prediction":
        return OutputConversion(alpha, sigma)
    return OutputConversion(-alpha / sigma, 1 / sigma)


def move(coefficients: StepCoefficients, device: str | torch.device | None) -> StepCoefficients:
    """Tensors of a run to a device; float64 where it has that."""
    dtype = torch.float32 if torch.device(device or "cpu").type == "mps" else torch.float64
    tensors = {field.name: getattr(coefficients, field.name) for field in fields(coefficients) if field.name != "times"}
    return replace(coefficients, **{name: x if x is None else x.to(device, dtype) for name, x in tensors.items()})
