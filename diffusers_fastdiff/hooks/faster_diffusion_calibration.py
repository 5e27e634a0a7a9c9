"""Measured key steps for Faster Diffusion: where they cost least, from a few runs of the model itself.

One plain run shows how fast the encoder's features change; a few more, in each of which features are propagated over another
part of the run, show how much that moves the result. Dynamic programming proposes key steps, see `numerics.propagation`. It
adds up errors of single steps, which is not the whole truth, so its proposals (for different longest gaps, with and without the
influence) and evenly spaced steps are tried, and the best one wins.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..numerics.propagation import cheapest_key_steps, hold_errors
from .faster_diffusion import PROPAGATIONS, FasterDiffusionConfig, apply_faster_diffusion, remove_faster_diffusion
from .key_steps import KeySchedule

MAX_PLACES = 2**16
"""Entries of each stored tensor that are looked at."""
GAPS = (1.25, 1.5, 2.0, 3.0)
"""Longest gaps of the proposals, in average gaps."""


class KeyStepCalibration:
    """Measurements of a sampler, made when this is constructed: `num_probes + 2` runs. An earlier `apply_faster_diffusion` is
    undone.

    Args:
        pipe_or_model: as in [`apply_faster_diffusion`].
        sample: runs the pipeline (or your loop) once, for a few samples, and returns its result (latents are best), (B, ...);
            the same at every call, so it has to seed its generators itself.
        encoder_share: as in [`FasterDiffusionConfig`].
        num_probes: runs for the influence of errors, one for each part of the run.
        scheduler: only with a bare model.

    Raises:
        ValueError: if `sample` is not reproducible or does not use the model, or `num_probes` is not positive.
    """

    def __init__(
        self,
        pipe_or_model: Any,
        sample: Callable[[], torch.Tensor],
        *,
        encoder_share: float | None = None,
        num_probes: int = 10,
        scheduler: Any = None,
    ):
        if num_probes < 1:
            raise ValueError(f"`num_probes` must be at least 1, got {num_probes}.")
        self._target, self._sample, self._scheduler = pipe_or_model, sample, scheduler
        self._encoder_share = encoder_share
        features = self._plain_run()
        self.gram = features @ features.T
        """Inner products of the encoder features of all steps, (T, T) float64."""
        self.influence = measure_influence(self.deviation, hold_errors(self.gram), num_probes)
        """How far a unit of relative feature error at each step moves the result, (T,) float64."""

    @property
    def num_steps(self) -> int:
        """Steps of the run, T."""
        return len(self.gram)

    def deviation(self, key_steps: list[int], propagation: str = "hold") -> float:
        """Relative distance of the result from the plain one: one run."""
        try:
            self._apply(key_steps=key_steps, propagation=propagation)
            return float((_as_tensor(self._sample()) - self._plain).norm() / self._plain.norm())
        finally:
            remove_faster_diffusion(self._target)

    def key_schedule(self, num_key_steps: int, propagation: str = "hold") -> KeySchedule:
        """The best key steps, from up to 9 runs.

        Args:
            num_key_steps: steps with the encoder, 1 to T.
            propagation: the one they will be used with.

        Raises:
            ValueError: if an argument is out of range.
        """
        if propagation not in PROPAGATIONS:
            raise ValueError(f"`propagation` must be one of {list(PROPAGATIONS)}, got {propagation!r}.")
        if not 1 <= num_key_steps <= self.num_steps:
            raise ValueError(f"`num_key_steps` must be 1 to {self.num_steps}, the steps of the run; got {num_key_steps}.")
        proposals = sorted(self._proposals(num_key_steps, propagation != "hold"))
        best = min(proposals, key=lambda steps: _finite(self.deviation(list(steps), propagation)))
        return KeySchedule(self.num_steps, best)

    def _proposals(self, num_key_steps: int, is_linear: bool) -> set[tuple[int, ...]]:
        """Different key steps, `num_key_steps` each. Forecasts of second order are searched for as linear ones."""
        proposals = {tuple(step * self.num_steps // num_key_steps for step in range(num_key_steps))}
        for gap in GAPS:
            max_gap = math.ceil(gap * self.num_steps / num_key_steps)
            for influence in (self.influence, torch.ones_like(self.influence)):
                proposals.add(tuple(cheapest_key_steps(self.gram, influence, num_key_steps, is_linear, max_gap)))
        return proposals

    def _apply(self, **options: Any) -> Any:
        config = FasterDiffusionConfig(**options, encoder_share=self._encoder_share)
        return apply_faster_diffusion(self._target, config, scheduler=self._scheduler)

    def _plain_run(self) -> torch.Tensor:
        """Features of every step, (T, places) float64."""
        features: list[torch.Tensor] = []
        try:
            hook = self._apply(every=1)
            hook.observer = lambda tensors: features.append(_sketch(tensors))
            self._plain = _as_tensor(self._sample())
        finally:
            remove_faster_diffusion(self._target)
        if not features:
            raise ValueError("`sample` did not call the model of `pipe_or_model`.")
        if not torch.equal(_as_tensor(self._sample()), self._plain):
            raise ValueError("`sample` must return the same at every call: make a generator with a fixed seed inside it.")
        return torch.stack(features)


def calibrate_key_steps(
    pipe_or_model: Any,
    sample: Callable[[], torch.Tensor],
    num_key_steps: int,
    *,
    propagation: str = "hold",
    **options: Any,
) -> KeySchedule:
    """Find the key steps for a sampler of your choice; save them with `KeySchedule.save`.

        sample = lambda: pipe(labels, generator=torch.Generator().manual_seed(0), output_type="np").images
        schedule = calibrate_key_steps(pipe, sample, 14, propagation="taylor")
        apply_faster_diffusion(pipe, FasterDiffusionConfig(key_steps=schedule, propagation="taylor"))

    Args:
        pipe_or_model, sample: and `options`, see [`KeyStepCalibration`], which serves several numbers of key steps.
        num_key_steps, propagation: see `KeyStepCalibration.key_schedule`.
    """
    return KeyStepCalibration(pipe_or_model, sample, **options).key_schedule(num_key_steps, propagation)


def measure_influence(deviation: Callable[[list[int]], float], errors: torch.Tensor, num_probes: int) -> torch.Tensor:
    """How far a unit of relative feature error at each step moves the result, (T,).

    Args:
        deviation: of the result, given key steps.
        errors: of held features, squared, (T, T), see `hold_errors`.
        num_probes: parts of the run that are measured; between their middles the logarithm is interpolated.
    """
    count = len(errors)
    num_probes = max(1, min(num_probes, count // 2))  # a part of one step has nothing to propagate
    ends = [round(probe * count / num_probes) for probe in range(num_probes + 1)]
    middles, values = [], []
    for begin, end in itertools.pairwise(ends):
        moved = _finite(deviation([step for step in range(count) if not begin < step < end]))
        middles.append((begin + end) / 2)
        values.append(math.log(max(moved, 1e-12) / float(errors[begin, begin + 1 : end].sqrt().sum().clamp_min(1e-12))))
    return torch.from_numpy(np.exp(np.interp(np.arange(count), middles, values)))


def _sketch(tensors: list[torch.Tensor]) -> torch.Tensor:
    """What is kept of a step: evenly spaced entries of all stored tensors, each tensor with the weight of its full size."""
    parts = []
    for tensor in tensors:
        stride = max(1, tensor.numel() // MAX_PLACES) | 1  # odd, so that it does not stay in one channel
        parts.append(tensor.flatten()[::stride].double().cpu() * math.sqrt(stride))
    return torch.cat(parts)


def _as_tensor(result: Any) -> torch.Tensor:
    return torch.as_tensor(result).double().cpu()


def _finite(value: float) -> float:
    """A run that diverged is as bad as any."""
    return value if math.isfinite(value) else 1e30
