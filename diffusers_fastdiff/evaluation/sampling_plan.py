"""What each image of a large sample is drawn from, and which images are drawn together.

An image depends on its seed, its label or prompt and, through the arithmetic of the network in the last bit, on the number of
images in a call and its place among them (on all of them, with hooks that look at the whole batch). The plan therefore fixes
the calls: image k is always at place `k % images_per_call` of call `k // images_per_call`, and the last call is filled up. The
number of processes, the batch size and interruptions only decide who makes which call when.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..training.randomness import derive_seed


def parse_seeds(text: str | None, num_images: int | None) -> list[int]:
    """Seeds from "0-999,5000,7000-7999"; by default 0 .. num_images - 1.

    Raises:
        ValueError: if the text is no list of numbers and ranges, repeats a seed or holds another number than `num_images`.
    """
    if text is None:
        if num_images is None or num_images < 1:
            raise ValueError(f"`--num_images` must be at least 1, or `--seeds` must be given; got {num_images}.")
        return list(range(num_images))
    seeds: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            seeds += range(int(first), int(last or first) + 1)
    except ValueError:
        raise ValueError(f"`--seeds` must look like '0-49999' or '1,2,10-19', got {text!r}.") from None
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"`--seeds` must name at least one seed and none twice, got {text!r}.")
    if num_images not in (None, len(seeds)):
        raise ValueError(f"`--seeds` {text!r} are {len(seeds)} seeds, but `--num_images` is {num_images}. Leave one out.")
    return seeds


def choose_labels(labels: list[str], seeds: list[int], num_classes: int) -> list[int]:
    """A class for each image.

    Args:
        labels: ["random"], drawn from the image's seed alone; ["balanced"], 0, 1, 2, ... in turn; or numbers, taken in turn.
        num_classes: of the model.

    Raises:
        ValueError: if a label is no class of the model.
    """
    if labels == ["random"]:
        generators = (torch.Generator().manual_seed(derive_seed("label", seed)) for seed in seeds)
        return [int(torch.randint(num_classes, (), generator=generator)) for generator in generators]
    if labels == ["balanced"]:
        return [index % num_classes for index in range(len(seeds))]
    if not all(label.isdecimal() and int(label) < num_classes for label in labels):
        raise ValueError(f"`--labels` must be 'random', 'balanced' or numbers in 0 .. {num_classes - 1}, got {labels}.")
    return [int(labels[index % len(labels)]) for index in range(len(seeds))]


@dataclass(frozen=True)
class Call:
    """One call of the pipeline: `indices` of its images, and `rows` with seeds and conditions, filled up to its full size."""

    indices: range
    rows: list[dict[str, Any]]


def plan_calls(rows: list[dict[str, Any]], images_per_call: int, finished: Iterable[int] = ()) -> list[Call]:
    """Calls that are still needed to have an image for each of `rows`."""
    finished = set(finished)
    calls = []
    for start in range(0, len(rows), images_per_call):
        indices = range(start, min(start + images_per_call, len(rows)))
        if not finished.issuperset(indices):
            chosen = [rows[index] for index in indices]
            calls.append(Call(indices, chosen + [rows[indices[-1]]] * (images_per_call - len(chosen))))
    return calls


def share(calls: list[Call], calls_at_a_time: int, rank: int, world_size: int) -> Iterator[list[Call]]:
    """Pieces of the work for one process, in turn."""
    pieces = [calls[start : start + calls_at_a_time] for start in range(0, len(calls), calls_at_a_time)]
    yield from pieces[rank::world_size]
