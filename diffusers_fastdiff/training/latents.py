"""VAE latents computed once and read many times.

A cache is a folder of safetensors files with a fixed number of images each. A file appears under its name only when it is
complete, so an interrupted computation goes on where it stopped.
"""

import argparse
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .data import DataInfo, open_images
from .randomness import BatchRandom

_SHARD = 1024


@torch.no_grad()
def cache_latents(
    dataset: Dataset, vae: AutoencoderKL, folder: str | Path, source: dict[str, Any], batch_size: int, random_flip: bool
) -> None:
    """Encode a dataset; each file holds "moments" (n, 2C, h, w): mean and log-variance, and labels or conditioning.

    Args:
        dataset: images, see `data`.
        vae: on the device to encode with.
        folder: where the cache lives.
        source: what identifies data and VAE; a cache made from something else is refused.
        batch_size: images encoded at a time.
        random_flip: also encode every image mirrored, behind the others.

    Raises:
        ValueError: if the folder holds the latents of another source.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    source = source | {"random_flip": random_flip, "num_images": len(dataset)}
    description = folder / "source.json"
    if description.exists() and json.loads(description.read_text()) != source:
        raise ValueError(
            f"`latents_dir` {str(folder)!r} holds latents of {description.read_text()}, not of {json.dumps(source)}. Choose "
            "another folder or delete this one."
        )
    description.write_text(json.dumps(source))
    total = len(dataset) * (2 if random_flip else 1)
    for start in tqdm(range(0, total, _SHARD), desc="Encoding images", unit="file"):
        path = _shard_path(folder, start // _SHARD)
        if path.exists():
            continue
        items = [_item(dataset, index) for index in range(start, min(start + _SHARD, total))]
        images = torch.stack([item.pop("images") for item in items])
        shard = {key: torch.stack([torch.as_tensor(item[key]) for item in items]) for key in items[0]}
        encoded = [
            vae.encode(part.to(vae.device, vae.dtype)).latent_dist.parameters.float().cpu() for part in images.split(batch_size)
        ]
        shard["moments"] = torch.cat(encoded).contiguous()
        partial = path.with_suffix(f".{os.getpid()}")
        save_file(shard, partial)
        partial.replace(path)


class LatentDataset(Dataset):
    """Reads what `cache_latents` wrote."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        source = json.loads((self.folder / "source.json").read_text())
        self._length = source["num_images"] * (2 if source["random_flip"] else 1)
        self._files: dict[int, Any] = {}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        shard, row = self._shard(index // _SHARD), index % _SHARD
        return {key: shard.get_slice(key)[row : row + 1][0] for key in shard.keys()}  # noqa: SIM118

    def _shard(self, number: int):
        if number not in self._files:
            self._files[number] = safe_open(_shard_path(self.folder, number), framework="pt")
        return self._files[number]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}  # open files do not travel to the workers of a loader


def sample_posterior(moments: torch.Tensor, noise: torch.Tensor, scaling_factor: float) -> torch.Tensor:
    """Draw from the posterior of the VAE: `moments` (B, 2C, h, w), `noise` (B, C, h, w) -> model inputs (B, C, h, w)."""
    mean, log_variance = moments.chunk(2, dim=1)
    return (mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise) * scaling_factor


@dataclass(frozen=True)
class TrainingData:
    """A dataset, what it looks like to the model, and how its batches become model inputs."""

    dataset: Dataset
    info: DataInfo
    vae: AutoencoderKL | None = None
    random_flip: bool = False
    unconditional: bool = False

    def clean(self, batch: dict[str, torch.Tensor], random: BatchRandom) -> torch.Tensor:
        """Data or scaled latents, (B, C, H, W)."""
        if "moments" not in batch:
            images = random.flip(batch["images"]) if self.random_flip else batch["images"]
            if self.vae is None:
                return images
            with torch.no_grad():
                batch = {"moments": self.vae.encode(images.to(self.vae.dtype)).latent_dist.parameters.float()}
        noise = random.normal(self.info.channels, self.info.resolution, self.info.resolution)
        return sample_posterior(batch["moments"], noise, self.vae.config.scaling_factor)

    def condition(
        self, batch: dict[str, torch.Tensor], random: BatchRandom, dropout: float, null_label: int | None
    ) -> dict[str, torch.Tensor]:
        """Keyword arguments for the model: labels or vectors, some of them dropped for classifier-free guidance."""
        if "conditioning" in batch:
            return {"conditioning": random.drop(batch["conditioning"], dropout, 0.0)}
        labels = batch.get("labels")
        if labels is None or self.unconditional:
            labels = torch.zeros_like(random.integers(1))
        return {"class_labels": random.drop(labels, dropout, null_label)}


def open_training_data(args: argparse.Namespace, state: PartialState) -> TrainingData:
    """The data that the flags of `arguments.add_data_arguments` name.

    Images as they are; with `--vae`, latents, computed in each step or, with `--latents_dir`, once.
    """
    with state.main_process_first():
        images = open_images(args)
    if args.vae is None:
        return TrainingData(images, images.info, None, args.random_flip, args.unconditional)
    vae = AutoencoderKL.from_pretrained(args.vae, subfolder=args.vae_subfolder).to(state.device).requires_grad_(False)
    side = images.info.resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    info = replace(images.info, channels=vae.config.latent_channels, resolution=side)
    if args.latents_dir is None:
        return TrainingData(images, info, vae, args.random_flip, args.unconditional)
    source = {
        "data": args.dataset_name or args.train_data_dir or "digits",
        "config": args.dataset_config_name,
        "split": args.dataset_split,
        "resolution": images.info.resolution,
        "vae": args.vae,
        "vae_subfolder": args.vae_subfolder,
    }
    if state.is_main_process:
        cache_latents(images, vae, args.latents_dir, source, args.encode_batch_size, args.random_flip)
    state.wait_for_everyone()
    return TrainingData(LatentDataset(args.latents_dir), info, vae, False, args.unconditional)


def _item(dataset: Dataset, index: int) -> dict[str, Any]:
    item = dict(dataset[index % len(dataset)])
    if index >= len(dataset):
        item["images"] = item["images"].flip(-1)
    return item


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"latents-{number:05d}.safetensors"
