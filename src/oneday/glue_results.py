"""Scores of fine-tuning runs: the file of finished runs, the summary of seeds, the average, the table."""

from __future__ import annotations

import json
import logging
import statistics
from pathlib import Path

import numpy as np

from oneday.classification import Checkpoint, PreparedTask, hex_digest
from oneday.durable_files import read_lines
from oneday.glue import GLUE_NUMBERS, TASKS, name_labels, score_majority
from oneday.glue_protocol import (
    CHOSEN_SETTINGS,
    OWN_TASK_SETTINGS,
    PROBE,
    PROTOCOL_SETTINGS,
    RUN_SETTINGS,
    TUNED,
    TUNED_SETTINGS,
    FinetuneArguments,
    choose_bf16,
    choose_pad_multiple,
    name_protocol,
)

logger = logging.getLogger(__name__)

RUNS_FILE = "glue_runs.jsonl"
COST_KEYS = ("trainable_parameters", "total_parameters", "peak_memory_bytes")
METRIC_TITLES = {
    "accuracy": "accuracy",
    "f1": "F1",
    "f1_macro": "macro F1",
    "matthews_correlation": "Matthews",
    "pearson": "Pearson",
    "spearmanr": "Spearman",
}


def describe_table(args: FinetuneArguments, checkpoint: Checkpoint) -> dict:
    """What all scores of one `glue_results.json` have in common: weights, inputs and settings."""
    settings = {name: getattr(args, name) for name in (*PROTOCOL_SETTINGS, "seed")}
    if args.protocol == TUNED:
        settings |= {name: getattr(args, name) for name in TUNED_SETTINGS} | dict.fromkeys(CHOSEN_SETTINGS)
    return {
        "protocol": name_protocol(args),
        "model": checkpoint.name,
        "weights_hash": checkpoint.weights_hash,
        "architecture_hash": checkpoint.architecture_hash,
        "settings": settings | {"bf16": choose_bf16(args)},
    }


def keep_earlier(table: dict, earlier: dict) -> dict[str, dict]:
    """The numbers of an earlier call that may stand beside those of this one; none of other weights or settings."""
    if all(earlier.get(name) == value for name, value in table.items() if name != "model"):
        return earlier["tasks"]
    if earlier:
        logger.info("scores of other weights or settings are replaced; their runs stay in the runs file")
    return {}


def summarize_runs(
    args: FinetuneArguments,
    table: dict,
    prepared: list[PreparedTask],
    runs: list[dict],
    kept: dict[str, dict],
    choices: dict[tuple[str, str], dict],
    submissions: dict[str, dict],
) -> dict:
    """The contents of `glue_results.json`.

    Args:
        args: The protocol.
        table: From `describe_table`.
        prepared: The tasks of this call.
        runs: Their lines of `glue_runs.jsonl`.
        kept: Numbers of earlier calls, from `keep_earlier`; of tasks that this call has, its own count alone.
        choices: Of the tuned protocol, by task and kind of weights.
        submissions: By task, the seed and the files of what was written for GLUE's server.
    """
    again = {task.task.name for task in prepared}
    tasks = {number: entry for number, entry in kept.items() if entry["task"] not in again}
    for task in prepared:
        name = task.task.name
        mine = [run for run in runs if run["task"] == name]
        shared = {
            "tuning": {kind: choice for (of, kind), choice in choices.items() if of == name},
            "own_task": {setting: getattr(args, setting) for setting in OWN_TASK_SETTINGS} if args.task_file else {},
            "label_scale": task.task.label_scale,
            "submission": submissions.get(name, {}),
        }
        shared = {key: value for key, value in shared.items() if value}
        for split in task.scored_splits:
            tasks[task.task.name_number(split)] = summarize_number(task, split, mine) | shared
    return table | summarize_machines(tasks) | {"tasks": tasks} | summarize_average(tasks)


def summarize_number(prepared: PreparedTask, split: str, runs: list[dict]) -> dict:
    """The entry of one number: its seeds' scores, their median, the floors beside it, and the rows behind it."""
    task, number = prepared.task, prepared.task.name_number(split)
    by_kind = {
        kind: [run["scores"][number] for run in runs if run["weights"] == kind] for kind in ("pretrained", "random")
    }
    main = {kind: [scores[task.main_metric] for scores in rows] for kind, rows in by_kind.items()}
    num_train, num_validation = len(prepared.splits["train"]), len(prepared.splits[split])
    sizes = dict(zip(task.validation_splits, task.num_validation))
    whole = {
        name: prepared.num_rows.get(name, count) for name, count in (("train", num_train), (split, num_validation))
    }
    official = (task.num_train or whole["train"], sizes.get(split, whole[split]))
    labels, train_labels = (np.asarray(prepared.splits[name]["label"]) for name in (split, "train"))
    entry = {
        "task": task.name,
        "split": split,
        "metric": task.main_metric,
        "labels": name_labels(task) if task.num_labels > 1 else None,
        "median": statistics.median(main["pretrained"]),
        "scores": main["pretrained"],
        "seeds": [run["seed"] for run in runs if run["weights"] == "pretrained"],
        "metrics": {name: [scores[name] for scores in by_kind["pretrained"]] for name in task.metrics},
        "majority": score_majority(task, train_labels, labels),
        "num_train": num_train,
        "num_validation": num_validation,
        "official_num_train": official[0],
        "official_num_validation": official[1],
        "subset": (num_train, num_validation) != official,
        **{name: max(run[name] for run in runs) for name in COST_KEYS},
        "seconds": round(sum(run["seconds"] for run in runs), 1),
        "data_hash": prepared.data_hash,
        "diverged_runs": sum(run["diverged"] for run in runs),
        "threads": sorted({run["threads"] for run in runs if "threads" in run}),
        "environments": list_environments(runs),
    }
    if main["random"]:
        entry["random_weights"] = {"median": statistics.median(main["random"]), "scores": main["random"]}
    return entry


def list_environments(runs: list[dict]) -> list[dict]:
    """The machines, versions and commits that runs were made with, each once; none of lines that say nothing."""
    found = []
    for run in runs:
        if run.get("environment") not in (None, *found):
            found.append(run["environment"])
    return found


def summarize_machines(tasks: dict[str, dict]) -> dict[str, object]:
    """`device` (`cpu`, or the GPUs' names; `unknown` of runs that do not say) and `threads` of all numbers."""
    environments = [environment for entry in tasks.values() for environment in entry["environments"]]
    names = {"cpu" if made["device_type"] == "cpu" else made["device"] for made in environments}
    threads = {number for entry in tasks.values() for number in entry["threads"]}
    return {"device": ", ".join(sorted(names)) or "unknown", "threads": sorted(threads)}


def summarize_average(tasks: dict[str, dict]) -> dict[str, object]:
    """The average over the numbers of `tasks`, under a name that says what it is of.

    Only all nine GLUE numbers on complete data make a "GLUE average"; WNLI, diagnostics and other tasks beside them
    are left out of it. Anything less is an average over what is there.
    """
    over = [name for name in GLUE_NUMBERS if name in tasks]
    complete = len(over) == len(GLUE_NUMBERS) and not any(tasks[name]["subset"] for name in over)
    over = over if complete else list(tasks)
    title = "GLUE average" if complete else f"average of {', '.join(over)}"
    average = statistics.fmean(tasks[name]["median"] for name in over)
    summary = {"average": average, "average_over": over, "average_name": title}
    if all("random_weights" in tasks[name] for name in over):
        summary["average_random_weights"] = statistics.fmean(tasks[name]["random_weights"]["median"] for name in over)
    return summary


def format_results(results: dict) -> str:
    """The scores (x 100) as a table of at most 80 columns, with what has to be said about them below it."""
    header = f"{'task':17}{'metric':10}{'majority':>9}{'random':>8}{'pretrained [min..max]':>24}{'gain':>8}"
    lines, notes = [header, "-" * len(header)], []
    for name, row in results["tasks"].items():
        floor = row["random_weights"]["median"] if "random_weights" in row else row["majority"]
        gain = row["median"] - floor
        random = f"{100 * floor:8.1f}" if "random_weights" in row else f"{'-':>8}"
        spread = f"{100 * row['median']:.1f} [{100 * min(row['scores']):.1f}..{100 * max(row['scores']):.1f}]"
        mark = name[:15] + "*" * row["subset"]
        title = METRIC_TITLES[row["metric"]]
        lines.append(f"{mark:17}{title:10}{100 * row['majority']:9.1f}{random}{spread:>24}{100 * gain:+8.1f}")
        if row["diverged_runs"]:
            notes.append(f"{name}: {row['diverged_runs']} of its runs diverged; a lower learning_rate may help")
        if gain <= 0 and "random_weights" in row:
            notes.append(f"{name}: pretraining does not help here")
        elif gain <= 0:
            notes.append(f"{name}: no better than the commonest answer")
        if "tuning" in row:
            tuning = row["tuning"]["pretrained"]
            epochs = tuning["chosen"]["num_train_epochs"]
            chosen = f"learning rate {tuning['chosen']['learning_rate']:g}, {epochs:g} epoch{'s' * (epochs != 1)}"
            times = f"{len(tuning['seeds'])} x " * (len(tuning["seeds"]) > 1)
            notes.append(f"{name}: {chosen}, chosen on {times}{tuning['num_held_out']:,} held-out rows")
        if row["subset"]:
            trained = f"{row['num_train']:,} of {row['official_num_train']:,} training rows"
            scored = f"{row['num_validation']:,} of {row['official_num_validation']:,} scored"
            if row["task"] in TASKS and TASKS[row["task"]].num_train is not None:
                notes += [f"* {name}: {trained},", f"  {scored}: no official score"]
            else:
                notes.append(f"* {name[:15]}: {trained}, {scored}")
    over = results["average_over"]
    title = results["average_name"]
    if title != "GLUE average":  # names them all
        title = f"average of {len(over)} number{'s' * (len(over) > 1)}"
    lines += [f"{title:53}{100 * results['average']:7.1f}", f"protocol: {results['protocol']}"]
    lines += [describe_cost(results), *notes]
    return "\n".join(lines)


def compare_with_full(results: dict, full: dict) -> list[str]:
    """Lines that set the scores of adapters beside those of training all weights of the same checkpoint."""
    is_full = full.get("weights_hash") == results["weights_hash"] and not full["settings"]["peft"]
    # Of the same rows, those trained on and those scored, by the same metric.
    rows, others = (
        {name: (entry["data_hash"], entry["metric"]) for name, entry in side.get("tasks", {}).items()}
        for side in (results, full)
    )
    shared = [name for name in rows if rows[name] == others.get(name)] if is_full else []
    if not results["settings"]["peft"] or not shared:
        return []
    lines = [f"{results['settings']['peft']} / all weights (protocol {full['protocol']}):"]
    for name in shared:
        ours, theirs = (100 * side["tasks"][name]["median"] for side in (results, full))
        lines.append(f"  {name[:15]:15}{ours:6.1f} /{theirs:6.1f}")
    return [*lines, f"  {describe_cost(full)}"]


def describe_cost(results: dict) -> str:
    """`lora: 0.18 M of 6.30 M parameters trained, peak memory 1.02 GB`, the largest over the tasks."""
    most = {name: max(row[name] for row in results["tasks"].values()) for name in COST_KEYS}
    trained, total = most["trainable_parameters"] / 1e6, most["total_parameters"] / 1e6
    memory = f"peak memory {most['peak_memory_bytes'] / 1e9:.2f} GB"
    of = " of the process" if results["device"] == "cpu" else ""
    return f"{results['settings']['peft'] or 'trained'}: {trained:.2f} M of {total:.2f} M parameters, {memory}{of}"


def hash_run(checkpoint: Checkpoint, task: PreparedTask, args: FinetuneArguments, seed: int, from_random: bool) -> str:
    """The key of one run: everything that its scores follow from."""
    return hex_digest(
        json.dumps(
            {
                "settings": {name: getattr(args, name) for name in RUN_SETTINGS}
                | {"probe": args.protocol == PROBE}
                | {"bf16": choose_bf16(args), "pad_multiple": choose_pad_multiple(args)},
                "architecture": checkpoint.architecture_hash,
                "weights": "random" if from_random else checkpoint.weights_hash,
                "task": task.task.name,
                "metrics": task.task.metrics,
                "data": task.data_hash,
                "seed": seed,
            }
            | ({} if task.task.name in TASKS else {"labels": task.task.label_names})
            | task.task.label_scale
        )
    )


def read_runs(path: Path) -> dict[str, dict]:
    """Finished runs by key."""
    return {run["key"]: run for run in read_lines(path)}
