"""Pairs of noise and what a slow, accurate solver makes of it: computed once, kept on disk, and continued after a kill."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..numerics.sigma_grids import logsnr_grid
from ..numerics.solver_methods import Solver
from ..numerics.solvers import solve
from .pipeline_denoiser import PipelineDenoiser
from .randomness import BatchRandom


class TeacherData(Dataset):
    """Samples {"noise": (C, H, W), "choice": (), "end": (C, H, W)}; `choice` is a condition of `PipelineDenoiser.draw`."""

    def __init__(self, shards: list[dict[str, torch.Tensor]]):
        self.tensors = {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}

    def __len__(self) -> int:
        return len(self.tensors["noise"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: values[index] for key, values in self.tensors.items()}


def teacher_grid(denoiser: PipelineDenoiser, num_evaluations: int) -> list[float]:
    """A fine grid over everything the network has seen, even in `log sigma`, and 0."""
    return [*logsnr_grid(num_evaluations, *denoiser.noise_model.sigma_range).tolist(), 0.0]


@torch.no_grad()
def teacher_shard(
    denoiser: PipelineDenoiser, teacher: Solver, sigmas: list[float], count: int, seed: int, number: int
) -> dict[str, torch.Tensor]:
    """Shard `number` of the pairs, a pure function of its arguments."""
    device = denoiser.network.device
    random = BatchRandom(seed, number, count, 0, count, device)
    choice, noise = denoiser.draw(random), random.normal(*denoiser.sample_shape)
    end = solve(denoiser.bind(denoiser.conditions(choice)), denoiser.start(noise, sigmas[0]), sigmas, teacher)
    return {"noise": noise.cpu(), "choice": choice.cpu(), "end": end.cpu()}


def make_teacher_data(
    folder: Path,
    denoiser: PipelineDenoiser,
    teacher: Solver,
    sigmas: list[float],
    num_trajectories: int,
    batch_size: int,
    seed: int,
    settings: dict[str, Any],
    state: PartialState,
) -> TeacherData:
    """Compute what is missing in `folder`, shared between the processes, and read all of it.

    Args:
        folder: for the shards.
        denoiser, teacher, sigmas: what is solved and how.
        num_trajectories: rounded up to whole batches.
        batch_size: trajectories in a shard.
        seed: of noise and conditions.
        settings: whatever the pairs depend on; kept beside them.
        state: accelerate's view of the processes.

    Raises:
        ValueError: if the folder holds pairs of other settings.
    """
    record, written = folder / "settings.json", json.loads(json.dumps(settings | {"sigmas": sigmas, "seed": seed}))
    if record.exists() and json.loads(record.read_text()) != written:
        raise ValueError(
            f"{folder} holds trajectories of another teacher or model. Delete it or choose another `--output_dir`."
        )
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(written))
    state.wait_for_everyone()
    paths = [folder / f"{number:05d}.safetensors" for number in range(-(-num_trajectories // batch_size))]
    mine = range(state.process_index, len(paths), state.num_processes)
    for number in tqdm(mine, desc="Teacher", disable=not state.is_main_process):
        if not paths[number].exists():
            shard = teacher_shard(denoiser, teacher, sigmas, batch_size, seed, number)
            partial = paths[number].with_suffix(".incomplete")
            save_file(shard, partial)
            partial.rename(paths[number])
    state.wait_for_everyone()
    return TeacherData([load_file(path) for path in paths])
