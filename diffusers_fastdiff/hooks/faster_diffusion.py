"""Faster Diffusion: the encoder of a denoiser runs at key steps only, and its features serve the steps between them.

Source: Li et al., "Faster Diffusion: Rethinking the Role of the Encoder for Diffusion Model Inference", arXiv 2312.09608.
Works on every model `encoder_cut` knows, in any pipeline and with any scheduler that calls the model once for each of its
timesteps.
Differences from the published programs, all on purpose:

* the decoder always gets the full conditions of the current step (the published programs mix up labels when they decode several
  steps at once, and drop the text-time and class embeddings of U-Nets), so batched and serial decoding agree;
* noise injection is off unless asked for, and then happens at every step below its threshold, after the sampler's update;
* sampling noise is drawn by the scheduler, once for each step, and guidance may be off.

The parts, each in a file of its own: `key_steps` says when the encoder runs (`faster_diffusion_calibration` measures the best
steps), `encoder_cut` where it ends, `encoder_features` keeps what it hands on, `key_step_run` follows the run, `step_batch`
decodes several steps at once, `key_step_controlnet` does the same for a ControlNet, `noise_injection` is the published option,
`faster_diffusion_summary` counts.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.utils import logging

from .attachment import attach_hook, detach_hook
from .denoiser_tap import DenoiserTap
from .encoder_cut import EncoderCut, encoder_cut
from .encoder_features import EncoderFeatures, map_tensors
from .faster_diffusion_summary import FasterDiffusionSummary, summarize
from .fixed_point_sampling import FixedPointSamplingHook
from .key_step_controlnet import KeyStepControlNetHook
from .key_step_run import KeyStep, KeyStepRun
from .key_steps import KeySchedule, check_key_steps, read_preset, resolve_key_steps
from .noise_injection import NoiseInjection
from .step_batch import StepBatch

logger = logging.get_logger(__name__)

HOOK_NAME = "faster_diffusion"
PROPAGATIONS = {"hold": 1, "linear": 2, "taylor": 3}
"""Ways to get the feature of a step that is not a key step, and the number of key steps each looks back at."""


@dataclass(frozen=True)
class FasterDiffusionConfig:
    """When the encoder runs, and what serves in its place when it does not.

    Give exactly one of `key_steps` and `every`.
    """

    key_steps: Iterable[int] | str | KeySchedule | Callable[[int], Iterable[int]] | None = None
    """Steps at which the encoder runs: a list that contains 0; the name of a published schedule ("dit-250", "sd-50", ... see
    `key_steps.PRESETS`) or a `KeySchedule`, for example a measured one, both scaled to the number of steps; or a function of
    the number of steps."""
    every: int | None = None
    """Run the encoder at every `every`-th step; 1 is the plain pipeline."""
    encoder_share: float | None = None
    """Share of the blocks of a DiT that are its encoder; None for the published 18/28. U-Nets have one fixed place."""
    propagation: str = "hold"
    """"hold" keeps the last feature, as published; "linear" and "taylor" (of second order) forecast it from the last two or
    three key steps."""
    batched: bool = False
    """Decode all steps up to the next key step at once, as the published programs do: more work for a GPU at a time, the same
    result to rounding."""
    max_batch: int | None = None
    """Most rows in such a batch (steps times the batch of the pipeline, guidance counted); None for no limit."""
    noise_injection: float = 0.0
    """Share of the initial latents that is added after each late update (published: 0.003)."""
    noise_injection_below: float = 0.3
    """Late is below this share of the training timesteps (published: 0.3 for DiT, 0.5 for Stable Diffusion)."""

    def __post_init__(self):
        if (self.key_steps is None) == (self.every is None):
            raise ValueError(f"Give exactly one of `key_steps` and `every`, got {self.key_steps!r} and {self.every!r}.")
        for name, value in (("every", self.every), ("max_batch", self.max_batch)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be a whole number from 1, got {value!r}.")
        if self.propagation not in PROPAGATIONS:
            raise ValueError(f"`propagation` must be one of {list(PROPAGATIONS)}, got {self.propagation!r}.")
        if self.max_batch is not None and not self.batched:
            raise ValueError("`max_batch` is the largest batch of batched decoding: set `batched`, or leave it out.")
        if self.encoder_share is not None and not 0 < self.encoder_share < 1:
            raise ValueError(f"`encoder_share` must lie between 0 and 1, got {self.encoder_share}.")
        for name, value in (("noise_injection", self.noise_injection), ("noise_injection_below", self.noise_injection_below)):
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` must lie between 0 and 1, got {value}.")
        if isinstance(self.key_steps, str):
            read_preset(self.key_steps)
        elif self.key_steps is not None and not isinstance(self.key_steps, KeySchedule) and not callable(self.key_steps):
            object.__setattr__(self, "key_steps", check_key_steps(self.key_steps))

    def key_steps_of(self, num_steps: int) -> tuple[int, ...]:
        """Key steps of a run of `num_steps` model calls.

        Raises:
            ValueError: if the key steps do not fit the run.
        """
        return resolve_key_steps(self.key_steps, self.every, num_steps)


class FasterDiffusionHook(ModelHook):
    """Decides at every call of a model whether its encoder runs, and owns what is kept from call to call. Does nothing to a
    model in training mode."""

    _is_stateful = True

    def __init__(self, model: torch.nn.Module, config: FasterDiffusionConfig, cut: EncoderCut, run: KeyStepRun):
        super().__init__()
        self.config, self.cut, self.run = config, cut, run
        self.model = model
        self.controlnet: torch.nn.Module | None = None
        self.controlnet_hook: KeyStepControlNetHook | None = None
        self.injection = NoiseInjection(config.noise_injection, config.noise_injection_below)
        self.features = EncoderFeatures(cut, PROPAGATIONS[config.propagation])
        self.feature_bytes = 0
        """Most memory that stored features have taken."""
        self.steps_computed: list[str] = []
        """What each model call of the current or last run did: "key", "decode", or "buffer" (no compute at all)."""
        self.example: dict[str, Any] | None = None
        """Arguments of the last key step without their data, for `summary`."""
        self.observer: Callable[[list[torch.Tensor]], None] | None = None
        """Called with the stored features after each key step, by the calibration."""
        self.is_transparent = False
        """Let calls through untouched."""
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        if "timestep" not in names:
            raise TypeError(f"`{type(model).__name__}.forward` must have an argument called `timestep`.")
        self._names, self._sample_name = names, names[0]
        self._batch = StepBatch(self._sample_name)
        self._encoder_arguments: dict[str, Any] = {}
        self._fingerprint: tuple = ()

    @torch.compiler.disable(recursive=False)
    def new_forward(self, module: torch.nn.Module, *args, **kwargs):
        if module.training or self.is_transparent:
            return self.fn_ref.original_forward(*args, **kwargs)
        arguments = dict(zip(self._names, args, strict=False)) | kwargs
        step = self.run.advance(arguments["timestep"])
        if step.is_first:
            self._begin_run()
        if self.config.batched:
            self._batch.check(self.run, step, arguments["timestep"])
        sample = arguments[self._sample_name]
        fingerprint = (tuple(sample.shape), sample.dtype, sample.device)
        try:
            if step.is_key or fingerprint != self._fingerprint:
                output = self._key_step(step, arguments)
            else:
                output = self._other_step(step, arguments)
        except BaseException:
            self.run.reset()
            self._clear()
            raise
        finally:
            self.features.end()
        self._fingerprint = fingerprint
        if step.is_last:
            self._clear()
        return output

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        """Called by diffusers at the end of a pipeline call."""
        self._clear()
        self.run.reset()
        return module

    def summary(self, num_steps: int | None = None, inputs: dict[str, Any] | None = None) -> FasterDiffusionSummary:
        """What is hooked, how many steps are key steps, and the expected share of compute and memory.

        Args:
            num_steps: steps of a run; None for the last one.
            inputs: arguments of the model (meta tensors will do); None for those of the last run.

        Raises:
            ValueError: if there was no run yet, and nothing was given in its place.
        """
        return summarize(self, num_steps, inputs)

    def attach(self, controlnet: torch.nn.Module | None, source: Any) -> None:
        """Hook everything."""
        attach_hook(self.model, self, HOOK_NAME)
        self.features.attach(HOOK_NAME)
        if controlnet is not None:
            self.controlnet_hook = KeyStepControlNetHook(KeyStepRun(source, self.config.key_steps_of))
            self.controlnet = controlnet
            attach_hook(controlnet, self.controlnet_hook, HOOK_NAME)

    def detach(self) -> None:
        """Undo `attach`, leaving no trace."""
        self._clear()
        self.injection.detach()
        self.features.detach(HOOK_NAME)
        for module in (self.model, self.controlnet):
            if module is not None:
                detach_hook(module, HOOK_NAME)

    def _begin_run(self) -> None:
        self._clear()
        self.steps_computed = []
        others = self.model._diffusers_hook.hooks.values()
        if any(isinstance(hook, FixedPointSamplingHook) for hook in others):
            raise ValueError(
                "Faster Diffusion and `apply_fixed_point_sampling` cannot rule the same model: at steps without iterations "
                "there is nothing to budget. Remove one of them."
            )
        if self.config.batched and any(isinstance(hook, DenoiserTap) for hook in others):
            raise ValueError(
                "`batched` does not work with a learned solver that looks at the bottleneck at every step. Set `batched` to "
                "False, or use the solver's static mode."
            )
        if self.config.every != 1 and 1 < len(self.run.keys) == self.run.num_steps:
            logger.warning(
                f"All {self.run.num_steps} steps of this run are key steps, so nothing is saved: the schedule is too dense for "
                "so few. Use `every`, or calibrate for this number of steps."
            )
        if self.config.noise_injection:
            self.injection.attach(self.run.scheduler)  # the scheduler may have been swapped since the last run

    def _clear(self) -> None:
        self.features.clear()
        self._batch.clear()
        self._encoder_arguments, self._fingerprint = {}, ()

    def _key_step(self, step: KeyStep, arguments: dict[str, Any]) -> Any:
        self.steps_computed.append("key")
        if self._fingerprint and self._fingerprint[0] != tuple(arguments[self._sample_name].shape):
            self._clear()  # no forecast from features of another batch
        self._encoder_arguments = {
            name: _shallow_copy(arguments[name]) for name in self.cut.encoder_arguments if arguments.get(name) is not None
        }
        if step.is_first:
            self.example = map_tensors(lambda tensor: torch.empty_like(tensor, device="meta"), arguments)
        num_rows = arguments[self._sample_name].shape[0]
        expands = self.cut.expands and self.config.propagation == "hold"
        count = self._num_decoded(step, num_rows) if expands else 1
        self.features.begin_recording(num_rows, count)
        output = self._call(step, arguments, count, self._conditions(arguments))
        self.features.end_recording(step.index)
        if self.observer is not None:
            self.observer(self.features.newest())
        self.feature_bytes = max(self.feature_bytes, self.features.nbytes())
        return output

    def _other_step(self, step: KeyStep, arguments: dict[str, Any]) -> Any:
        conditions = self._conditions(arguments)
        output = self._batch.take(step.index, conditions) if self.config.batched else None
        if output is not None:
            self.steps_computed.append("buffer")
            return output
        self.steps_computed.append("decode")
        arguments = {name: value for name, value in arguments.items() if name not in self.cut.encoder_arguments}
        arguments |= {name: _shallow_copy(value) for name, value in self._encoder_arguments.items()}
        count = self._num_decoded(step, arguments[self._sample_name].shape[0])
        self.features.begin_replay(range(step.index, step.index + count))
        if self.cut.replay_arguments is not None:
            arguments |= self.cut.replay_arguments(self.features.resumed_feature())
        return self._call(step, arguments, count, conditions)

    def _num_decoded(self, step: KeyStep, num_rows: int) -> int:
        """Steps to decode in this call."""
        if not self.config.batched or self._batch.is_off:
            return 1
        most = step.num_coming if self.config.max_batch is None else self.config.max_batch // num_rows
        return max(1, min(step.num_coming, most))

    def _call(self, step: KeyStep, arguments: dict[str, Any], count: int, conditions: dict[str, Any]) -> Any:
        if count == 1:
            return self.fn_ref.original_forward(**arguments)
        timesteps = self.run.coming_timesteps(step.index, count)
        output = self.fn_ref.original_forward(**self._batch.expand(arguments, timesteps))
        return self._batch.split(output, step.index, count, conditions, self.run.timesteps)

    def _conditions(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What the decoder depends on beside its features and the timestep."""
        others = (self._sample_name, "timestep", *self.cut.encoder_arguments)
        return {name: value for name, value in arguments.items() if name not in others}


def apply_faster_diffusion(pipe_or_model: Any, config: FasterDiffusionConfig, *, scheduler: Any = None) -> FasterDiffusionHook:
    """Run the encoder of a denoiser at key steps only, replacing an earlier config.

    A ControlNet of the pipeline also runs at key steps only.

    Args:
        pipe_or_model: a pipeline with a `unet` or `transformer`, or such a model for loops of your own; then `scheduler` must
            be the scheduler of that loop (or the pipeline whose scheduler it is).
        config: see [`FasterDiffusionConfig`].
        scheduler: only with a bare model.

    Returns:
        The hook; its `summary()` says what it does, its `steps_computed` what each step of the last run did.

    Raises:
        TypeError: if there is no model in the pipeline, or nobody registered where its encoder ends.
        ValueError: if the config does not fit the model.
    """
    model = _denoiser(pipe_or_model)
    is_bare = isinstance(pipe_or_model, torch.nn.Module)
    if is_bare and scheduler is None:
        raise TypeError("`scheduler` is needed with a bare model: it tells where a sampling run begins.")
    if not is_bare and scheduler is not None:
        raise TypeError("`scheduler` is for bare models; a pipeline has its own.")
    source = scheduler if is_bare else pipe_or_model
    cut = encoder_cut(model, config.encoder_share)
    hook = FasterDiffusionHook(model, config, cut, KeyStepRun(source, config.key_steps_of))
    remove_faster_diffusion(model)
    if config.noise_injection:
        hook.injection.attach(hook.run.scheduler)
    controlnet = None if is_bare else getattr(pipe_or_model, "controlnet", None)
    hook.attach(controlnet if isinstance(controlnet, torch.nn.Module) else None, source)
    return hook


def remove_faster_diffusion(pipe_or_model: Any) -> None:
    """Undo `apply_faster_diffusion`; does nothing where it was not applied."""
    registry = getattr(_denoiser(pipe_or_model), "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook(HOOK_NAME)
    if isinstance(hook, FasterDiffusionHook):
        hook.detach()


def _denoiser(pipe_or_model: Any) -> torch.nn.Module:
    if isinstance(pipe_or_model, torch.nn.Module):
        model = pipe_or_model
    else:
        model = getattr(pipe_or_model, "unet", None) or getattr(pipe_or_model, "transformer", None)
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            "`pipe_or_model` must be a denoiser or a pipeline with a `unet` or `transformer`, got "
            f"{type(pipe_or_model).__name__}."
        )
    return getattr(model, "_orig_mod", model)  # a model given to torch.compile


def _shallow_copy(value: Any) -> Any:
    """Models take residuals out of the list they are given."""
    return list(value) if isinstance(value, list) else value
