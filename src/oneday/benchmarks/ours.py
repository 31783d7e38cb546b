"""Our side of a benchmark: a recipe run by BudgetTrainer, with its held-out curve."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from oneday.assembly import CLASSES, assemble_trainer, check_settings
from oneday.benchmarks.heldout import CurveCallback, HeldOutLoss, describe_result, name_measure, point_times
from oneday.benchmarks.records import Job
from oneday.errors import SettingError
from oneday.hub_texts import write_revisions
from oneday.model_card import write_reports
from oneday.recipe import build_arguments
from oneday.run_directory import create_run

logger = logging.getLogger(__name__)


def run_ours(job: Job, run_dir: Path | None = None) -> dict[str, Any]:
    """Run a recipe; for a fresh process.

    Args:
        job: `details` holds `budget_seconds` (None where another kind of budget ends the run) and `num_points`.
        run_dir: Where its directory is kept; None: nowhere.

    Raises:
        SettingError: When a setting cannot work.
        KeyboardInterrupt: When a signal ended it.
    """
    with tempfile.TemporaryDirectory(prefix="oneday-benchmark-") as temporary:
        folder = Path(temporary) / job.name  # its card and its curve have this name
        folder.mkdir()
        model_args, data_args, args = build_arguments(CLASSES, {**job.recipe, "output_dir": str(folder)})
        check_settings(model_args, args)
        trainer, data = assemble_trainer(model_args, data_args, args)
        held_out = HeldOutLoss(
            trainer.model,
            trainer.objective,
            data.validation,
            args.micro_batch_tokens,
            trainer.evaluation_precision,
            trainer.position_offset,
        )
        budget_seconds = job.details["budget_seconds"]
        times = point_times(budget_seconds, job.details["num_points"]) if budget_seconds else []
        curve = CurveCallback(trainer.clock, times, held_out.measure, args.device)
        trainer.add_callback(curve)
        metrics = trainer.run()
        if trainer.status == "interrupted":
            raise trainer.failure or KeyboardInterrupt
        losses = {name_measure(trainer.objective): metrics[name_measure(trainer.objective)]}
        if "eval_bits_per_byte" in metrics:
            losses["bits_per_byte"] = metrics["eval_bits_per_byte"]
        curve.add_point(losses)
        result = describe_result(trainer.clock, curve, trainer.model, args.device, trainer.peak_flops, trainer.bf16)
        if run_dir is not None:  # all is measured
            try:
                create_run(folder, {**job.recipe, "output_dir": str(run_dir)})
                write_revisions(folder)
                write_reports(trainer, data, model_args, data_args, metrics)
                keep_run(folder, run_dir)
            except (OSError, SettingError) as error:  # a full disk, say, does not undo the run
                logger.warning("The run is not kept in %s (%s); its record is.", run_dir, error)
        return {**result, "precision": trainer.describe_precision()}


def keep_run(folder: Path, run_dir: Path) -> None:
    """Copy a finished run's directory to where it is kept, whole or not at all, in place of an older one."""
    aside = run_dir.with_name(f".{run_dir.name}")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(folder, aside)
    shutil.rmtree(run_dir, ignore_errors=True)
    aside.rename(run_dir)
