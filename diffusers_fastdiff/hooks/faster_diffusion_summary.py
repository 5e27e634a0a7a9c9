"""What Faster Diffusion does to a model and what that is expected to save, from counted operations: nothing is computed."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from .attachment import beneath_offloading
from .encoder_features import map_tensors

if TYPE_CHECKING:
    from .faster_diffusion import FasterDiffusionHook


@dataclass(frozen=True)
class FasterDiffusionSummary:
    """Print it, or read its fields."""

    model: str
    """Class of the denoiser."""
    encoder_modules: tuple[str, ...]
    """Modules that compute at key steps only."""
    has_controlnet: bool
    """Whether a ControlNet does, too."""
    num_steps: int
    """Model calls of a run."""
    key_steps: tuple[int, ...]
    """Those with the encoder."""
    operations: int
    """Floating-point operations of one plain model call."""
    encoder_share: float
    """Share of them in the encoder."""
    feature_bytes: int
    """Memory of the stored features: all that is kept beyond what the pipeline keeps itself."""
    most_steps_decoded: int
    """Largest number of steps in one call; the decoder's activations and a copy of the features grow by that factor."""

    @property
    def compute_share(self) -> float:
        """Expected share of the plain run's operations."""
        keys = len(self.key_steps) / self.num_steps
        return keys + (1 - keys) * (1 - self.encoder_share)

    def __str__(self) -> str:
        first, last = self.encoder_modules[0], self.encoder_modules[-1]
        where = first if first == last else f"{first} ... {last} ({len(self.encoder_modules)} modules)"
        controlnet = " and its ControlNet (at key steps, its operations are not counted)" if self.has_controlnet else ""
        lines = [
            f"Faster Diffusion on {self.model}{controlnet}",
            f"  encoder: {where}, {self.encoder_share:.1%} of {self.operations / 1e9:.4g} GFLOP for a call",
            f"  key steps: {len(self.key_steps)} of {self.num_steps}: {_ranges(self.key_steps)}",
            f"  expected compute: {self.compute_share:.1%} of the plain run ({1 / self.compute_share:.2f}x)",
            f"  stored features: {self.feature_bytes / 2**20:.4g} MiB; at most {self.most_steps_decoded} steps decoded at once",
        ]
        return "\n".join(lines)


def summarize(hook: "FasterDiffusionHook", num_steps: int | None, inputs: dict[str, Any] | None) -> FasterDiffusionSummary:
    """See `FasterDiffusionHook.summary`."""
    arguments = hook.example if inputs is None else inputs
    if arguments is None or (num_steps is None and not hook.run.num_steps):
        raise ValueError("There was no run yet: give `num_steps`, and as `inputs` the arguments of a model call.")
    keys = hook.run.keys if num_steps is None else hook.config.key_steps_of(num_steps)
    num_steps = hook.run.num_steps if num_steps is None else num_steps
    names = {module: name for name, module in hook.model.named_modules()}
    encoder = tuple(names[module] for module in hook.cut.encoder_modules)
    operations, encoder_operations, feature_bytes = count_operations(hook, arguments, encoder)
    gaps = [end - start for start, end in zip(keys, (*keys[1:], num_steps), strict=True)]
    most_rows = hook.config.max_batch or max(gaps) * _num_rows(arguments)
    most_decoded = max(1, min(max(gaps), most_rows // _num_rows(arguments))) if hook.config.batched else 1
    return FasterDiffusionSummary(
        model=type(hook.model).__name__,
        encoder_modules=encoder,
        has_controlnet=hook.controlnet is not None,
        num_steps=num_steps,
        key_steps=keys,
        operations=operations,
        encoder_share=encoder_operations / operations,
        feature_bytes=feature_bytes,
        most_steps_decoded=most_decoded,
    )


@torch.no_grad()
def count_operations(hook: "FasterDiffusionHook", inputs: dict[str, Any], encoder: tuple[str, ...]) -> tuple[int, int, int]:
    """Operations of a plain call, those of the modules `encoder` in it, and bytes of the features it would store.

    The model is called with weights and inputs that have shapes but no data.
    """
    model, features = hook.model, hook.features
    arguments = map_tensors(_without_data, {name: value for name, value in inputs.items() if name != "return_dict"})
    weights = map_tensors(_without_data, dict(model.named_parameters()) | dict(model.named_buffers()))
    hook.is_transparent = True
    counter = FlopCounterMode(display=False)
    try:
        features.begin_recording(_num_rows(arguments), 1)
        with counter, beneath_offloading(model), torch.compiler.set_stance("force_eager"):
            functional_call(model, weights, kwargs=arguments)
        feature_bytes = features.current_nbytes()
    finally:
        hook.is_transparent = False
        features.end()
    counts = {name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()}
    root = type(model).__name__
    return counter.get_total_flops(), sum(counts.get(f"{root}.{name}", 0) for name in encoder), feature_bytes


def _without_data(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="meta")


def _num_rows(arguments: dict[str, Any]) -> int:
    return next(value for value in arguments.values() if torch.is_tensor(value)).shape[0]


def _ranges(steps: tuple[int, ...]) -> str:
    """0, 6-9, 16-19"""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][-1] + 1:
            runs[-1].append(step)
        else:
            runs.append([step])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
