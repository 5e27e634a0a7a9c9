"""The processes that share the work."""

import os
from typing import Protocol

import torch

from ..errors import require


class Processes(Protocol):
    """What is used of `accelerate.PartialState`."""

    is_main_process: bool
    process_index: int
    num_processes: int
    device: torch.device

    def wait_for_everyone(self) -> None: ...


def join_processes() -> Processes:
    """The state of this process among those of `accelerate launch` or `torchrun`, on a machine with or without accelerators.

    Raises:
        ValueError: if a launcher has started several processes that do not see each other; each would do all of the work.
    """
    # Without `cpu`, accelerate leaves the processes of `torchrun` on their own where there is no accelerator.
    uses_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") or not torch.accelerator.is_available()
    state = require("accelerate", "eval").PartialState(cpu=uses_cpu)
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes != launched:
        raise ValueError(f"The launcher has started {launched} processes, but accelerate sees {state.num_processes}.")
    return state
