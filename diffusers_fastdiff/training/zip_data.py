"""Training images in a ZIP archive: one file for a data set, in the layout that EDM's tools use.

Images are files anywhere in the archive. Labels are those of `dataset.json`, `{"labels": [["00000/img.png", 3], ...]}`, or,
where it is missing, the images' folders at the top, if there are several.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from .data import DataInfo, image_to_tensor

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_LARGEST = 2**28


class ZipDataset(Dataset):
    """Images of an archive, resized and cropped to squares where they are none of that size; see `training.data`.

    Args:
        path: the archive.
        resolution: side of the images; None for that of the first one, which then must be square.

    Raises:
        ValueError: if the file is no archive of images, or its labels do not fit them.
    """

    def __init__(self, path: str | Path, resolution: int | None = None):
        self.path = Path(path)
        if not self.path.is_file() or not zipfile.is_zipfile(self.path):
            raise ValueError(f"`train_data_dir` {str(path)!r} is not a ZIP archive.")
        self._archive: zipfile.ZipFile | None = None
        self.names = sorted(name for name in self._open().namelist() if Path(name).suffix.lower() in SUFFIXES)
        if not self.names:
            raise ValueError(f"`train_data_dir` {str(path)!r} holds no images ({', '.join(sorted(SUFFIXES))}).")
        self.labels, label_names = self._read_labels()
        first = self.image(0)
        self.mode = "L" if first.mode in ("L", "1") else "RGB"
        if resolution is None and first.width != first.height:
            raise ValueError(f"`resolution` must be given: the images of {str(path)!r} are not square ({first.size}).")
        self.resolution = resolution or first.width
        self.info = DataInfo(1 if self.mode == "L" else 3, self.resolution, label_names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {"images": image_to_tensor(self.image(int(index)).convert(self.mode), self.resolution)}
        if self.labels is not None:
            item["labels"] = torch.tensor(self.labels[int(index)])
        return item

    def _open(self) -> zipfile.ZipFile:
        if self._archive is None:
            self._archive = zipfile.ZipFile(self.path)
        return self._archive

    def image(self, index: int) -> Image.Image:
        """An image as it is in the archive."""
        if self._open().getinfo(self.names[index]).file_size > _LARGEST:
            raise ValueError(f"{self.names[index]!r} of {str(self.path)!r} claims to be larger than {_LARGEST} bytes.")
        with self._open().open(self.names[index]) as file:
            image = Image.open(file)
            image.load()
        return image

    def _read_labels(self) -> tuple[list[int] | None, tuple[str, ...] | None]:
        if "dataset.json" in self._open().namelist():
            table = dict(json.loads(self._open().read("dataset.json")).get("labels") or [])
            if not table:
                return None, None
            missing = [name for name in self.names if name not in table]
            if missing or not all(isinstance(label, int) and label >= 0 for label in table.values()):
                raise ValueError(
                    f"`dataset.json` of {str(self.path)!r} must give each image a whole number >= 0; missing: {missing[:3]}."
                )
            labels = [table[name] for name in self.names]
            return labels, tuple(map(str, range(max(labels) + 1)))
        folders = sorted({name.partition("/")[0] for name in self.names if "/" in name})
        if len(folders) < 2 or any("/" not in name for name in self.names):
            return None, None
        return [folders.index(name.partition("/")[0]) for name in self.names], tuple(folders)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_archive": None}  # an open file does not travel to the workers of a loader
