"""The U-Nets of DDPM++, NCSN++ and ADM as one model: the raw network `F(c_in x; c_noise)` inside a preconditioned denoiser.

Sources: Song et al., arXiv 2011.13456 (DDPM++, NCSN++); Dhariwal and Nichol, arXiv 2105.05233 (ADM); Karras et al., arXiv
2206.00364, table 7 (the sizes here, augmentation and class conditioning); Dockhorn et al., arXiv 2112.07068 (the size for
critically damped Langevin diffusion). What is around the network, c_skip, c_out, c_in and c_noise, is
`diffusers_fastdiff.numerics.preconditioning`. Differences from the published programs, all on purpose:

* labels are integers with a null label, and one-hot vectors inside;
* queries, keys and values are three projections, so that adapters and attention backends of diffusers fit;
* the network computes in the dtype of its weights, noise-level features always in float32 or wider;
* the constructor leaves PyTorch's default initialisation; the published one is `initialize_weights`.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from .class_labels import prepare_labels
from .unet_edm_blocks import (
    FOURIER_SCALE,
    EDMDownBlock,
    EDMInputResidual,
    EDMInputSkip,
    EDMMidBlock,
    EDMNoiseFeatures,
    EDMOutputLayer,
    EDMResample,
    EDMResnetBlock,
    EDMUpBlock,
    initialize_weights,
)

CHOICES = {
    "embedding_type": ("positional", "fourier"),
    "encoder_type": ("standard", "skip", "residual"),
    "decoder_type": ("standard", "skip"),
    "decoder_attention": ("last", "all"),
    "class_embed_position": ("before_mlp", "after_mlp"),
}
NCSNPP = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "resample_filter": (1, 3, 3, 1),
    "noise_channel_mult": 2,
}
"""What NCSN++ does differently from DDPM++, which is the default."""
ADM = {
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "class_embed_position": "after_mlp",
    "decoder_attention": "all",
    "attention_head_dim": 64,
    "adaptive_scale": True,
    "skip_scale": 1.0,
    "norm_eps": 1e-5,
    "resample_shortcut_proj": False,
}
"""What ADM does differently from DDPM++."""
_CIFAR10 = {"sample_size": 32, "channel_mult": (2, 2, 2), "dropout": 0.13, "augment_dim": 9}
_FFHQ = {"sample_size": 64, "channel_mult": (1, 2, 2, 2), "dropout": 0.05, "augment_dim": 9}
_IMAGENET64 = {
    "sample_size": 64,
    "num_classes": 1000,
    "model_channels": 192,
    "channel_mult": (1, 2, 3, 4),
    "layers_per_block": 3,
    "attention_resolutions": (32, 16, 8),
    "dropout": 0.1,
}
_CLD = {"in_channels": 6, "sample_size": 32, "channel_mult": (1, 2, 2, 2), "layers_per_block": 8, "dropout": 0.1}
PRESETS = {
    "cifar10-ddpmpp": _CIFAR10,
    "cifar10-ncsnpp": _CIFAR10 | NCSNPP,
    "ffhq-ddpmpp": _FFHQ,
    "ffhq-ncsnpp": _FFHQ | NCSNPP,
    "afhqv2-ddpmpp": _FFHQ | {"dropout": 0.25},
    "afhqv2-ncsnpp": _FFHQ | {"dropout": 0.25} | NCSNPP,
    "imagenet64-adm": _IMAGENET64 | ADM,
    "cld-cifar10": _CLD | NCSNPP,
}
"""Published networks. Those for 32x32 and 64x64 images were trained with and without labels; without is the default."""


class EDMUNet2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, AttentionMixin):
    r"""U-Net of EDM, FDM and gDDIM for images; the defaults are DDPM++ for 32x32 images.

    Args:
        sample_size: height and width the attention resolutions refer to.
        in_channels: channels of the input.
        out_channels: channels of the output, by default those of the input.
        num_classes: labels 0 .. num_classes - 1 with a null label behind them, or None for a model without labels.
        augment_dim: width of the vector that says how a training image was augmented, 0 for none.
        class_dropout_prob: in training mode, chance that a sample loses its label (drawn once per sample).
        model_channels: unit of width.
        channel_mult: width of each resolution, from the full one down, in that unit.
        layers_per_block: residual blocks for each resolution of the encoder; the decoder has one more.
        attention_resolutions: heights of the feature maps with attention.
        attention_head_dim: channels of an attention head, None for a single head.
        decoder_attention: whether "all" decoder blocks of such a resolution have attention or the "last" one.
        dropout: probability inside the residual blocks.
        embedding_type: "positional" or "fourier" features of the noise level.
        flip_sin_to_cos: cosines before sines.
        freq_shift: 1 makes positional features reach the frequency 1/10000, 0 stops just before it.
        noise_channel_mult: number of noise-level features in units of `model_channels`.
        temb_channel_mult: width of the noise embedding in units of `model_channels`.
        class_embed_position: labels join the noise level "before_mlp" (scaled by `sqrt(num_classes)`, with a bias) or
            "after_mlp".
        encoder_type: "standard", or with an input branch of downsampled images, "skip" or "residual".
        decoder_type: "standard", or "skip" for an image that is summed up over resolutions.
        resample_filter: taps of the FIR filter for changes of resolution: (1, 1) is a box.
        resample_shortcut_proj: whether shortcuts are projected where they are resampled, even if the channels stay.
        adaptive_scale: the noise embedding scales and shifts normalised features instead of being added to them.
        skip_scale: factor of every sum of a shortcut with its branch.
        norm_eps: epsilon of the group normalisations.
    """

    _supports_gradient_checkpointing = True
    # Stages, not residual blocks: these come in more shapes than a compiler specialises for.
    _no_split_modules = ["EDMDownBlock", "EDMMidBlock", "EDMUpBlock"]
    _repeated_blocks = ["EDMDownBlock", "EDMMidBlock", "EDMUpBlock"]
    _skip_layerwise_casting_patterns = ["time_proj", "norm"]
    _keep_in_fp32_modules = ["time_proj"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int | None = None,
        num_classes: int | None = None,
        augment_dim: int = 0,
        class_dropout_prob: float = 0.0,
        model_channels: int = 128,
        channel_mult: tuple[int, ...] = (2, 2, 2),
        layers_per_block: int = 4,
        attention_resolutions: tuple[int, ...] = (16,),
        attention_head_dim: int | None = None,
        decoder_attention: str = "last",
        dropout: float = 0.13,
        embedding_type: str = "positional",
        flip_sin_to_cos: bool = False,
        freq_shift: float = 1,
        noise_channel_mult: int = 1,
        temb_channel_mult: int = 4,
        class_embed_position: str = "before_mlp",
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: tuple[float, ...] = (1, 1),
        resample_shortcut_proj: bool = True,
        adaptive_scale: bool = False,
        skip_scale: float = math.sqrt(0.5),
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        self.register_to_config(out_channels=in_channels if out_channels is None else out_channels)
        _check_config(self.config)
        self._build_embeddings()
        self._build_encoder_and_decoder()

    def _build_embeddings(self) -> None:
        config = self.config
        features = config.model_channels * config.noise_channel_mult
        temb_channels = config.model_channels * config.temb_channel_mult
        is_before = config.class_embed_position == "before_mlp"
        self.time_proj = EDMNoiseFeatures(features, config.embedding_type, config.flip_sin_to_cos, config.freq_shift)
        self.time_embedder = TimestepEmbedding(features, temb_channels)
        self.class_embedder = None
        if config.num_classes is not None:
            self.class_embedder = nn.Linear(config.num_classes, features if is_before else temb_channels, bias=is_before)
        self.augment_embedder = nn.Linear(config.augment_dim, features, bias=False) if config.augment_dim else None

    def _build_encoder_and_decoder(self) -> None:
        config, taps = self.config, self.config.resample_filter
        make_block = partial(
            EDMResnetBlock,
            temb_channels=config.model_channels * config.temb_channel_mult,
            dropout=config.dropout,
            adaptive_scale=config.adaptive_scale,
            skip_scale=config.skip_scale,
            norm_eps=config.norm_eps,
            resample_filter=taps,
            resample_shortcut_proj=config.resample_shortcut_proj,
            attention_head_dim=config.attention_head_dim,
        )
        widths = [config.model_channels * multiple for multiple in config.channel_mult]
        has_attention = [config.sample_size >> level in config.attention_resolutions for level in range(len(widths))]

        self.conv_in = nn.Conv2d(config.in_channels, config.model_channels, kernel_size=3, padding=1)
        channels, branch_channels, skip_channels = config.model_channels, config.in_channels, [config.model_channels]
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            input_branch = None
            if level > 0:
                skip_channels.append(channels)
                if config.encoder_type == "residual":
                    input_branch = EDMInputResidual(branch_channels, channels, taps, config.skip_scale)
                    branch_channels = channels
                elif config.encoder_type == "skip":
                    input_branch = EDMInputSkip(branch_channels, channels, taps)
            self.down_blocks.append(
                EDMDownBlock(
                    make_block, channels, width, config.layers_per_block, has_attention[level], level > 0, input_branch
                )
            )
            channels = width
            skip_channels += [width] * config.layers_per_block

        self.mid_block = EDMMidBlock(make_block, channels)
        self.up_blocks, self.output_layers = nn.ModuleList(), nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            num_layers = config.layers_per_block + 1
            attention = [has_attention[level]] * num_layers
            if config.decoder_attention == "last":
                attention[:-1] = [False] * (num_layers - 1)
            skips = [skip_channels.pop() for _ in range(num_layers)]
            self.up_blocks.append(EDMUpBlock(make_block, channels, width, skips, attention, level < len(widths) - 1))
            channels = width
            if config.decoder_type == "skip" or level == 0:
                self.output_layers.append(EDMOutputLayer(channels, config.out_channels, config.norm_eps))
        self.output_upsampler = EDMResample(config.out_channels, "up", taps) if config.decoder_type == "skip" else None

    @classmethod
    def from_preset(cls, preset: str, **kwargs) -> "EDMUNet2DModel":
        """A model of a published size, for example `from_preset("cifar10-ddpmpp", num_classes=10)`.

        Args:
            preset: one of `PRESETS`.
            kwargs: any argument of the constructor, to add to the preset or override it.

        Raises:
            ValueError: for an unknown preset.
        """
        if preset not in PRESETS:
            raise ValueError(f"`preset` must be one of {list(PRESETS)}, got {preset!r}.")
        return cls(**(PRESETS[preset] | kwargs))

    @property
    def null_label(self) -> int | None:
        """Label of "no class", None for a model without labels."""
        return self.config.num_classes

    @property
    def bottleneck(self) -> EDMResnetBlock:
        """Last residual block of the encoder. Its output, 8x8 in the sizes of EDM, is what learned solvers look at."""
        return self.down_blocks[-1].resnets[-1]

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """The raw network: no preconditioning inside. It computes and answers in the dtype of its weights.

        Args:
            sample: scaled noisy images `c_in x`, (B, in_channels, H, W).
            timestep: `c_noise`, a number or (B,) of any float type.
            class_labels: (B,) integers in 0 .. num_classes; `num_classes` means no label.
            augment_labels: (B, augment_dim); None means not augmented, as zeros do.
            return_dict: return a `UNet2DOutput` instead of a tuple.

        Raises:
            ValueError: on sizes or labels that do not fit the model.
        """
        self._check_inputs(sample, class_labels, augment_labels)
        dtype = self.dtype
        sample = sample.to(dtype)

        # 1. Embeddings
        temb = self._embed(timestep, class_labels, augment_labels, sample)

        # 2. Encoder
        hidden_states, branch = self.conv_in(sample), sample
        skips = [hidden_states]
        for down_block in self.down_blocks:
            hidden_states, branch, block_skips = down_block(hidden_states, temb, branch)
            skips += block_skips

        # 3. Decoder
        hidden_states = self.mid_block(hidden_states, temb)
        image = None
        num_silent_blocks = len(self.up_blocks) - len(self.output_layers)
        for index, up_block in enumerate(self.up_blocks):
            hidden_states = up_block(hidden_states, temb, [skips.pop() for _ in up_block.resnets])
            if index >= num_silent_blocks:
                output = self.output_layers[index - num_silent_blocks](hidden_states)
                image = output if image is None else output + self.output_upsampler(image)

        return UNet2DOutput(sample=image) if return_dict else (image,)

    def _check_inputs(self, sample, class_labels, augment_labels) -> None:
        config = self.config
        factor = 2 ** (len(config.channel_mult) - 1)
        if sample.ndim != 4 or sample.shape[1] != config.in_channels or sample.shape[2] % factor or sample.shape[3] % factor:
            raise ValueError(
                f"`sample` must have shape (B, {config.in_channels}, H, W) with H and W divisible by {factor}, got "
                f"{tuple(sample.shape)}."
            )
        if class_labels is None and config.num_classes is not None:
            raise ValueError(f"`class_labels` must be given: the model has classes. The label {self.null_label} means none.")
        if class_labels is not None and config.num_classes is None:
            raise ValueError("`class_labels` were given to a model without classes: leave them out, or see `num_classes`.")
        if augment_labels is not None and tuple(augment_labels.shape) != (sample.shape[0], config.augment_dim):
            raise ValueError(
                f"`augment_labels` must have shape ({sample.shape[0]}, {config.augment_dim}), got "
                f"{tuple(augment_labels.shape)}."
            )

    def _embed(self, timestep, class_labels, augment_labels, sample: torch.Tensor) -> torch.Tensor:
        """Noise level and conditions -> (B, temb_channels)."""
        batch_size, device, dtype = sample.shape[0], sample.device, sample.dtype
        if not torch.is_tensor(timestep):
            timestep = torch.full((batch_size,), timestep, device=device, dtype=self.time_proj.frequencies.dtype)
        timestep = timestep.to(device).reshape(-1)
        if timestep.shape[0] not in (1, batch_size):
            raise ValueError(f"`timestep` must be a number or hold {batch_size} of them, got {timestep.shape[0]}.")
        features = self.time_proj(timestep.expand(batch_size)).to(dtype)
        if augment_labels is not None and self.augment_embedder is not None:
            features = features + self.augment_embedder(augment_labels.to(device, dtype))
        one_hot, is_before = None, self.config.class_embed_position == "before_mlp"
        if class_labels is not None:
            one_hot = self._one_hot(class_labels.to(device), batch_size, dtype)
        if one_hot is not None and is_before:
            features = features + self.class_embedder(one_hot * math.sqrt(self.config.num_classes))
        temb = self.time_embedder(features)
        if one_hot is not None and not is_before:
            temb = temb + self.class_embedder(one_hot)
        return F.silu(temb)

    def _one_hot(self, class_labels: torch.Tensor, batch_size: int, dtype: torch.dtype) -> torch.Tensor:
        """(B, num_classes); zeros for the null label. Drops the labels of some samples in training mode."""
        dropout_prob = self.config.class_dropout_prob if self.training else 0.0
        labels = prepare_labels(class_labels, self.null_label, batch_size, dropout_prob)
        return (labels[:, None] == torch.arange(self.config.num_classes, device=labels.device)).to(dtype)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw new weights as published, from the global generator: the starting point for training.

        ADM (recognised by `adaptive_scale`): PyTorch's default, standard normal class embeddings, zeros in the last layer of
        each residual branch and of the network. DDPM++ and NCSN++: Xavier-uniform weights without biases, scaled by 1e-5 in
        those last layers and by sqrt(0.1) in queries, keys and values.
        """
        is_adm = self.config.adaptive_scale
        initialize_weights(self, is_adm)
        if is_adm and self.class_embedder is not None:
            nn.init.normal_(self.class_embedder.weight)
        if self.config.embedding_type == "fourier":
            self.time_proj.frequencies.normal_(std=FOURIER_SCALE)


def _check_config(config) -> None:
    for name, choices in CHOICES.items():
        if config[name] not in choices:
            raise ValueError(f"`{name}` must be one of {choices}, got {config[name]!r}.")
    sizes = [config.sample_size >> level for level in range(len(config.channel_mult))]
    if config.sample_size % 2 ** (len(sizes) - 1):
        raise ValueError(f"`sample_size` ({config.sample_size}) must be divisible by 2 for each change of resolution.")
    if not set(config.attention_resolutions) <= set(sizes):
        raise ValueError(
            f"`attention_resolutions` {list(config.attention_resolutions)} must be among the resolutions {sizes} that "
            "`sample_size` and `channel_mult` give."
        )
    if len(config.resample_filter) % 2:
        raise ValueError(f"`resample_filter` must have an even number of taps, got {list(config.resample_filter)}.")
    if not 0 <= config.class_dropout_prob <= 1:
        raise ValueError(f"`class_dropout_prob` must be a probability, got {config.class_dropout_prob}.")
    head_dim = config.attention_head_dim or 1
    if any(config.model_channels * multiple % head_dim for multiple in config.channel_mult):
        raise ValueError(f"`attention_head_dim` ({head_dim}) must divide the width of each resolution.")
