"""Three small GLUE-style tasks made from the part of python-docs that pretraining never sees.

They let a fresh install fine-tune and score a model without a download. Labels are balanced, so that chance and the
majority class score the same: one over the number of labels.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import datasets
import numpy as np

from oneday.corpus import resolve_cache_dir
from oneday.errors import SettingError
from oneday.prose import split_sentences
from oneday.python_docs import STDLIB, TOPIC_PACKAGES, build_python_docs, hash_text

DOCS_TASKS = ("docs-topic", "docs-pair", "docs-order")

NUM_EXAMPLES = {"train": 2000, "validation": 600}
VALIDATION_FRACTION = 0.25  # of the text of each package, by whole modules
SEED = 2024

MIN_SENTENCE_WORDS, MAX_SENTENCE_WORDS = 6, 32
MIN_PASSAGE_WORDS, MAX_PASSAGE_WORDS, MAX_PASSAGE_SENTENCES = 20, 60, 3

# Plain words, and at most one name of the code (`DataFrame`, `n_jobs`), so that no code is taken for a sentence.
PLAIN_WORD = re.compile(r"[\"'(]*(?:[A-Z]?[a-z]+(?:['’-][a-z]+)*|[A-Z]{1,5}s?|e\.g\.|i\.e\.|\d+)[\"')]*[,;:]?[\"')]*")
CODE_WORD = re.compile(r"[\"'(]*[\w./-]*\w[\"')]*[,;:]?")
SENTENCE_SHAPE = re.compile(r"[A-Z][^:]*\w[\"')]*[.?!]")
REFERENCE = re.compile(
    r"\b(?:above|below|following|docstring|documentation|deprecated|for details|for more information)\b"
)

# What would give a package away, besides the names of its modules.
NICKNAMES = re.compile(
    r"\b(?:numpy|np|scipy|sklearn|scikit(?:-learn)?|pandas|pd|matplotlib|mpl|pyplot|plt|pylab|networkx|nx|sympy|mpmath|"
    r"(?:py)?torch(?:script)?|transformers|hugging ?face|hf|c?python)\b",
    re.IGNORECASE,
)
# A module's name that so many packages use in their prose ("graph", "index") is a word like any other.
MIN_COMMON_PACKAGES = 4
WORD = re.compile(r"[A-Za-z]+")


@dataclass(frozen=True)
class Module:
    """One module of the tasks part: `paragraphs` holds its runs of sentences, in order."""

    package: str
    path: str
    paragraphs: tuple[tuple[str, ...], ...]


def build_docs_task(name: str, cache_dir: str | None = None) -> datasets.DatasetDict:
    """Makes one of `DOCS_TASKS`, always the same for the same installed packages.

    Args:
        name: "docs-topic" (`sentence`: which package is a passage of two or three sentences from), "docs-pair"
            (`sentence1`, `sentence2`: is the second the next sentence) or "docs-order" (`sentence`: are its words in
            order).
        cache_dir: where the corpus is kept; as in `resolve_cache_dir`.

    Returns:
        `train` and `validation` with those columns, `label` (a `ClassLabel`, exactly balanced) and `idx`. No module is
        in both, and no sentence.

    Raises:
        SettingError: there is no task `name`.
    """
    makers = {
        "docs-topic": (make_topic, TOPIC_PACKAGES),
        "docs-pair": (make_pair, ("not_next", "next")),
        "docs-order": (make_order, ("shuffled", "intact")),
    }
    if name not in makers:
        raise SettingError(f"task_names has {name!r}, which is no built-in task: choose from {', '.join(DOCS_TASKS)}.")
    make, label_names = makers[name]
    docs = build_python_docs(resolve_cache_dir(cache_dir))
    splits = split_modules(docs)
    if name == "docs-topic":
        make = functools.partial(make_topic, giveaways=find_giveaways(docs), held_out=splits["validation"])
    rows = {split: balance(make(modules, make_rng(split)), split) for split, modules in splits.items()}
    return label_rows(rows, list(label_names))


def make_rng(split: str) -> np.random.Generator:
    """A generator of its own for each split."""
    return np.random.default_rng([SEED, hash_text(split)])


def split_modules(docs: datasets.Dataset) -> dict[str, list[Module]]:
    """Returns the modules of the tasks part by split, with every sentence kept only where it comes first."""
    seen: set[str] = set()
    rows = [row for row in docs if row["split"] == "tasks"]
    size: dict[str, int] = defaultdict(int)
    for row in rows:
        size[row["package"]] += len(row["text"])
    room = {package: VALIDATION_FRACTION * total for package, total in size.items()}
    splits: dict[str, list[Module]] = {"train": [], "validation": []}
    for row in rows:
        fits = len(row["text"]) <= room[row["package"]]
        room[row["package"]] -= len(row["text"]) if fits else 0
        module = Module(row["package"], row["path"], tuple(find_sentences(row["text"], seen)))
        splits["validation" if fits else "train"].append(module)
    return splits


def find_sentences(text: str, seen: set[str]) -> Iterator[tuple[str, ...]]:
    """Yields the runs of whole sentences that follow each other in a paragraph; adds them to `seen`."""
    for paragraph in text.split("\n"):
        run: list[str] = []
        for sentence in [*split_sentences(paragraph), ""]:
            if is_sentence(sentence) and sentence not in seen:
                seen.add(sentence)
                run.append(sentence)
            elif run:
                yield tuple(run)
                run = []


def is_sentence(sentence: str) -> bool:
    """Whether `sentence` is a whole sentence of plain words, one name of the code aside, that makes sense alone."""
    words = sentence.split()
    if not MIN_SENTENCE_WORDS <= len(words) <= MAX_SENTENCE_WORDS or not SENTENCE_SHAPE.fullmatch(sentence):
        return False
    if REFERENCE.search(sentence) or sentence.count("(") != sentence.count(")") or sentence.count('"') % 2:
        return False
    names = find_code_words(sentence)
    return not names or (len(names) == 1 and CODE_WORD.fullmatch(names[0]) is not None)


def find_code_words(sentence: str) -> list[str]:
    """The words of a sentence that are no plain English: names, calls, formulas."""
    return [word for word in sentence.rstrip(".?!").split() if not PLAIN_WORD.fullmatch(word)]


def find_giveaways(docs: datasets.Dataset) -> frozenset[str]:
    """The names of submodules, in lower case, that only the prose of few packages uses."""
    packages_of: dict[str, set[str]] = defaultdict(set)
    names: set[str] = set()
    for row in docs:
        if row["package"] in TOPIC_PACKAGES:
            names.update(WORD.findall(find_submodule(row["package"], row["path"])))
            for word in set(WORD.findall(row["text"].lower())):
                packages_of[word].add(row["package"])
    return frozenset(name for name in names if len(packages_of[name]) < MIN_COMMON_PACKAGES)


def find_submodule(package: str, path: str) -> str:
    """The part of a module's path that names its subject, in lower case: "linalg", "asyncio", of a model "bert"."""
    parts = path.lower().removesuffix(".py").split("/")
    if parts[:2] == ["transformers", "models"]:
        return parts[-1]
    return parts[0] if package == STDLIB else parts[1]


def hide_names(sentence: str, giveaways: frozenset[str]) -> str:
    """Puts "it" in the place of what names a package or a piece of its code."""
    for name in find_code_words(sentence):
        sentence = sentence.replace(name.strip("\"'(),;:"), "it")
    sentence = NICKNAMES.sub("it", sentence)
    sentence = WORD.sub(lambda word: "it" if word[0].lower() in giveaways else word[0], sentence)
    return sentence[0].upper() + sentence[1:]


def make_topic(
    modules: list[Module], rng: np.random.Generator, giveaways: frozenset[str], held_out: list[Module]
) -> list[dict[str, object]]:
    """Passages of two or three sentences of a module, in order, with the names of packages and modules taken out.

    Without their names two sentences may be one: passages with a sentence of other modules, held out, are left out.
    """
    passages = [
        (group, TOPIC_PACKAGES.index(module.package))
        for module in modules
        if module.package in TOPIC_PACKAGES
        for group in group_passages(hide_all_names(module, giveaways))
    ]
    others = () if modules is held_out else held_out
    taken = {sentence for module in others for sentence in hide_all_names(module, giveaways)}
    shuffled = (passages[i] for i in rng.permutation(len(passages)))
    return [{"sentence": " ".join(group), "label": label} for group, label in shuffled if taken.isdisjoint(group)]


def hide_all_names(module: Module, giveaways: frozenset[str]) -> list[str]:
    """The sentences of a module, see `hide_names`."""
    return [hide_names(sentence, giveaways) for paragraph in module.paragraphs for sentence in paragraph]


def group_passages(sentences: list[str]) -> Iterator[list[str]]:
    """Yields the sentences two or three at a time, each group with at least 20 and at most 60 words."""
    group: list[str] = []
    num_words = 0
    for sentence in sentences:
        length = len(sentence.split())
        if len(group) == MAX_PASSAGE_SENTENCES or num_words + length > MAX_PASSAGE_WORDS:
            group, num_words = [], 0
        group.append(sentence)
        num_words += length
        if len(group) > 1 and num_words >= MIN_PASSAGE_WORDS:
            yield group
            group, num_words = [], 0


def make_pair(modules: list[Module], rng: np.random.Generator) -> list[dict[str, object]]:
    """Neighbours in a paragraph; in every second pair the second sentence is exchanged for one of another module."""
    pairs = [
        (first, second, module.path)
        for module in modules
        for paragraph in module.paragraphs
        for first, second in itertools.pairwise(paragraph)
    ]
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    half = len(pairs) // 2
    rows = [{"sentence1": first, "sentence2": second, "label": 1} for first, second, _ in pairs[:half]]
    for (first, _, path), (_, second, other) in zip(pairs[half:], [*pairs[half + 1 :], pairs[half]]):
        if path != other:
            rows.append({"sentence1": first, "sentence2": second, "label": 0})
    return [rows[i] for i in rng.permutation(len(rows))]


def make_order(modules: list[Module], rng: np.random.Generator) -> list[dict[str, object]]:
    """Single sentences, every second one with two or three pairs of neighbouring words exchanged."""
    sentences = [sentence for module in modules for paragraph in module.paragraphs for sentence in paragraph]
    sentences = [sentence for sentence in sentences if not find_code_words(sentence)]
    rows: list[dict[str, object]] = []
    for i in rng.permutation(len(sentences)):
        shuffled = swap_words(sentences[i], rng)
        if shuffled is not None:  # those too short to shuffle are left out on both sides: their length would tell
            label = len(rows) % 2
            rows.append({"sentence": sentences[i] if label else shuffled, "label": label})
    return rows


def swap_words(sentence: str, rng: np.random.Generator) -> str | None:
    """Exchanges two or three pairs of neighbours, none of them the first or last word or beside a mark.

    Capitals and punctuation stay where they belong, so that only the order of the words tells. None if too short.
    """
    words = sentence.split()
    places = [
        i
        for i in range(1, len(words) - 2)
        if words[i].islower() and words[i + 1].islower() and words[i].isalpha() and words[i + 1].isalpha()
        if words[i] != words[i + 1]
    ]
    chosen: list[int] = []
    for place in rng.permutation(places):
        if all(abs(place - other) > 1 for other in chosen):
            chosen.append(int(place))
    if len(chosen) < 2:
        return None
    for i in chosen[: int(rng.integers(2, 4))]:
        words[i], words[i + 1] = words[i + 1], words[i]
    return " ".join(words)


def balance(rows: list[dict[str, object]], split: str) -> list[dict[str, object]]:
    """The same number of each label: as many as there are of the rarest, up to the size of the split."""
    groups: dict[object, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[row["label"]].append(i)
    size = min(NUM_EXAMPLES[split] // len(groups), *(len(group) for group in groups.values()))
    return [rows[i] for i in sorted(i for group in groups.values() for i in group[:size])]


def label_rows(splits: dict[str, list[dict[str, object]]], names: list[str]) -> datasets.DatasetDict:
    """The rows as data sets, with the names of the labels and a running `idx`."""
    parts = datasets.DatasetDict()
    for split, rows in splits.items():
        part = datasets.Dataset.from_list([{**row, "idx": i} for i, row in enumerate(rows)])
        parts[split] = part.cast_column("label", datasets.ClassLabel(names=names))
    return parts
