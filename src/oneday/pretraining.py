"""A whole run of a BudgetTrainer: new or resumed, until the final model is on disk and scored."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from oneday import run_directory as rundir
from oneday.arguments import SettingError
from oneday.budget import read_carried_seconds
from oneday.callbacks import note_signals
from oneday.compilation import try_compiled
from oneday.initialization import initialize_embeddings

if TYPE_CHECKING:
    from oneday.trainer import BudgetTrainer

logger = logging.getLogger(__name__)

# The final save and evaluation may take this much longer than they did when measured.
RESERVE_MARGIN = 1.25
RESERVE_FLOOR_SECONDS = 0.25


def run_pretraining(trainer: BudgetTrainer, resume: bool = False) -> dict[str, float]:
    """Train until the budget is used up, save, evaluate; returns the final held-out metrics.

    Args:
        resume: Go on from where the run directory stands.

    Raises:
        SettingError: When the budget does not hold one step, or the disk is full.
    """
    with note_signals() as trainer.signals:
        if not (resume and load_trained(trainer)):
            train_within_budget(trainer, prepare_resume(trainer) if resume else None)
            if trainer.status == "interrupted":
                trainer.write_budget()
                return {}
            trainer.save_final()
            trainer.status = "trained"
            trainer.write_budget()
        metrics = trainer.evaluate()
        trainer.clock.stop()
        trainer.status = "finished"
        trainer.write_budget()
        rundir.append_metrics(
            trainer.args.output_dir, {"event": "end", "status": trainer.status, **trainer.describe_place()}
        )
    return metrics


def train_within_budget(trainer: BudgetTrainer, checkpoint: Path | None) -> None:
    """The steps, from random weights or a checkpoint."""
    if trainer.clock.budget.clock_limit_seconds is not None:
        measure_end(trainer)
    if trainer.args.eval_on_start and checkpoint is None:
        trainer.evaluate()
    trainer.args.eval_on_start = False
    prepare_first_step(trainer, is_new=checkpoint is None)
    if trainer.next_step_fits():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    elif checkpoint is None:
        raise SettingError(
            f"The budget ({trainer.clock.budget.describe()}) is too small for one step: initialising and compiling "
            f"took {trainer.clock.preparation_seconds:.1f} s here, the final evaluation and save take "
            f"{trainer.clock.reserve_seconds:.1f} s; raise it."
        )
    else:
        trainer._load_from_checkpoint(str(checkpoint))


def prepare_first_step(trainer: BudgetTrainer, is_new: bool) -> None:
    """Set the embeddings of a new run from the corpus and compile, on the clock; progress starts after it."""
    clock, args = trainer.clock, trainer.args
    if is_new and args.embedding_init == "cooccurrence":
        clock.start()
        with clock.account("initialization"):
            special_ids = trainer.processing_class.all_special_ids
            initialize_embeddings(trainer.model, trainer.train_dataset, special_ids, args.seed)
    if args.use_compile:
        clock.start()
        with clock.account("compilation"):
            args.use_compile = try_compiled(trainer.model, trainer.rehearse_step)
    if is_new:
        clock.end_preparation()


def load_trained(trainer: BudgetTrainer) -> bool:
    """Whether an earlier process saved the final model but did not score it; then it is loaded."""
    report = rundir.read_json(Path(trainer.args.output_dir) / rundir.BUDGET)
    if report.get("status") != "trained":
        return False
    trainer._load_from_checkpoint(trainer.args.output_dir)
    trainer.clock.load_report(report)
    trainer.clock.start()
    return True


def prepare_resume(trainer: BudgetTrainer) -> Path | None:
    """Set clock and data position from the last checkpoint; the time of killed processes counts.

    Raises:
        SettingError: When the corpus or the tokenizer is another one than when the checkpoint was written.
    """
    folder = trainer.args.output_dir
    trainer.clock.carried_seconds = read_carried_seconds(Path(folder) / rundir.BUDGET)
    checkpoints = rundir.list_checkpoints(folder)
    if checkpoints:
        state = rundir.read_json(checkpoints[-1] / rundir.STATE)
        if state["data"] != trainer.data_fingerprint:
            raise SettingError(
                f"The text or tokenizer of dataset_name is not what {folder} was trained on so far; bring the same "
                "text back, or name another output_dir."
            )
        trainer.clock.load_state_dict(state["clock"])
        trainer.loader.load_state_dict(state["loader"])
    else:
        trainer.clock.ledger["lost"] = trainer.clock.carried_seconds
    started = time.time() - psutil.Process().create_time()
    trainer.clock.start(since=trainer.clock.now() - started)
    rundir.append_metrics(folder, {"event": "resume", "from_step": trainer.clock.steps, **trainer.describe_place()})
    logger.info(
        "Resuming from step %d, %.0f s of the budget spent.", trainer.clock.steps, trainer.clock.elapsed_seconds
    )
    return checkpoints[-1] if checkpoints else None


def measure_end(trainer: BudgetTrainer) -> None:
    """Time a save and a part of an evaluation, so that the reserve is right from the first step."""
    begun = time.monotonic()
    with rundir.staging(trainer.args.output_dir, "trial") as folder:
        trainer.model.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
    trainer.save_seconds = time.monotonic() - begun
    trainer.measure_held_out(max_parts=1)
    begun = time.monotonic()
    trainer.measure_held_out(max_parts=1)
    rows_at_once = max(1, trainer.args.micro_batch_tokens // trainer.eval_dataset.row_length)
    trainer.eval_seconds = (time.monotonic() - begun) * math.ceil(len(trainer.eval_dataset) / rows_at_once)
    update_reserve(trainer)


def update_reserve(trainer: BudgetTrainer) -> None:
    """Keep for the end what the last evaluation and save took, with a margin."""
    measured = trainer.eval_seconds + trainer.save_seconds
    trainer.clock.reserve_seconds = RESERVE_MARGIN * measured + RESERVE_FLOOR_SECONDS
