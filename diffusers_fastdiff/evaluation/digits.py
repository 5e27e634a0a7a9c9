"""Quality of 8x8 digits: does a classifier read the intended class, how close is the distribution, is anything copied."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from ..training.data import DigitsDataset
from .intervals import bootstrap_error, estimate, mean_estimate, share_estimate
from .metrics import FrechetReference, moments, nearest_distances

_WEIGHTS = Path(__file__).parent / "digits_classifier.safetensors"


class DigitsClassifier(nn.Module):
    """Convolutional classifier of 8x8 digits; the input of its last layer serves as features (64 numbers)."""

    def __init__(self):
        super().__init__()
        self.conv_1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv_2 = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 4 * 4, 64)
        self.output = nn.Linear(64, 10)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 1, 8, 8) in [-1, 1] -> (B, 64)."""
        x = F.relu(self.conv_1(images))
        x = F.max_pool2d(F.relu(self.conv_2(x)), 2)
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 1, 8, 8) in [-1, 1] -> logits (B, 10)."""
        return self.output(self.features(images))


def load_digits_classifier() -> DigitsClassifier:
    """The embedded classifier; examples/train_digits_classifier.py made it and says how well it reads held-out digits."""
    classifier = DigitsClassifier()
    classifier.load_state_dict({key: value.float() for key, value in load_file(_WEIGHTS).items()})
    return classifier.eval()


def evaluate_digits(images: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """The values of `digit_estimates` without their intervals, and "num_images"."""
    estimates = digit_estimates(images, labels, bootstrap=0)
    return {"num_images": len(images)} | {name: each["value"] for name, each in estimates.items()}


@torch.no_grad()
def digit_estimates(images: torch.Tensor, labels: torch.Tensor, bootstrap: int = 50) -> dict[str, dict[str, Any]]:
    """Numbers for samples of digits, with intervals (see `intervals`).

    Args:
        images: (B, 1, 8, 8) in [-1, 1].
        labels: intended classes, (B,).
        bootstrap: resampled sets for the standard error of the Frechet distance, at least 2; 0 for none.

    Returns:
        "accuracy" (share read as intended), "frechet_distance" to the real digits in the features of the classifier,
        "nearest_distance" (mean distance to the nearest training image, grey levels 0 .. 1) and its value for real digits,
        and "closer_than_real" (share of samples closer than 1 % of the real digits are to each other).
    """
    classifier, real = load_digits_classifier(), DigitsDataset()
    distances = nearest_distances(images, real.images) / 2  # in grey levels 0 .. 1
    real_distances = nearest_distances(real.images, real.images, exclude_self=True) / 2
    features, reference = classifier.features(images), FrechetReference(moments(classifier.features(real.images)))
    measure = lambda weights: reference.distance(moments(features, weights))  # noqa: E731
    error = bootstrap_error(measure, len(images), bootstrap) if bootstrap else None
    return {
        "accuracy": share_estimate(classifier(images).argmax(1) == labels),
        "frechet_distance": estimate(measure(torch.ones(len(images))), error),
        "nearest_distance": mean_estimate(distances),
        "nearest_distance_real": mean_estimate(real_distances),
        "closer_than_real": share_estimate(distances < real_distances.quantile(0.01)),
    }
