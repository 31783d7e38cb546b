"""The tuned protocol: a task's learning rate and epochs, chosen from a small grid on a held-out part of its training
split. The validation split that is scored afterwards has no say in it.
"""

from __future__ import annotations

import dataclasses
import itertools

from oneday.classification import PreparedTask
from oneday.glue_protocol import CHOSEN_SETTINGS, FinetuneArguments

HELD_OUT = "held_out"
HELD_OUT_FRACTION, MAX_HELD_OUT = 0.2, 2000


def spread_grid(args: FinetuneArguments) -> list[FinetuneArguments]:
    """The settings of each trial: `tuned_learning_rates` times `tuned_epochs`."""
    return [
        dataclasses.replace(args, learning_rate=rate, num_train_epochs=epochs, save_models=False)
        for rate, epochs in itertools.product(args.tuned_learning_rates, args.tuned_epochs)
    ]


def choose_setting(
    args: FinetuneArguments, trial: PreparedTask, points: list[FinetuneArguments], lines: list[dict]
) -> tuple[FinetuneArguments, dict]:
    """The best of the trials; of equal ones the first.

    Args:
        args: The protocol.
        trial: The task with its held-out rows, from `hold_out`.
        points: From `spread_grid`.
        lines: Of the trials' runs, in their order.

    Returns:
        The settings with the chosen two in their places, and the record of the choice.
    """
    metric, (number,) = trial.task.main_metric, map(trial.task.name_number, trial.scored_splits)
    grid = [
        {name: getattr(point, name) for name in CHOSEN_SETTINGS} | {"score": line["scores"][number][metric]}
        for point, line in zip(points, lines, strict=True)
    ]
    best = max(grid, key=lambda point: point["score"])
    chosen = {name: best[name] for name in CHOSEN_SETTINGS}
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
