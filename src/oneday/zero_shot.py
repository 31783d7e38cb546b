"""Zero-shot tasks: rows of local files or of the Hub -> questions with choices, in the layouts that public sets have.

A question is a set of (context, continuation) pairs, of which a model should find one the most probable. Rows may have

    sentence_good, sentence_bad                     minimal pairs (BLiMP), grouped by UID
    query, choices, gold                            multiple choice, as in MosaicML's and DCLM's files
    question, choices {text, label}, answerKey      ARC, CommonsenseQA; question_stem: OpenBookQA
    goal, sol1, sol2, label                         PIQA
    ctx, endings, label                             HellaSwag
    context, question, answerA.., label             Social IQa
    context_options, continuation, gold             WinoGrande, Winograd: the same ending after two contexts
    sentence with _, option1, option2, answer       WinoGrande as on the Hub
    context, continuation                           LAMBADA: the last word is to be the most probable one

so that a file of a user's own in one of these layouts is a task too. Prompts are those of lm-evaluation-harness, but
for CommonsenseQA, whose answers are scored themselves and not their letters.
"""

from __future__ import annotations

import difflib
import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from oneday.errors import SettingError, describe_error
from oneday.text_files import read_json_line

Row = dict[str, Any]
OPENERS = {".jsonl": open, ".gz": gzip.open, ".xz": lzma.open}
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz")
# Names of parts of a set, which are not to be scored as one.
SPLITS = {"train", "validation", "valid", "val", "dev", "test"}
# Sets that the Hub has as parquet: (id, configuration, split).
HUB_SETS = {
    "lambada_openai": ("EleutherAI/lambada_openai", "default", "test"),
    "piqa": ("baber/piqa", None, "validation"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
    "hellaswag": ("Rowan/hellaswag", None, "validation"),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation"),
    "openbook_qa": ("allenai/openbookqa", "main", "test"),
    "commonsense_qa": ("tau/commonsense_qa", None, "validation"),
    "social_i_qa": ("lighteval/siqa", None, "validation"),
    "blimp": ("nyu-mll/blimp", None, "train"),
}


@dataclass(frozen=True)
class Question:
    """One question of a task.

    Attributes:
        pairs: (context, continuation) of each choice; the continuation is what is scored.
        gold: Index of the right one. With a single choice the question is whether it is the most probable text.
        group: Where it belongs within its task; empty: nowhere.
    """

    pairs: tuple[tuple[str, str], ...]
    gold: int
    group: str = ""

    @property
    def lengths(self) -> list[int]:
        """Characters of each continuation without the space before it, which normalise its log-probability."""
        return [max(1, len(continuation.removeprefix(" "))) for _, continuation in self.pairs]


def spell(value: Any) -> str:
    """A text or a number as text.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError(f"{value!r} is no text")
    return str(value)


def read_index(value: Any) -> int:
    """A whole number, also spelled or as 1.0.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(f"{value} is no whole number")
    return int(value)


def read_minimal_pair(row: Row) -> Question:
    """The whole sentence is scored; the good one should be more probable."""
    pairs = tuple(("", f" {spell(row[name])}") for name in ("sentence_good", "sentence_bad"))
    return Question(pairs, 0, str(row.get("UID", "")))


def read_choices(row: Row) -> Question:
    """A query that opens or ends with a line `Question: ...` is followed by `Answer:`, any other by the choice."""
    query = row["query"].rstrip()
    asks = any(line.startswith("Question:") for line in (query, query.rpartition("\n")[2]))
    prompt = f"{query}\nAnswer:" if asks and not query.endswith("Answer:") else query
    return build_choices(prompt, row["choices"], read_index(row["gold"]))


def read_exam(row: Row) -> Question:
    """ARC, CommonsenseQA, OpenBookQA as on the Hub."""
    stem = row.get("question_stem")
    prompt = stem if stem is not None else f"Question: {row['question']}\nAnswer:"
    return build_choices(prompt, row["choices"]["text"], row["choices"]["label"].index(row["answerKey"]))


def read_piqa(row: Row) -> Question:
    """PIQA as on the Hub."""
    return build_choices(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], read_index(row["label"]))


def read_endings(row: Row) -> Question:
    """HellaSwag as on the Hub, cleaned as lm-evaluation-harness does."""
    context = row["ctx"]
    if "activity_label" in row:
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [clean_wikihow(end) for end in row["endings"]]
    return build_choices(clean_wikihow(context), endings, read_index(row["label"]))


def clean_wikihow(text: str) -> str:
    """Without WikiHow's marks."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def read_social(row: Row) -> Question:
    """Social IQa; its labels count from 1."""
    answers = [row["answerA"], row["answerB"], row["answerC"]]
    return build_choices(f"Q: {row['context']} {row['question']}\nA:", answers, read_index(row["label"]) - 1)


def read_context_options(row: Row) -> Question:
    """The same continuation after several contexts."""
    end = f" {spell(row['continuation'])}"
    return Question(tuple((context, end) for context in row["context_options"]), read_index(row["gold"]))


def read_blank(row: Row) -> Question:
    """WinoGrande as on the Hub: what follows the blank is scored after each of the two words in it."""
    before, after = row["sentence"].split("_", 1)
    contexts = [before + row[name] for name in ("option1", "option2")]
    return Question(tuple((context, f" {after.strip()}") for context in contexts), read_index(row["answer"]) - 1)


def read_last_word(row: Row) -> Question:
    """LAMBADA: `text` as on the Hub ends with the word."""
    context, word = (row["context"], row["continuation"]) if "context" in row else row["text"].rsplit(" ", 1)
    return Question(((context, f" {word.strip()}"),), 0)


def build_choices(prompt: str, choices: list[str], gold: int) -> Question:
    """The same context before every choice."""
    if isinstance(choices, str):
        raise TypeError("its choices are one text")
    return Question(tuple((prompt, f" {spell(choice)}") for choice in choices), gold)


# Columns beside which a text is to be judged, not continued.
ANSWERS = {"label", "labels", "answer", "answers", "gold", "target", "score"}
# The first layout whose columns a row has.
LAYOUTS: tuple[tuple[set[str], Callable[[Row], Question]], ...] = (
    ({"sentence_good", "sentence_bad"}, read_minimal_pair),
    ({"query", "choices", "gold"}, read_choices),
    ({"goal", "sol1", "sol2", "label"}, read_piqa),
    ({"ctx", "endings", "label"}, read_endings),
    ({"context", "question", "answerA", "answerB", "answerC", "label"}, read_social),
    ({"context_options", "continuation", "gold"}, read_context_options),
    ({"sentence", "option1", "option2", "answer"}, read_blank),
    ({"question_stem", "choices", "answerKey"}, read_exam),
    ({"question", "choices", "answerKey"}, read_exam),
    ({"context", "continuation"}, read_last_word),
    ({"text"}, read_last_word),
)


def list_local_tasks(folder: Path) -> dict[str, list[Path]]:
    """Task -> files: `TASK.jsonl`, else `TASK/TASK.jsonl`, else all `TASK/*.jsonl`; also as .gz and .xz."""
    ranked: dict[str, dict[int, list[Path]]] = {}
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        name = name_file(path)
        if name is None or not path.is_file():
            continue
        task = name if path.parent == folder else path.parent.name
        rank = 0 if path.parent == folder else 1 if name == task else 2
        ranked.setdefault(task, {}).setdefault(rank, []).append(path)
    # Of one file in two compressions the last counts.
    best = {task: {name_file(path): path for path in files[min(files)]} for task, files in ranked.items()}
    return {task: list(paths.values()) for task, paths in best.items()}


def name_file(path: Path) -> str | None:
    """A task file's name without its ending; None: it is none."""
    return next((path.name.removesuffix(suffix) for suffix in SUFFIXES if path.name.endswith(suffix)), None)


def load_task(name: str, folder: str | None, limit: int | None = None) -> list[Question]:
    """The questions of a task, from local files or, without a folder, from the Hub.

    Args:
        name: Of the task.
        folder: Holds `NAME.jsonl` or `NAME/*.jsonl` (also .gz, .xz).
        limit: Only so many questions, evenly spread; None: all.

    Raises:
        SettingError: When there is no such task, or a row cannot be read.
    """
    found = read_local(name, Path(folder)) if folder is not None else read_hub(name)
    rows = list(enumerate(found, start=1))
    if limit is not None and limit < len(rows):
        rows = [rows[index * len(rows) // limit] for index in range(limit)]
    if not rows:
        raise SettingError(f"The task {name} of task_names has no rows; look at its file.")
    return [read_row(name, number, row) for number, row in rows]


def read_local(name: str, folder: Path) -> Iterator[Row]:
    """The rows of a local task."""
    tasks = list_local_tasks(folder)
    if name not in tasks:
        near = difflib.get_close_matches(name, tasks, 1, 0.4)
        hint = f"the nearest is {near[0]}" if near else f"there are {', '.join(tasks) or 'none'}"
        raise SettingError(f"The setting task_names has {name!r}, of which {folder} has no file; {hint}.")
    splits = [path.name for path in tasks[name] if SPLITS & set(re.split(r"[^a-z]+", path.name.lower()))]
    if splits and len(tasks[name]) > 1:
        raise SettingError(
            f"The task {name} of task_names has several files in {tasks[name][0].parent}, {splits[0]} among them, "
            f"which names a part of a set; call the one that is to be scored {name}.jsonl."
        )
    for path in tasks[name]:
        try:
            with OPENERS[path.suffix](path, "rt", encoding="utf-8") as lines:
                for line in lines:
                    if line.strip():
                        yield read_json_line(line)
        except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError) as error:
            raise SettingError(
                f"The file {path} of task {name} cannot be read ({' '.join(str(error).split())}); mend it."
            ) from None


def read_hub(name: str) -> Iterable[Row]:
    """The rows of a set on the Hub."""
    if name not in HUB_SETS:
        near = difflib.get_close_matches(name, HUB_SETS, 1, 0.4)
        hint = f"the nearest is {near[0]}" if near else f"known are {', '.join(HUB_SETS)}"
        raise SettingError(f"The setting task_names has {name!r}, which is not known; {hint}, or set task_data_dir.")
    repository, config, split = HUB_SETS[name]
    try:
        configs = datasets.get_dataset_config_names(repository) if name == "blimp" else [config]
        return [row for config in configs for row in datasets.load_dataset(repository, config, split=split)]
    except Exception as error:  # the network's own errors are many
        raise SettingError(
            f"The task {name} cannot be had from the Hub ({describe_error(error)}); set task_data_dir."
        ) from None


def read_row(name: str, number: int, row: Row) -> Question:
    """One question; says which row has no known layout.

    Raises:
        SettingError: When it has none, or a value cannot be read.
    """
    if not isinstance(row, dict):
        raise SettingError(f"Row {number} of task {name} is no JSON object; one a line.")
    layouts = LAYOUTS[:-1] if ANSWERS & row.keys() else LAYOUTS
    reader = next((read for columns, read in layouts if columns <= row.keys()), None)
    if reader is None:
        shown = ", ".join(sorted(row)[:8])
        raise SettingError(
            f"Row {number} of task {name} has the columns {shown}, which are no layout that is known; rename them, "
            "say to query, choices and gold."
        )
    try:
        question = reader(row)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise SettingError(
            f"Row {number} of task {name} cannot be read ({type(error).__name__}: {error}); mend it."
        ) from None
    if not all(isinstance(text, str) for pair in question.pairs for text in pair) or "" in (
        continuation.strip() for _, continuation in question.pairs
    ):
        raise SettingError(f"Row {number} of task {name} has an empty text, or one that is no string; mend it.")
    if not 0 <= question.gold < len(question.pairs):
        raise SettingError(
            f"Row {number} of task {name} has the answer {question.gold} of {len(question.pairs)} choices; mend it."
        )
    return question
