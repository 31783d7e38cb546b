"""The tuned protocol: a task's learning rate and epochs, chosen from a small grid on held-out parts of its training
split. The validation split that is scored afterwards has no say in it.

One part of a small task and one seed choose by chance (EXPERIMENTS.md, 2026-11-28, "Chosen on several parts"). So
every point of the grid is tried on as many parts as hold `ENOUGH_HELD_OUT` rows together, five at most, each with a
seed of its own: five are cross-validation, and of 5,000 rows or more one is enough.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics

from oneday.classification import PreparedTask
from oneday.errors import SettingError
from oneday.glue_protocol import CHOSEN_SETTINGS, TUNED_PARTS, FinetuneArguments

HELD_OUT = "held_out"
HELD_OUT_FRACTION, MAX_HELD_OUT = 0.2, 2000
ENOUGH_HELD_OUT = 1000
# A part has two rows then: a correlation needs as many.
MIN_ROWS = 10


def spread_grid(args: FinetuneArguments) -> list[FinetuneArguments]:
    """The settings of each point: `tuned_learning_rates` times `tuned_epochs`."""
    return [
        dataclasses.replace(args, learning_rate=rate, num_train_epochs=epochs, save_models=False)
        for rate, epochs in itertools.product(args.tuned_learning_rates, args.tuned_epochs)
    ]


def plan_trials(
    args: FinetuneArguments, points: list[FinetuneArguments], task: PreparedTask, parts: list[PreparedTask]
) -> list[tuple[PreparedTask, FinetuneArguments, int]]:
    """Each point on all parts in turn: what is trained and scored, its settings, and its seed.

    A trial makes as many steps on fewer rows as the run that it stands for: with fewer, a small task may not have
    begun to learn. Its seeds come after those that are scored, which have no say in the choice either.
    """
    trials = []
    for point, (number, part) in itertools.product(points, enumerate(parts)):
        stretch = len(task.splits["train"]) / len(part.splits["train"])
        stretched = dataclasses.replace(point, num_train_epochs=point.num_train_epochs * stretch)
        trials.append((part, stretched, args.seed + args.num_seeds + number))
    return trials


def choose_setting(
    args: FinetuneArguments, parts: list[PreparedTask], points: list[FinetuneArguments], lines: list[dict]
) -> tuple[FinetuneArguments, dict]:
    """The point with the best mean over the parts; of equal ones the first, and one that diverged only among such.

    Args:
        args: The protocol.
        parts: The task with its held-out rows, from `hold_out`.
        points: From `spread_grid`.
        lines: Of the trials' runs, in the order of `plan_trials`.

    Returns:
        The settings with the chosen two in their places, and the record of the choice.
    """
    task = parts[0].task
    metric, number = task.main_metric, task.name_number(HELD_OUT)
    grid = [
        {name: getattr(point, name) for name in CHOSEN_SETTINGS} | {"scores": [], "diverged": False}
        for point in points
    ]
    for (row, _), line in zip(itertools.product(grid, parts), lines, strict=True):
        row["scores"].append(line["scores"][number][metric])
        row["diverged"] |= line["diverged"]
    for row in grid:
        row["score"] = statistics.fmean(row["scores"])
    # The answers of a run that diverged are all one class, which may be the commonest.
    best = max(grid, key=lambda point: (not point["diverged"], point["score"]))
    chosen = {name: best[name] for name in CHOSEN_SETTINGS}
    record = {"chosen": chosen, "grid": grid, "metric": metric, "num_held_out": len(parts[0].splits[HELD_OUT])}
    record["seeds"] = [line["seed"] for line in lines[: len(parts)]]
    return dataclasses.replace(args, **chosen), record


def check_rows(task: PreparedTask) -> None:
    """Raise SettingError where there are too few training rows to hold some of them out."""
    if len(task.splits["train"]) < MIN_ROWS:
        raise SettingError(
            f"protocol is tuned and {task.task.name} has {len(task.splits['train'])} training rows; it holds a fifth "
            f"of them out to choose by and needs {MIN_ROWS}: take another protocol."
        )


def hold_out(task: PreparedTask) -> list[PreparedTask]:
    """The task with a fifth of its training rows, 2,000 at most, in place of the splits that are scored: once for each
    part that is held out in turn, no row twice.

    The rows are drawn without regard to the seed: every choice is made on the same ones.
    """
    rows = task.splits["train"].shuffle(seed=0)
    size = min(MAX_HELD_OUT, int(HELD_OUT_FRACTION * len(rows)))
    row = dataclasses.replace(task.task, validation_splits=(HELD_OUT,))
    parts = []
    for part in range(min(TUNED_PARTS, -(-ENOUGH_HELD_OUT // size))):
        held_out = range(part * size, (part + 1) * size)
        others = [index for index in range(len(rows)) if index not in held_out]
        splits = {"train": rows.select(others), HELD_OUT: rows.select(held_out)}
        parts.append(PreparedTask(row, splits, f"{task.data_hash}-{HELD_OUT}-{part}"))
    return parts
