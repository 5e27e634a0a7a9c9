"""Features of many images on disk: written by several processes, read in pieces."""

from pathlib import Path

import numpy as np
import torch


class FeatureFile:
    """A matrix of float32 in a .npy file, of which only the rows asked for are in memory.

    It can be indexed like a tensor, by a slice or a tensor of row numbers. Reads and writes go through plain files rather than
    a memory map, whose pages would count as memory of the process.

    Args:
        path: of an existing .npy file with a float32 matrix.

    Raises:
        ValueError: if the file holds anything else or is too short.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with open(self.path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, is_fortran, dtype = read_header(file)
            self._offset = file.tell()
        if len(shape) != 2 or is_fortran or dtype != np.float32:
            raise ValueError(f"{self.path} must hold a matrix of float32, got {dtype} of shape {shape}.")
        self.shape = torch.Size(shape)
        self._row_bytes = 4 * shape[1]
        if self.path.stat().st_size != self._offset + shape[0] * self._row_bytes:
            raise ValueError(f"{self.path} is damaged: its size does not fit its header. Delete it.")

    @classmethod
    def create(cls, path: str | Path, rows: int, columns: int) -> "FeatureFile":
        """A new file of the given shape; the content is zero until it is written. Reserves the space on the disk."""
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, columns)}
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            empty = bytes(1 << 20)
            remaining = 4 * rows * columns
            while remaining > 0:  # zeros rather than a hole, so that a full disk shows before the work
                remaining -= file.write(empty[: min(remaining, len(empty))])
        return cls(path)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | torch.Tensor) -> torch.Tensor:
        """Rows as a float32 tensor (n, d)."""
        with open(self.path, "rb") as file:
            if isinstance(index, slice):
                start, stop, _ = index.indices(len(self))
                file.seek(self._offset + start * self._row_bytes)
                values = np.fromfile(file, "<f4", (stop - start) * self.shape[1])
            else:
                values = np.concatenate([self._read_row(file, int(row)) for row in index])
        return torch.from_numpy(values).reshape(-1, self.shape[1])

    def write(self, start: int, rows: torch.Tensor) -> None:
        """Store rows (n, d) from row `start` on."""
        with open(self.path, "r+b") as file:
            file.seek(self._offset + start * self._row_bytes)
            file.write(rows.to("cpu", torch.float32).contiguous().numpy().tobytes())

    def _read_row(self, file, row: int) -> np.ndarray:
        file.seek(self._offset + row * self._row_bytes)
        return np.fromfile(file, "<f4", self.shape[1])


class FeatureRows:
    """Some rows of a matrix, which can be read like a matrix.

    Args:
        features: a [`FeatureFile`].
        rows: their numbers, (n,).
    """

    def __init__(self, features: FeatureFile, rows: torch.Tensor):
        self._features, self._rows = features, rows
        self.shape = torch.Size((len(rows), features.shape[1]))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: slice | torch.Tensor) -> torch.Tensor:
        return self._features[self._rows[index]]
