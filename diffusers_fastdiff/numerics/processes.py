"""The processes by name."""

from .blur import BlurProcess
from .linear_sde import LinearProcess
from .phase_space import CLDProcess
from .variance_preserving import LogNoiseVPProcess, VPProcess

PROCESSES: dict[str, type[LinearProcess]] = {
    "vp": VPProcess,
    "vp_discrete": LogNoiseVPProcess,
    "cld": CLDProcess,
    "blur": BlurProcess,
}


def make_process(name: str, **parameters: float) -> LinearProcess:
    """A process by name, with the parameters of its class."""
    if name not in PROCESSES:
        raise ValueError(f"`process` must be one of {tuple(PROCESSES)}, got {name!r}.")
    return PROCESSES[name](**parameters)
