"""Training data as map-style datasets of tensors, and the order in which they are read.

A dataset yields dictionaries: "images" (C, H, W) float32 in [-1, 1] (or "moments", see `latents`), and, where the data has
them, "labels" (integer) or "conditioning" (vector).
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from ..errors import require
from .randomness import derive_seed


@dataclass(frozen=True)
class DataInfo:
    """What a model has to know about its data."""

    channels: int
    resolution: int
    label_names: tuple[str, ...] | None
    """Names of the classes; None without labels."""
    conditioning_dim: int | None = None


class DigitsDataset(Dataset):
    """The 1797 handwritten digits of scikit-learn: 8x8, one channel, 17 grey levels."""

    def __init__(self):
        digits = require("sklearn.datasets", "train").load_digits()
        self.images = torch.from_numpy(digits.images.astype(np.float32) / 8 - 1)[:, None]
        self.labels = torch.from_numpy(digits.target)
        self.info = DataInfo(1, 8, tuple(map(str, range(10))))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"images": self.images[index], "labels": self.labels[index]}


class ImageDataset(Dataset):
    """Images of a folder or of a dataset on the Hub, resized on the short side and cropped to a centred square.

    Args:
        name: dataset on the Hub or on disk, as for `datasets.load_dataset`; None with `data_dir` for a folder of images (one
            subfolder for each class, or a metadata file).
        data_dir: folder of images.
        resolution: side of the square, in pixels.
        config_name, split: as for `datasets.load_dataset`.
        image_column, label_column, conditioning_column: columns to use; None finds the image and, if there is one, the label.

    Raises:
        ValueError: if a column is missing or of the wrong kind.
    """

    def __init__(
        self,
        name: str | None,
        data_dir: str | None,
        resolution: int,
        config_name: str | None = None,
        split: str = "train",
        image_column: str | None = None,
        label_column: str | None = None,
        conditioning_column: str | None = None,
    ):
        datasets = require("datasets", "train")
        self.rows = datasets.load_dataset(name or "imagefolder", config_name, data_dir=data_dir, split=split)
        features = self.rows.features
        for column in (image_column, label_column, conditioning_column):
            if column is not None and column not in features:
                raise ValueError(f"The data has no column {column!r}; it has {sorted(features)}.")
        images = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
        labels = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        if not (image_column or images):
            raise ValueError(f"The data has no image column; it has {sorted(features)}. Name one with `--image_column`.")
        self.image_column = image_column or images[0]
        self.conditioning_column = conditioning_column
        self.label_column = None if conditioning_column else label_column or (labels[0] if labels else None)
        self.resolution = resolution
        self.mode = "L" if self.rows[0][self.image_column].mode in ("L", "1") else "RGB"
        self.info = DataInfo(
            channels=1 if self.mode == "L" else 3,
            resolution=resolution,
            label_names=_label_names(self.rows, self.label_column),
            conditioning_dim=len(self.rows[0][conditioning_column]) if conditioning_column else None,
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[int(index)]
        item = {"images": image_to_tensor(row[self.image_column].convert(self.mode), self.resolution)}
        if self.label_column is not None:
            item["labels"] = torch.tensor(int(row[self.label_column]))
        if self.conditioning_column is not None:
            item["conditioning"] = torch.tensor(row[self.conditioning_column], dtype=torch.float32)
        return item


def image_to_tensor(image: Image.Image, resolution: int) -> torch.Tensor:
    """Resize the short side to `resolution`, crop the centre; (C, resolution, resolution) in [-1, 1]."""
    scale = resolution / min(image.size)
    size = [max(resolution, round(side * scale)) for side in image.size]
    image = image.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)
    left, top = ((side - resolution) // 2 for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + resolution, top + resolution)), dtype=np.float32)
    pixels = pixels.reshape(resolution, resolution, -1) / 127.5 - 1
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class ShuffledBatches(Sampler[list[int]]):
    """Endless batches of indices, a new order in each pass, as a pure function of the position.

    Batch `k` of the run is the `k`-th piece of the passes laid end to end; process `rank` of `world_size` gets the batches
    `rank, rank + world_size, ...`, so that together the processes read what one process with their total batch would read.

    Args:
        num_samples: size of the dataset.
        batch_size: samples for each process.
        seed: of the order.
        first_round: rounds (one batch for each process) that have been read already.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int, first_round: int = 0, rank: int = 0, world_size: int = 1):
        if num_samples < 1:
            raise ValueError("The dataset is empty.")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.first_round, self.rank, self.world_size = first_round, rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        position = (self.first_round * self.world_size + self.rank) * self.batch_size
        while True:
            batch = []
            for place in range(position, position + self.batch_size):
                if place // self.num_samples != epoch:
                    epoch = place // self.num_samples
                    generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
                    order = torch.randperm(self.num_samples, generator=generator)
                batch.append(int(order[place % self.num_samples]))
            yield batch
            position += self.world_size * self.batch_size


def _label_names(rows: Any, column: str | None) -> tuple[str, ...] | None:
    if column is None:
        return None
    names = getattr(rows.features[column], "names", None)
    return tuple(names) if names else tuple(map(str, range(max(rows[column]) + 1)))


def open_images(args: argparse.Namespace) -> Dataset:
    """The images that the data flags of `arguments.add_data_arguments` name.

    Raises:
        ValueError: if the flags contradict each other or the data.
    """
    if args.dataset_name is None and args.train_data_dir is None:
        if args.resolution not in (None, 8):
            raise ValueError(f"`--resolution` must be left out or 8 for the digits, got {args.resolution}.")
        return DigitsDataset()
    if args.resolution is None:
        raise ValueError("`--resolution` must be given for your own images: the side of the squares to train on.")
    return ImageDataset(
        args.dataset_name,
        args.train_data_dir,
        args.resolution,
        config_name=args.dataset_config_name,
        split=args.dataset_split,
        image_column=args.image_column,
        label_column=args.label_column,
        conditioning_column=args.conditioning_column,
    )
