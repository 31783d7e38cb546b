"""A classification or regression task from a file of one's own, named by its columns and a metric."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
from datasets import Dataset, DatasetDict

from oneday.errors import SettingError, describe_error
from oneday.glue import GLUE_NUMBERS, TASKS, Task
from oneday.glue_protocol import FinetuneArguments
from oneday.task_data import normalize_split, read_file

logger = logging.getLogger(__name__)

REGRESSION_METRICS = ("pearson", "spearmanr")
BINARY_METRICS = ("f1",)
METRICS = ("accuracy", "f1", "f1_macro", "matthews_correlation", *REGRESSION_METRICS)
HELD_OUT_FRACTION = 0.1
MAX_CLASSES = 1000
TEXT_NAMES = ("text1", "text2")


def load_own_task(args: FinetuneArguments) -> tuple[Task, DatasetDict]:
    """The row of `task_file` and its splits, as `task_data.load_task` gives them for a named task.

    Classes are the distinct labels of `task_file`, in order; labels may be words or numbers. Without a
    `validation_file` a tenth of its rows, the same ones for every seed, is held out.

    Raises:
        SettingError: When a file, a column, a label or the metric does not fit.
    """
    if args.metric not in METRICS:
        raise SettingError(f"metric is {args.metric!r}; it must be one of {', '.join(METRICS)}.")
    if len(args.text_columns) not in (1, 2):
        raise SettingError(
            f"text_columns names {len(args.text_columns)} columns; name one, or two for a pair of texts."
        )
    train = read_columns(args.task_file, args)
    if len(train) < 2:
        raise SettingError(f"The task file {args.task_file} has {len(train)} rows; it needs two at least.")
    task = describe_task(args, list(train["label"]))
    if args.validation_file:
        if os.path.realpath(args.validation_file) == os.path.realpath(args.task_file):
            raise SettingError(
                f"validation_file is {args.validation_file}, the task_file itself; leave it out to hold rows out."
            )
        splits = {"train": train, "validation": read_columns(args.validation_file, args)}
    else:
        least = min(2 if task.num_labels == 1 else 1, len(train) - 1)  # a correlation is of two rows at least
        parts = train.train_test_split(max(least, int(HELD_OUT_FRACTION * len(train))), seed=0)
        splits = {"train": parts["train"], "validation": parts["test"]}
        logger.info("no validation_file: %d of %d rows are held out", len(parts["test"]), len(train))
    splits = {split: number_classes(task, split, rows) for split, rows in splits.items()}
    splits = DatasetDict({split: normalize_split(task, split, rows) for split, rows in splits.items()})
    return (scale_labels(task, splits["train"]) if task.num_labels == 1 else task), splits


def scale_labels(task: Task, train: Dataset) -> Task:
    """The task with the mean and the standard deviation of its training labels, whatever their unit (years, say)."""
    labels = np.asarray(train["label"], np.float64)
    std = float(labels.std())
    task = dataclasses.replace(task, label_mean=float(labels.mean()), label_std=std if std > 0 else 1.0)
    logger.info("%s: labels are learnt as (label - %g) / %g", task.name, task.label_mean, task.label_std)
    return task


def number_classes(task: Task, split: str, rows: Dataset) -> Dataset:
    """Labels as the numbers of their classes, by their exact names; those of a regression as they are.

    Raises:
        SettingError: On a label that is no class.
    """
    if task.num_labels == 1:
        return rows
    numbers = {name: number for number, name in enumerate(task.label_names)}
    labels = list(rows["label"])
    unknown = next((label for label in labels if label not in numbers), None)
    if unknown is not None:
        names = ", ".join(task.label_names)
        raise SettingError(
            f"The task {task.name} has in its split {split} the label {unknown!r}; it must be one of: {names}."
        )
    return rows.remove_columns("label").add_column("label", [numbers[label] for label in labels])


def read_columns(path: str, args: FinetuneArguments) -> Dataset:
    """The text columns and the label, as `label`, of a .csv, .tsv, .jsonl or .parquet file."""
    if not Path(path).is_file():
        raise SettingError(f"There is no task file {path}; name a .csv, .tsv, .jsonl or .parquet file.")
    table = read_table(Path(path), (*args.text_columns, args.label_column))
    for name in (*args.text_columns, args.label_column):
        if table.column_names.count(name) != 1:
            has = "two columns" if name in table.column_names else "no column"
            raise SettingError(f"{path} has {has} {name!r}; it has {', '.join(table.column_names)}.")
        if table.schema.field(name).type in (pa.binary(), pa.large_binary()):
            raise SettingError(f"{path} holds bytes in the column {name!r}, not text; write it again as strings.")
        if pa.types.is_nested(table.schema.field(name).type):
            raise SettingError(f"{path} holds lists or objects in the column {name!r}; write one value a row.")
    labels = [spell_label(label) for label in table[args.label_column].to_pylist()]
    if None in labels:
        number = labels.index(None) + 1
        raise SettingError(f"{path} has no label in row {number} (the first is 1); fill in or remove the row.")
    # Under names of ours, for the file's may mean something here. A split is drawn from the rows later; each keeps its
    # place in the file.
    texts = {name: table[column] for name, column in zip(TEXT_NAMES, args.text_columns)}
    return Dataset(pa.table({**texts, "label": labels, "idx": range(len(labels))}))


def read_table(path: Path, columns: tuple[str, ...]) -> pa.Table:
    """A file; these columns of a .csv or .tsv are strings, and a .csv has quotes as spreadsheets write them."""
    if path.suffix not in (".csv", ".tsv", ".jsonl", ".parquet"):
        raise SettingError(f"The task file {path} is of an unknown kind; write .csv, .tsv, .jsonl or .parquet.")
    if path.suffix != ".csv":
        return read_file(path, columns)
    try:
        parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
        convert = pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(columns, pa.string()), strings_can_be_null=False
        )
        return pyarrow.csv.read_csv(path, parse_options=parse, convert_options=convert)
    except (pa.ArrowException, OSError) as error:
        raise SettingError(f"The task file {path} cannot be read ({describe_error(error)}); write it again.") from None


def spell_label(label: object) -> str | None:
    """A label as text, whatever its type: `1`, `1.0`, `"1"` and `"1.0"` are one; None where it is missing.

    A truth value is `True` or `False`, as pandas writes it to a .csv.
    """
    if label is None or label != label or not str(label).strip():
        return None
    if isinstance(label, bool):
        return str(label)
    is_whole = isinstance(label, int) or (isinstance(label, float) and label.is_integer())
    return str(int(label)) if is_whole else re.sub(r"^(-?\d+)\.0+$", r"\1", str(label).strip())


def describe_task(args: FinetuneArguments, labels: list[str]) -> Task:
    """The task's row, its classes read from the labels and shown."""
    name, columns = args.task_name or Path(args.task_file).stem, TEXT_NAMES[: len(args.text_columns)]
    if "/" in name:
        raise SettingError(f"task_name is {name!r}; it must have no slash, for files are called by it.")
    if name in TASKS or name in GLUE_NUMBERS:
        name += " (own)"
    if args.metric in REGRESSION_METRICS:
        return Task(name, columns, 1, (args.metric,))
    names = sorted(set(labels), key=sort_label)
    if not 2 <= len(names) <= MAX_CLASSES:
        raise SettingError(
            f"The column {args.label_column!r} of {args.task_file} has {len(names)} distinct labels, which makes no "
            f"classification task (2 to {MAX_CLASSES}); name another label_column, or metric pearson for numbers."
        )
    if args.metric in BINARY_METRICS and len(names) > 2:
        raise SettingError(
            f"metric is {args.metric!r}, which is of two classes, and there are {len(names)}; take f1_macro."
        )
    positive = find_class(args.positive_label, names)
    if args.positive_label is not None and (args.metric not in BINARY_METRICS or positive is None):
        raise SettingError(
            f"positive_label is {args.positive_label!r}; it must be one of {', '.join(names)}, and metric "
            f"{' or '.join(BINARY_METRICS)}."
        )
    names.sort(key=lambda name: name == positive)
    logger.info("%s: %d classes: %s", name, len(names), dict(enumerate(names)))
    if args.metric in BINARY_METRICS:
        logger.info("%s: %s is that of %r; positive_label names the other", name, args.metric, names[1])
    return Task(name, columns, len(names), (args.metric,), label_names=tuple(names))


def find_class(label: str | None, names: list[str]) -> str | None:
    """The class that a label means, in other capitals where one is so written (`true` for `True`); None: none is."""
    label = spell_label(label)
    alike = [name for name in names if label is not None and name.lower() == label.lower()]
    return label if label in names else alike[0] if len(alike) == 1 else None


def sort_label(label: str) -> tuple[bool, float, str]:
    """Numbers in their order, before words in theirs; `nan` has no place among numbers and is a word."""
    try:
        number = float(label)
    except ValueError:
        return (True, 0.0, label)
    return (True, 0.0, label) if math.isnan(number) else (False, number, label)
