"""A folder of numbered images that grows in any order, from any number of processes, and survives a kill.

Every file appears under its name only when it is complete. While images are drawn they are PNG files; archives are packed from
them at the end.
"""

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FORMATS = ("png", "tar", "npz")
_TEMPORARY = ".incomplete-"


class ImageStore:
    """Images 0 .. n - 1 of one run.

    Args:
        folder: where they go; made if it does not exist.
        rows: what to write about each image into metadata.jsonl, for example {"seed": 3, "label": 7}.
        formats: some of "png" (000000.png, ...), "tar" (numbered archives) and "npz" (the format of the ADM evaluation).
        images_per_archive: of each tar archive.
    """

    def __init__(
        self, folder: str | Path, rows: list[dict[str, Any]], formats: Iterable[str] = ("png",), images_per_archive: int = 1000
    ):
        self.folder, self.rows, self.formats = Path(folder), rows, tuple(formats)
        self._digits = max(6, len(str(len(rows) - 1)))
        self._shards = [range(s, min(s + images_per_archive, len(rows))) for s in range(0, len(rows), images_per_archive)]

    def start(self, settings: dict[str, Any]) -> None:
        """Begin or continue a run; only one process may call it, before the others save.

        Raises:
            ValueError: if the folder belongs to a run with other settings, or holds strange images.
        """
        path = self.folder / "sampling.json"
        settings = json.loads(json.dumps(settings))
        if path.is_file():
            saved = json.loads(path.read_text())
            different = [
                f"{key} ({saved.get(key)!r}, now {settings.get(key)!r})"
                for key in sorted(saved.keys() | settings.keys())
                if key != "command" and saved.get(key) != settings.get(key)
            ]
            if different:
                raise ValueError(
                    f"{self.folder} holds images of a run with other settings: {', '.join(different)}. Use the same, or choose "
                    "another `--output_dir`."
                )
        elif any(self.folder.glob("*.png")):
            raise ValueError(f"{self.folder} holds images of something else. Choose another `--output_dir`.")
        for leftover in self.folder.glob(f"{_TEMPORARY}*"):
            leftover.unlink()
        lines = [json.dumps({"file_name": self.path(k).name, **row}, ensure_ascii=False) for k, row in enumerate(self.rows)]
        self._write("metadata.jsonl", ("\n".join(lines) + "\n").encode())
        if not path.is_file():
            self._write("sampling.json", (json.dumps(settings, indent=2) + "\n").encode())

    def path(self, index: int) -> Path:
        """File of one image."""
        return self.folder / f"{index:0{self._digits}}.png"

    def finished(self) -> set[int]:
        """Images that exist, loose or packed."""
        names = set(os.listdir(self.folder))
        if "images.npz" in names and "npz" in self.formats:
            return set(range(len(self.rows)))
        packed = {index for shard in self._shards if self._shard_name(shard) in names for index in shard}
        return packed | {index for index in range(len(self.rows)) if self.path(index).name in names}

    def save(self, index: int, picture: Image.Image) -> None:
        """Write one image. All images must have one size and mode.

        Raises:
            OSError: saying that everything finished is kept, if the disk is full.
        """
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        self._write(self.path(index).name, buffer.getvalue())

    def pack(self) -> None:
        """Turn all images into the formats that were asked for; only one process may call it, when all are finished."""
        if "npz" in self.formats and not (self.folder / "images.npz").is_file():
            self._pack_npz()
        for shard in self._shards if "tar" in self.formats else ():
            if not (self.folder / self._shard_name(shard)).is_file():
                self._pack_tar(shard)
            self._remove_loose(shard)
        self._remove_loose(range(len(self.rows)))

    def _remove_loose(self, indices: range) -> None:
        if "png" not in self.formats:
            for index in indices:
                self.path(index).unlink(missing_ok=True)

    def _shard_name(self, shard: range) -> str:
        return f"images-{self._shards.index(shard):05}-of-{len(self._shards):05}.tar"

    def _pack_tar(self, shard: range) -> None:
        """Pairs of 000000.png and 000000.json, as WebDataset reads them."""

        def write(file) -> None:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
                for index in shard:
                    path = self.path(index)
                    row = json.dumps(self.rows[index], ensure_ascii=False).encode()
                    for name, data in ((path.name, path.read_bytes()), (f"{path.stem}.json", row)):
                        info = tarfile.TarInfo(name)
                        info.size = len(data)
                        archive.addfile(info, io.BytesIO(data))

        self._write(self._shard_name(shard), write)

    def _pack_npz(self) -> None:
        """uint8 colour images (N, H, W, 3) as arr_0, and labels, if there are any, as arr_1; written row by row."""

        def write(file) -> None:
            with Image.open(self.path(0)) as first:
                width, height = first.size
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as array:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (len(self.rows), height, width, 3)}
                    np.lib.format.write_array_header_1_0(array, header)
                    for index in range(len(self.rows)):
                        with Image.open(self.path(index)) as picture:
                            array.write(picture.convert("RGB").tobytes())
                if "label" in self.rows[0]:
                    with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as array:
                        np.lib.format.write_array(array, np.array([row["label"] for row in self.rows]), allow_pickle=False)

        self._write("images.npz", write)

    def _write(self, name: str, content) -> None:
        """Write bytes, or call a function with the open file, and rename."""
        partial = self.folder / f"{_TEMPORARY}{os.getpid()}-{name}"
        try:
            with open(partial, "wb") as file:
                content(file) if callable(content) else file.write(content)
            os.replace(partial, self.folder / name)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OSError(
                f"{self.folder / name} cannot be written ({error.strerror or error}). Finished images are kept: make room and "
                "run the same command again."
            ) from error
