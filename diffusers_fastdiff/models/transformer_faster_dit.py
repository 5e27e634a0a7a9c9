"""diffusers' DiT, corrected where it differs from the published one (arXiv 2212.09748).

* Label dropout is drawn once per sample. In diffusers every block draws its own, so a sample is unlabelled in some blocks
  and labelled in others, which trains neither the conditional nor the unconditional model.
* Models with fewer than 1000 classes work under guidance in `DiTPipeline`, which writes 1000 for "no class".
* The frequencies of the timestep embedding can be those of the original, which converted weights need.

Encoder propagation (Faster Diffusion, arXiv 2312.09608) can be switched on from the model itself.
"""

from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from .class_labels import prepare_labels


class FasterDiffusionDiTTransformer2DModel(DiTTransformer2DModel):
    r"""`DiTTransformer2DModel` with correct label dropout and null label. Loads stock weights and configs.

    Args:
        num_attention_heads: and all others up to `norm_eps`, see `diffusers.DiTTransformer2DModel`.
        class_dropout_prob: in training mode, chance that a sample loses its label.
        time_freq_shift: the divisor of the sinusoidal frequencies is `128 - time_freq_shift`: 1 as in diffusers (for weights
            trained there), 0 as in the original DiT (for converted weights).
    """

    _repeated_blocks = ["BasicTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_zero",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
        class_dropout_prob: float = 0.1,
        time_freq_shift: int = 1,
    ):
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            dropout=dropout,
            norm_num_groups=norm_num_groups,
            attention_bias=attention_bias,
            sample_size=sample_size,
            patch_size=patch_size,
            activation_fn=activation_fn,
            num_embeds_ada_norm=num_embeds_ada_norm,
            upcast_attention=upcast_attention,
            norm_type=norm_type,
            norm_elementwise_affine=norm_elementwise_affine,
            norm_eps=norm_eps,
        )
        if not 0 <= class_dropout_prob <= 1:
            raise ValueError(f"`class_dropout_prob` must be a probability, got {class_dropout_prob}.")
        self.register_to_config(out_channels=self.out_channels)  # DiTPipeline reads it from the config
        for block in self.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = time_freq_shift
            block.norm1.emb.class_embedder.dropout_prob = 0.0  # done in `forward`, once for all blocks

    @property
    def null_label(self) -> int:
        """Label of "no class"."""
        return self.config.num_embeds_ada_norm

    def enable_faster_diffusion(self, source: Any, config: Any = None, **options: Any) -> Any:
        """Run the first blocks at key steps only, see [`apply_faster_diffusion`].

        Args:
            source: the pipeline this model is in, or the scheduler of your own loop.
            config: a [`FasterDiffusionConfig`]; or give its fields as `options`, by default `key_steps="dit-250"` as published.

        Returns:
            The hook, whose `summary()` says what it does.

        Raises:
            ValueError: if both `config` and `options` are given, or one is out of range.
        """
        from diffusers_fastdiff import FasterDiffusionConfig, apply_faster_diffusion  # hooks are built on models

        if config is not None and options:
            raise ValueError(f"Give either `config` or its fields, not both; got the fields {sorted(options)}.")
        config = config or FasterDiffusionConfig(**(options or {"key_steps": "dit-250"}))
        return apply_faster_diffusion(self, config, scheduler=source)

    def disable_faster_diffusion(self) -> None:
        """Undo `enable_faster_diffusion`; does nothing where it was not called."""
        from diffusers_fastdiff import remove_faster_diffusion

        remove_faster_diffusion(self)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """As `DiTTransformer2DModel.forward`; `class_labels` may also be 1000 for "no class", whatever the number of classes.

        Raises:
            ValueError: if a label or their number does not fit.
        """
        if class_labels is None:
            raise ValueError(f"`class_labels` is required; {self.null_label} means no class.")
        dropout_prob = self.config.class_dropout_prob if self.training else 0.0
        labels = prepare_labels(class_labels, self.null_label, hidden_states.shape[0], dropout_prob)
        return super().forward(hidden_states, timestep, labels, cross_attention_kwargs, return_dict)
