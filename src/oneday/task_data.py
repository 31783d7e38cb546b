"""Rows of a task: from local files or the Hub, with texts as strings and labels as numbers in range."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from oneday.docs_tasks import build_docs_task
from oneday.errors import SettingError, describe_error
from oneday.glue import GLUE_HUB, TASKS, Task, find_task, name_labels
from oneday.text_files import read_json_line

logger = logging.getLogger(__name__)

FILE_KINDS = (".parquet", ".jsonl", ".tsv")


def load_task(name: str, task_data_dir: str | None = None, cache_dir: str | None = None) -> DatasetDict:
    """The splits of a task: text columns as strings, `label` as a `ClassLabel` (float32 for a regression), `row`.

    Args:
        name: A name in `TASKS`.
        task_data_dir: Directory with `<task>/<split>.parquet`, `.jsonl` or `.tsv` in the Hub's column names;
            None reads the Hub. The docs tasks are built in and read neither.
        cache_dir: Where downloads and built tasks are kept; None is the libraries' default.

    Returns:
        `train` and those of the task's validation splits that are there.

    Raises:
        SettingError: When the task is unknown, or its data is missing, unreadable or has labels out of range.
    """
    task = find_task(name)
    raw = read_splits(task, task_data_dir, cache_dir, ("train", *task.validation_splits))
    if task.train_task:
        raw["train"] = read_splits(find_task(task.train_task), task_data_dir, cache_dir, ("train",)).get("train")
    found = [split for split in task.validation_splits if raw.get(split) is not None]
    if raw.get("train") is None or not found:
        missing = "training" if raw.get("train") is None else " or ".join(task.validation_splits)
        raise SettingError(f"The task {name} has no {missing} split in {task_data_dir or 'its data'}; add the file.")
    for split in set(task.validation_splits) - set(found):
        logger.info("%s has no split %s here: it is scored on %s only", name, split, ", ".join(found))
    task = complete_task(task, raw["train"])
    return DatasetDict({split: normalize_split(task, split, raw[split]) for split in ("train", *found)})


def complete_task(task: Task, train: Dataset) -> Task:
    """The row with its labels filled in from the data, where it leaves them open."""
    if task.num_labels:
        return task
    names = tuple(train.features["label"].names)
    return dataclasses.replace(task, num_labels=len(names), label_names=names)


def read_splits(
    task: Task, task_data_dir: str | None, cache_dir: str | None, splits: tuple[str, ...]
) -> dict[str, Dataset]:
    """The named splits that are there, as they are stored."""
    if task.is_built_in:
        return dict(build_docs_task(task.name, cache_dir))
    if task_data_dir is None:
        return read_hub(task, cache_dir, splits)
    folder = Path(task_data_dir) / task.name
    if not folder.is_dir():
        raise SettingError(f"task_data_dir {task_data_dir} has no folder {task.name}; add it, or leave the task out.")
    candidates = {split: [folder / (split + kind) for kind in FILE_KINDS] for split in splits}
    found = {split: [path for path in paths if path.exists()] for split, paths in candidates.items()}
    return {split: Dataset(read_file(paths[0], task.columns)) for split, paths in found.items() if paths}


def read_file(path: Path, text_columns: Iterable[str]) -> pa.Table:
    """One local file, whatever its kind; `text_columns` of a .tsv are strings whatever they look like."""
    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path)
        if path.suffix == ".jsonl":
            return read_json_rows(path)
        # GLUE's own .tsv files hold unbalanced quotes, and sentences that read "null" or "NA".
        parse = pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False)
        convert = pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(text_columns, pa.string()), null_values=[], strings_can_be_null=False
        )
        return pyarrow.csv.read_csv(path, parse_options=parse, convert_options=convert)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SettingError(
            f"The task file {path} cannot be read ({describe_error(error)}); write it again or remove it."
        ) from None


def read_json_rows(path: Path) -> pa.Table:
    """A file of one JSON object a line; a column of several kinds becomes text.

    Not pyarrow's reader, which takes texts that look like dates for dates, and refuses a file for any mixed column.
    """
    columns, num_rows = {}, 0
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = read_json_line(line)
            except (ValueError, RecursionError) as error:
                raise SettingError(f"The task file {path} has a line {number} that is not JSON ({error}).") from None
            if not isinstance(row, dict):
                raise SettingError(f"The task file {path} has a line {number} that is no JSON object; one a line.")
            for name in row:
                columns.setdefault(name, [None] * num_rows)
            for name, values in columns.items():
                values.append(row.get(name))
            num_rows += 1
    return pa.table({name: join_kinds(values) for name, values in columns.items()})


def join_kinds(values: list[object]) -> pa.Array:
    """A column of one kind as it is, of several as text."""
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        return pa.array([spell_value(value) for value in values], pa.string())


def spell_value(value: object) -> str | None:
    """A value as text: truth values as Python has them, lists and objects as JSON."""
    if isinstance(value, (list, dict)):
        return json.dumps(value)
    return None if value is None else str(value)


def read_hub(task: Task, cache_dir: str | None, splits: tuple[str, ...]) -> dict[str, Dataset]:
    """A task's splits from the Hub."""
    try:
        if task.hub_files is None:
            return dict(datasets.load_dataset(GLUE_HUB, task.name, cache_dir=cache_dir))
        files = {split: task.hub_files.format(task=task.name, split=split) for split in splits}
        return dict(datasets.load_dataset("parquet", data_files=files, cache_dir=cache_dir))
    # datasets, huggingface_hub and httpx each have errors of their own for "not reachable".
    except Exception as error:  # noqa: BLE001
        raise SettingError(
            f"The task {task.name} cannot be read from the Hub ({describe_error(error)}); "
            f"set task_data_dir to a directory with {list_files(task)}."
        ) from None


def list_files(task: Task) -> str:
    """The local files of a task, in words."""
    training = f"{task.train_task or task.name}/train.parquet"
    return " and ".join([training, *[f"{task.name}/{split}.parquet" for split in task.validation_splits]])


def normalize_split(task: Task, split: str, data: Dataset) -> Dataset:
    """Text columns as strings (a missing text is empty), labels as ids in range (or floats), and `row`."""
    missing = [column for column in (*task.columns, "label") if column not in data.column_names]
    if missing:
        raise SettingError(
            f"The task {task.name} needs the column {missing[0]!r}, and its split {split} has "
            f"{', '.join(data.column_names)}; rename it to the Hub's name."
        )
    if not len(data):
        raise SettingError(f"The task {task.name} has no rows in its split {split}; add some.")
    columns = {name: ["" if text is None else str(text) for text in data[name]] for name in task.columns}
    num_empty = sum(not any(text.strip() for text in row) for row in zip(*columns.values()))
    if num_empty:
        logger.info("%s %s: %d rows have no text; they are kept", task.name, split, num_empty)
    columns["label"] = normalize_labels(task, split, list(data["label"]))
    columns["row"] = number_rows(data)
    if task.num_labels > 1:
        label = ClassLabel(num_classes=task.num_labels, names=name_labels(task))
    else:  # a file of one's own may hold large numbers, which float32 would round
        label = Value("float32" if task.name in TASKS else "float64")
    texts = dict.fromkeys(task.columns, Value("string"))
    return Dataset.from_dict(columns, Features({**texts, "label": label, "row": Value("int64")}))


def number_rows(data: Dataset) -> list[int]:
    """What a row is called wherever it goes: its `idx` as on the Hub, or its place in the file."""
    ids = list(data["idx"]) if "idx" in data.column_names else []
    are_ids = len(set(ids)) == len(data) and all(isinstance(number, int) and number >= 0 for number in ids)
    return ids if are_ids else list(range(len(data)))


def normalize_labels(task: Task, split: str, labels: list[object]) -> list[float] | list[int]:
    """Labels as ids (floats for a regression); names and digits in text form are mapped.

    Raises:
        SettingError: On a name that the task does not have, or an id out of range.
    """
    where = f"The task {task.name} has in its split {split} the label"
    kind = float if task.num_labels == 1 else int
    by_name = {name.lower(): label for label, name in enumerate(task.label_names)}
    normalized = []
    for label in labels:
        key = label.strip().lower() if isinstance(label, str) else label
        try:
            number = by_name[key] if isinstance(key, str) and key in by_name else float(key)
        except (TypeError, ValueError):
            names = ", ".join(task.label_names) or "numbers"
            raise SettingError(f"{where} {label!r}; it must be one of: {names}.") from None
        if not np.isfinite(number) or (kind is int and (number != int(number) or not 0 <= number < task.num_labels)):
            hint = "it looks like a hidden test label" if number == -1 else "correct the file"
            if number == -1 and task.name == "ax":
                hint = "the Hub hides them: write_submission with mnli answers the diagnostics, too (AX.tsv)"
            wrong = "which is no finite number" if kind is float else f"outside 0..{task.num_labels - 1}"
            raise SettingError(f"{where} {label!r}, {wrong}; {hint}.")
        normalized.append(kind(number))
    if any(isinstance(label, str) and label.strip().lower() in by_name for label in labels):
        logger.info("%s %s: label names mapped as %s", task.name, split, dict(zip(task.label_names, range(99))))
    return normalized


def take_examples(rows: Dataset, limit: int | None) -> Dataset:
    """`limit` rows drawn without regard to the run's seed, so that all runs share them."""
    return rows if limit is None or limit >= len(rows) else rows.shuffle(seed=0).select(range(limit))
