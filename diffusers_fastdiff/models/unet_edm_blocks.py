"""The parts of [`EDMUNet2DModel`]: noise-level features, resampling, residual blocks, encoder and decoder stages.

Sources: Ho et al., arXiv 2006.11239 (positional features, residual block with attention); Song et al., arXiv 2011.13456,
section 4.4 and appendix H (DDPM++ and NCSN++: Fourier features, FIR resampling, rescaled shortcuts, input and output branches);
Dhariwal and Nichol, arXiv 2105.05233 (ADM: adaptive group normalisation); Karras et al., arXiv 2206.00364, appendix F.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .fixed_point_dit_blocks import FixedPointDiTAttention

FOURIER_SCALE = 16.0
"""Standard deviation of the random frequencies of Fourier features (arXiv 2011.13456, appendix C)."""


class EDMNoiseFeatures(nn.Module):
    """Sines and cosines of a noise level, (B,) -> (B, channels), in float32 or wider whatever the weights are cast to.

    Args:
        channels: number of features, even.
        embedding_type: "positional", `exp(-log(10000) j / (channels / 2 - freq_shift))`, or "fourier", random frequencies
            that belong to the weights.
        flip_sin_to_cos: cosines first.
        freq_shift: 1 reaches the frequency 1/10000, 0 stops just before it.
    """

    frequencies: torch.Tensor

    def __init__(self, channels: int, embedding_type: str, flip_sin_to_cos: bool, freq_shift: float):
        super().__init__()
        self.flip_sin_to_cos = flip_sin_to_cos
        if embedding_type == "fourier":
            self.register_buffer("frequencies", torch.randn(channels // 2, dtype=torch.float32) * FOURIER_SCALE)
            self.phase_per_level = 2 * math.pi
        else:
            exponent = torch.arange(channels // 2, dtype=torch.float32) / (channels // 2 - freq_shift)
            self.register_buffer("frequencies", (1 / 10000) ** exponent, persistent=False)
            self.phase_per_level = 1.0

    def _apply(self, fn: Callable, recurse: bool = True) -> "EDMNoiseFeatures":
        # Phases reach hundreds of radians: frequencies in half precision would give unrelated features.
        precise = self.frequencies
        super()._apply(fn, recurse)
        if self.frequencies.dtype in (torch.float16, torch.bfloat16):
            self.frequencies = precise.to(self.frequencies.device)
        return self

    def forward(self, level: torch.Tensor) -> torch.Tensor:
        phases = level.to(self.frequencies)[:, None] * (self.phase_per_level * self.frequencies)
        parts = (phases.cos(), phases.sin()) if self.flip_sin_to_cos else (phases.sin(), phases.cos())
        return torch.cat(parts, dim=1)


class EDMResample(nn.Module):
    """Half or twice the height and width by a separable FIR filter with an even number of taps, zeros outside the image."""

    def __init__(self, channels: int, direction: str, taps: Sequence[float]):
        super().__init__()
        self.direction, self.is_box = direction, list(taps) == [1, 1]
        self.padding = len(taps) // 2 - 1
        if not self.is_box:
            self.register_buffer("kernel", fir_kernel(channels, taps, gain=4 if direction == "up" else 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_box:
            return F.avg_pool2d(x, 2) if self.direction == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")
        convolve = F.conv2d if self.direction == "down" else F.conv_transpose2d
        return convolve(x, self.kernel.to(x.dtype), stride=2, padding=self.padding, groups=x.shape[1])


class EDMInputResidual(nn.Module):
    """Input branch "residual": the branch is filtered, halved and projected, and its sum with the encoder replaces both."""

    def __init__(self, branch_channels: int, channels: int, taps: Sequence[float], skip_scale: float):
        super().__init__()
        self.padding, self.skip_scale = len(taps) // 2, skip_scale
        self.register_buffer("kernel", fir_kernel(branch_channels, taps), persistent=False)
        self.conv = nn.Conv2d(branch_channels, channels, kernel_size=3, stride=2)

    def forward(self, hidden_states: torch.Tensor, branch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        smooth = F.conv2d(branch, self.kernel.to(branch.dtype), padding=self.padding, groups=branch.shape[1])
        hidden_states = (hidden_states + self.conv(smooth)) * self.skip_scale
        return hidden_states, hidden_states


class EDMInputSkip(nn.Module):
    """Input branch "skip": a halved image is projected and added to the encoder at each resolution."""

    def __init__(self, branch_channels: int, channels: int, taps: Sequence[float]):
        super().__init__()
        self.resample = EDMResample(branch_channels, "down", taps)
        self.conv = nn.Conv2d(branch_channels, channels, kernel_size=1)

    def forward(self, hidden_states: torch.Tensor, branch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        branch = self.resample(branch)
        return hidden_states + self.conv(branch), branch


class EDMAttention(FixedPointDiTAttention):
    """Multi-head self-attention over the pixels of a feature map, (B, C, H, W) -> (B, C, H, W)."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = super().forward(hidden_states.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).unflatten(2, hidden_states.shape[2:])


class EDMResnetBlock(nn.Module):
    """Residual block with optional resampling and self-attention, (B, in_channels, ...) -> (B, out_channels, ...).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        attention: whether self-attention follows the convolutions.
        resample: None, "down" or "up".
        temb_channels: width of the noise embedding.
        dropout: probability before the second convolution.
        adaptive_scale: the embedding scales and shifts the normalised features instead of being added before it.
        skip_scale: factor of every sum of a shortcut with its branch.
        norm_eps: epsilon of the group normalisations.
        resample_filter: taps of the FIR filter.
        resample_shortcut_proj: whether the shortcut is projected where it is resampled, even if the channels stay.
        attention_head_dim: channels of an attention head, None for a single head.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        attention: bool = False,
        resample: str | None = None,
        *,
        temb_channels: int,
        dropout: float,
        adaptive_scale: bool,
        skip_scale: float,
        norm_eps: float,
        resample_filter: Sequence[float],
        resample_shortcut_proj: bool,
        attention_head_dim: int | None,
    ):
        super().__init__()
        self.adaptive_scale, self.skip_scale = adaptive_scale, skip_scale
        self.resample = EDMResample(in_channels, resample, resample_filter) if resample else nn.Identity()
        self.norm1 = group_norm(in_channels, norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.time_emb_proj = nn.Linear(temb_channels, 2 * out_channels if adaptive_scale else out_channels)
        self.norm2 = group_norm(out_channels, norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        has_projection = in_channels != out_channels or (resample is not None and resample_shortcut_proj)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1) if has_projection else None
        self.attn_norm = group_norm(out_channels, norm_eps) if attention else None
        self.attn = EDMAttention(out_channels, out_channels // (attention_head_dim or out_channels)) if attention else None

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        shortcut = self.resample(hidden_states)
        if self.conv_shortcut is not None:
            shortcut = self.conv_shortcut(shortcut)
        hidden_states = self.conv1(self.resample(F.silu(self.norm1(hidden_states))))
        modulation = self.time_emb_proj(temb)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = modulation.chunk(2, dim=1)
            hidden_states = torch.addcmul(shift, self.norm2(hidden_states), 1 + scale)
        else:
            hidden_states = self.norm2(hidden_states + modulation)
        hidden_states = self.conv2(self.dropout(F.silu(hidden_states)))
        hidden_states = (shortcut + hidden_states) * self.skip_scale
        if self.attn is not None:
            hidden_states = (hidden_states + self.attn(self.attn_norm(hidden_states))) * self.skip_scale
        return hidden_states


class EDMDownBlock(nn.Module):
    """One resolution of the encoder: downsampling and input branch, except at the first, then residual blocks.

    Args:
        make_block: `EDMResnetBlock` with everything but channels, attention and resampling filled in.
        in_channels: channels of the input.
        out_channels: channels of the residual blocks.
        num_layers: number of residual blocks.
        attention: whether they have attention.
        downsample: whether this is not the first resolution.
        input_branch: module `(hidden_states, branch) -> (hidden_states, branch)`, or None.
    """

    def __init__(
        self,
        make_block: Callable[..., EDMResnetBlock],
        in_channels: int,
        out_channels: int,
        num_layers: int,
        attention: bool,
        downsample: bool,
        input_branch: nn.Module | None,
    ):
        super().__init__()
        self.downsampler = make_block(in_channels, in_channels, resample="down") if downsample else None
        self.input_branch = input_branch
        widths = [in_channels] + [out_channels] * num_layers
        self.resnets = nn.ModuleList(make_block(*pair, attention=attention) for pair in itertools.pairwise(widths))
        self.gradient_checkpointing = False

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, branch: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Feature map, input branch for the next resolution, and feature maps for the decoder in the order they came."""
        skips = []
        if self.downsampler is not None:
            hidden_states = run_block(self, self.downsampler, hidden_states, temb)
            if self.input_branch is not None:
                hidden_states, branch = self.input_branch(hidden_states, branch)
            skips.append(hidden_states)
        for resnet in self.resnets:
            hidden_states = run_block(self, resnet, hidden_states, temb)
            skips.append(hidden_states)
        return hidden_states, branch, skips


class EDMMidBlock(nn.Module):
    """Two residual blocks at the lowest resolution, the first one with attention: the beginning of the decoder."""

    def __init__(self, make_block: Callable[..., EDMResnetBlock], channels: int):
        super().__init__()
        self.resnets = nn.ModuleList([make_block(channels, channels, attention=True), make_block(channels, channels)])
        self.gradient_checkpointing = False

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        for resnet in self.resnets:
            hidden_states = run_block(self, resnet, hidden_states, temb)
        return hidden_states


class EDMUpBlock(nn.Module):
    """One resolution of the decoder: upsampling, except at the lowest, then a residual block for each skip connection.

    Args:
        make_block: `EDMResnetBlock` with everything but channels, attention and resampling filled in.
        in_channels: channels of the input.
        out_channels: channels of the residual blocks.
        skip_channels: channels of the skip connections, in the order in which they are used.
        attention: for each residual block, whether it has attention.
        upsample: whether this is not the lowest resolution.
    """

    def __init__(
        self,
        make_block: Callable[..., EDMResnetBlock],
        in_channels: int,
        out_channels: int,
        skip_channels: Sequence[int],
        attention: Sequence[bool],
        upsample: bool,
    ):
        super().__init__()
        self.upsampler = make_block(in_channels, in_channels, resample="up") if upsample else None
        inputs = [in_channels] + [out_channels] * (len(skip_channels) - 1)
        self.resnets = nn.ModuleList(
            make_block(channels + skip, out_channels, attention=has_attention)
            for channels, skip, has_attention in zip(inputs, skip_channels, attention, strict=True)
        )
        self.gradient_checkpointing = False

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor, skips: Sequence[torch.Tensor]) -> torch.Tensor:
        """`skips`: one feature map of the encoder for each residual block, in the order in which they are used."""
        if self.upsampler is not None:
            hidden_states = run_block(self, self.upsampler, hidden_states, temb)
        for resnet, skip in zip(self.resnets, skips, strict=True):
            hidden_states = run_block(self, resnet, torch.cat([hidden_states, skip], dim=1), temb)
        return hidden_states


class EDMOutputLayer(nn.Module):
    """Normalisation, SiLU and convolution to the channels of the image."""

    def __init__(self, in_channels: int, out_channels: int, norm_eps: float):
        super().__init__()
        self.norm = group_norm(in_channels, norm_eps)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(F.silu(self.norm(hidden_states)))


def fir_kernel(channels: int, taps: Sequence[float], gain: float = 1.0) -> torch.Tensor:
    """Depthwise kernel whose entries sum to `gain`, (channels, 1, len(taps), len(taps))."""
    taps = torch.tensor(taps, dtype=torch.float32)
    kernel = torch.outer(taps, taps) * (gain / taps.sum().square())
    return kernel.expand(channels, 1, -1, -1).contiguous()


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """32 groups, fewer where a group would have less than four channels."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


def run_block(stage: nn.Module, block: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() and stage.gradient_checkpointing:
        return stage._gradient_checkpointing_func(block, *inputs)
    return block(*inputs)


@torch.no_grad()
def initialize_weights(model: nn.Module, is_adm: bool) -> None:
    """See `EDMUNet2DModel.initialize_weights`."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.GroupNorm):
            module.reset_parameters()
        if isinstance(module, nn.Linear | nn.Conv2d) and not is_adm:
            _initialize_xavier(module)
    for module in model.modules():
        match module:
            case EDMResnetBlock():
                last = module.conv2
            case EDMOutputLayer():
                last = module.conv
            case EDMAttention():
                last = module.to_out[0]
                if not is_adm:
                    for projection in (module.to_q, module.to_k, module.to_v):
                        _initialize_xavier(projection, gain=math.sqrt(0.1))
            case _:
                continue
        _initialize_xavier(last, gain=0.0 if is_adm else 1e-5)


def _initialize_xavier(module: nn.Linear | nn.Conv2d, gain: float = 1.0) -> None:
    nn.init.xavier_uniform_(module.weight, gain)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
