"""Hooks that leave no trace: a model is the same object with the same attributes after a hook is detached."""

import torch
from diffusers.hooks import HookRegistry, ModelHook


def attach_hook(model: torch.nn.Module, hook: ModelHook, name: str) -> None:
    """Register `hook` on `model`, replacing one of the same name."""
    detach_hook(model, name)
    HookRegistry.check_if_exists_or_initialize(model).register_hook(hook, name)


def detach_hook(model: torch.nn.Module, name: str) -> bool:
    """Remove the hook; True if there was one. With the last hook goes everything that diffusers' registry left on the model."""
    registry = getattr(model, "_diffusers_hook", None)
    if registry is None or registry.get_hook(name) is None:
        return False
    registry.remove_hook(name, recurse=False)
    if not registry.hooks:
        del model._diffusers_hook
        if getattr(model.__dict__.get("forward"), "__func__", None) is type(model).forward:
            del model.forward  # the registry restores the bound method as an instance attribute
    return True
