"""Our side of a benchmark: a recipe run by BudgetTrainer, with its held-out curve."""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from oneday.arguments import SettingError
from oneday.assembly import CLASSES, assemble_trainer, check_settings
from oneday.benchmarks.heldout import CurveCallback, HeldOut, describe_result, name_measure, point_times
from oneday.benchmarks.records import Job
from oneday.recipe import build_arguments
from oneday.trainer import BudgetTrainer


def run_ours(job: Job, run_dir: Path | None = None) -> dict[str, Any]:
    """Run a recipe; for a fresh process.

    Args:
        job: `details` holds `budget_seconds` (None where another kind of budget ends the run) and `num_points`.
        run_dir: Kept; None: a temporary one.

    Raises:
        SettingError: When a setting cannot work, or `run_dir` holds something.
        KeyboardInterrupt: When a signal ended it.
    """
    with open_run_dir(run_dir) as folder:
        model_args, data_args, args = build_arguments(CLASSES, {**job.recipe, "output_dir": folder})
        check_settings(model_args, args)
        trainer, data = assemble_trainer(model_args, data_args, args)
        held_out = HeldOut(
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
            raise KeyboardInterrupt
        losses = {name_measure(trainer.objective): metrics[name_measure(trainer.objective)]}
        if "eval_bits_per_byte" in metrics:
            losses["bits_per_byte"] = metrics["eval_bits_per_byte"]
        curve.add_point(losses)
        result = describe_result(trainer.clock, curve, trainer.model, args.device, trainer.peak_flops, trainer.bf16)
        return {**result, "precision": describe_precision(trainer)}


def open_run_dir(run_dir: Path | None) -> AbstractContextManager[str]:
    """The directory of one run: `run_dir`, which must not be there yet, or a temporary one."""
    if run_dir is None:
        return tempfile.TemporaryDirectory(prefix="oneday-benchmark-")
    if run_dir.exists():
        raise SettingError(f"The setting keep_runs is {run_dir.parent}, which holds {run_dir.name} already; move it.")
    run_dir.mkdir(parents=True)
    return nullcontext(str(run_dir))


def describe_precision(trainer: BudgetTrainer) -> str:
    """What our side computes in."""
    return trainer.describe_precision()
