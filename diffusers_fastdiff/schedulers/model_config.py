"""From the config of a scheduler to the model it drives and the grid it visits.

Config entries have the names of diffusers, so that `from_config` of its schedulers works.
"""

from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from ..numerics.gaussian_diffusion import rescale_zero_terminal_snr
from ..numerics.noise_levels import (
    DiscreteNoiseLevels,
    NoiseModel,
    PreconditionedModel,
    RectifiedFlowModel,
    VariancePreservingModel,
)
from ..numerics.parametrization import PREDICTION_TYPES
from ..numerics.preconditioning import Preconditioning
from ..numerics.sigma_grids import check_grid, make_grid

# DPMSolverSDEScheduler raises without torchsde, which would make `scheduler.compatibles` unusable; EDMEulerScheduler is for
# other models.
_NOT_COMPATIBLE = ("DPMSolverSDEScheduler", "EDMEulerScheduler")
COMPATIBLES = [entry.name for entry in KarrasDiffusionSchedulers if entry.name not in _NOT_COMPATIBLE]
GRID_NAMES = {"karras": "polynomial", "exponential": "logsnr"}
"""What EDM schedulers call `sigma_schedule`, and our names."""
SPACINGS = ("linspace", "leading", "trailing")


# Entries of the configs of our FDM schedulers, and what `Preconditioning` calls them.
_PRECONDITIONING = {
    "multiplier": "momentum",
    "network_sigma_min": "sigma_min",
    "network_sigma_max": "sigma_max",
    "sigma_data": "sigma_data",
    "beta_d": "beta_d",
    "beta_min": "beta_min",
    "epsilon_t": "epsilon_t",
    "num_train_timesteps": "num_timesteps",
    "noise_input_scale": "noise_input_scale",
}


def with_model_family(config: Any) -> Any:
    """Configs of flow-matching and EDM schedulers do not say what the model predicts; their entries do.

    Raises:
        ValueError: for configs whose models need a scheduler of their own.
    """
    if not isinstance(config, dict):
        return config
    if config.get("process", "vp") != "vp":
        raise ValueError(f"`config` is for models of the process {config['process']!r}, which only GDDIMScheduler drives.")
    if "shift" in config and "prediction_type" not in config:  # only flow-matching schedulers have the one without the other
        return {**config, "prediction_type": "flow_prediction", "flow_shift": config["shift"]}
    is_edm = "sigma_data" in config and "_formulation" not in config  # of one of diffusers' EDM schedulers
    if "_formulation" in config or is_edm:
        config = {**config, "sigma_schedule": GRID_NAMES.get(config.get("sigma_schedule"), config.get("sigma_schedule"))}
    if "_formulation" in config:  # of an FDM scheduler
        numbers = {own: config[theirs] for theirs, own in _PRECONDITIONING.items() if theirs in config}
        return {**config, "preconditioning": {"kind": config["_formulation"], **numbers}}
    if is_edm:
        if config.get("prediction_type") != "epsilon":
            raise ValueError(f"`prediction_type` of EDM schedulers must be 'epsilon', got {config.get('prediction_type')!r}.")
        numbers = {name: config[name] for name in ("sigma_data", "sigma_min", "sigma_max") if name in config}
        return {**config, "preconditioning": {"kind": "edm", **numbers}}
    return config


def make_betas(config: Any) -> torch.Tensor:
    """Noise variances of a discrete schedule, float64, (T,)."""
    steps = config.num_train_timesteps
    if config.trained_betas is not None:
        betas = torch.tensor(config.trained_betas, dtype=torch.float64)
    elif config.beta_schedule == "linear":
        betas = torch.linspace(config.beta_start, config.beta_end, steps, dtype=torch.float64)
    elif config.beta_schedule == "scaled_linear":
        betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, steps, dtype=torch.float64) ** 2
    elif config.beta_schedule == "squaredcos_cap_v2":
        time = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        level = ((time + 0.008) / 1.008 * torch.pi / 2).cos() ** 2
        betas = (1 - level[1:] / level[:-1]).clamp_max(0.999)
    else:
        raise ValueError(
            "`beta_schedule` must be 'linear', 'scaled_linear' or 'squaredcos_cap_v2' (or give `trained_betas`), got "
            f"{config.beta_schedule!r}."
        )
    return rescale_zero_terminal_snr(betas) if config.rescale_betas_zero_snr else betas


def make_levels(betas: torch.Tensor) -> DiscreteNoiseLevels:
    """The table of a discrete schedule. At zero terminal SNR the last level is infinite; it becomes very large instead."""
    return DiscreteNoiseLevels((1 - betas).cumprod(0).clamp_min(2.0**-24))


def make_model(config: Any, levels: DiscreteNoiseLevels) -> NoiseModel:
    """The model that a config describes.

    Raises:
        ValueError: for an unknown prediction type or preconditioning.
    """
    if config.preconditioning is not None:
        return PreconditionedModel(Preconditioning(**config.preconditioning))
    if config.prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"`prediction_type` must be one of {PREDICTION_TYPES}, got {config.prediction_type!r}.")
    if config.prediction_type == "flow_prediction":
        return RectifiedFlowModel(config.num_train_timesteps)
    return VariancePreservingModel(levels, config.prediction_type)


def spaced_timesteps(num_steps: int, config: Any) -> torch.Tensor:
    """The `num_steps` timesteps of diffusers' three spacings, descending integers."""
    total = config.num_train_timesteps
    match config.timestep_spacing:
        case "linspace":
            steps = torch.linspace(0, total - 1, num_steps + 1, dtype=torch.float64).round().flip(0)[:-1]
        case "leading":
            steps = torch.arange(num_steps, 0, -1, dtype=torch.float64) * (total // (num_steps + 1)) + config.steps_offset
        case "trailing":
            steps = (total - torch.arange(num_steps, dtype=torch.float64) * (total / num_steps)).round() - 1
        case _:
            raise ValueError(f"`timestep_spacing` must be one of {SPACINGS}, got {config.timestep_spacing!r}.")
    return steps.long()


def shift_flow(sigmas: torch.Tensor, config: Any, mu: float | None) -> torch.Tensor:
    """Resolution-dependent shift of flow times: by `flow_shift`, or with dynamic shifting by `exp(mu)`."""
    if config.use_dynamic_shifting:
        if mu is None:
            raise ValueError("`mu` must be passed to `set_timesteps` when `use_dynamic_shifting` is on.")
        shift = float(torch.tensor(mu, dtype=torch.float64).exp())
    else:
        shift = config.flow_shift
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def make_sigmas(
    num_steps: int,
    config: Any,
    model: NoiseModel,
    levels: DiscreteNoiseLevels,
    final: str,
    mu: float | None = None,
) -> torch.Tensor:
    """A grid with `num_steps` intervals, (num_steps + 1,) float64.

    Args:
        num_steps: intervals.
        config: of the scheduler.
        model, levels: of `make_model` and `make_levels`.
        final: where the grid ends, "zero" or "sigma_min".
        mu: see `shift_flow`.

    Raises:
        ValueError: for options that contradict each other.
    """
    if final not in ("zero", "sigma_min"):
        raise ValueError(f"`final_sigmas_type` must be 'zero' or 'sigma_min', got {final!r}.")
    kind, flow = _grid_kind(config), isinstance(model, RectifiedFlowModel)
    if isinstance(model, PreconditionedModel):  # has no table of timesteps to space
        kind = kind or "polynomial"
    if kind is None:
        if flow:
            times = torch.linspace(1, 1 / config.num_train_timesteps, num_steps, dtype=torch.float64)
            sigmas = shift_flow(times, config, mu)
        else:
            sigmas = levels.sigma(spaced_timesteps(num_steps, config))
        return with_final(sigmas, config, model, final)
    low, high = model.sigma_range
    low = low if config.sigma_min is None else config.sigma_min
    high = high if config.sigma_max is None else config.sigma_max
    table = levels if isinstance(model, VariancePreservingModel) else None
    if final == "sigma_min":
        return make_grid(kind, num_steps + 1, low, high, config.rho, table)
    if num_steps == 1:
        return torch.tensor([high, 0.0], dtype=torch.float64)
    grid = make_grid(kind, num_steps, low, high, config.rho, table)
    return torch.cat([grid, grid.new_zeros(1)])


def _grid_kind(config: Any) -> str | None:
    flags = {"use_karras_sigmas": "polynomial", "use_exponential_sigmas": "logsnr", "use_lu_lambdas": "logsnr"}
    chosen = [name for name in (*flags, "use_beta_sigmas") if getattr(config, name)]
    if len(chosen) + (config.sigma_schedule is not None) > 1:
        raise ValueError(f"Only one grid can be chosen, got `sigma_schedule` {config.sigma_schedule!r} and {chosen}.")
    if chosen == ["use_beta_sigmas"]:
        raise ValueError("`use_beta_sigmas` is not supported; choose a `sigma_schedule` or pass `sigmas` to `set_timesteps`.")
    return flags[chosen[0]] if chosen else config.sigma_schedule


def with_final(sigmas: torch.Tensor, config: Any, model: NoiseModel, final: str) -> torch.Tensor:
    """Append the level at which a run ends: 0 or the smallest one."""
    if final == "zero":
        return torch.cat([sigmas, sigmas.new_zeros(1)])
    last = model.sigma_range[0] if config.sigma_min is None else config.sigma_min
    if float(sigmas[-1]) <= last:
        raise ValueError(
            f"A run that ends at {last:.6g} needs a grid that stays above it, but this one falls to {float(sigmas[-1]):.6g}. "
            "Choose a `sigma_schedule`, another `timestep_spacing`, a smaller `sigma_min` or `final_sigmas_type` 'zero'."
        )
    return torch.cat([sigmas, sigmas.new_tensor([last])])


def custom_grid(
    sigmas: list[float] | None, timesteps: list[float] | None, config: Any, model: NoiseModel, levels: DiscreteNoiseLevels
) -> torch.Tensor:
    """A grid that the caller lists: noise levels (with or without a final 0), or timesteps.

    Raises:
        ValueError: if both are given or a list does not fall strictly.
    """
    if sigmas is not None and timesteps is not None:
        raise ValueError("Give either `sigmas` or `timesteps`, not both.")
    if timesteps is not None:
        times = torch.as_tensor(timesteps, dtype=torch.float64).flatten()
        if isinstance(model, PreconditionedModel):
            given = model.sigma(times)
        else:
            flow = isinstance(model, RectifiedFlowModel)
            given = times / config.num_train_timesteps if flow else levels.sigma(times)
            if len(given) > 1:
                check_grid(times + 1, "timesteps")
    else:
        given = torch.as_tensor(sigmas, dtype=torch.float64).flatten()
    if len(given) < 1:
        raise ValueError("The list of `sigmas` or `timesteps` is empty.")
    if float(given[-1]) != 0:
        given = with_final(given, config, model, "zero")
    return check_grid(given)
