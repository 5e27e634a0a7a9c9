"""Peak memory of a piece of work, on a GPU by its allocator, elsewhere by counting live tensors."""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class PeakMemory:
    """Filled in when the work is done."""

    bytes: int = 0
    """Most bytes that tensors made by the work held at one time; what lived before does not count."""


@contextlib.contextmanager
def peak_memory(device: torch.device | str) -> Iterator[PeakMemory]:
    """Measure the block that follows, which runs slower than alone.

    Args:
        device: where the work runs. For "cuda" the allocator counts, with temporary space inside of kernels; elsewhere
            PyTorch does not, and the storages of living tensors are counted instead, which leaves that space out.
    """
    result = PeakMemory()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield result
        torch.cuda.synchronize()
        result.bytes = torch.cuda.max_memory_allocated() - before
        return
    with _LiveTensors() as live:
        yield result
    result.bytes = live.peak


class _LiveTensors(TorchDispatchMode):
    """Counts the storages that operations return, until they are freed."""

    def __init__(self):
        super().__init__()
        self.current = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage(), inputs)
        return output

    def _add(self, storage: torch.UntypedStorage, inputs: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or key in inputs:  # a view
            return
        self._seen.add(key)
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.current -= size
