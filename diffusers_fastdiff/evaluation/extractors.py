"""Networks that turn images into features. What a result means depends on them, so each has a name that the result carries."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from .digits import load_digits_classifier
from .inception import InceptionV3, resize_like_tensorflow

EXTRACTORS = ("digits-classifier", "inception-2015", "inception-torchvision")


class Features(NamedTuple):
    """What an extractor says about a batch of B images; float32."""

    pooled: torch.Tensor
    """(B, d): for FID, KID, precision and recall."""
    spatial: torch.Tensor
    """(B, s): with places, for sFID."""
    logits: torch.Tensor
    """(B, classes): for the Inception Score."""


class FeatureExtractor(nn.Module):
    """Base of extractors: `forward` takes uint8 images (B, C, H, W) and returns [`Features`].

    Attributes:
        name: which network and preprocessing.
        identity: the name and a hash of the weights; features of different identities must not be compared.
        sizes: d, s and the number of classes.
        shape: (C, H, W) that images must have, or None if any will do.
    """

    name: str
    sizes: tuple[int, int, int]
    shape: tuple[int, int, int] | None = None

    @cached_property
    def identity(self) -> str:
        digest = hashlib.blake2b(digest_size=6)
        for key, value in sorted(self.state_dict().items()):
            digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        return f"{self.name}@{digest.hexdigest()}"

    def check(self, shape: tuple[int, ...], source: str) -> None:
        """Refuse images (C, H, W) that the extractor was not made for.

        Raises:
            ValueError: naming the source.
        """
        if self.shape is not None and tuple(shape) not in (self.shape, (3, *self.shape[1:])):
            wanted, got = ("x".join(map(str, sizes)) for sizes in (self.shape, shape))
            raise ValueError(
                f"The extractor {self.name!r} is for images of {wanted}, but {source} has {got}. Choose another "
                "`--extractor` and give its weights."
            )


class DigitsExtractor(FeatureExtractor):
    """The embedded classifier of 8x8 digits. Colour images of digits, as the ADM format has them, are averaged to grey."""

    name, sizes, shape = "digits-classifier", (64, 7 * 16, 10), (1, 8, 8)

    def __init__(self):
        super().__init__()
        self.classifier = load_digits_classifier()

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> Features:
        x = images.float().mean(dim=1, keepdim=True) / 127.5 - 1
        spatial = F.max_pool2d(F.relu(self.classifier.conv_2(F.relu(self.classifier.conv_1(x)))), 2)
        pooled = self.classifier.features(x)
        return Features(pooled, spatial[:, :7].flatten(1), self.classifier.output(pooled))


class InceptionExtractor(FeatureExtractor):
    """Inception-v3 from a file of weights.

    "inception-2015" is the network converted from TensorFlow that published FIDs use, with TensorFlow's resize and scaling.
    "inception-torchvision" is the later network with the antialiased resize and the scaling of its training. Their numbers are
    not comparable. The logits leave out the bias of the last layer, as in the original Inception Score of the former.

    Args:
        name: one of the two.
        weights: a safetensors file with the parameters of torchvision's, pytorch-fid's or torch-fidelity's model.

    Raises:
        ValueError: if the file is of another kind or does not fit the network.
    """

    def __init__(self, name: str, weights: str | Path):
        super().__init__()
        self.name = name
        self.is_2015 = name == "inception-2015"
        self.network = InceptionV3(tensorflow=self.is_2015)
        self.sizes = (2048, 7 * 17 * 17, self.network.fc.out_features)
        state = {key: value for key, value in _read_weights(weights).items() if not key.startswith("AuxLogits.")}
        expected = self.network.state_dict()
        optional = {key for key in expected if key.endswith("num_batches_tracked")}
        wrong = sorted(
            (expected.keys() - optional - state.keys())
            | (state.keys() - expected.keys())
            | {key for key in expected.keys() & state.keys() if expected[key].shape != state[key].shape}
        )
        if wrong:
            raise ValueError(
                f"`weights` {str(weights)!r} does not fit {name!r}: {len(wrong)} missing, unknown or wrongly shaped parameters "
                f"({', '.join(wrong[:3])}). The network of 2015 has 1008 classes, torchvision's 1000."
            )
        self.network.load_state_dict(state, strict=False)
        self.eval()

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> Features:
        x = images.float().expand(-1, 3, -1, -1)
        if self.is_2015:
            x = (resize_like_tensorflow(x, 299) - 128) / 128
        else:
            x = F.interpolate(x, (299, 299), mode="bilinear", antialias=True, align_corners=False) / 255
            mean, std = x.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
            x = (x - mean) / std
        pooled, spatial = self.network(x)
        return Features(pooled, spatial.flatten(1), F.linear(pooled, self.network.fc.weight))


def load_extractor(name: str = "digits-classifier", weights: str | Path | None = None) -> FeatureExtractor:
    """An extractor by name.

    Args:
        name: one of `EXTRACTORS`.
        weights: safetensors file of an Inception network; the digits classifier is embedded.

    Raises:
        ValueError: for an unknown name, and if weights are missing, superfluous or wrong.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"`--extractor` must be one of {EXTRACTORS}, got {name!r}.")
    if name == "digits-classifier":
        if weights is not None:
            raise ValueError("`--extractor_weights` must be left out for 'digits-classifier', which is embedded.")
        return DigitsExtractor().eval()
    if weights is None:
        raise ValueError(f"`--extractor_weights` must be given for {name!r}: a safetensors file with its parameters.")
    return InceptionExtractor(name, weights)


def _read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"`--extractor_weights` {str(path)!r} is not a file.")
    try:
        return load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"`--extractor_weights` {str(path)!r} is no safetensors file ({error}). Pickles and TorchScript archives can run "
            "code and are not opened. Convert a state dict with `save_file(torch.load(path, weights_only=True), "
            '"weights.safetensors")`.'
        ) from error
