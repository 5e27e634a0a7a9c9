"""Reading pickles of networks without running anything in them.

The snapshots of EDM, FDM and AMED are pickles whose objects carry the source of their classes, and loading them the usual way
runs that source. This reader knows no function and no class of Python at all: names stay names, and the few operations that
tensors and plain containers need are spelled out in `_CALLS`. Everything else is refused by name. Objects become
`StoredObject`: the name of a class, its source as text, and its state.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

MAGIC = 0x1950A86A20F9469CFC6C
"""First object in a file of PyTorch's old format."""
_SCALAR_TYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
_MAX_MODULES = 100_000


class Name(NamedTuple):
    """A name in a pickle: never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class StoredObject:
    """An object whose class is not loaded.

    Args:
        class_name: of its class.
        source: of the module of its class, where the pickle has it; text, never run.
        state: attributes by name.
    """

    def __init__(self, class_name: str, source: str | None = None, state: Mapping[str, Any] | None = None):
        self.class_name, self.source = class_name, source
        self.state: dict[str, Any] = dict(state or {})


class _Number:
    """A NumPy dtype in the making: kind, size and byte order."""

    def __init__(self, code: str):
        if code[:1] not in "biuf" or not code[1:].isdigit():
            raise pickle.UnpicklingError(f"numbers of the type {code!r} are not read")
        self.code, self.order = code, "="


def read_pickle(path: str | Path) -> Any:
    """Content of a pickle: numbers, text, containers, tensors, and `StoredObject` for everything else.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: saying what was found, if the file is damaged or holds anything but these. Nothing of it has been run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`checkpoint` {str(path)!r} is not a file.")
    with path.open("rb") as file:
        return _guarded(lambda: _Reader(file).load(), path)


def _guarded(read: Callable[[], Any], path: Path) -> Any:
    try:
        return read()
    except RecursionError as error:
        raise ValueError(f"`checkpoint` {str(path)!r} is refused: it is nested too deeply.") from error
    except (pickle.UnpicklingError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError) as error:
        reason = str(error) or "it ends in the middle"
        raise ValueError(f"`checkpoint` {str(path)!r} is refused or damaged: {reason}. Nothing in it was run.") from error
    except (OverflowError, MemoryError, RuntimeError, UnicodeDecodeError) as error:
        raise ValueError(f"`checkpoint` {str(path)!r} is damaged: {error}. Nothing in it was run.") from error


class _Reader(pickle._Unpickler):
    """A pickle machine in Python, with every opcode that could reach an object replaced."""

    def find_class(self, module: str, name: str) -> Name:
        return Name(module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to data outside of it")

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError(f"it uses extension code {code}")

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(_call(function, arguments))

    def load_newobj(self) -> None:
        arguments, cls = self.stack.pop(), self.stack.pop()
        self.stack.append(_new(cls, arguments))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, StoredObject) and isinstance(state, Mapping):
            target.state.update(state)
        elif isinstance(target, _Number) and isinstance(state, tuple) and len(state) > 1:
            target.order = {"<": "<", ">": ">"}.get(state[1], "=")
        elif state:
            raise pickle.UnpicklingError(f"it sets the state of a {type(target).__name__}")

    def _filled(self, kind: type) -> None:
        """Check what the next operation fills: items lie above the last mark, the container below it."""
        if not self.metastack or not self.metastack[-1] or not isinstance(self.metastack[-1][-1], kind):
            raise pickle.UnpicklingError(f"it fills something that is no {kind.__name__}")

    def load_appends(self) -> None:
        self._filled(list)
        super().load_appends()

    def load_setitems(self) -> None:
        self._filled(dict)
        super().load_setitems()

    def load_additems(self) -> None:
        self._filled(set)
        super().load_additems()

    def load_setitem(self) -> None:
        if not isinstance(self.stack[-3], dict):
            raise pickle.UnpicklingError(f"it fills a {type(self.stack[-3]).__name__}")
        super().load_setitem()

    def refuse(self) -> None:
        raise pickle.UnpicklingError("it uses an operation that no network needs")

    dispatch = dict(pickle._Unpickler.dispatch)
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.APPENDS[0]] = load_appends
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.ADDITEMS[0]] = load_additems
    for _opcode in (pickle.NEWOBJ_EX, pickle.INST, pickle.OBJ, pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER):
        dispatch[_opcode[0]] = refuse


class _StorageReader(_Reader):
    """The pickles inside a storage; the storage itself is a persistent id."""

    def persistent_load(self, pid: Any) -> Any:
        return pid


# -- what a pickle may ask for --------------------------------------------------------------------------------------------


def _call(function: Any, arguments: tuple) -> Any:
    if not isinstance(function, Name):
        raise pickle.UnpicklingError(f"it calls a {type(function).__name__}")
    if function not in _CALLS:
        raise pickle.UnpicklingError(f"it calls {function}, which is not among what tensors and containers need")
    return _CALLS[function](*arguments)


def _new(cls: Any, arguments: tuple) -> Any:
    if cls in _CONTAINERS and not arguments:
        return _CONTAINERS[cls]()
    if isinstance(cls, Name) and cls.module.startswith("torch.nn.modules.") and not arguments:
        return StoredObject(cls.name)
    raise pickle.UnpicklingError(f"it makes an object of {cls}, which is not known")


def _stored_object(meta: Mapping[str, Any]) -> StoredObject:
    if meta.get("type") != "class":
        raise pickle.UnpicklingError(f"it holds an embedded object of the unknown type {meta.get('type')!r}")
    return StoredObject(str(meta["class_name"]), str(meta.get("module_src", "")), meta.get("state"))


def _old_new(cls: Any, base: Any, state: Any) -> Any:
    if base != Name("builtins", "object") and base != Name("__builtin__", "object"):
        raise pickle.UnpicklingError(f"it makes an object of {cls} from {base}")
    return _new(cls, ())


def _text_to_bytes(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it encodes text as {encoding!r}")
    return text.encode("latin-1")


def _number_type(code: str, *_: Any) -> _Number:
    return _Number(code)


def _scalar(kind: _Number, data: bytes) -> Any:
    dtype = np.dtype(kind.order + kind.code)
    if len(data) != dtype.itemsize:
        raise pickle.UnpicklingError(f"a number of {dtype.itemsize} bytes has {len(data)}")
    return np.frombuffer(data, dtype)[0].item()


def _storage(data: bytes) -> torch.Tensor:
    """A storage in PyTorch's old format, as a flat tensor."""
    file = io.BytesIO(data)
    magic, _version, _machine = (_Reader(file).load() for _ in range(3))
    if magic != MAGIC:
        raise pickle.UnpicklingError("a storage is not in the format of PyTorch")
    kind, storage_type, key, _, count, *_ = _StorageReader(file).load()
    if kind != "storage" or _Reader(file).load() != [key]:
        raise pickle.UnpicklingError("a storage is not in the format of PyTorch")
    dtype = _SCALAR_TYPES.get(storage_type.name)
    if dtype is None or storage_type.module != "torch":
        raise pickle.UnpicklingError(f"a storage of the type {storage_type} is not read")
    stored, content = int.from_bytes(file.read(8), "little"), file.read()
    if stored != count or len(content) != count * dtype.itemsize:
        raise pickle.UnpicklingError(f"a storage of {count} numbers has {len(content)} bytes")
    return torch.frombuffer(bytearray(content), dtype=dtype) if count else torch.empty(0, dtype=dtype)


def _tensor(storage: torch.Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> torch.Tensor:
    """A view of a storage; one that lies outside of it or is larger than it is refused."""
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise pickle.UnpicklingError(f"a tensor has the size {size} and strides {stride}")
    count = int(np.prod(size, dtype=object)) if size else 1
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if count and (count > storage.numel() or last >= storage.numel()):
        raise pickle.UnpicklingError(f"a tensor of the size {size} does not fit its storage of {storage.numel()} numbers")
    return torch.as_strided(storage, size, stride, offset)


_CONTAINERS = {
    Name("collections", "OrderedDict"): OrderedDict,
    Name("dnnlib.util", "EasyDict"): dict,
    Name("builtins", "dict"): dict,
    Name("builtins", "list"): list,
    Name("builtins", "set"): set,
}
_CALLS: dict[Name, Callable[..., Any]] = {
    Name("collections", "OrderedDict"): OrderedDict,
    Name("builtins", "set"): set,
    Name("builtins", "frozenset"): frozenset,
    Name("copyreg", "_reconstructor"): _old_new,
    Name("copy_reg", "_reconstructor"): _old_new,
    Name("_codecs", "encode"): _text_to_bytes,
    Name("torch_utils.persistence", "_reconstruct_persistent_obj"): _stored_object,
    Name("torch.storage", "_load_from_bytes"): _storage,
    Name("torch._utils", "_rebuild_tensor"): _tensor,
    Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Name("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    Name("torch", "Size"): tuple,
    Name("numpy", "dtype"): _number_type,
    Name("numpy.core.multiarray", "scalar"): _scalar,
    Name("numpy._core.multiarray", "scalar"): _scalar,
}


# -- modules --------------------------------------------------------------------------------------------------------------


def stored_state_dict(module: StoredObject) -> dict[str, torch.Tensor]:
    """The state dict of a stored `torch.nn.Module`.

    Raises:
        ValueError: if it is none, or is nested without end.
    """
    tensors: dict[str, torch.Tensor] = {}
    waiting, visited = [("", module)], 0
    while waiting:
        prefix, part = waiting.pop()
        visited += 1
        if visited > _MAX_MODULES or len(prefix) > 1000:
            raise ValueError("The stored module holds itself, or far too many others.")
        if not isinstance(part, StoredObject) or not isinstance(part.state.get("_modules"), Mapping):
            raise ValueError(f"{prefix or 'the stored object'!r} is no stored module.")
        dropped = part.state.get("_non_persistent_buffers_set") or ()
        for kind in ("_parameters", "_buffers"):
            for name, value in (part.state.get(kind) or {}).items():
                if isinstance(value, torch.Tensor) and not (kind == "_buffers" and name in dropped):
                    tensors[f"{prefix}{name}"] = value
        waiting += [(f"{prefix}{name}.", child) for name, child in part.state["_modules"].items() if child is not None]
    return tensors
