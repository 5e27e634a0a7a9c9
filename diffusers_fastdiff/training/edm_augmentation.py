"""Augmentation of training images that does not leak into samples: the network is told what was done to an image.

Source: Karras et al., arXiv 2206.00364, appendix F.2 and table 6. At sampling time the network gets zeros, "nothing was done".
Difference from the published program: images are resampled bicubically with reflected edges rather than through a wavelet
filter bank. As published, labels 5 and 6 leave the common sign of b and its direction open.

| label | operation | drawn from |
|---|---|---|
| 0 | mirrored left to right, always drawn | {0, 1} |
| 1 | mirrored top to bottom | {0, 1} |
| 2 | scaled by 2^(0.2 a) | a standard normal |
| 3, 4 | rotated by a: cos a - 1, sin a | a uniform in [-pi, pi) |
| 5, 6 | stretched by 2^(0.2 b) along direction a, shrunk across it: b cos a, b sin a | b standard normal, a uniform |
| 7, 8 | moved by a / 8 of the side, to the right and down | a standard normal, each |
"""

import math

import torch
import torch.nn.functional as F

from .randomness import BatchRandom

NUM_LABELS = 9


def augment(images: torch.Tensor, random: BatchRandom, probability: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Augmented images and what was done to them.

    Args:
        images: (B, C, H, W) in [-1, 1].
        random: of this batch.
        probability: of each operation but the first, 0.12 to 0.15 as published; 0 does nothing.

    Returns:
        Images (B, C, H, W) and labels (B, 9). Images that are at most mirrored keep their pixels exactly.
    """
    if probability <= 0:
        return images, images.new_zeros(len(images), NUM_LABELS)
    labels, matrix = _draw(random, probability, images.device)
    mirrored = torch.where(labels[:, 0, None, None, None] > 0, images.flip(-1), images)
    mirrored = torch.where(labels[:, 1, None, None, None] > 0, mirrored.flip(-2), mirrored)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = F.grid_sample(mirrored, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    is_moved = labels[:, 2:].any(1)[:, None, None, None]
    return torch.where(is_moved, moved.clamp(-1, 1), mirrored), labels.to(images.dtype)


def _draw(random: BatchRandom, probability: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (B, 9) and the maps (B, 2, 3) from places in the new image to places in the mirrored one."""

    def happens() -> torch.Tensor:
        return (random.uniform() < probability).float()

    def angle() -> torch.Tensor:
        return (2 * random.uniform() - 1) * math.pi

    mirror_x = random.integers(2).float()
    mirror_y = random.integers(2) * happens()
    scale = random.normal() * happens()
    rotation = angle() * happens()
    direction, stretch = angle(), random.normal() * happens()
    shift = random.normal(2) * happens()[:, None]
    columns = [mirror_x, mirror_y, scale, rotation.cos() - 1, rotation.sin()]
    columns += [stretch * direction.cos(), stretch * direction.sin(), shift[:, 0], shift[:, 1]]
    labels = torch.stack(columns, dim=1).to(device)

    factor = 2 ** (0.2 * stretch)
    turn = _rotations(direction)
    stretched = turn @ torch.diag_embed(torch.stack([factor, 1 / factor], dim=1)) @ turn.mT
    linear = _rotations(rotation) @ stretched * (2 ** (0.2 * scale))[:, None, None]
    inverse = torch.linalg.inv(linear)
    offset = -inverse @ (2 * shift / 8)[:, :, None]  # a side is 2 long in these coordinates
    return labels, torch.cat([inverse, offset], dim=2).to(device)


def _rotations(angle: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 2, 2)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)
