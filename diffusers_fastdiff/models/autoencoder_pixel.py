"""The identity in the place of an autoencoder: lets latent pipelines run on pixels."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin


class PixelAutoencoder(ModelMixin, ConfigMixin):
    r"""Pixels are their own latents, so that a small pixel-space model runs in `DiTPipeline` and the like.

    Args:
        in_channels: channels of the images, 1 or 3.
        scaling_factor: latents are images times this factor, as in `AutoencoderKL`.
    """

    @register_to_config
    def __init__(self, in_channels: int = 3, scaling_factor: float = 1.0):
        super().__init__()
        # A model without any tensor has no dtype or device and cannot be saved; this one says that channels are not mixed.
        self.register_buffer("channel_gain", torch.ones(in_channels))

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[torch.Tensor]:
        """Images (B, C, H, W) in [-1, 1] -> latents of the same shape, not yet multiplied by `scaling_factor`."""
        return AutoencoderTinyOutput(latents=x) if return_dict else (x,)

    def decode(self, z: torch.Tensor, generator=None, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Latents (B, C, H, W), already divided by `scaling_factor` -> images of the same shape."""
        del generator  # part of the interface of autoencoders; nothing is random here
        return DecoderOutput(sample=z) if return_dict else (z,)

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        return self.decode(self.encode(sample, return_dict=False)[0], return_dict=return_dict)
