"""Means and covariances of reference data in .npz files: our own, those of EDM and those of ADM.

EDM's hold "mu" and "sigma"; ADM's also "mu_s" and "sigma_s" of the spatial features, and images as "arr_0". Ours have all four
and say which extractor made them from how many images of which shape.
"""

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .metrics import Moments


@dataclass(frozen=True)
class Statistics:
    """What a file says about a set of images."""

    source: str
    pooled: Moments
    spatial: Moments | None = None
    extractor: str | None = None
    """Identity of the extractor; None if the file does not say."""
    image_shape: tuple[int, ...] | None = None
    num_images: int | None = None

    def check(self, identity: str, sizes: tuple[int, ...], image_shape: tuple[int, ...], made_by: str | None) -> None:
        """Refuse statistics of another extractor or resolution.

        Args:
            identity: of the extractor at hand, with its name before "@".
            sizes: of its pooled and spatial features.
            image_shape: (C, H, W) of the images at hand.
            made_by: name of the extractor that the user vouches for, for files that do not say.

        Raises:
            ValueError: naming the file.
        """
        name = identity.partition("@")[0]
        if self.extractor is None and made_by is None:
            raise ValueError(
                f"{self.source} does not say which extractor made it. If it was {name!r}, say `--reference_extractor {name}` "
                "(the files of EDM and ADM come from 'inception-2015')."
            )
        theirs = self.extractor or made_by
        if theirs not in (identity, name):
            raise ValueError(f"{self.source} was made by the extractor {theirs!r}, but this one is {identity!r}.")
        found = (len(self.pooled.mean), len(self.spatial.mean) if self.spatial else sizes[1])
        if found != tuple(sizes[:2]):
            raise ValueError(f"{self.source} has features of sizes {found}, the extractor {name!r} has {tuple(sizes[:2])}.")
        if self.image_shape is not None and tuple(self.image_shape[1:]) != tuple(image_shape[1:]):
            wanted, got = ("x".join(map(str, shape[1:])) for shape in (self.image_shape, image_shape))
            raise ValueError(f"{self.source} is of images of {wanted} pixels, but the images at hand have {got}.")


def save_statistics(path: str | Path, statistics: Statistics) -> None:
    """Write an .npz that this package, EDM's and ADM's programs can read."""
    arrays = {"mu": statistics.pooled.mean.numpy(), "sigma": statistics.pooled.covariance.numpy()}
    if statistics.spatial is not None:
        arrays |= {"mu_s": statistics.spatial.mean.numpy(), "sigma_s": statistics.spatial.covariance.numpy()}
    if statistics.extractor is not None:
        arrays["extractor"] = np.array(statistics.extractor)
    if statistics.image_shape is not None:
        arrays["image_shape"] = np.array(statistics.image_shape)
    if statistics.num_images is not None:
        arrays["num_images"] = np.array(statistics.num_images)
    path = Path(path)
    partial = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_statistics(path: str | Path) -> Statistics | None:
    """Read an .npz of statistics; None if it holds only images.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it is damaged, holds objects (which could run code), or neither statistics nor images.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            if not {"mu", "sigma"} <= names:
                if "arr_0" in names:
                    return None
                raise ValueError(f"it has {sorted(names)}, but must have 'mu' and 'sigma', or images as 'arr_0'")
            pooled = _moments(file["mu"], file["sigma"])
            spatial = _moments(file["mu_s"], file["sigma_s"]) if {"mu_s", "sigma_s"} <= names else None
            return Statistics(
                source=str(path),
                pooled=pooled,
                spatial=spatial,
                extractor=str(file["extractor"]) if "extractor" in names else None,
                image_shape=tuple(file["image_shape"].tolist()) if "image_shape" in names else None,
                num_images=int(file["num_images"]) if "num_images" in names else None,
            )
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds no readable statistics: {error}.") from error


def _moments(mean: np.ndarray, covariance: np.ndarray) -> Moments:
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"a mean of shape {mean.shape} does not go with a covariance of shape {covariance.shape}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError("it has values that are not finite")
    return Moments(torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(covariance.astype(np.float64)))
