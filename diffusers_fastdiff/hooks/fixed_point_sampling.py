"""Iteration budgets and solution reuse for `FixedPointDiTTransformer2DModel` in any pipeline.

Source: arXiv 2401.08741, section 3.4. The hook owns all state that outlives a model call. Differences from the published
program: the controller is asked once per model call, so a run spends what its table says; a budget with fewer iterations
than steps is refused; a stored solution belongs to one run and cannot leak into the next.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import ModelHook

from ..models.transformer_fixed_point_dit import FixedPointDiTTransformer2DModel
from ..numerics.fixed_point import ALLOCATIONS, FixedPointSolver, allocate_iterations
from .attachment import attach_hook, detach_hook
from .sampling_run import SamplingRun, SamplingStep

_HOOK_NAME = "fixed_point_sampling"


@dataclass(frozen=True)
class FixedPointSamplingConfig:
    """How many fixed-point iterations each sampling step gets, and where they start.

    Give at most one of `num_iterations` and `budget`; with neither, every step gets the default of the model.
    """

    num_iterations: int | tuple[int, ...] | Callable[[float], int] | None = None
    """Iterations of every step, or a list with one entry for each step (noise first), or a function of the timestep."""
    budget: int | None = None
    """Iterations of the whole run, spread by `allocation`; at least the number of steps."""
    allocation: str = "constant"
    """"constant", "increasing" (most iterations at the noisiest step) or "decreasing"."""
    allocation_ratio: tuple[float, float] = (0.5, 1.5)
    """Weights of the cheapest and the dearest step."""
    reuse_solution: bool = False
    """Start each step from the solution of the step before, instead of from the pre blocks."""
    solver: FixedPointSolver = field(default_factory=FixedPointSolver)
    """Stopping by tolerance and Anderson acceleration."""

    def __post_init__(self):
        if self.num_iterations is not None and self.budget is not None:
            raise ValueError("Give either `num_iterations` or `budget`, not both.")
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"`budget` must be at least 1, got {self.budget}.")
        if self.allocation not in ALLOCATIONS:
            raise ValueError(f"`allocation` must be one of {ALLOCATIONS}, got {self.allocation!r}.")
        if isinstance(self.num_iterations, list):
            object.__setattr__(self, "num_iterations", tuple(self.num_iterations))
        counts = self.num_iterations if isinstance(self.num_iterations, tuple) else (self.num_iterations,)
        for count in counts:
            if isinstance(count, int) and count < 1:
                raise ValueError(f"`num_iterations` must be at least 1 in every step, got {self.num_iterations}.")

    def iterations(self, step: SamplingStep, timestep: torch.Tensor) -> int | None:
        """Iterations of one step; None for the default of the model."""
        if self.budget is not None:
            return allocate_iterations(self.budget, step.num_steps, self.allocation, self.allocation_ratio)[step.index]
        if isinstance(self.num_iterations, tuple):
            if len(self.num_iterations) != step.num_steps:
                raise ValueError(f"`num_iterations` lists {len(self.num_iterations)} steps, but the run has {step.num_steps}.")
            return self.num_iterations[step.index]
        if callable(self.num_iterations):
            count = self.num_iterations(float(torch.as_tensor(timestep).flatten()[0]))
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"The function given as `num_iterations` must return an integer >= 1, got {count!r}.")
            return count
        return self.num_iterations


class FixedPointSamplingHook(ModelHook):
    """Chooses iterations and start of every model call in a run. Does nothing to a model in training mode."""

    _is_stateful = True

    def __init__(self, config: FixedPointSamplingConfig, run: SamplingRun):
        super().__init__()
        self.config = config
        self.run = run
        self.iterations_spent: list[torch.Tensor] = []
        """Iterations of each step of the current or last run, (B,) each."""
        self._solution: torch.Tensor | None = None

    def new_forward(self, module: FixedPointDiTTransformer2DModel, *args, **kwargs):
        if module.training:
            return self.fn_ref.original_forward(*args, **kwargs)
        hidden_states = kwargs.get("hidden_states", args[0] if args else None)
        timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        return_dict = kwargs.pop("return_dict", True)
        step = self.run.advance()
        if step.is_first:
            self._solution, self.iterations_spent = None, []
        if self.config.reuse_solution:
            _check_shared_timestep(timestep)
        initial = self._solution
        if initial is not None and initial.shape[0] != hidden_states.shape[0]:
            raise ValueError(
                f"The batch size changed from {initial.shape[0]} to {hidden_states.shape[0]} in the middle of a run; a reused "
                "solution cannot follow. Switch `reuse_solution` off."
            )
        output = self.fn_ref.original_forward(
            *args,
            **kwargs,
            num_iterations=self.config.iterations(step, timestep),
            initial_solution=initial,
            solver=None if self.config.solver == FixedPointSolver() else self.config.solver,
        )
        self._solution = output.solution if self.config.reuse_solution else None
        self.iterations_spent.append(output.num_iterations)
        return output if return_dict else output.to_tuple()

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        """Called by diffusers at the end of a pipeline call."""
        self._solution = None
        self.run.reset()
        return module


def apply_fixed_point_sampling(pipe: Any, config: FixedPointSamplingConfig, *, scheduler: Any = None) -> FixedPointSamplingHook:
    """Let `config` rule the fixed-point iterations of a pipeline's transformer, replacing an earlier config.

    Args:
        pipe: a pipeline with a `transformer` and a `scheduler`, or a [`FixedPointDiTTransformer2DModel`] for loops of your
            own; then `scheduler` must be the scheduler of that loop.
        config: see [`FixedPointSamplingConfig`].
        scheduler: only with a bare model.

    Returns:
        The hook; its `iterations_spent` tells what each step of the last run cost.

    Raises:
        TypeError: if there is no fixed-point transformer to control.
    """
    model = getattr(pipe, "transformer", pipe)
    if not isinstance(model, FixedPointDiTTransformer2DModel):
        raise TypeError(f"`pipe` must be a FixedPointDiTTransformer2DModel or a pipeline with one, got {type(model).__name__}.")
    if model is pipe and scheduler is None:
        raise TypeError("`scheduler` is needed with a bare model: it tells where a sampling run begins.")
    hook = FixedPointSamplingHook(config, SamplingRun(scheduler if model is pipe else pipe))
    attach_hook(model, hook, _HOOK_NAME)
    return hook


def remove_fixed_point_sampling(pipe: Any) -> None:
    """Undo `apply_fixed_point_sampling`; does nothing where it was not applied."""
    detach_hook(getattr(pipe, "transformer", pipe), _HOOK_NAME)


def _check_shared_timestep(timestep: torch.Tensor) -> None:
    if not torch.is_tensor(timestep) or timestep.ndim == 0 or timestep.numel() == 1 or timestep.stride(0) == 0:
        return  # an expanded number is equal by construction, which spares accelerators a read
    if bool((timestep != timestep[0]).any()):
        raise ValueError(
            "`reuse_solution` needs one timestep for the whole batch, because solutions of different timesteps differ; got "
            f"{timestep.tolist()}. Switch `reuse_solution` off."
        )
