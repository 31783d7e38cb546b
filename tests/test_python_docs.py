"""The built-in corpus and the tasks made from it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import networkx
import numpy as np
import pytest

from oneday import python_docs
from oneday.arguments import DataArguments
from oneday.corpus import load_corpus
from oneday.docs_tasks import DOCS_TASKS, build_docs_task, find_code_words, hide_names, split_modules, swap_words
from oneday.errors import SettingError
from oneday.prose import clean_docstring, is_prose, split_sentences
from oneday.python_docs import TOPIC_PACKAGES, build_python_docs, corpus_hash, find_docstrings, fold_paragraph


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    build_python_docs(folder)
    return folder


@pytest.fixture(scope="module")
def docs(cache_dir):
    return build_python_docs(cache_dir)


def parse_docstrings(source: str) -> list[str]:
    """The docstrings of `source` as Python's own parser finds them, as they are written, if triple-quoted."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(
            node
        ):
            written = ast.get_source_segment(source, node.body[0].value).lstrip("rRuU")
            if written.startswith(('"""', "'''")):
                found.append(written[3:-3])
    return found


def test_lexer_finds_every_docstring_that_the_parser_finds():
    num_docstrings = 0
    for file in sorted(Path(networkx.__file__).parent.rglob("*.py"))[:150]:
        source = file.read_text(encoding="utf-8")
        expected = parse_docstrings(source)
        found = list(find_docstrings(source, min_comment_characters=10**9))
        assert not Counter(expected) - Counter(found), file
        num_docstrings += len(expected)
    assert num_docstrings > 300


def test_lexer_is_not_fooled_by_quotes_in_comments_and_strings():
    source = '''# it's a """ in a comment
x = "a # in a string"  # and "this" comment follows code
y = f(1, """not at the start of its line""")
def f():
    r"""Raw \\"quoted\\" text."""
    z = '\\'"""'
    \'\'\'A second "one".\'\'\'
    # a block of comments
    # of two lines
'''
    assert list(find_docstrings(source, 1)) == [
        'it\'s a """ in a comment',
        'Raw \\"quoted\\" text.',
        'A second "one".',
        "a block of comments\nof two lines",
    ]


NUMPY_STYLE = """Return the mean of the values along the given axis.

    The average is taken over the flattened array by default, see [1]_ for
    the details of :func:`~numpy.mean` and of ``float64`` intermediate values.

    Parameters
    ----------
    a : array_like, shape (n, m)
        Array that contains the numbers whose mean is desired by the caller.
    axis : None or int, optional

    Examples
    --------
    >>> np.mean([1, 2])  # this is an example with the words of a sentence
    1.5 is the output which is not a part of the text at all

    References
    ----------
    .. [1] A. Author, "The book that is in the list of the references", 1999.
    """


def test_clean_docstring_of_numpy_style():
    assert clean_docstring(NUMPY_STYLE) == [
        "Return the mean of the values along the given axis.",
        "The average is taken over the flattened array by default, for the details of numpy.mean and of float64 "
        "intermediate values.",
        "Array that contains the numbers whose mean is desired by the caller.",
    ]


def test_clean_docstring_of_google_style_and_markdown():
    text = """Builds the thing from a [`Config`] that was saved before by the user.

    Args:
        path (`str` or `os.PathLike` (a folder), *optional*, defaults to `"x"`):
            The folder in which the files of the model are to be found.
        size: The number of rows that are read at a time
            from each of the files.

    ```python
    thing = build(path)  # the code is not a part of the text that is kept
    ```

    [![badge](https://example.org/a.svg)](https://example.org)

    Read [the guide](https://example.org/guide) before you use this in your own work.
    It is at https://example.org/guide for all who want to read it. And this is kept as it is nothing but prose.
    """
    assert clean_docstring(text) == [
        "Builds the thing from a Config that was saved before by the user.",
        "The folder in which the files of the model are to be found.",
        "The number of rows that are read at a time from each of the files.",
        "Read the guide before you use this in your own work.",
        "And this is kept as it is nothing but prose.",
    ]


def test_clean_docstring_drops_literal_blocks_and_directives_but_keeps_notes():
    text = """The code is shown in the block that is below this line::

        for the_code in the_block: is_it_not_a_sentence_of_the_text

    .. code-block:: python

        this is code that would be a sentence if it were not in a block

    .. note:: This is a note that should be in the text as it is prose.
    """
    assert clean_docstring(text) == [
        "The code is shown in the block that is below this line:",
        "This is a note that should be in the text as it is prose.",
    ]


def test_prose_is_told_from_tables_and_code():
    assert is_prose("This is a sentence that has a good number of words in it.")
    assert not is_prose("0.12 0.44 0.98 is 1 2 3 the 4 5 6 of 7 8 9 10 11 12 13 14")
    assert not is_prose("Alpha beta gamma delta epsilon zeta eta theta iota kappa lambda")


def test_split_sentences_knows_abbreviations():
    text = "Use a metric, e.g. Manhattan, or others (cf. Smith et al. 1999). Then stop! (It is done.) Good."
    assert split_sentences(text) == [
        "Use a metric, e.g. Manhattan, or others (cf. Smith et al. 1999).",
        "Then stop!",
        "(It is done.)",
        "Good.",
    ]


def test_fold_paragraph_joins_copies_for_another_class():
    assert fold_paragraph("Constructs a BertModel of 12 layers.") == fold_paragraph(
        "constructs a GPT2Model of 24 layers"
    )
    assert fold_paragraph("Constructs a model of layers.") != fold_paragraph("Constructs a model of heads.")


def test_corpus_is_large_enough_and_mixed(docs):
    assert docs.column_names == ["text", "package", "path", "split"]
    size = Counter()
    for row in docs:
        size[row["split"]] += len(row["text"])
    assert size["train"] > 10_000_000
    assert size["validation"] > 150_000
    assert 0.05 < size["tasks"] / sum(size.values()) < 0.12
    assert set(TOPIC_PACKAGES) < set(docs["package"])
    assert len(set(docs["package"][:100])) > 10


def test_corpus_holds_no_paragraph_twice_and_no_path_of_the_machine(docs):
    keys = Counter(fold_paragraph(paragraph) for text in docs["text"] for paragraph in text.split("\n"))
    assert keys.most_common(1)[0][1] == 1
    assert len(set(docs["path"])) == len(docs)
    assert not any(os.path.isabs(path) for path in docs["path"])
    assert not any(">>>" in text or "http:" in text or "    " in text for text in docs["text"])


def test_second_call_reads_what_the_first_one_kept(cache_dir, docs, monkeypatch):
    monkeypatch.setattr(python_docs, "_build", None)
    assert corpus_hash(build_python_docs(cache_dir)) == corpus_hash(docs)
    assert [path.name[:12] for path in cache_dir.iterdir()] == ["python-docs-"]


def test_corpus_splits_through_load_corpus(cache_dir, docs):
    corpus = load_corpus(DataArguments(dataset_name="python-docs", cache_dir=str(cache_dir)))
    parts = {split: [row["text"] for row in docs if row["split"] == split] for split in set(docs["split"])}
    assert corpus.name == "python-docs"
    assert corpus.train["text"][:] == parts["train"]
    assert corpus.validation["text"][:] == parts["validation"]
    assert len(parts["tasks"]) > 100


def test_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def fail(folder, num_proc):
        Path(folder, "half").write_text("x")
        raise KeyboardInterrupt

    monkeypatch.setattr(python_docs, "_build", fail)
    with pytest.raises(KeyboardInterrupt):
        build_python_docs(tmp_path)
    assert not list(tmp_path.iterdir())


SMALL_BUILD = """
import sys
from oneday import python_docs
python_docs.PACKAGES, python_docs.STDLIB = {"evaluate": "evaluate", "tqdm": "tqdm", "yaml": "pyyaml"}, "attr"
docs = python_docs.build_python_docs(sys.argv[1], num_proc=1)
print(python_docs.corpus_hash(docs), len(docs))
"""


def test_corpus_does_not_depend_on_processes_or_hash_seed(tmp_path, monkeypatch):
    command = [sys.executable, "-c", SMALL_BUILD, str(tmp_path / "one")]
    done = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(python_docs, "PACKAGES", {"evaluate": "evaluate", "tqdm": "tqdm", "yaml": "pyyaml"})
    monkeypatch.setattr(python_docs, "STDLIB", "attr")
    docs = build_python_docs(tmp_path / "three", num_proc=3)
    assert len(docs) > 20
    assert done.stdout.splitlines()[-1] == f"{corpus_hash(docs)} {len(docs)}"


def test_corpus_hash_tells_content_order_and_parts():
    a, b = ({"text": [text]} for text in ("one", "two"))
    make = datasets.Dataset.from_dict
    both = make({"text": ["one", "two"]})
    hashes = [
        corpus_hash(both),
        corpus_hash(make({"text": ["two", "one"]})),
        corpus_hash(make({"text": ["onetwo"]})),
        corpus_hash(make(a), make(b)),
    ]
    assert len(set(hashes)) == 4
    assert corpus_hash(both.select([1, 0])) == hashes[1]
    assert len(hashes[0]) == 16


@pytest.mark.parametrize("name", DOCS_TASKS)
def test_task_is_balanced_clean_and_repeatable(name, cache_dir):
    task = build_docs_task(name, str(cache_dir))
    assert task["train"].num_rows > 1500
    assert task["validation"].num_rows >= 400
    texts = {}
    for split, rows in task.items():
        counts = Counter(rows["label"])
        assert len(set(counts.values())) == 1, counts
        assert len(counts) == rows.features["label"].num_classes
        assert list(rows["idx"]) == list(range(len(rows)))
        columns = [column for column in rows.column_names if column.startswith("sentence")]
        passages = list(zip(*(rows[column] for column in columns)))
        assert len(set(passages)) == len(rows)
        texts[split] = {part for passage in passages for text in passage for part in (text, *split_sentences(text))}
    assert not texts["train"] & texts["validation"], "no sentence is in both"
    again = build_docs_task(name, str(cache_dir))
    assert all(again[split].to_dict() == task[split].to_dict() for split in task)


def test_no_module_is_in_both_splits(docs):
    paths = [{(m.package, m.path) for m in modules} for modules in split_modules(docs).values()]
    assert len(paths) == 2 and all(paths) and paths[0].isdisjoint(paths[1])


def test_topic_does_not_name_its_package(cache_dir):
    task = build_docs_task("docs-topic", str(cache_dir))
    assert task["train"].features["label"].names == list(TOPIC_PACKAGES)
    text = " ".join([*task["train"]["sentence"], *task["validation"]["sentence"]]).lower()
    short = {"np", "pd", "plt", "mpl", "nx", "hf", "pyplot", "scikit", "pytorch", "python", "cpython"}
    assert not set(re.findall("[a-z]+", text)) & {*TOPIC_PACKAGES, *short}
    assert hide_names("Uses NumPy, pd.DataFrame and n_jobs of asyncio.", frozenset({"asyncio"})) == (
        "Uses it, it and it of it."
    )


def test_order_exchanges_neighbours_only():
    rng = np.random.default_rng(0)
    sentence = "Returns the first of all elements, which are kept in the order of the list."
    for _ in range(50):
        shuffled = swap_words(sentence, rng)
        assert shuffled != sentence
        words, moved = sentence.split(), shuffled.split()
        assert sorted(words) == sorted(moved)
        assert (moved[0], moved[5], moved[-1]) == ("Returns", "elements,", "list.")
        assert 4 <= sum(a != b for a, b in zip(words, moved)) <= 6
    assert swap_words("Returns the first element.", rng) is None


def test_order_cannot_be_solved_by_length(cache_dir):
    task = build_docs_task("docs-order", str(cache_dir))["train"]
    lengths = {0: [], 1: []}
    for row in task:
        lengths[row["label"]].append(len(row["sentence"].split()))
        assert not find_code_words(row["sentence"])
    assert abs(np.mean(lengths[0]) - np.mean(lengths[1])) < 0.8


def test_unknown_task_is_one_sentence(tmp_path):
    with pytest.raises(SettingError, match="task_names has 'docs-x'.*docs-topic, docs-pair, docs-order"):
        build_docs_task("docs-x", str(tmp_path))
