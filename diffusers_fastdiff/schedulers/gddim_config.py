"""Which configurations of [`GDDIMScheduler`] make sense, and the process that one describes."""

from typing import Any

from ..numerics.linear_sde import LinearProcess, check_parametrization
from ..numerics.processes import make_process
from .gddim_run import CORRECTORS, GRIDS, SPACINGS

PROCESSES = {"vp": "vp_discrete", "cld": "cld", "blur": "blur"}
SAMPLERS = {
    "vp": ("gddim",),
    "cld": ("gddim", "euler_maruyama", "sscs"),
    "blur": ("gddim", "euler_maruyama"),
}


def make_forward_process(config: Any) -> LinearProcess:
    """The process of a config.

    Raises:
        ValueError: if it has no such parameter, or not of that size.
    """
    parameters = dict(config.process_parameters or {})
    try:
        return make_process(PROCESSES[config.process], **parameters)
    except TypeError as error:
        raise ValueError(f"`process_parameters` {parameters} do not fit `process={config.process!r}`: {error}.") from None


def check_config(config: Any) -> None:
    """Raise ValueError, naming argument, value and remedy, for what cannot work."""
    process = config.process
    if process not in PROCESSES:
        raise ValueError(f"`process` must be one of {tuple(PROCESSES)}, got {process!r}.")
    is_vp = process == "vp"
    choices = {
        "prediction_type": ("epsilon", "v_prediction", "sample") if is_vp else ("epsilon",),
        "timestep_spacing": SPACINGS,
        "corrector": CORRECTORS,
        "sampler": SAMPLERS[process],
        "time_grid": (None, *GRIDS),
        "denoise": (None,) if is_vp else (None, True, False),
        "mixed_score": (True, False) if process == "cld" else (False,),
    }
    for name, allowed in choices.items():
        if config[name] not in allowed:
            raise ValueError(f"`{name}` must be one of {allowed} when `process` is {process!r}, got {config[name]!r}.")
    if config.order not in range(4):
        raise ValueError(f"`order` must be 0, 1, 2 or 3, the number of older eps that are kept, got {config.order!r}.")
    check_parametrization(config.parametrization)
    check_parametrization(config.network_parametrization)
    _check_sampler(config)


def _check_sampler(config: Any) -> None:
    stochasticity = config.stochasticity
    if not 0 <= stochasticity < float("inf"):
        raise ValueError(f"`stochasticity` (lambda) must be at least 0, got {stochasticity}.")
    if config.sampler == "sscs" and stochasticity != 1:
        raise ValueError(f"`stochasticity` must be 1 for `sampler='sscs'`, the reverse SDE, got {stochasticity}.")
    if stochasticity == 0 and config.sampler == "gddim":
        return
    for name, plain in (("corrector", None), ("parametrization", "R")):
        if config[name] != plain:
            raise ValueError(
                f"`{name}` must be {plain!r} for `sampler={config.sampler!r}` with `stochasticity={stochasticity}`, got "
                f"{config[name]!r}: only the deterministic gDDIM sampler has it."
            )
