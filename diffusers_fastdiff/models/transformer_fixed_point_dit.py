"""Fixed-point diffusion transformer: one weight-shared DiT block, iterated.

Source: Bai and Melas-Kyriazi, "Fixed Point Diffusion Models", arXiv 2401.08741; blocks as in Peebles and Xie, "Scalable
Diffusion Models with Transformers", arXiv 2212.09748 (adaLN-Zero). Differences from the published program, all on purpose:

* the modulation of the shared block and the injection part of its input projection do not change from iteration to iteration
  and are computed once per call;
* iteration counts are arguments of `forward`, never drawn inside it, and a solution to start from is passed in and handed
  out, never kept on the module;
* constructing the model leaves PyTorch's default initialisation, as everywhere in diffusers; the initialisation of the paper
  is `diffusers_fastdiff.training.initialize_dit`.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import PatchEmbed, TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

from ..numerics.fixed_point import FixedPointSolver, solve
from .class_labels import prepare_labels
from .fixed_point_dit_blocks import FixedPointDiTBlock, FixedPointDiTSharedBlock, Modulation

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
"""Depth, width and heads of the published DiT sizes."""
PATCH_SIZES = (2, 4, 8)


def read_preset(preset: str) -> tuple[int, int, int, int]:
    """Depth, width, heads and patch size of a published DiT, "S/2" to "XL/8".

    Raises:
        ValueError: for any other name.
    """
    size, _, patch = preset.partition("/")
    if size not in SIZES or patch not in map(str, PATCH_SIZES):
        known = [f"{s}/{p}" for s in SIZES for p in PATCH_SIZES]
        raise ValueError(f"`preset` must be one of {known}, got {preset!r}.")
    return *SIZES[size], int(patch)


@dataclass
class FixedPointDiTOutput(BaseOutput):
    """Output of [`FixedPointDiTTransformer2DModel`].

    Args:
        sample: predicted noise (or velocity, or data), with learned variance behind it; (B, out_channels, H, W).
        solution: fixed point before the last blocks, (B, N, D); detached. May start the next call.
        num_iterations: iterations spent on each sample, (B,).
        residuals: relative change of each iteration, (K, B), or None unless asked for.
    """

    sample: torch.Tensor
    solution: torch.Tensor | None = None
    num_iterations: torch.Tensor | None = None
    residuals: torch.Tensor | None = None


class FixedPointDiTTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, AttentionMixin, CacheMixin):
    r"""Diffusion transformer with a fixed-point block between a few ordinary ones. Works in the stock `DiTPipeline`.

    Args:
        num_attention_heads: heads of every block.
        attention_head_dim: channels of a head; the width of the model is `num_attention_heads * attention_head_dim`.
        in_channels: channels of the latents.
        out_channels: channels of the prediction, `2 * in_channels` when the variance is learned (the default, as published).
        num_pre_layers: ordinary blocks before the fixed point.
        num_post_layers: ordinary blocks after it.
        num_iterations: fixed-point iterations of a call that does not say how many; published: depth of the DiT it replaces
            minus the pre and post blocks.
        sample_size: height and width of the latents.
        patch_size: height and width of a token in latents.
        mlp_ratio: hidden width of the MLPs in units of the model width.
        num_classes: labels 0 .. num_classes - 1 with a null label behind them, or None for a model without labels.
        conditioning_dim: width of a continuous conditioning vector that takes the place of labels, or None.
        class_dropout_prob: in training mode, chance that a sample loses its label (drawn once per sample).
        pre_post_timestep_conditioning: whether the pre blocks, post blocks and output see the timestep; the published training
            and sampling scripts say False.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["FixedPointDiTBlock", "FixedPointDiTSharedBlock"]
    _repeated_blocks = ["FixedPointDiTBlock", "FixedPointDiTSharedBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_pre_layers: int = 1,
        num_post_layers: int = 1,
        num_iterations: int = 26,
        sample_size: int = 32,
        patch_size: int = 2,
        mlp_ratio: float = 4.0,
        num_classes: int | None = 1000,
        conditioning_dim: int | None = None,
        class_dropout_prob: float = 0.1,
        pre_post_timestep_conditioning: bool = True,
    ):
        super().__init__()
        out_channels = 2 * in_channels if out_channels is None else out_channels
        self.register_to_config(out_channels=out_channels)  # DiTPipeline reads it from the config
        _check_config(self.config)
        dim = num_attention_heads * attention_head_dim

        self.pos_embed = PatchEmbed(sample_size, sample_size, patch_size, in_channels, dim)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(256, dim)
        self.class_embedder = nn.Embedding(num_classes + 1, dim) if num_classes is not None else None
        self.conditioning_embedder = nn.Linear(conditioning_dim, dim) if conditioning_dim is not None else None

        self.transformer_blocks = nn.ModuleList(
            [FixedPointDiTBlock(dim, num_attention_heads, mlp_ratio) for _ in range(num_pre_layers)]
            + [FixedPointDiTSharedBlock(dim, num_attention_heads, mlp_ratio)]
            + [FixedPointDiTBlock(dim, num_attention_heads, mlp_ratio) for _ in range(num_post_layers)]
        )
        # Beside the blocks, not in them: offloading moves a block's weights only while the block itself runs.
        self.modulations = nn.ModuleList([nn.Linear(dim, 6 * dim) for _ in self.transformer_blocks])
        self.injection_in = nn.Linear(dim, dim)
        self.injection_out = nn.Linear(dim, 2 * dim)

        self.norm_out = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.proj_out_1 = nn.Linear(dim, 2 * dim)
        self.proj_out_2 = nn.Linear(dim, patch_size * patch_size * out_channels)
        self.gradient_checkpointing = False
        self._cache_context_open = False

    @classmethod
    def from_preset(cls, preset: str, **kwargs) -> "FixedPointDiTTransformer2DModel":
        """A model of a published size, for example `from_preset("XL/2", sample_size=32)`.

        Args:
            preset: size and patch, "S/2" to "XL/8".
            kwargs: any argument of the constructor, to add to the preset or override it. `num_iterations` follows the
                number of pre and post layers unless it is given.

        Raises:
            ValueError: for an unknown preset.
        """
        depth, dim, heads, patch_size = read_preset(preset)
        outer_layers = kwargs.get("num_pre_layers", 1) + kwargs.get("num_post_layers", 1)
        settings = {
            "num_attention_heads": heads,
            "attention_head_dim": dim // heads,
            "patch_size": patch_size,
            "num_iterations": depth - outer_layers,
        }
        return cls(**(settings | kwargs))

    @property
    def null_label(self) -> int | None:
        """Label of "no class", None for a model without labels."""
        return self.config.num_classes

    def enable_cache(self, config) -> None:
        """Enable one of the caches of diffusers; see `diffusers.CacheMixin`.

        Raises:
            ValueError: if the model lacks an ordinary block before or after the fixed point. Caches compare the first block
                with the last one, and a shared block that runs many times per call can be neither.
        """
        if self.config.num_pre_layers == 0 or self.config.num_post_layers == 0:
            raise ValueError(
                "Caching needs `num_pre_layers` >= 1 and `num_post_layers` >= 1, got "
                f"{self.config.num_pre_layers} and {self.config.num_post_layers}."
            )
        super().enable_cache(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | int | float,
        class_labels: torch.Tensor | None = None,
        conditioning: torch.Tensor | None = None,
        num_iterations: int | None = None,
        num_no_grad_iterations: int = 0,
        initial_solution: torch.Tensor | None = None,
        solver: FixedPointSolver | None = None,
        return_residuals: bool = False,
        return_dict: bool = True,
    ) -> FixedPointDiTOutput | tuple[torch.Tensor, ...]:
        """Predict noise (or velocity, or data) for a batch of noisy latents.

        Args:
            hidden_states: noisy latents, (B, in_channels, sample_size, sample_size).
            timestep: (B,) or a number, on the scale of the training noise schedule (0 .. 999), not necessarily whole.
            class_labels: (B,) integers in 0 .. num_classes; `num_classes` means no label, and so does the 1000 of
                `DiTPipeline` in models with fewer classes.
            conditioning: (B, conditioning_dim) for models with continuous conditioning; zeros mean none.
            num_iterations: fixed-point iterations (with gradient, in training), >= 1; None takes the one of the config.
            num_no_grad_iterations: iterations before those, outside the graph: the stochastic Jacobian-free training of the
                paper draws both counts (see `diffusers_fastdiff.training`).
            initial_solution: (B, N, D), start of the iteration, for example the `solution` of the sampling step before; None
                starts from the pre blocks. Never part of the graph.
            solver: stopping by tolerance and Anderson acceleration; only without gradients.
            return_residuals: also return the relative residual of each iteration.
            return_dict: return a [`FixedPointDiTOutput`] instead of a tuple.

        Raises:
            ValueError: on sizes, labels or iteration counts that do not fit the model.
        """
        num_iterations = self.config.num_iterations if num_iterations is None else num_iterations
        self._check_inputs(hidden_states, class_labels, conditioning, num_iterations, num_no_grad_iterations, solver)
        num_pre_layers = self.config.num_pre_layers

        with self._default_cache_context():
            # 1. Embeddings, shared by all blocks
            tokens = self.pos_embed(hidden_states).contiguous()  # one layout for all blocks: they compile once
            time_embedding = self._embed_timestep(timestep, hidden_states.shape[0], tokens)
            label_embedding = self._embed_condition(class_labels, conditioning, time_embedding)
            inner_condition = F.silu(time_embedding + label_embedding)
            outer_condition = inner_condition if self.config.pre_post_timestep_conditioning else F.silu(label_embedding)

            # 2. Pre blocks
            for index in range(num_pre_layers):
                tokens = self._run_block(index, tokens, self._modulation(index, outer_condition))

            # 3. Fixed point. What depends on neither the state nor the iteration is computed here, once.
            injection = self.injection_out(self.injection_in(tokens))
            modulation = self._modulation(num_pre_layers, inner_condition)
            start = self._start(tokens, initial_solution)

            def iterate_once(state: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
                if rows is None:
                    return self._run_block(num_pre_layers, state, modulation, injection)
                return self._run_block(num_pre_layers, state, tuple(m[rows] for m in modulation), injection[rows])

            if num_no_grad_iterations > 0:
                with torch.no_grad():
                    start = solve(iterate_once, start, num_no_grad_iterations).state
                # Autocast would hand the casts made above, which have no gradient, to the iterations below.
                torch.clear_autocast_cache()
            solution = solve(iterate_once, start, num_iterations, solver, return_residuals)
            tokens = solution.state

            # 4. Post blocks and output
            for index in range(num_pre_layers + 1, len(self.transformer_blocks)):
                tokens = self._run_block(index, tokens, self._modulation(index, outer_condition))
            shift, scale = self.proj_out_1(outer_condition)[:, None].chunk(2, dim=-1)
            tokens = self.proj_out_2(torch.addcmul(shift, self.norm_out(tokens), 1 + scale))

        output = FixedPointDiTOutput(
            sample=self._unpatchify(tokens),
            solution=solution.state.detach(),
            num_iterations=solution.num_iterations + num_no_grad_iterations,
            residuals=solution.residuals,
        )
        return output if return_dict else output.to_tuple()

    @contextmanager
    def cache_context(self, name: str, **kwargs):
        """As `CacheMixin.cache_context`; remembers that the caller opened one."""
        self._cache_context_open = True
        try:
            with super().cache_context(name, **kwargs):
                yield
        finally:
            self._cache_context_open = False

    def _default_cache_context(self):
        """DiTPipeline and other pipelines open no cache context, without which the caches of diffusers raise."""
        if self.is_cache_enabled and not self._cache_context_open:
            return self.cache_context("default")
        return nullcontext()

    def _check_inputs(self, hidden_states, class_labels, conditioning, num_iterations, num_no_grad_iterations, solver):
        config = self.config
        expected = (config.in_channels, config.sample_size, config.sample_size)
        if hidden_states.ndim != 4 or tuple(hidden_states.shape[1:]) != expected:
            raise ValueError(
                f"`hidden_states` must have shape (B, {', '.join(map(str, expected))}), got {tuple(hidden_states.shape)}."
            )
        if num_iterations < 1 or num_no_grad_iterations < 0:
            raise ValueError(
                "`num_iterations` must be at least 1 and `num_no_grad_iterations` at least 0, got "
                f"{num_iterations} and {num_no_grad_iterations}."
            )
        if solver is not None and torch.is_grad_enabled() and solver != FixedPointSolver():
            raise ValueError(
                "`solver` (tolerance, Anderson) is for inference: wrap the call in `torch.no_grad()`, or train with fixed "
                "iteration counts."
            )
        for name, value, size in (
            ("class_labels", class_labels, config.num_classes),
            ("conditioning", conditioning, config.conditioning_dim),
        ):
            if (value is None) != (size is None):
                problem = "is required by" if value is None else "was given to"
                raise ValueError(f"`{name}` {problem} a model without it in its config: see `num_classes`, `conditioning_dim`.")

    def _embed_timestep(self, timestep, batch_size: int, tokens: torch.Tensor) -> torch.Tensor:
        timestep = torch.as_tensor(timestep, device=tokens.device).reshape(-1)
        if timestep.shape[0] not in (1, batch_size):
            raise ValueError(f"`timestep` must be a number or hold {batch_size} of them, got {timestep.shape[0]}.")
        features = self.time_proj(timestep.expand(batch_size))
        return self.time_embedder(features.to(tokens.dtype))

    def _embed_condition(self, class_labels, conditioning, time_embedding: torch.Tensor) -> torch.Tensor:
        """(B, D); zeros in a model without labels and vectors. Drops the condition of some samples in training mode."""
        batch_size, device = time_embedding.shape[0], time_embedding.device
        dropout_prob = self.config.class_dropout_prob if self.training else 0.0
        if class_labels is not None:
            return self.class_embedder(prepare_labels(class_labels.to(device), self.null_label, batch_size, dropout_prob))
        if conditioning is not None:
            if tuple(conditioning.shape) != (batch_size, self.config.conditioning_dim):
                raise ValueError(
                    f"`conditioning` must have shape ({batch_size}, {self.config.conditioning_dim}), got "
                    f"{tuple(conditioning.shape)}."
                )
            if dropout_prob > 0:
                dropped = torch.rand(batch_size, device=device) < dropout_prob
                conditioning = conditioning.masked_fill(dropped[:, None], 0)
            return self.conditioning_embedder(conditioning.to(device, time_embedding.dtype))
        return torch.zeros_like(time_embedding)

    def _modulation(self, index: int, condition: torch.Tensor) -> Modulation:
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = self.modulations[index](condition)[:, None].chunk(
            6, dim=-1
        )
        return shift_attn, 1 + scale_attn, gate_attn, shift_ff, 1 + scale_ff, gate_ff

    def _run_block(self, index: int, *inputs) -> torch.Tensor:
        block = self.transformer_blocks[index]
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    def _start(self, tokens: torch.Tensor, initial_solution: torch.Tensor | None) -> torch.Tensor:
        """Never part of the graph: the pre blocks learn through the injection only (section 3.3)."""
        if initial_solution is None:
            return tokens.detach()
        if initial_solution.shape != tokens.shape:
            raise ValueError(
                f"`initial_solution` must have shape {tuple(tokens.shape)}, got {tuple(initial_solution.shape)}: a solution "
                "fits only the batch size and model it was computed with."
            )
        return initial_solution.to(tokens).detach()

    def _unpatchify(self, tokens: torch.Tensor) -> torch.Tensor:
        patch, channels = self.config.patch_size, self.config.out_channels
        grid = self.config.sample_size // patch
        tokens = tokens.reshape(-1, grid, grid, patch, patch, channels)
        return torch.einsum("nhwpqc->nchpwq", tokens).reshape(-1, channels, grid * patch, grid * patch)


def _check_config(config) -> None:
    if config.num_pre_layers < 0 or config.num_post_layers < 0:
        raise ValueError(
            "`num_pre_layers` and `num_post_layers` must not be negative, got "
            f"{config.num_pre_layers} and {config.num_post_layers}."
        )
    if config.num_iterations < 1:
        raise ValueError(f"`num_iterations` must be at least 1, got {config.num_iterations}.")
    if config.sample_size % config.patch_size:
        raise ValueError(f"`sample_size` ({config.sample_size}) must be a multiple of `patch_size` ({config.patch_size}).")
    if config.num_classes is not None and config.conditioning_dim is not None:
        raise ValueError("`num_classes` and `conditioning_dim` exclude each other: set one of them to None.")
    if not 0 <= config.class_dropout_prob <= 1:
        raise ValueError(f"`class_dropout_prob` must be a probability, got {config.class_dropout_prob}.")
