"""Hooks of diffusers below those of accelerate.

CPU offloading wraps `forward` as hooks do, and `enable_model_cpu_offload` unwraps and wraps it again after every pipeline
call. A hook attached on top would be lost with the first of them, and one removed from below would leave offloading with an
old `forward`. So hooks go between the model and its offloading, whichever came first.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def beneath_offloading(module: torch.nn.Module) -> Iterator[None]:
    """Show the module without its offloading for as long as the context is open."""
    if "_old_forward" not in vars(module):
        yield
        return
    offloading = module.forward
    module.forward = module._old_forward
    try:
        yield
    finally:
        module._old_forward = module.forward
        module.forward = offloading
