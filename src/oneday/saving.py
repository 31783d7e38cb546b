"""What a trainer writes into its run directory: checkpoints, the final model, events, the heartbeat."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINING_ARGS_NAME
from transformers.utils import logging as transformers_logging

from oneday import run_directory as rundir
from oneday.arguments import BudgetTrainingArguments
from oneday.budget_clock import BudgetClock
from oneday.checkpoints import STATE, find_good_checkpoint, publish_checkpoint, remove_old_checkpoints
from oneday.durable_files import synchronize_path, write_json
from oneday.loader import StepLoader
from oneday.objectives import COMPANION
from oneday.optimizers import CompositeOptimizer
from oneday.ranks import Ranks
from oneday.recovery import StepGuard, are_finite
from oneday.throughput import describe_environment, name_device

logger = logging.getLogger(__name__)

COMPANION_FILE = "companion.safetensors"


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without the warning that tied weights, or those of a companion, are not in the file: they are set too."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def drop_aliases(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One name for each tensor: tied ones are one tensor, which safetensors refuses to write twice."""
    return dict({tensor.data_ptr(): (key, tensor) for key, tensor in reversed(state.items())}.values())


def read_names(checkpoint: Path) -> set[str]:
    """The names of the weights in a checkpoint's files, those of a companion not among them."""
    names: set[str] = set()
    for path in checkpoint.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            names |= set(weights.keys())
    return names


def tidy_files(folder: Path) -> None:
    """Take the pickled settings away, which nothing reads, and give weights the permissions of the other files.

    safetensors writes them for their owner alone.
    """
    (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


class RunTrainer(Trainer):
    """A Trainer whose run directory is whole at every moment. Only process 0 writes there; all read from it.

    Attributes:
        ranks: The processes of the run.
        clock: What has been spent.
        loader: Position in the data.
        data_fingerprint: What data and tokenizer these are.
        model_fingerprint: What config file the model is built from; empty: from none.
        status: `running`, `interrupted`, `trained` (the final model is on disk) or `finished` (and scored).
        micro_batch_limit: Tokens of the largest micro-batch that memory holds, once it has run out.
        save_as_kept: The next checkpoint is one that `extend` starts from.
        resumed_progress: Progress under this budget of the checkpoint that it goes on from; 0: of none, or another's.
        saved_at: Steps taken when the last checkpoint was written; None: none was.
        guard: Counts of bad steps.
        composite: The optimizer, as this project built it.
    """

    args: BudgetTrainingArguments
    ranks: Ranks
    clock: BudgetClock
    loader: StepLoader
    data_fingerprint: str
    model_fingerprint: str
    status = "running"
    micro_batch_limit: int | None = None
    save_as_kept = False
    resumed_progress = 0.0
    saved_at: int | None = None
    guard: StepGuard
    composite: CompositeOptimizer
    checkpoint_seconds = 0.0
    _staging_dir: Path | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.budget_lock = threading.Lock()
        super().__init__(*args, **kwargs)

    def _save_checkpoint(self, model: torch.nn.Module, trial: None = None) -> None:
        """Write a checkpoint, by process 0; every process must call it."""
        begun = time.monotonic()
        if not are_finite(self.model, self.ranks):
            logger.warning("The checkpoint of step %d was not written: a weight is not finite.", self.clock.steps)
            return
        with self.clock.account("checkpoints"), self.ranks.whole(self.model, self.composite):
            if self.ranks.is_first:
                self.keep_checkpoint(model, trial, begun)

    def keep_checkpoint(self, model: torch.nn.Module, trial: None, begun: float) -> None:
        """Write it aside, seal and rename it; where that fails, keep the last one and go on."""
        try:
            self.write_checkpoint(model, trial)
        except rundir.WRITE_ERRORS as error:
            reason = "the disk is full" if rundir.is_disk_full(error, self.args.output_dir) else str(error)[:120]
            logger.warning("The checkpoint of step %d was not written: %s.", self.clock.steps, reason)
            return
        finally:
            self.save_as_kept = False
            self.checkpoint_seconds = time.monotonic() - begun
        self.saved_at = self.clock.steps_taken
        self.note_event("checkpoint")
        try:
            remove_old_checkpoints(Path(self.args.output_dir), self.args.save_total_limit)
        except OSError as error:
            logger.warning("An old checkpoint could not be removed: %s.", str(error)[:120])
        self.checkpoint_seconds = time.monotonic() - begun

    def write_checkpoint(self, model: torch.nn.Module, trial: None) -> None:
        """The parent's checkpoint and this project's state, whole or not at all."""
        name, folder = f"checkpoint-{self.state.global_step}", Path(self.args.output_dir)
        with rundir.staging(folder, "checkpoint") as self._staging_dir:
            try:
                super()._save_checkpoint(model, trial)
                self.write_state(self._staging_dir / name)
                publish_checkpoint(self._staging_dir / name, folder / name)
            finally:
                self._staging_dir = None

    def find_good_checkpoint(self) -> Path | None:
        """The newest whole checkpoint, as process 0 finds it; see `checkpoints.find_good_checkpoint`."""
        return self.ranks.lead(lambda: find_good_checkpoint(self.args.output_dir))

    def _get_output_dir(self, trial: Any) -> str:
        """Where the parent writes checkpoints: the staging directory while one is being written."""
        return str(self._staging_dir or self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """As the parent, without what the model only carries; of a checkpoint that lies in a file of its own."""
        companion = getattr(self.model, COMPANION, None)
        if companion is None:
            super()._save(output_dir, state_dict)
            tidy_files(Path(output_dir or self.args.output_dir))
            return
        state = {key: value for key, value in self.model.state_dict().items() if not key.startswith(f"{COMPANION}.")}
        super()._save(output_dir, dict(state))  # it takes entries out
        if self._staging_dir is not None:
            shared = {parameter.data_ptr() for parameter in state.values()}
            own = {key: value for key, value in companion.state_dict().items() if value.data_ptr() not in shared}
            save_file(drop_aliases(own), Path(output_dir) / COMPANION_FILE)
        tidy_files(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """As the parent, and what the model carries.

        Files have the names that the Hub knows; of experts the model has others, and those fit nowhere.
        """
        with quiet_loading():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if read_names(Path(resume_from_checkpoint)) - self.model.state_dict().keys():
                stock = type(self.model).from_pretrained(resume_from_checkpoint, dtype=torch.float32)
                self.model.load_state_dict(stock.state_dict(), strict=False)
        self.load_companion(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load them from main memory: the parent puts the whole state on a device that may hold a share of it only."""
        if checkpoint is not None:
            optimizer, scheduler = (Path(checkpoint) / name for name in (OPTIMIZER_NAME, SCHEDULER_NAME))
            self.optimizer.load_state_dict(torch.load(optimizer, map_location="cpu", weights_only=True, mmap=True))
            self.lr_scheduler.load_state_dict(torch.load(scheduler, weights_only=True))

    def load_companion(self, checkpoint: Path | None) -> None:
        """Load what the model carries, where a checkpoint has it."""
        path = None if checkpoint is None else checkpoint / COMPANION_FILE
        if path is not None and path.is_file():
            getattr(self.model, COMPANION).load_state_dict(load_file(path), strict=False)

    def describe_limit(self) -> list[str | int]:
        """What `micro_batch_limit` was found with: a device, and the micro-batch that was asked for."""
        return [name_device(self.args.device), self.args.micro_batch_tokens]

    def write_state(self, folder: Path) -> None:
        """This project's own state beside the parent's: position in the data, the clock, what memory allowed."""
        state = {
            "data": self.data_fingerprint,
            "model": self.model_fingerprint,
            "loader": self.loader.state_dict(),
            "clock": self.clock.state_dict(),
            "micro_batch_limit": self.micro_batch_limit,
            "limited_on": self.describe_limit(),
            "is_kept": self.save_as_kept,
            "bad_steps": {name: getattr(self.guard, name) for name in ("in_row", "rollbacks", "furthest")},
        }
        write_json(folder / STATE, state)

    def save_trial(self) -> None:
        """Write the model aside and throw it away, to see how long that takes.

        Raises:
            SettingError: When the disk is full.
        """
        folder = Path(self.args.output_dir)
        with rundir.refuse_full_disk(folder), rundir.staging(folder, "trial") as new:
            self._save(str(new))
            for path in new.iterdir():
                synchronize_path(path)

    def save_final(self) -> None:
        """The final model and tokenizer at the top of the run directory.

        Raises:
            SettingError: When the disk is full.
        """
        with self.clock.account("checkpoints"), self.ranks.whole(self.model):
            self.ranks.lead(self.write_final)

    def write_final(self) -> None:
        """What `save_final` does on process 0."""
        folder = Path(self.args.output_dir)
        with rundir.refuse_full_disk(folder), rundir.staging(folder, "final") as new:
            self.save_model(str(new), _internal_call=True)
            rundir.publish_files(new, folder)

    def describe_place(self) -> dict[str, Any]:
        """Where the run is: the keys that every line of metrics.jsonl has."""
        return {
            "step": self.clock.steps,
            "taken": self.clock.steps_taken,
            "tokens": self.clock.tokens,
            "progress": self.clock.progress,
            "train_seconds": self.clock.train_seconds,
            "budget_seconds": self.clock.elapsed_seconds,
        }

    def note_event(self, event: str, **values: Any) -> None:
        """Add a line to metrics.jsonl, from the first process only."""
        if self.args.should_save:
            rundir.append_metrics(self.args.output_dir, {"event": event, **self.describe_place(), **values})

    def write_environment(self) -> None:
        """Write environment.json: the machine that the run is on, of one that went on elsewhere the last.

        Raises:
            SettingError: When the disk is full.
        """
        if self.args.should_save:
            with rundir.refuse_full_disk(self.args.output_dir):
                write_json(Path(self.args.output_dir) / rundir.ENVIRONMENT, describe_environment(self.args.device))

    def write_budget(self) -> None:
        """Write budget.json: the report at the end, the heartbeat (from a thread of its own) before it."""
        if not self.args.should_save:
            return
        with self.budget_lock:
            try:
                path, seen = Path(self.args.output_dir) / rundir.BUDGET, self.loader.samples_seen
                facts = {"samples_seen": seen, "data": self.data_fingerprint, "model": self.model_fingerprint}
                self.clock.write(path, self.status, is_durable=self.status != "running", **facts)
            except OSError as error:
                if not rundir.is_disk_full(error, self.args.output_dir):
                    raise
