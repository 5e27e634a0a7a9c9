"""Folders that try to run code or to read what is not theirs. Each attack changes a saved folder in place."""

import json
import pickle
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLE = "diffusion_pytorch_model.bin"


class Payload:
    """Leaves a file behind if anything unpickles it."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


# -- weights: attack(folder of a model, marker) -----------------------------------------------------------------------------


def pickle_under_the_name_of_safetensors(folder: Path, marker: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps(Payload(marker)))


def pickle_instead(folder: Path, marker: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / PICKLE).write_bytes(pickle.dumps(Payload(marker)))


def pickle_among_tensors(folder: Path, marker: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors | {"more": Payload(marker)}, folder / PICKLE)


def pickle_as_a_shard(folder: Path, marker: Path) -> None:
    names = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    (folder / "part.bin").write_bytes(pickle.dumps(Payload(marker)))
    write_index(folder, names, "part.bin")


def bytes_appended(folder: Path, marker: Path) -> None:
    with open(folder / WEIGHTS, "ab") as file:
        file.write(pickle.dumps(Payload(marker)))


def header_too_long(folder: Path, marker: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    (folder / WEIGHTS).write_bytes((size + 8).to_bytes(8, "little") + data[8:])


def header_of_a_terabyte(folder: Path, marker: Path) -> None:
    (folder / WEIGHTS).write_bytes((2**40).to_bytes(8, "little") + b"{}")


def shape_that_is_not_true(folder: Path, marker: Path) -> None:
    edit_header(folder, lambda entry: entry.update(shape=[2 * size for size in entry["shape"]]))


def offsets_behind_the_end(folder: Path, marker: Path) -> None:
    edit_header(folder, lambda entry: entry.update(data_offsets=[0, 10**9]))


def shard_in_the_folder_above(folder: Path, marker: Path) -> None:
    names = load_file(folder / WEIGHTS)
    shutil.move(folder / WEIGHTS, folder.parent / "outside.safetensors")
    write_index(folder, names, "../outside.safetensors")


def shard_at_an_absolute_path(folder: Path, marker: Path) -> None:
    shard_in_the_folder_above(folder, marker)
    outside = (folder.parent / "outside.safetensors").resolve()
    write_index(folder, load_file(outside), str(outside))


WEIGHT_ATTACKS = (
    pickle_under_the_name_of_safetensors,
    pickle_instead,
    pickle_among_tensors,
    pickle_as_a_shard,
    bytes_appended,
    header_too_long,
    header_of_a_terabyte,
    shape_that_is_not_true,
    offsets_behind_the_end,
    shard_in_the_folder_above,
    shard_at_an_absolute_path,
)


# -- names: entries of model_index.json that name what a pipeline must not load ----------------------------------------------

INDEX_ATTACKS = {
    "function of the system": {"scheduler": ["os", "system"]},
    "class that starts programs": {"scheduler": ["subprocess", "Popen"]},
    "unpickler": {"scheduler": ["torch", "load"]},
    "module in the folder": {"scheduler": ["evil", "Evil"]},
    "our function": {"scheduler": ["diffusers_fastdiff", "apply_faster_diffusion"]},
    "our model as a scheduler": {"scheduler": ["diffusers_fastdiff", "PixelAutoencoder"]},
    "our file": {"scheduler": ["diffusers_fastdiff.conversion.restricted_pickle", "load_restricted"]},
    "pipeline in the folder": {"_class_name": ["evil", "Evil"]},
}


def plant_code(folder: Path, marker: Path) -> None:
    """Python files where remote code would be looked for."""
    code = f"open({str(marker)!r}, 'w')\n\n\nclass Evil:\n    pass\n"
    for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        (place / "evil.py").write_text(code)


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_index(folder: Path, names, shard: str) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def edit_header(folder: Path, edit) -> None:
    data = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    edit(next(entry for name, entry in header.items() if name != "__metadata__"))
    changed = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + size :])
