"""Networks of EDM (arXiv 2206.00364), FDM (2306.06991), ADM (2105.05233) and consistency models (2303.01469) to our class.

Snapshots of EDM, FDM and AMED's collection are pickles; they are read as data (see `restricted_pickle`). What surrounds the
network, the formulation and the momentum, is recorded there as well and comes back as the config of a scheduler.
"""

import re
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ..models.unet_edm import EDMUNet2DModel
from ..numerics.preconditioning import Preconditioning
from .adm_unet import convert_adm_unet
from .checkpoint import Checkpoint, state_dict_and_arguments
from .dit import StateDict
from .edm_unet import convert_edm_unet
from .restricted_pickle import MAGIC, StoredObject, read_pickle, stored_state_dict

_CONFIG_NAMES = {
    "momentum": "multiplier",
    "sigma_min": "network_sigma_min",
    "sigma_max": "network_sigma_max",
    "num_timesteps": "num_train_timesteps",
}
_NUMBERS = ("sigma_data", "beta_d", "beta_min", "epsilon_t")
_CLASS_NAME = re.compile(r"(FDM_)?(VP|VE|EDM)Precond")


class ConvertedEDM(NamedTuple):
    """What a checkpoint holds."""

    unet: EDMUNet2DModel
    """The raw network, in evaluation mode."""
    preconditioning: Preconditioning | None
    """What is around it; None where neither the checkpoint nor the caller said so."""

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """For `FDMEDMScheduler.from_config` (or the class that "_class_name" names).

        Raises:
            ValueError: if the formulation is not known.
        """
        if self.preconditioning is None:
            raise ValueError("The checkpoint does not say how its network is preconditioned: pass `kind` to `convert_edm`.")
        facts = asdict(self.preconditioning)
        kind = facts.pop("kind")
        for training_only in ("log_sigma_mean", "log_sigma_std"):
            facts.pop(training_only)
        names = {"_class_name": f"FDM{kind.upper()}Scheduler", "_formulation": kind}
        return names | {_CONFIG_NAMES.get(key, key): value for key, value in facts.items()}


def convert_edm(
    checkpoint: Checkpoint,
    *,
    weights: str = "ema",
    kind: str | None = None,
    multiplier: float | None = None,
    family: str | None = None,
    sample_size: int | None = None,
    **config: Any,
) -> ConvertedEDM:
    """The network of a checkpoint with the same outputs, and what is around it.

    Args:
        checkpoint: a pickle of EDM, FDM or AMED's collection (.pkl); a state dict of such a network, raw or preconditioned; or
            one of ADM or a consistency model's U-Net (.pt, .safetensors or a mapping).
        weights: entry of a snapshot or of a training checkpoint to take, mostly "ema".
        kind: formulation of a network whose file does not tell, "vp", "ve" or "edm".
        multiplier: of the momentum, for files that do not record it. A published VE network has 1 whatever its file says, as
            the published program ignores it there.
        family: "adm" or "consistency" for networks in ADM's names, whose weights do not tell. The latter are in the EDM
            formulation (`kind` is not needed).
        sample_size: height and width of the images, for networks in ADM's names.
        config: other arguments of [`EDMUNet2DModel`], where weights do not tell and the network is not a published one.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a file is damaged, holds anything that tensors and containers do not need, or is another network.
    """
    network, original = _read(checkpoint, weights)
    if any(key.startswith("input_blocks.") for key in original):
        if family is None or sample_size is None:
            raise ValueError("`family` ('adm' or 'consistency') and `sample_size` must be given: the weights do not tell.")
        unet = convert_adm_unet(original, family=family, sample_size=sample_size, **config)
        if family == "consistency" and kind in (None, "edm"):
            return ConvertedEDM(unet, Preconditioning("edm", multiplier, noise_input_scale=1000.0))
    else:
        if family is not None or sample_size is not None:
            raise ValueError("`family` and `sample_size` belong to networks in ADM's names; this one has EDM's.")
        unet = convert_edm_unet(original, **config)
    if network is not None and (match := _CLASS_NAME.fullmatch(network.class_name)):
        if kind not in (None, match[2].lower()):
            raise ValueError(f"`kind` is {kind!r}, but the checkpoint holds a {network.class_name}.")
        return ConvertedEDM(unet, _recorded(network.state, match[2].lower(), match[1] is not None, multiplier))
    return ConvertedEDM(unet, None if kind is None else Preconditioning(kind, multiplier))


def _recorded(state: Mapping[str, Any], kind: str, has_momentum: bool, multiplier: float | None) -> Preconditioning:
    """The formulation that the attributes of a stored network describe."""
    options: dict[str, Any] = {name: float(state[name]) for name in _NUMBERS if isinstance(state.get(name), int | float)}
    if isinstance(state.get("M"), int):
        options["num_timesteps"] = state["M"]
    if not has_momentum:
        return Preconditioning(kind, **options)
    low, high = (state.get(name) for name in ("sigma_min", "sigma_max"))
    if kind != "vp" and isinstance(low, int | float) and isinstance(high, int | float):
        options |= {"sigma_min": float(low), "sigma_max": float(high)}
    recorded = state.get("fdm_multiplier", multiplier)
    if kind == "ve":
        recorded = 1.0
    elif recorded is None:
        raise ValueError("`multiplier` must be given: the checkpoint has momentum, but does not record how much.")
    return Preconditioning(kind, float(recorded), **options)


class Snapshot(NamedTuple):
    """A network in a pickle of EDM, FDM or AMED."""

    network: StoredObject
    """Name of its class and its attributes."""
    state_dict: StateDict


def read_snapshot(path: str | Path, weights: str = "ema") -> Snapshot:
    """A network in a pickle, read as data.

    Predictors of AMED are such networks as well: `convert_amed(read_snapshot(path, "model").state_dict, ...)`.

    Args:
        path: of the pickle.
        weights: its entry of the pickle, "ema" in snapshots of EDM and FDM, "model" in those of AMED.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, holds anything that tensors and containers do not need, or lacks the entry.
    """
    snapshot = _snapshot_in(read_pickle(path), path, weights)
    if snapshot is None:
        raise ValueError(f"`path` {str(path)!r} holds no network.")
    return snapshot


def _snapshot_in(content: Any, path: str | Path, weights: str) -> Snapshot | None:
    """The network in what a pickle holds; None for plain tensors."""
    if isinstance(content, Mapping):
        stored = {key: value for key, value in content.items() if isinstance(value, StoredObject)}
        if not stored:
            return None
        if weights not in stored:
            raise ValueError(f"`weights` is {weights!r}, but the snapshot {str(path)!r} holds only {sorted(stored)}.")
        content = stored[weights]
    if not isinstance(content, StoredObject):
        raise ValueError(f"`checkpoint` {str(path)!r} holds no network, but a {type(content).__name__}.")
    return Snapshot(content, stored_state_dict(content))


def _read(checkpoint: Checkpoint, weights: str) -> tuple[StoredObject | None, StateDict]:
    """The stored network, if the file is a snapshot, and its state dict."""
    if isinstance(checkpoint, Mapping) or not Path(checkpoint).is_file() or Path(checkpoint).suffix == ".safetensors":
        return None, state_dict_and_arguments(checkpoint, weights)[0]
    path = Path(checkpoint)
    if zipfile.is_zipfile(path):
        refuse_inflated_archive(path)
        return None, state_dict_and_arguments(path, weights)[0]
    content = read_pickle(path)
    if isinstance(content, int) and content == MAGIC:  # the old format of PyTorch is a sequence of pickles
        return None, state_dict_and_arguments(path, weights)[0]
    snapshot = _snapshot_in(content, path, weights)
    return snapshot or (None, state_dict_and_arguments(content, weights)[0])


def refuse_inflated_archive(path: Path) -> None:
    """Refuse a ZIP archive that claims to hold more than it has bytes; PyTorch never compresses.

    Raises:
        ValueError: if it does.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    claimed, size = sum(entry.file_size for entry in entries), path.stat().st_size
    if claimed > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(
            f"`checkpoint` {str(path)!r} is refused: its {size} bytes claim to hold {claimed}. PyTorch writes archives "
            "without compression. Nothing in it was run."
        )
