"""Images to measure: a folder, tar or zip archives, an .npz file or a dataset, one at a time as uint8 tensors.

Everything is looked at when a set is opened, so that a damaged or odd file shows before any work is done.
"""

import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from ..training.data import DigitsDataset, ImageDataset

_ARCHIVES = (".tar", ".zip")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm"}


class ImageSet(Dataset):
    """Images of one size: item k is a uint8 tensor (C, H, W) with one or three channels.

    Args:
        name: for messages and results.
        size: number of images.
        read: index -> pixels, (H, W) or (H, W, C) in uint8.
        fingerprint: hash of the content.
        prompts: of each image, if known.
    """

    def __init__(
        self,
        name: str,
        size: int,
        read: Callable[[int], np.ndarray],
        fingerprint: str,
        prompts: list[str] | None = None,
    ):
        if size < 1:
            raise ValueError(f"{name} holds no images.")
        self.name, self.fingerprint, self.prompts = name, fingerprint, prompts
        self._size, self._read = size, read
        self.shape = tuple(self[0].shape)
        """(C, H, W)."""

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> torch.Tensor:
        pixels = self._read(index)
        return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1).copy())


def open_images(source: str | Path, resolution: int | None = None, split: str = "train", image_column=None) -> ImageSet:
    """The images of a source.

    Args:
        source: a folder of images (read with its subfolders, in the order of their names) or of archives; a .tar or .zip that
            is not compressed; an .npz with images as "arr_0" (the format of the ADM evaluation); "digits" for the digits of
            scikit-learn; or "hub:NAME" for a dataset on the Hub or on disk.
        resolution: side of the squares that images of datasets are resized and cropped to; other sources are never resized.
        split, image_column: of a dataset.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: naming the file, if an image is damaged, or differs from the first in size or in its channels.
    """
    source = str(source)
    if source == "digits":
        return _dataset_images(source, DigitsDataset(), "scikit-learn digits")
    if source.startswith("hub:"):
        if resolution is None:
            raise ValueError(f"`resolution` must be given with {source!r}: the side of the squares to cut.")
        dataset = ImageDataset(source.removeprefix("hub:"), None, resolution, split=split, image_column=image_column)
        return _dataset_images(source, dataset, f"{dataset.rows._fingerprint}/{resolution}")
    path = Path(source)
    if path.suffix == ".npz" and path.is_file():
        return _array_images(path)
    if path.suffix in _ARCHIVES and path.is_file():
        return _file_images(path, _archive_entries([path]))
    if path.is_dir():
        return _file_images(path, _folder_entries(path))
    raise FileNotFoundError(f"{source!r} is no folder, .tar, .zip or .npz file of images, and neither 'digits' nor 'hub:NAME'.")


Entry = tuple[str, Path, int, int]
"""Name, and file, offset and length of its bytes."""


def _folder_entries(folder: Path) -> list[Entry]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    if not files:
        return _archive_entries(sorted(path for path in folder.iterdir() if path.suffix in _ARCHIVES))
    return [(str(path.relative_to(folder)), path, 0, path.stat().st_size) for path in files]


def _archive_entries(archives: list[Path]) -> list[Entry]:
    entries = []
    for path in archives:
        try:
            members = _tar_members(path) if path.suffix == ".tar" else _zip_members(path)
        except (tarfile.TarError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is no readable, uncompressed archive: {error}.") from error
        found = [member for member in members if Path(member[0]).suffix.lower() in SUFFIXES]
        entries += [(f"{path.name}/{name}", path, offset, size) for name, offset, size in sorted(found)]
    return entries


def _tar_members(path: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(path, "r:") as archive:
        return [(member.name, member.offset_data, member.size) for member in archive if member.isfile()]


def _zip_members(path: Path) -> list[tuple[str, int, int]]:
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        infos = [info for info in archive.infolist() if not info.is_dir()]
        compressed = [info.filename for info in infos if info.compress_type != zipfile.ZIP_STORED]
        if compressed:
            raise zipfile.BadZipFile(f"{compressed[0]} is compressed; pack the images with `zip -0`")
        return [(info.filename, _content_offset(file, info), info.file_size) for info in infos]


def _content_offset(file, info: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin: behind a header with lengths of its own for name and extra field."""
    file.seek(info.header_offset + 26)
    return info.header_offset + 30 + sum(np.frombuffer(file.read(4), "<u2").tolist())


def _file_images(source: Path, entries: list[Entry]) -> ImageSet:
    if not entries:
        raise ValueError(f"{source} holds no images ({', '.join(sorted(SUFFIXES))}, or archives of them).")

    def content(entry: Entry) -> bytes:
        with open(entry[1], "rb") as file:
            file.seek(entry[2])
            return file.read(entry[3])

    digest, first = hashlib.blake2b(digest_size=16), None
    for entry in entries:
        data = content(entry)
        digest.update(hashlib.blake2b(data).digest())
        try:
            with Image.open(io.BytesIO(data)) as image:
                kind = (image.size, _mode(image))
                image.verify()
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{source}: {entry[0]} is no intact image ({error}). Replace or delete it.") from error
        first = first or (entry[0], kind)
        if kind != first[1]:
            raise ValueError(
                f"{source} mixes images: {first[0]} is {_describe(first[1])}, {entry[0]} is {_describe(kind)}. "
                "All must have one size and one kind of colour."
            )

    def read(index: int) -> np.ndarray:
        try:
            image = Image.open(io.BytesIO(content(entries[index])))
            return np.asarray(image.convert(_mode(image)))
        except OSError as error:  # what `verify` does not see, for example in a JPEG
            raise ValueError(f"{source}: {entries[index][0]} cannot be decoded ({error}). Replace or delete it.") from error

    return ImageSet(str(source), len(entries), read, digest.hexdigest(), _read_prompts(source, [entry[0] for entry in entries]))


def _mode(image: Image.Image) -> str:
    return "L" if image.mode in ("L", "1") else "RGB"


def _describe(kind: tuple[tuple[int, int], str]) -> str:
    (width, height), mode = kind
    return f"{width}x{height} {'grey' if mode == 'L' else 'colour'}"


def _read_prompts(source: Path, names: list[str]) -> list[str] | None:
    """Prompts of metadata.jsonl, as `image_store` writes it."""
    path = source / "metadata.jsonl"
    if not path.is_file():
        return None
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    prompts = {row["file_name"]: row["prompt"] for row in rows if "prompt" in row}
    found = [prompts.get(Path(name).name) for name in names]
    return None if None in found else found


def _array_images(path: Path) -> ImageSet:
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo("arr_0.npy")
            with archive.open(info) as file:
                np.lib.format.read_magic(file)
                shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
                start = file.tell()
            if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or is_fortran:
                raise ValueError(f"`arr_0` must hold uint8 images (N, H, W, 3), got {dtype} of shape {shape}.")
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError("it is compressed; write it with `numpy.savez`, so that it can be read in pieces.")
            damaged = archive.testzip()  # checks every byte
            if damaged:
                raise ValueError(f"{damaged} is damaged.")
    except (KeyError, zipfile.BadZipFile, ValueError) as error:
        raise ValueError(f"{path} holds no readable images: {error}") from error
    with open(path, "rb") as file:
        start += _content_offset(file, info)
    size = int(np.prod(shape[1:]))

    def read(index: int) -> np.ndarray:
        with open(path, "rb") as file:
            file.seek(start + index * size)
            return np.frombuffer(file.read(size), np.uint8).reshape(shape[1:])

    return ImageSet(str(path), shape[0], read, f"{info.CRC:08x}-{info.file_size}")


def _dataset_images(name: str, dataset, fingerprint: str) -> ImageSet:
    def read(index: int) -> np.ndarray:
        return ((dataset[index]["images"] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()

    return ImageSet(name, len(dataset), read, hashlib.blake2b(fingerprint.encode(), digest_size=16).hexdigest())
