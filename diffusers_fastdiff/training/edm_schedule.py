"""Schedules of EDM and FDM that count images, as pure functions of the optimisation step.

Source: Karras et al., arXiv 2206.00364, table 7 (half-life of the average, ramp-up of the learning rate).
"""

import math


def half_life_decay(step: int, batch_size: int, half_life: float, ramp_up: float | None = 0.05) -> float:
    """Decay of the moving average in optimisation step `step` (from 0).

    Args:
        step: optimisation steps done.
        batch_size: images in a step.
        half_life: images after which a weight counts half; 0 for no average.
        ramp_up: the half-life is at most this share of the images seen, so that the average does not remember the random start;
            None for none.
    """
    if ramp_up is not None:
        half_life = min(half_life, ramp_up * step * batch_size)
    return 0.0 if half_life <= 0 else 0.5 ** (batch_size / half_life)


def ramp_up_steps(images: float, batch_size: int) -> int:
    """Optimisation steps of a ramp-up that lasts for `images` training images."""
    return math.ceil(images / batch_size)
