"""Preparation of a data set: every image resized and cropped once, all in one ZIP archive that `zip_data.ZipDataset` reads."""

import io
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from ..errors import check_writable, require
from .zip_data import SUFFIXES, ZipDataset

CROPS = ("center", "wide", "none")


def fit(image: Image.Image, width: int, height: int, crop: str) -> Image.Image | None:
    """An image of the wanted size, or None if it is too small for that.

    Args:
        image: any size.
        width, height: wanted.
        crop: "center" crops the middle with the wanted proportions, then shrinks; "wide" does the same and fills up to a square
            of side `width` with black above and below; "none" only shrinks, changing proportions.

    Raises:
        ValueError: for an unknown crop.
    """
    if crop not in CROPS:
        raise ValueError(f"`crop` must be one of {CROPS}, got {crop!r}.")
    if image.width < width or image.height < height:
        return None
    if crop != "none":
        scale = min(image.width / width, image.height / height)
        box_width, box_height = round(width * scale), round(height * scale)
        left, top = (image.width - box_width) // 2, (image.height - box_height) // 2
        image = image.crop((left, top, left + box_width, top + box_height))
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    if crop == "wide" and width > height:
        square = Image.new(image.mode, (width, width))
        square.paste(image, (0, (width - height) // 2))
        image = square
    return image


def read_images(source: str, split: str = "train", column: str | None = None) -> Iterator[tuple[Image.Image, int | None]]:
    """Images with their labels, from a folder (one subfolder for each class, or none), a ZIP archive, or a data set on the Hub.

    Raises:
        ValueError: if there is none.
    """
    path = Path(source)
    if path.is_file():
        if not zipfile.is_zipfile(path):
            raise ValueError(f"`source` {source!r} is neither a folder nor a ZIP archive.")
        archive = ZipDataset(path, resolution=1)
        for index in range(len(archive)):
            yield archive.image(index), None if archive.labels is None else archive.labels[index]
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise ValueError(f"`source` {source!r} holds no images ({', '.join(sorted(SUFFIXES))}).")
        classes = sorted({file.relative_to(path).parts[0] for file in files if file.parent != path})
        has_labels = len(classes) > 1 and all(file.parent != path for file in files)
        for file in files:
            with Image.open(file) as image:
                image.load()
            yield image, classes.index(file.relative_to(path).parts[0]) if has_labels else None
    else:
        datasets = require("datasets", "train")
        rows = datasets.load_dataset(source, split=split)
        images = [key for key, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        labels = [key for key, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
        if not (column or images):
            raise ValueError(f"`source` {source!r} has no column of images; it has {sorted(rows.features)}.")
        for row in rows:
            yield row[column or images[0]], row[labels[0]] if labels else None


def write_archive(
    images: Iterator[tuple[Image.Image, int | None]],
    destination: str | Path,
    width: int,
    height: int,
    crop: str,
    mode: str = "RGB",
) -> tuple[int, int]:
    """Write an archive of PNG files with `dataset.json`; it appears under its name when it is complete.

    Args:
        images: see `read_images`.
        destination: the archive, ".zip".
        width, height, crop: see `fit`.
        mode: "RGB" or "L".

    Returns:
        How many images were written, and how many were too small.

    Raises:
        ValueError: if nothing is left to write, the name is no archive's, or only some images have labels.
    """
    destination = Path(destination)
    if destination.suffix.lower() != ".zip":
        raise ValueError(f"`dest` must end in .zip, got {str(destination)!r}.")
    check_writable(destination.parent, "dest")
    partial = destination.with_name(f".{destination.name}.{os.getpid()}")
    labels: list[tuple[str, int | None]] = []
    skipped = 0
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            for image, label in images:
                fitted = fit(image.convert(mode), width, height, crop)
                if fitted is None:
                    skipped += 1
                    continue
                name, content = f"{len(labels) // 1000:05d}/img{len(labels):08d}.png", io.BytesIO()
                fitted.save(content, format="png", compress_level=1)
                archive.writestr(zipfile.ZipInfo(name), content.getvalue())
                labels.append((name, label))
            given = [label is not None for _, label in labels]
            if not labels:
                raise ValueError(f"`source` has no image of at least {width} x {height} pixels ({skipped} are smaller).")
            if any(given) and not all(given):
                raise ValueError("`source` has labels for some images only.")
            listed = json.dumps({"labels": labels if all(given) else None})
            archive.writestr(zipfile.ZipInfo("dataset.json"), listed)
        partial.replace(destination)
    finally:
        partial.unlink(missing_ok=True)
    return len(labels), skipped
