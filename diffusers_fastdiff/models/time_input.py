"""What a network of gDDIM is told about the time."""

import torch


def network_time(timestep: torch.Tensor, embedding_type: str) -> torch.Tensor:
    """The timestep `999 t` as it is, its logarithm for random Fourier features: as the published networks were trained.

    Args:
        timestep: any shape, positive.
        embedding_type: of the network, see [`EDMUNet2DModel`].
    """
    return timestep.log() if embedding_type == "fourier" else timestep
