"""Inception-v3 (Szegedy et al., arXiv 1512.00567) in the two forms that image metrics use.

Parameters have the names of torchvision's model, which is also how the weights of pytorch-fid and torch-fidelity are called.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

_AVERAGE, _MAX = "average", "max"


class ConvUnit(nn.Module):
    """Convolution, normalisation, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel=1, stride: int = 1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


_CHAINS: dict[str, Callable[[int], dict[str, list[tuple]]]] = {
    "A": lambda pool: {
        "branch1x1": [("branch1x1", 64, 1)],
        "branch5x5": [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        "branch3x3dbl": [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        "pool": [("branch_pool", pool, 1)],
    },
    "B": lambda _: {
        "branch3x3": [("branch3x3", 384, 3, 2)],
        "branch3x3dbl": [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
        "pool": [],
    },
    "C": lambda c: {
        "branch1x1": [("branch1x1", 192, 1)],
        "branch7x7": [("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))],
        "branch7x7dbl": [
            ("branch7x7dbl_1", c, 1),
            ("branch7x7dbl_2", c, (7, 1)),
            ("branch7x7dbl_3", c, (1, 7)),
            ("branch7x7dbl_4", c, (7, 1)),
            ("branch7x7dbl_5", 192, (1, 7)),
        ],
        "pool": [("branch_pool", 192, 1)],
    },
    "D": lambda _: {
        "branch3x3": [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
        "branch7x7x3": [
            ("branch7x7x3_1", 192, 1),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, 3, 2),
        ],
        "pool": [],
    },
    "E": lambda _: {
        "branch1x1": [("branch1x1", 320, 1)],
        "branch3x3": [("branch3x3_1", 384, 1), (("branch3x3_2a", "branch3x3_2b"), 384, (1, 3))],
        "branch3x3dbl": [
            ("branch3x3dbl_1", 448, 1),
            ("branch3x3dbl_2", 384, 3),
            (("branch3x3dbl_3a", "branch3x3dbl_3b"), 384, (1, 3)),
        ],
        "pool": [("branch_pool", 192, 1)],
    },
}
"""Branches of each kind of block: chains of (name, channels, kernel, stride); a pair of names runs the kernel and its transpose
side by side. Blocks of stride 2 do not pad."""


class Block(nn.Module):
    """Parallel chains of convolutions, of which one begins with a pooling, joined along the channels."""

    def __init__(self, kind: str, in_channels: int, width: int = 0, pooling: str = _AVERAGE, count_include_pad: bool = False):
        super().__init__()
        self.chains = _CHAINS[kind](width)
        self.stride = 2 if kind in "BD" else 1
        self.pooling = _MAX if self.stride == 2 else pooling
        self.count_include_pad = count_include_pad
        self.out_channels = 0
        for chain in self.chains.values():
            channels = in_channels
            for names, out_channels, kernel, *stride in chain:
                pair = isinstance(names, tuple)
                for number, name in enumerate(names if pair else (names,)):
                    size = (kernel, kernel) if isinstance(kernel, int) else kernel[::-1] if number else kernel
                    padding = (0, 0) if stride else tuple(side // 2 for side in size)
                    self.add_module(name, ConvUnit(channels, out_channels, size, stride[0] if stride else 1, padding))
                channels = out_channels * (2 if pair else 1)
            self.out_channels += channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.branch(name, x) for name in self.chains], dim=1)

    def branch(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Output of one branch."""
        if name == "pool":
            padding = 0 if self.stride == 2 else 1
            if self.pooling == _MAX:
                x = F.max_pool2d(x, 3, self.stride, padding)
            else:
                x = F.avg_pool2d(x, 3, self.stride, padding, count_include_pad=self.count_include_pad)
        for names, *_ in self.chains[name]:
            pair = names if isinstance(names, tuple) else (names,)
            x = torch.cat([getattr(self, single)(x) for single in pair], dim=1)
        return x


class InceptionV3(nn.Module):
    """Trunk and last layer.

    Args:
        tensorflow: the network of 2015 that FID was defined with: 1008 classes, averages that leave out the padding, and a
            maximum in the last block. Otherwise the later one, with 1000 classes.
    """

    def __init__(self, tensorflow: bool):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvUnit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvUnit(64, 80)
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, 3)
        kinds = {
            "Mixed_5b": ("A", 32), "Mixed_5c": ("A", 64), "Mixed_5d": ("A", 64), "Mixed_6a": ("B", 0), "Mixed_6b": ("C", 128),
            "Mixed_6c": ("C", 160), "Mixed_6d": ("C", 160), "Mixed_6e": ("C", 192), "Mixed_7a": ("D", 0), "Mixed_7b": ("E", 0),
            "Mixed_7c": ("E", 0),
        }  # fmt: skip
        channels = 192
        for name, (kind, width) in kinds.items():
            pooling = _MAX if tensorflow and name == "Mixed_7c" else _AVERAGE
            block = Block(kind, channels, width, pooling, count_include_pad=not tensorflow)
            self.add_module(name, block)
            channels = block.out_channels
        self._blocks = tuple(kinds)
        self.fc = nn.Linear(channels, 1008 if tensorflow else 1000)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, 299, 299), about -1 .. 1 -> pooled features (B, 2048) and spatial features (B, 7, 17, 17).

        The spatial ones are the first seven channels of the first convolution of the block that TensorFlow calls mixed_6: those
        of the sFID (Nash et al., arXiv 2103.03841, as measured by the ADM evaluation).
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x, spatial = F.max_pool2d(x, 3, 2), None
        for name in self._blocks:
            block = getattr(self, name)
            if name == "Mixed_6d":
                spatial = block.branch("branch1x1", x)[:, :7]
            x = block(x)
        return x.mean(dim=(2, 3)), spatial


def resize_like_tensorflow(images: torch.Tensor, size: int) -> torch.Tensor:
    """Bilinear resize of (B, C, H, W) as in TensorFlow 1: output pixel k lies at k * H / size, and nothing is smoothed."""
    for dim in (2, 3):
        length = images.shape[dim]
        position = torch.arange(size, device=images.device, dtype=torch.float32) * (length / size)
        low = position.long().clamp_max(length - 1)
        high = (low + 1).clamp_max(length - 1)
        fraction = (position - low).view(-1, *[1] * (3 - dim))
        lower = images.index_select(dim, low)
        images = lower + (images.index_select(dim, high) - lower) * fraction
    return images
