"""Random numbers that are a pure function of seed and step.

A training step then draws the same numbers in a resumed run as in an uninterrupted one, and on two processes (or in two
accumulation rounds) as on one with the same batch in total.
"""

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any number of labels, the same in every process and version."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class BatchRandom:
    """Draws for one slice of the batch of one optimisation step.

    Every draw is made for the whole batch and cut, so it does not depend on how the batch is split.

    Args:
        seed: seed of the run.
        step: optimisation step.
        batch_size: samples in the whole batch, over all processes and accumulation rounds.
        start: first sample of this slice.
        stop: one past its last sample.
        device: where to draw; numbers differ between kinds of devices.
    """

    def __init__(self, seed: int, step: int, batch_size: int, start: int, stop: int, device: torch.device | str = "cpu"):
        self._generator = torch.Generator(device).manual_seed(derive_seed(seed, step))
        self._batch_size, self._slice = batch_size, slice(start, stop)

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal, (slice, *shape)."""
        device = self._generator.device
        return torch.randn(self._batch_size, *shape, generator=self._generator, device=device)[self._slice]

    def uniform(self, *shape: int) -> torch.Tensor:
        """Uniform in [0, 1), (slice, *shape)."""
        device = self._generator.device
        return torch.rand(self._batch_size, *shape, generator=self._generator, device=device)[self._slice]

    def integers(self, high: int) -> torch.Tensor:
        """Uniform in 0 .. high - 1, (slice,)."""
        device = self._generator.device
        return torch.randint(high, (self._batch_size,), generator=self._generator, device=device)[self._slice]

    def drop(self, labels: torch.Tensor, probability: float, null: int | float) -> torch.Tensor:
        """Replace whole samples of `labels` (slice, ...) by `null` with the given probability."""
        dropped = (self.uniform() < probability).to(labels.device)
        return labels.masked_fill(dropped.reshape(-1, *[1] * (labels.ndim - 1)), null)

    def flip(self, images: torch.Tensor) -> torch.Tensor:
        """Mirror each image (slice, C, H, W) left to right with probability 1/2."""
        flipped = (self.uniform() < 0.5).to(images.device).reshape(-1, 1, 1, 1)
        return torch.where(flipped, images.flip(-1), images)
