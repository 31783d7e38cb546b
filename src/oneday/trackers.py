"""Dashboards that watch a run (`report_to`): their files lie in the run directory, and all of a run is one line."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.integrations import (
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    get_available_reporting_integrations,
)

from oneday import run_directory as rundir
from oneday.arguments import BudgetTrainingArguments
from oneday.durable_files import read_json, write_json
from oneday.errors import SettingError

if TYPE_CHECKING:
    from oneday.trainer import BudgetTrainer

PROJECT, STOCK_PROJECT = "oneday", "huggingface"
# Where a tracker looks for a directory that the user chose.
DIRECTORIES = {"trackio": "TRACKIO_DIR", "wandb": "WANDB_DIR"}
TENSORBOARD_DIRECTORY = "TENSORBOARD_LOGGING_DIR"


def check_trackers(args: BudgetTrainingArguments) -> None:
    """Raise SettingError where a tracker of `report_to` is unknown or not installed."""
    available = get_available_reporting_integrations()
    for tracker in args.report_to:
        if tracker not in available:
            raise SettingError(
                f"report_to names {tracker}, which is not installed or not known; here are {', '.join(available)}, "
                f"or none."
            )


def name_run(args: BudgetTrainingArguments) -> None:
    """Name the run after its directory and keep trackers' files there; call before the trainer makes its callbacks.

    Under a name, the final evaluation and a resumed run go on in the same line of a dashboard. A choice in the
    environment or the settings stays.
    """
    args.run_name = args.run_name or Path(args.output_dir).name
    args.project = PROJECT if args.project == STOCK_PROJECT else args.project
    for tracker, variable in DIRECTORIES.items():
        if tracker in args.report_to:
            os.environ.setdefault(variable, str(Path(args.output_dir).resolve() / tracker))
    if "wandb" in args.report_to:
        os.environ.setdefault("WANDB_PROJECT", args.project)


def continue_line(args: BudgetTrainingArguments) -> None:
    """Have W&B go on in the run's own line after an interruption, on another machine too; call in a run's directory.

    Its id is kept there. An id in the environment is taken instead.
    """
    if "wandb" not in args.report_to:
        return
    path = Path(args.output_dir) / rundir.WANDB_RUN
    run_id = os.environ.get("WANDB_RUN_ID") or read_json(path).get("id") or uuid.uuid4().hex
    write_json(path, {"id": run_id})
    os.environ.update(WANDB_RUN_ID=run_id)
    os.environ.setdefault("WANDB_RESUME", "allow")


def place_tensorboard(trainer: BudgetTrainer) -> None:
    """One directory for every process of a run; the stock name of it would hold the host's."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and TENSORBOARD_DIRECTORY not in os.environ:
            callback.logging_dir = str(Path(trainer.args.output_dir) / "tensorboard")


def close_trackers(trainer: BudgetTrainer) -> None:
    """Bring to the disk what came after the last step: the parent closes trackers there, the final loss opens them."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, (TensorBoardCallback, TrackioCallback)):
            callback.on_train_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
        elif isinstance(callback, WandbCallback) and callback._wandb is not None:
            callback._wandb.finish()
