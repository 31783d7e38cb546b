"""The tuned protocol: a task's learning rate and epochs, chosen from a small grid on a held-out part of its training
split. The validation split that is scored afterwards has no say in it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

from oneday.classification import PreparedTask
from oneday.glue_protocol import FinetuneArguments

HELD_OUT = "held_out"
HELD_OUT_FRACTION, MAX_HELD_OUT = 0.2, 2000


def choose_setting(
    task: PreparedTask, args: FinetuneArguments, obtain_run: Callable[[PreparedTask, FinetuneArguments], dict]
) -> tuple[FinetuneArguments, dict]:
    """Run the grid once, with the first seed, and take the best; of equal ones the first.

    Args:
        task: With its whole training split.
        args: The protocol; `tuned_learning_rates` and `tuned_epochs` span the grid.
        obtain_run: Gives one run's line for a task and settings.

    Returns:
        The settings with the chosen two in their places, and the record of the choice.
    """
    trial, metric = hold_out(task), task.task.main_metric
    grid = []
    for rate, epochs in itertools.product(args.tuned_learning_rates, args.tuned_epochs):
        point = {"learning_rate": rate, "num_train_epochs": epochs}
        run = obtain_run(trial, dataclasses.replace(args, **point, save_models=False))
        grid.append(point | {"score": run["scores"][task.task.name][metric]})
    best = max(grid, key=lambda point: point["score"])
    chosen = {name: best[name] for name in ("learning_rate", "num_train_epochs")}
    record = {"chosen": chosen, "grid": grid, "metric": metric, "num_held_out": len(trial.splits[HELD_OUT])}
    return dataclasses.replace(args, **chosen), record | {"seed": args.seed}


def hold_out(task: PreparedTask) -> PreparedTask:
    """The task with a fifth of its training rows, 2,000 at most, in place of the splits that are scored.

    The rows are drawn without regard to the seed: every choice is made on the same ones.
    """
    rows = task.splits["train"].shuffle(seed=0)
    num_held_out = max(1, min(MAX_HELD_OUT, int(HELD_OUT_FRACTION * len(rows))))
    splits = {
        "train": rows.select(range(num_held_out, len(rows))),
        HELD_OUT: rows.select(range(num_held_out)),
    }
    row = dataclasses.replace(task.task, validation_splits=(HELD_OUT,))
    return PreparedTask(row, splits, f"{task.data_hash}-{HELD_OUT}")
