"""Text classification tasks: one row a task, and their metrics.

To add a task, add a row to `TASKS`. GLUE: Wang et al. 2018, arXiv 1804.07461; SuperGLUE: Wang et al. 2019,
arXiv 1905.00537.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from oneday.errors import SettingError

if TYPE_CHECKING:
    import evaluate

GLUE_HUB = "nyu-mll/glue"
# The repository itself may still hold a loading script, which datasets >= 4 refuses; its parquet export does not.
SUPERGLUE_HUB = "aps/super_glue"
SUPERGLUE_FILES = "hf://datasets/aps/super_glue@refs%2Fconvert%2Fparquet/{task}/{split}/*.parquet"
METRIC_DIR = Path(__file__).parent / "metrics" / "glue_metric"
# The nine numbers of the GLUE average; WNLI is left out (arXiv 2212.14034, section 5).
GLUE_NUMBERS = ("mnli_matched", "mnli_mismatched", "qqp", "qnli", "sst2", "cola", "stsb", "mrpc", "rte")
GLUE_TASKS = ("rte", "mrpc", "stsb", "cola", "sst2", "qnli", "qqp", "mnli")


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: Its name here, on the Hub and as a folder of `task_data_dir`.
        columns: Text columns in the Hub's names.
        num_labels: Number of classes; 1 is a regression, 0 is read from the data.
        metrics: Configurations of `metrics/glue_metric`; the first is the score that is averaged.
        label_names: Names in the order of their ids.
        num_train: Rows of the complete training split; None when there is no official size.
        num_validation: Rows of each complete validation split.
        validation_splits: Splits that are scored, each giving one number.
        num_first_columns: How many of `columns` make up the first text; the rest are the second.
        train_task: Task whose training split is used, where the task has none.
        hub_files: Pattern of files on the Hub, where `load_dataset(GLUE_HUB, name)` is not the way.
        is_built_in: Made from the built-in text, see `docs_tasks`.
        label_mean: Of a regression on a file of one's own: what is taken off a label before the model learns it, and
            added to its answer. STS-B's labels are learnt as they are, as elsewhere.
        label_std: What the rest is divided by; answers are multiplied by it.
    """

    name: str
    columns: tuple[str, ...]
    num_labels: int
    metrics: tuple[str, ...]
    label_names: tuple[str, ...] = ()
    num_train: int | None = None
    num_validation: tuple[int, ...] = ()
    validation_splits: tuple[str, ...] = ("validation",)
    num_first_columns: int = 1
    train_task: str | None = None
    hub_files: str | None = None
    is_built_in: bool = False
    label_mean: float = 0.0
    label_std: float = 1.0

    @property
    def main_metric(self) -> str:
        """The metric whose median is the task's score."""
        return self.metrics[0]

    @property
    def hub_id(self) -> str:
        """The data set's id on the Hub; of a built-in task its name."""
        if self.is_built_in:
            return self.name
        return GLUE_HUB if self.hub_files is None else SUPERGLUE_HUB

    @property
    def label_scale(self) -> dict[str, float]:
        """`{"label_mean", "label_std"}`; nothing where labels are learnt as they are."""
        scale = {"label_mean": self.label_mean, "label_std": self.label_std}
        return scale if scale != {"label_mean": 0.0, "label_std": 1.0} else {}

    def name_number(self, split: str) -> str:
        """The name of a split's score: `rte`, but `mnli_matched` and `mnli_mismatched`."""
        return self.name if len(self.validation_splits) == 1 else self.name + split.removeprefix("validation")


PAIR = ("sentence1", "sentence2")
NLI = ("entailment", "neutral", "contradiction")
MATTHEWS = "matthews_correlation"
TASKS = {
    task.name: task
    for task in (
        Task(
            "cola",
            ("sentence",),
            2,
            (MATTHEWS, "accuracy"),
            label_names=("unacceptable", "acceptable"),
            num_train=8551,
            num_validation=(1043,),
        ),
        Task(
            "sst2",
            ("sentence",),
            2,
            ("accuracy",),
            label_names=("negative", "positive"),
            num_train=67349,
            num_validation=(872,),
        ),
        Task(
            "mrpc",
            PAIR,
            2,
            ("f1", "accuracy"),
            label_names=("not_equivalent", "equivalent"),
            num_train=3668,
            num_validation=(408,),
        ),
        Task("stsb", PAIR, 1, ("pearson", "spearmanr"), num_train=5749, num_validation=(1500,)),
        Task(
            "qqp",
            ("question1", "question2"),
            2,
            ("f1", "accuracy"),
            label_names=("not_duplicate", "duplicate"),
            num_train=363846,
            num_validation=(40430,),
        ),
        Task(
            "mnli",
            ("premise", "hypothesis"),
            3,
            ("accuracy",),
            label_names=NLI,
            num_train=392702,
            num_validation=(9815, 9832),
            validation_splits=("validation_matched", "validation_mismatched"),
        ),
        Task(
            "qnli",
            ("question", "sentence"),
            2,
            ("accuracy",),
            label_names=("entailment", "not_entailment"),
            num_train=104743,
            num_validation=(5463,),
        ),
        Task(
            "rte",
            PAIR,
            2,
            ("accuracy",),
            label_names=("entailment", "not_entailment"),
            num_train=2490,
            num_validation=(277,),
        ),
        Task(
            "wnli",
            PAIR,
            2,
            ("accuracy",),
            label_names=("not_entailment", "entailment"),
            num_train=635,
            num_validation=(71,),
        ),
        Task(
            "ax",
            ("premise", "hypothesis"),
            3,
            (MATTHEWS, "accuracy"),
            label_names=NLI,
            num_train=392702,
            num_validation=(1104,),
            validation_splits=("test",),
            train_task="mnli",
        ),
        Task(
            "boolq",
            ("question", "passage"),
            2,
            ("accuracy",),
            label_names=("False", "True"),
            num_train=9427,
            num_validation=(3270,),
            hub_files=SUPERGLUE_FILES,
        ),
        Task(
            "cb",
            ("premise", "hypothesis"),
            3,
            ("accuracy", "f1_macro"),
            label_names=("entailment", "contradiction", "neutral"),
            num_train=250,
            num_validation=(56,),
            hub_files=SUPERGLUE_FILES,
        ),
        Task(
            "copa",
            ("premise", "question", "choice1", "choice2"),
            2,
            ("accuracy",),
            label_names=("choice1", "choice2"),
            num_train=400,
            num_validation=(100,),
            num_first_columns=2,
            hub_files=SUPERGLUE_FILES,
        ),
        Task("docs-topic", ("sentence",), 0, ("accuracy", "f1_macro"), is_built_in=True),
        Task("docs-pair", PAIR, 0, ("accuracy",), is_built_in=True),
        Task("docs-order", ("sentence",), 0, ("accuracy",), is_built_in=True),
    )
}


def find_task(name: str) -> Task:
    """The row of a task.

    Raises:
        SettingError: When there is none of this name.
    """
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, 1, 0.4)
    hint = f"did you mean {near[0]!r}?" if near else "there are " + ", ".join(TASKS) + "."
    raise SettingError(f"task_names has the unknown task {name!r}; {hint}")


def expand_task_names(names: list[str]) -> list[str]:
    """`["glue"]` becomes the eight tasks of the GLUE average; each name once, in the order given."""
    expanded = [part for name in names for part in (GLUE_TASKS if name == "glue" else (name,))]
    return list(dict.fromkeys(find_task(name).name for name in expanded))


def name_labels(task: Task) -> list[str]:
    """Label names, or the ids as text where a row of `TASKS` names none."""
    return list(task.label_names) or [str(label) for label in range(task.num_labels)]


@functools.cache
def load_metric(name: str) -> evaluate.Metric:
    """A configuration of the metric module on disk; needs no network."""
    import evaluate  # here, because it takes a second and pretraining needs only the table of tasks

    return evaluate.load(str(METRIC_DIR), name, keep_in_memory=True)


def score_predictions(task: Task, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Every metric of a task.

    Args:
        task: Its row.
        predictions: (rows,) class ids, or numbers for a regression.
        labels: (rows,) likewise.
    """
    return {name: load_metric(name).compute(predictions=predictions, references=labels)[name] for name in task.metrics}


def score_majority(task: Task, train_labels: np.ndarray, labels: np.ndarray) -> float:
    """The main metric of always answering the training split's most frequent class; 0 for a correlation."""
    if task.num_labels == 1:
        return 0.0
    majority = np.bincount(np.asarray(train_labels, dtype=int)).argmax()
    return score_predictions(task, np.full(len(labels), majority), labels)[task.main_metric]
