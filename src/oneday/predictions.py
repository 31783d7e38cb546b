"""What a fine-tuned model answered: a parquet file a split of each run, and the files of a GLUE submission."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from oneday.classification import PreparedTask
from oneday.durable_files import write_whole
from oneday.glue import Task, find_task, name_labels
from oneday.task_data import normalize_split, read_splits

logger = logging.getLogger(__name__)

# The server's file of each task and split (gluebenchmark.com): index, tab, prediction. The diagnostics are answered by
# the MNLI model.
SUBMISSION_FILES = {
    "cola": {"test": "CoLA"},
    "sst2": {"test": "SST-2"},
    "mrpc": {"test": "MRPC"},
    "stsb": {"test": "STS-B"},
    "qqp": {"test": "QQP"},
    "mnli": {"test_matched": "MNLI-m", "test_mismatched": "MNLI-mm"},
    "qnli": {"test": "QNLI"},
    "rte": {"test": "RTE"},
    "wnli": {"test": "WNLI"},
}
WORD_TASKS = ("mnli", "qnli", "rte")
SUBMISSION_DIR = "submission"
# In a file of answers to test rows: the hash of these rows, which a run's key does not hold.
ROWS_HASH = "rows_hash"


def read_test_splits(name: str, task_data_dir: str | None, cache_dir: str | None) -> dict[str, Dataset]:
    """A task's test rows under the names of the server's files, with a label that means nothing.

    What GLUE's server takes no file for, or has no test rows here, is said and left out.
    """
    task, files = find_task(name), SUBMISSION_FILES.get(name, {})
    if not files:
        logger.warning("write_submission: GLUE's server takes no file for %s; it is left out.", name)
        return {}
    raw = read_splits(task, task_data_dir, cache_dir, tuple(files))
    missing = [split for split in files if split not in raw]
    if missing:
        splits, where = " and ".join(missing), task_data_dir or "its data"
        logger.warning("write_submission: %s has no split %s in %s; its file is left out.", name, splits, where)
    found = {file: hide_labels(task, file, raw[split]) for split, file in files.items() if split in raw}
    if name == "mnli" and (task_data_dir is None or (Path(task_data_dir) / "ax").is_dir()):
        diagnostics = find_task("ax")
        rows = read_splits(diagnostics, task_data_dir, cache_dir, ("test",))
        found |= {"AX": hide_labels(diagnostics, "AX", rows["test"])} if "test" in rows else {}
    return found


def hide_labels(task: Task, split: str, rows: Dataset) -> Dataset:
    """Test rows in their order; their labels, which are hidden or absent, all read 0."""
    rows = rows.remove_columns("label") if "label" in rows.column_names else rows
    return normalize_split(task, split, rows.add_column("label", np.zeros(len(rows), np.int64)))


def decide(task: Task, logits: np.ndarray) -> np.ndarray:
    """Class ids, or numbers for a regression, from outputs (rows, num_labels)."""
    return logits.reshape(-1) if task.num_labels == 1 else logits.argmax(axis=-1)


def write_predictions(folder: Path, prepared: PreparedTask, logits: dict[str, np.ndarray]) -> None:
    """One parquet file a split: `row` (`idx` on the Hub, or its place in the file), `label`, `prediction`, `logits`.

    Labels and predictions are class ids, or numbers for a regression; a test split has no `label`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, outputs in logits.items():
        rows = (prepared.splits | prepared.test_splits)[split]
        columns = {"row": rows["row"][:], "label": rows["label"][:]}
        if split in prepared.test_splits:
            del columns["label"]
        columns |= {"prediction": decide(prepared.task, outputs), "logits": list(outputs.astype(np.float32))}
        table = pa.table(columns)
        if split in prepared.test_splits:
            table = table.replace_schema_metadata({ROWS_HASH: prepared.test_hash})
        pq.write_table(table, folder / f"{split}.parquet")


def are_answered(folder: Path, prepared: PreparedTask) -> bool:
    """Whether the answers to a task's rows, to test rows as these are now, lie whole in a run's folder."""
    try:
        for split in prepared.scored_splits:
            pq.read_schema(folder / f"{split}.parquet")
        schemas = [pq.read_schema(folder / f"{split}.parquet") for split in prepared.test_splits]
    except (OSError, pa.ArrowInvalid):
        return False
    return all((schema.metadata or {}).get(ROWS_HASH.encode()) == prepared.test_hash.encode() for schema in schemas)


def write_submission(output_dir: Path, prepared: PreparedTask, runs: list[tuple[dict, Path]]) -> dict[str, object]:
    """The server's files of one task, from the run with the median score (of an even number, the lower middle).

    Args:
        output_dir: Gets the folder `submission`.
        prepared: The task.
        runs: Its pretrained runs' lines and the folders of what is kept of them.

    Returns:
        `{"seed": of that run, "files": their names}`.
    """
    task, number = prepared.task, prepared.task.name_number(prepared.scored_splits[0])
    scores = [run["scores"][number][task.main_metric] for run, _ in runs]
    run, folder = runs[scores.index(statistics.median_low(scores))]
    target = output_dir / SUBMISSION_DIR
    target.mkdir(exist_ok=True)
    for file in prepared.test_splits:
        table = pq.read_table(folder / f"{file}.parquet", columns=["row", "prediction"])
        answers = sorted(zip(table["row"].to_pylist(), table["prediction"].to_pylist()))
        lines = [f"{index}\t{spell_answer(task, answer)}\n" for index, answer in answers]
        write_whole(target / f"{file}.tsv", "index\tprediction\n" + "".join(lines))
    return {"seed": run["seed"], "files": [f"{file}.tsv" for file in prepared.test_splits]}


def remove_submission(output_dir: Path, tasks: Iterable[str] = tuple(SUBMISSION_FILES)) -> None:
    """Take away the server's files of some tasks, which are of other weights, settings or rows than come now."""
    for task in tasks:
        names = [*SUBMISSION_FILES.get(task, {}).values(), *(["AX"] if task == "mnli" else [])]
        for name in names:
            (output_dir / SUBMISSION_DIR / f"{name}.tsv").unlink(missing_ok=True)


def spell_answer(task: Task, answer: float | int) -> str:
    """A prediction as the server reads it: `entailment`, `1`, or a similarity of 0 to 5."""
    if task.num_labels == 1:
        return f"{min(5.0, max(0.0, answer)):.3f}"
    return name_labels(task)[answer] if task.name in WORD_TASKS else str(answer)
