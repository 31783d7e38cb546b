"""More budget for a finished run: it goes on from before its learning rate fell, as if it had been planned that long.

Shapes with a flat phase (trapezoid, one_minus_sqrt) leave a checkpoint at its end, constant one at the end of the run.
The others (linear, cosine, triangle) have decayed all along: they go on from their end, warming up again.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from oneday import run_directory as rundir
from oneday.budget import Budget
from oneday.checkpoints import find_fault, list_checkpoints, list_kept, read_state, remove_checkpoint
from oneday.durable_files import read_json, write_json
from oneday.errors import SettingError
from oneday.schedules import find_plateau_end

logger = logging.getLogger(__name__)

EXTENDING = "extending"


def extend_run(output_dir: str | Path, settings: dict[str, Any], budget: Budget, data: str, model: str) -> None:
    """Turn a finished run into one that is resumed under a larger budget; may be called again if it was cut off.

    Args:
        output_dir: The run directory.
        settings: All settings, with the new budget.
        budget: That budget.
        data: Fingerprint of the text at hand, as in `BudgetTrainer`.
        model: That of the model config.

    Raises:
        SettingError: When the run cannot be extended, or the budget is not larger than what it had.
    """
    folder = Path(output_dir)
    report = read_json(folder / rundir.BUDGET)
    plateau_end = find_plateau_end(settings["lr_shape"], settings["decay_fraction"])
    base = find_base(folder, plateau_end, report)
    check_extension(settings, budget, report)
    rundir.check_same_run(folder, read_state(base), data, model)
    is_falling = plateau_end == 0.0
    state = read_state(base)["clock"]
    if is_falling:
        logger.info(
            "lr_shape %s has no flat phase to go on from: the learning rate warms up again from the end of the run.",
            settings["lr_shape"],
        )
    discarded = report["spent"]["seconds"] - state["elapsed_seconds"] + report.get("discarded_seconds", 0.0)
    energy = {"kwh": state["metered_kwh"]} if state["metered_kwh"] > 0.0 else {}
    undone = [path for path in list_checkpoints(folder) if path != base and is_later(path, state["steps_taken"])]
    if report.get("status") != EXTENDING:
        report |= {
            "status": EXTENDING,
            "discarded_seconds": discarded,
            "restart_at": state["steps_taken"] if is_falling else None,
            "spent": {**report["spent"], "seconds": state["elapsed_seconds"], **energy},
        }
        write_json(folder / rundir.BUDGET, report)
    for checkpoint in undone:
        remove_checkpoint(checkpoint)
    rundir.write_recipe(folder, settings)
    # The scores of weights that are about to move; results.json last, without which the run is not finished.
    scores = [*folder.glob(f"glue*/{rundir.GLUE_RESULTS}"), folder / rundir.ZERO_SHOT_RESULTS, folder / rundir.RESULTS]
    for path in filter(Path.exists, scores):
        os.replace(path, path.with_name(f"{path.stem}-{report['spent']['steps']:.0f}-steps.json"))
    logger.info("Going on from step %d, %.0f s of the budget spent.", state["steps"], state["elapsed_seconds"])


def is_later(checkpoint: Path, steps_taken: int) -> bool:
    """Whether a checkpoint is of more steps, or damaged.

    Raises:
        SettingError: When it cannot be read, which says nothing of what is in it.
    """
    clock = read_state(checkpoint).get("clock")
    return find_fault(checkpoint) is not None if clock is None else clock["steps_taken"] > steps_taken


def check_extension(settings: dict[str, Any], budget: Budget, report: dict[str, Any]) -> None:
    """Refuse, before anything is touched, what would only cost the finished model.

    Raises:
        SettingError: On a replay, or a budget that is not larger in every kind.
    """
    if settings.get("replay"):
        raise SettingError("extend is set on a replay, which repeats a run step by step; extend that run instead.")
    for kind, limit in budget.limits.items():
        had = max(report["limit"].get(kind, 0.0), report["spent"].get(kind, 0.0))
        if limit <= had:
            raise SettingError(
                f"extend needs a budget that is larger in every kind: {limit:,.6g} {kind} are set and the run had "
                f"{had:,.6g}; raise it, or set it to null."
            )


def find_base(folder: Path, plateau_end: float, report: dict[str, Any]) -> Path:
    """The checkpoint kept for this, the last one; of a shape without a flat phase the one of the run's end also does.

    Args:
        folder: The run directory.
        plateau_end: Progress at which the learning rate begins to fall.
        report: budget.json.

    Raises:
        SettingError: When there is none, or it is damaged.
    """
    kept = list_kept(folder)
    if not kept and plateau_end in (0.0, 1.0):
        clocks = {path: read_state(path).get("clock", {}) for path in list_checkpoints(folder)}
        kept = [path for path, clock in clocks.items() if clock.get("steps") == report["spent"]["steps"]]
    if not kept:
        raise SettingError(
            f"The run in {folder} cannot be extended: the checkpoint from before its learning rate fell is not there; "
            "begin a new run."
        )
    fault = find_fault(kept[-1])
    if fault is not None:
        raise SettingError(
            f"The run in {folder} cannot be extended: {kept[-1].name} is damaged ({fault}); begin a new run."
        )
    return kept[-1]
