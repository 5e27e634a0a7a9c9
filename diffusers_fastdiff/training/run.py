"""The mechanics that all training scripts share: devices, data position, optimisation, EMA, checkpoints, logging.

A script keeps what is particular to its method, above all the loss:

    run = TrainingRun(args, model, dataset)
    for step in run.steps():
        for batch, random in run.micro_batches(step):
            run.backward(loss_of(run.model, batch, random))
        run.update(step)
"""

import argparse
import json
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration, parse_flag_from_env
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..errors import check_writable
from .checkpoints import find_checkpoint, load_checkpoint, save_checkpoint
from .data import ShuffledBatches
from .randomness import BatchRandom

# What may differ between the run that wrote a checkpoint and the one that goes on with it.
_FREE_SETTINGS = {
    "output_dir", "logging_dir", "report_to", "resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit",
    "logging_steps", "max_train_steps", "dataloader_num_workers", "push_to_hub", "hub_token", "hub_model_id",
    "hub_private_repo", "save_precision", "gradient_checkpointing", "train_batch_size", "gradient_accumulation_steps",
}  # fmt: skip


def start_processes() -> PartialState:
    """accelerate's view of this process and its siblings; call it before anything else of accelerate.

    Unlike accelerate by itself, it also lets several processes that `torchrun` started on a machine without accelerators find
    each other (`accelerate launch` starts only one there).
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU", default=not torch.accelerator.is_available()))


class TrainingRun:
    """One training run of one model on one dataset.

    Args:
        args: the flags of `training.arguments`, plus any others of the script.
        model: trained where its parameters require gradients.
        dataset: see `training.data`; None for losses that draw all they need.

    Raises:
        ValueError: if the output folder cannot be written to, or a checkpoint belongs to another run.
    """

    def __init__(self, args: argparse.Namespace, model: torch.nn.Module, dataset: Dataset | None = None):
        self.args = args
        self.output_dir = check_writable(args.output_dir)
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            log_with=args.report_to,
            project_config=ProjectConfiguration(logging_dir=str(self.output_dir / args.logging_dir)),
        )
        processes = self.accelerator.num_processes
        self.batch_size = args.train_batch_size * args.gradient_accumulation_steps * processes
        """Samples in one optimisation step, over all processes and accumulation rounds."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters,
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay,
            eps=args.adam_epsilon,
        )
        schedule = get_scheduler(
            args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
        )
        self._learning_rate = schedule.lr_lambdas[0]
        self.bare_model = model
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.ema = EMAModel(parameters, decay=args.ema_decay, use_ema_warmup=False) if args.use_ema else None
        if self.ema is not None:
            self.ema.to(self.accelerator.device)
        self._parameters = parameters
        self._settings = self._settings_of_run()
        self.first_step = self._resume()
        self._start_logging()
        self._batches = repeat({}) if dataset is None else self._open_data(dataset)

    # -- the loop ---------------------------------------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """Numbers of the optimisation steps still to do, with a progress bar."""
        self.model.train()
        self._bar = tqdm(
            initial=self.first_step,
            total=self.args.max_train_steps,
            desc="Training",
            disable=not self.accelerator.is_main_process,
        )
        self._loss, self._loss_steps = torch.zeros((), device=self.accelerator.device), 0
        for step in range(self.first_step, self.args.max_train_steps):
            for group in self.optimizer.param_groups:
                group["lr"] = self.args.learning_rate * self._learning_rate(step)
            yield step
            self._bar.update()
        self._bar.close()
        self.accelerator.end_training()

    def micro_batches(self, step: int) -> Iterator[tuple[dict[str, torch.Tensor], BatchRandom]]:
        """The batches of one step on this process, each with its random numbers."""
        size, rounds = self.args.train_batch_size, self.args.gradient_accumulation_steps
        for number in range(rounds):
            start = (number * self.accelerator.num_processes + self.accelerator.process_index) * size
            device = self.accelerator.device
            batch = {key: value.to(device, non_blocking=True) for key, value in next(self._batches).items()}
            with self.gradient_round(number):
                yield batch, BatchRandom(self.args.seed, step, self.batch_size, start, start + size, device)

    def gradient_round(self, number: int) -> AbstractContextManager:
        """Forward and backward of accumulation round `number` belong inside: processes exchange gradients in the last one."""
        is_last = number == self.args.gradient_accumulation_steps - 1
        return nullcontext() if is_last else self.accelerator.no_sync(self.model)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of the mean loss of one micro batch; processes exchange gradients in the last one only."""
        rounds = self.args.gradient_accumulation_steps
        loss = loss / rounds
        self._loss += loss.detach()
        self.accelerator.backward(loss)

    def update(self, step: int, logs: dict[str, float] | None = None) -> None:
        """Take the optimisation step, then log and write a checkpoint when they are due.

        Raises:
            FloatingPointError: if the loss is not a number any more.
        """
        self.take_step()
        self._loss_steps += 1
        done = step + 1
        if done % self.args.logging_steps == 0 or done == self.args.max_train_steps:
            self._log(done, logs or {})
        if self.args.checkpointing_steps and done % self.args.checkpointing_steps == 0:
            save_checkpoint(
                self.accelerator, self.output_dir, done, self._settings, self.ema, self.args.checkpoints_total_limit
            )

    def take_step(self) -> None:
        """Only the optimisation step, for losses that take several on one batch; `update` takes the last one."""
        if self.args.max_grad_norm > 0:
            self.accelerator.clip_grad_norm_(self._parameters, self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None and not self.accelerator.optimizer_step_was_skipped:
            self.ema.step(self._parameters)

    @contextmanager
    def averaged_weights(self) -> Iterator[torch.nn.Module]:
        """The bare model in evaluation mode, with EMA weights if there are any."""
        model = self.bare_model
        was_training = model.training
        if self.ema is not None:
            self.ema.store(self._parameters)
            self.ema.copy_to(self._parameters)
        model.eval()
        try:
            with torch.no_grad():
                yield model
        finally:
            model.train(was_training)
            if self.ema is not None:
                self.ema.restore(self._parameters)

    # -- parts ------------------------------------------------------------------------------------------------------------

    def _settings_of_run(self) -> dict[str, Any]:
        settings = {key: value for key, value in vars(self.args).items() if key not in _FREE_SETTINGS}
        settings["total_batch_size"] = self.batch_size
        if self.args.lr_scheduler not in ("constant", "constant_with_warmup"):
            settings["max_train_steps"] = self.args.max_train_steps  # the learning rate depends on it
        return json.loads(json.dumps(settings))

    def _resume(self) -> int:
        if self.args.resume_from_checkpoint is None:
            return 0
        path = find_checkpoint(self.output_dir, self.args.resume_from_checkpoint)
        return 0 if path is None else load_checkpoint(self.accelerator, path, self._settings, self.ema)

    def _open_data(self, dataset: Dataset) -> Iterator[dict[str, torch.Tensor]]:
        sampler = ShuffledBatches(
            len(dataset),
            self.args.train_batch_size,
            self.args.seed,
            first_round=self.first_step * self.args.gradient_accumulation_steps,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        workers = self.args.dataloader_num_workers
        return iter(DataLoader(dataset, batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0))

    def _start_logging(self) -> None:
        """Trackers, and log.jsonl without the lines of steps that are about to be done again."""
        if self.args.report_to is not None:
            plain = {k: v for k, v in vars(self.args).items() if isinstance(v, int | float | str | bool)}
            self.accelerator.init_trackers("diffusers_fastdiff", config=plain)
        self._log_file = self.output_dir / "log.jsonl"
        if self.accelerator.is_main_process:
            lines = self._log_file.read_text().splitlines() if self._log_file.exists() else []
            kept = [line for line in lines if json.loads(line)["step"] <= self.first_step]
            self._log_file.write_text("".join(f"{line}\n" for line in kept))

    def _log(self, done: int, logs: dict[str, float]) -> None:
        loss = float(self.accelerator.reduce(self._loss, "mean")) / self._loss_steps
        self._loss, self._loss_steps = torch.zeros_like(self._loss), 0
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss} before step {done}. Lower `--learning_rate` or set `--max_grad_norm`; the last checkpoint "
                "is intact."
            )
        logs = {"loss": loss, "lr": self.optimizer.param_groups[0]["lr"], **logs}
        self._bar.set_postfix(loss=f"{loss:.4f}", lr=f"{logs['lr']:.1e}")
        self.accelerator.log(logs, step=done)
        if self.accelerator.is_main_process:
            with self._log_file.open("a") as file:
                file.write(json.dumps({"step": done, "images": done * self.batch_size, **logs}) + "\n")


def check_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for flags out of range, before any work."""
    for name in ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "logging_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"`--{name}` must be at least 1, got {getattr(args, name)}.")
    if args.learning_rate <= 0:
        raise ValueError(f"`--learning_rate` must be positive, got {args.learning_rate}.")
    if args.checkpointing_steps < 0:
        raise ValueError(f"`--checkpointing_steps` must not be negative, got {args.checkpointing_steps}.")
    check_writable(args.output_dir)
    if args.resume_from_checkpoint not in (None, "latest"):
        find_checkpoint(Path(args.output_dir), args.resume_from_checkpoint)
