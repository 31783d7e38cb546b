"""Scores in the form that the Hub reads from a model card: one `EvalResult` a number, under `model-index`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from oneday import run_directory as rundir
from oneday.arguments import BudgetTrainingArguments
from oneday.durable_files import read_json
from oneday.glue import TASKS
from oneday.glue_results import METRIC_TITLES
from oneday.objectives import OBJECTIVES, Objective
from oneday.python_docs import PYTHON_DOCS
from oneday.zero_shot import HUB_SETS
from oneday.zero_shot_results import name_measure


def model_index(folder: Path, results: dict[str, Any], pipeline: str) -> list[dict[str, Any]]:
    """All scores of a run directory.

    Args:
        folder: A run directory.
        results: Its results.json.
        pipeline: The pipeline that the model serves, say fill-mask.
    """
    scores = [*held_out(results, pipeline), *fine_tuned(folder), *zero_shot(folder, pipeline)]
    return eval_results_to_model_index(folder.resolve().name, scores)


def describe_origin(folder: Path, results: dict[str, Any]) -> dict[str, Any]:
    """The licence; Hub ids of what it was trained on as `datasets`; the language where it is known."""
    origin = {"license": rundir.read_recipe(folder).get("hub_license") or BudgetTrainingArguments.hub_license}
    language = {"language": "en"} if results["corpus"] == PYTHON_DOCS else {}
    ids = results.get("hub_datasets")
    return origin | language | ({"datasets": ids} if ids else {})


def held_out(results: dict[str, Any], pipeline: str) -> list[EvalResult]:
    """Loss, and bits per byte where they are defined."""
    corpus = {"task_type": pipeline, "dataset_type": "text", "dataset_name": results["corpus"]}
    named = {
        "eval_loss": ("loss", describe_loss(results["objective"])),
        "bits_per_byte": ("bits_per_byte", "bits per byte"),
    }
    return [
        EvalResult(**corpus, metric_type=kind, metric_value=round(results[key], 4), metric_name=name)
        for key, (kind, name) in named.items()
        if key in results
    ]


def describe_loss(objective: str) -> str:
    """What the held-out loss of an objective is."""
    return f"held-out loss, {OBJECTIVES.get(objective, Objective).loss_unit}"


def fine_tuned(folder: Path) -> list[EvalResult]:
    """The median over the seeds of each task; a part of the data is named as one."""
    glue = read_json(folder / rundir.GLUE / rundir.GLUE_RESULTS)
    return [
        EvalResult(
            task_type="text-classification",
            dataset_type=TASKS[task["task"]].hub_id if task["task"] in TASKS else task["task"],
            dataset_name=name + subset_mark(task),
            dataset_config=task["task"],
            dataset_split=task["split"],
            metric_type=task["metric"],
            metric_value=round(task["median"], 4),
            metric_name=f"{METRIC_TITLES[task['metric']]}, median of {len(task['scores'])} seeds ({glue['protocol']})",
        )
        for name, task in glue.get("tasks", {}).items()
    ]


def subset_mark(task: dict[str, Any]) -> str:
    """What stands behind the name of a task that was not run on all of its data."""
    if not task.get("subset"):
        return ""
    counts = [f"{task[f'num_{part}']:,} of {task[f'official_num_{part}']:,}" for part in ("train", "validation")]
    return f" (subset: {counts[0]} rows trained on, {counts[1]} scored)"


def zero_shot(folder: Path, pipeline: str) -> list[EvalResult]:
    """Accuracies without training."""
    measure = name_measure(read_json(folder / rundir.ZERO_SHOT_RESULTS))
    return [
        EvalResult(
            task_type=pipeline,
            # Two configs of one data set with the same task would be one entry.
            **dict(zip(("dataset_type", "dataset_config", "dataset_split"), find_set(name, task))),
            dataset_name=name + part,
            metric_type="accuracy",
            metric_value=round(task["accuracy"], 4),
            metric_name=f"zero-shot accuracy over {task['num_questions']:,} questions, by {measure}",
        )
        for name, task, part in zero_shot_tasks(folder)
    ]


def find_set(name: str, task: dict[str, Any]) -> tuple[str | None, ...]:
    """(id, configuration, split) of a set that was read from the Hub; of files only what they are called."""
    return HUB_SETS[name] if task.get("source") == "hub" else (name,)


def zero_shot_section(folder: Path) -> str:
    """The same for the reader, when there are some."""
    rows = [
        f"| {name}{part} | {task['num_questions']:,} | {100 * task['chance']:.1f} | {100 * task['accuracy']:.1f} +- "
        f"{100 * task['standard_error']:.1f} |"
        for name, task, part in zero_shot_tasks(folder)
    ]
    head = ["\n\n## Zero-shot\n", "| task | questions | chance | accuracy |", "|---|---|---|---|"]
    return "\n".join(head + rows) if rows else ""


def zero_shot_tasks(folder: Path) -> list[tuple[str, dict[str, Any], str]]:
    """(name, scores, marks of a subset and of bfloat16) of each zero-shot task in a run directory."""
    report = read_json(folder / rundir.ZERO_SHOT_RESULTS)
    tasks = report.get("tasks", {})
    limits = {name: task.get("max_examples", report.get("max_examples")) for name, task in tasks.items()}
    found = []
    for name, task in tasks.items():
        marks = [f"subset: {limits[name]:,} questions"] if task["num_questions"] == limits[name] else []
        marks += ["bfloat16"] if task.get("bf16") else []
        found.append((name, task, f" ({', '.join(marks)})" if marks else ""))
    return found
