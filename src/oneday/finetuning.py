"""Fine-tune a checkpoint on tasks, over several seeds, under one protocol for all of them."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict

from oneday.classification import (
    Checkpoint,
    PreparedTask,
    encode_batch,
    hash_rows,
    limit_length,
    load_checkpoint,
    silence_libraries,
    tokenize_split,
)
from oneday.durable_files import check_folder, make_folder, read_json, write_json
from oneday.errors import SettingError
from oneday.finetuning_processes import obtain_runs
from oneday.finetuning_run import WEIGHTS, PlannedRun, plan_run
from oneday.glue import Task, find_task
from oneday.glue_picture import PICTURE_FILE, count_confusions, draw_results
from oneday.glue_protocol import (
    TUNED,
    FinetuneArguments,
    check_arguments,
    complete_arguments,
    find_output_dir,
    warn_of_unread,
)
from oneday.glue_results import describe_table, keep_earlier, summarize_runs
from oneday.own_task import load_own_task
from oneday.predictions import read_test_splits, remove_submission, write_submission
from oneday.run_directory import GLUE_RESULTS, refuse_full_disk
from oneday.task_data import complete_task, load_task, take_examples
from oneday.throughput import keep_freed_memory, set_threads
from oneday.tuning import check_rows, choose_setting, hold_out, plan_trials, spread_grid

logger = logging.getLogger(__name__)


def run_protocol(args: FinetuneArguments, may_start_processes: bool = False) -> dict:
    """Fine-tune on every task with every seed, and write `glue_results.json` into the output directory.

    A finished run is written to `glue_runs.jsonl` at once and is not run again by the same command. Scores of other
    tasks stay in the file as long as they are of the same weights and settings.

    Args:
        args: The settings.
        may_start_processes: Start processes where they are worth it without `num_processes` asking for them. They
            import the main module again, which must do nothing then: `if __name__ == "__main__":`.

    Returns:
        What the file holds: `{"protocol", "tasks": {number: {"metric", "median", "scores", ...}}, "average",
        "average_over", ...}`; scores are fractions (accuracy 0.9, not 90).

    Raises:
        SettingError: When a setting cannot work (nothing has been written then), a run in a process of its own
            failed, or the disk is full (finished runs are kept).
    """
    warn_of_unread(args)
    args = complete_arguments(args)
    names = check_arguments(args)
    output_dir = find_output_dir(args)
    check_folder(output_dir, "output_dir")
    set_threads(args.num_threads)
    keep_freed_memory()
    checkpoint = load_checkpoint(args.model_name_or_path)
    prepared = [prepare_task(name, args, checkpoint) for name in names]
    check_test_splits(args, prepared)
    for task in prepared if args.protocol == TUNED else ():
        check_rows(task)
    if args.task_file:
        check_name_is_free(args, prepared[0], read_json(output_dir / GLUE_RESULTS))
    make_folder(output_dir, "output_dir")
    with refuse_full_disk(output_dir):
        return score_tasks(checkpoint, prepared, args, may_start_processes)


def score_tasks(
    checkpoint: Checkpoint, prepared: list[PreparedTask], args: FinetuneArguments, may_start_processes: bool
) -> dict:
    """Do the runs that are missing, and write what all of them come to; see `run_protocol`."""
    output_dir = find_output_dir(args)
    kinds = (False, True) if args.random_baseline else (False,)
    plan = [(task, from_random) for task in prepared for from_random in kinds]
    settings, choices = [args] * len(plan), {}
    if args.protocol == TUNED:
        settings, choices = choose_settings(checkpoint, plan, args, may_start_processes)
    runs = [
        plan_run(checkpoint, task, chosen, seed, from_random)
        for (task, from_random), chosen in zip(plan, settings)
        for seed in range(args.seed, args.seed + args.num_seeds)
    ]
    lines = obtain_runs(checkpoint, args, runs, may_start_processes)
    table = describe_table(args, checkpoint)
    earlier = read_json(output_dir / GLUE_RESULTS)
    kept = keep_earlier(table, earlier)
    if not kept:
        remove_submission(output_dir)
    else:
        rows = {entry["data_hash"] for entry in kept.values()}
        remove_submission(output_dir, [task.task.name for task in prepared if task.data_hash not in rows])
    submissions = write_submissions(args, prepared, runs, lines)
    results = summarize_runs(args, table, prepared, lines, kept, choices, submissions)
    write_json(output_dir / GLUE_RESULTS, results)
    draw_results(results, count_answers(prepared, runs), output_dir / PICTURE_FILE)
    return results


def choose_settings(
    checkpoint: Checkpoint, plan: list[tuple[PreparedTask, bool]], args: FinetuneArguments, may_start_processes: bool
) -> tuple[list[FinetuneArguments], dict[tuple[str, str], dict]]:
    """Of the tuned protocol: the settings of each (task, from_random), and the choice's record by task and weights."""
    points = spread_grid(args)
    parts = {task.task.name: hold_out(task) for task, from_random in plan if not from_random}
    trials = [
        [
            plan_run(checkpoint, part, settings, seed, from_random)
            for part, settings, seed in plan_trials(args, points, task, parts[task.task.name])
        ]
        for task, from_random in plan
    ]
    lines = obtain_runs(checkpoint, args, sum(trials, []), may_start_processes, "choosing settings")
    lines = {line["key"]: line for line in lines}
    settings, choices = [], {}
    for (task, from_random), runs in zip(plan, trials, strict=True):
        name = task.task.name
        chosen, record = choose_setting(args, parts[name], points, [lines[run.key] for run in runs])
        settings.append(chosen)
        choices[name, WEIGHTS[from_random]] = record
    return settings, choices


def check_name_is_free(args: FinetuneArguments, prepared: PreparedTask, earlier: dict) -> None:
    """Raise SettingError where the scores of another file, or of other columns, stand under this task's name."""
    name = prepared.task.name
    entry = earlier.get("tasks", {}).get(name)
    if entry is None or entry["data_hash"] == prepared.data_hash:
        return
    own = entry.get("own_task", {})
    other = own.get("task_file", "another data set")
    if Path(other).resolve() != Path(args.task_file).resolve():
        raise SettingError(
            f"The scores of {other} are kept as {name}, as those of {args.task_file} would be; set task_name."
        )
    for column in ("label_column", "text_columns"):
        if own[column] != getattr(args, column):
            raise SettingError(
                f"The scores of {other} with {column} {own[column]} are kept as {name}, as those with "
                f"{getattr(args, column)} would be; set task_name."
            )


def check_test_splits(args: FinetuneArguments, prepared: list[PreparedTask]) -> None:
    """Raise SettingError where a submission is asked for and no task has rows for it."""
    if args.write_submission and not any(task.test_splits for task in prepared):
        raise SettingError("write_submission is on, and no task of task_names has a test split; turn it off.")


def write_submissions(
    args: FinetuneArguments, prepared: list[PreparedTask], runs: list[PlannedRun], lines: list[dict]
) -> dict[str, dict]:
    """GLUE's files of the tasks that have test rows -> `{task: {"seed": ..., "files": [...]}}`."""
    found = {}
    for task in prepared if args.write_submission else ():
        if task.test_splits:
            mine = [(line, run.folder) for run, line in zip(runs, lines) if run.task is task and not run.from_random]
            found[task.task.name] = write_submission(find_output_dir(args), task, mine)
    return found


def count_answers(prepared: list[PreparedTask], runs: list[PlannedRun]) -> dict[str, np.ndarray]:
    """Number's name -> labels by answers, summed over the pretrained runs; of classes only."""
    return {
        task.task.name_number(split): count_confusions(
            [run.folder / f"{split}.parquet" for run in runs if run.task is task and not run.from_random],
            task.task.num_labels,
        )
        for task in prepared
        if task.task.num_labels > 1
        for split in task.scored_splits
    }


def prepare_task(name: str, args: FinetuneArguments, checkpoint: Checkpoint) -> PreparedTask:
    """Load a task and tokenise it."""
    with silence_libraries():
        task, data = read_task(name, args)
        limits = {split: args.max_train_examples if split == "train" else args.max_eval_examples for split in data}
        num_rows = {split: len(rows) for split, rows in data.items()}
        data = {split: take_examples(rows, limits[split]) for split, rows in data.items()}
        data_hash = hash_rows(data)
        max_length = limit_length(args.max_seq_length, checkpoint, task)
        encode = functools.partial(encode_batch, task=task, checkpoint=checkpoint, max_length=max_length)
        splits = {split: tokenize_split(rows, encode) for split, rows in data.items()}
        tests = read_test_splits(name, args.task_data_dir, args.cache_dir) if args.write_submission else {}
        test_hash = hash_rows(tests) if tests else ""
        tests = {file: tokenize_split(rows, encode) for file, rows in tests.items()}
    say_cut(task, splits, max_length)
    return PreparedTask(task, splits, data_hash, tests, test_hash, num_rows)


def say_cut(task: Task, splits: dict[str, Dataset], max_length: int) -> None:
    """Say of how many rows something may have been cut off: those of the full length."""
    for split, rows in splits.items():
        num_full = sum(length == max_length for length in rows["length"][:])
        if num_full:
            logger.info(
                "%s %s: %s of %s rows fill or exceed %d tokens and are cut there; max_seq_length sets it",
                task.name, split, f"{num_full:,}", f"{len(rows):,}", max_length,
            )  # fmt: skip


def read_task(name: str, args: FinetuneArguments) -> tuple[Task, DatasetDict]:
    """A task's row and its splits: of the user's own file, when there is one, or by its name."""
    if args.task_file:
        return load_own_task(args)
    data = load_task(name, args.task_data_dir, args.cache_dir)
    return complete_task(find_task(name), data["train"]), data
