"""Hooks that leave no trace: a model is the same object with the same attributes after a hook is detached.

CPU offloading by accelerate wraps `forward` as hooks of diffusers do, and `enable_model_cpu_offload` unwraps and wraps it again
after every pipeline call. A hook attached on top would be lost with the first of them, and one removed from below would leave
offloading with an old `forward`. So hooks go between the model and its offloading, whichever came first.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.hooks import HookRegistry, ModelHook


def attach_hook(model: torch.nn.Module, hook: ModelHook, name: str) -> None:
    """Register `hook` on `model`, replacing one of the same name."""
    detach_hook(model, name)
    with beneath_offloading(model):
        HookRegistry.check_if_exists_or_initialize(model).register_hook(hook, name)


def detach_hook(model: torch.nn.Module, name: str) -> bool:
    """Remove the hook; True if there was one. With the last hook goes everything that diffusers' registry left on the model."""
    registry = getattr(model, "_diffusers_hook", None)
    if registry is None or registry.get_hook(name) is None:
        return False
    with beneath_offloading(model):
        registry.remove_hook(name, recurse=False)
        if not registry.hooks:
            del model._diffusers_hook
            if getattr(model.__dict__.get("forward"), "__func__", None) is type(model).forward:
                del model.forward  # the registry restores the bound method as an instance attribute
    return True


@contextmanager
def beneath_offloading(module: torch.nn.Module) -> Iterator[None]:
    """Show the module without its offloading for as long as the context is open. Contexts must not be nested."""
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
