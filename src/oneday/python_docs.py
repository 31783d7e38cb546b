"""The built-in corpus: the documentation written inside the installed Python packages, cleaned to prose.

Every install has it, so a first run needs no download. One document is one module: its docstrings and longer comments,
in the order of the file, a paragraph a line.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import platform
import re
import sysconfig
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import datasets

from oneday.durable_files import explain_failed_write, written_aside
from oneday.prose import clean_docstring
from oneday.throughput import usable_cores

logger = logging.getLogger(__name__)

# How `dataset_name` calls this corpus.
PYTHON_DOCS = "python-docs"
# Raise it whenever the text that comes out changes: it is part of the cache key.
SCHEMA_VERSION = 3

STDLIB = "stdlib"
# Top-level packages that the requirements always bring, and the distribution of each. Fixed, so that what else is
# installed beside them does not change the corpus.
PACKAGES: dict[str, str] = {
    "accelerate": "accelerate",
    "aiohttp": "aiohttp",
    "anyio": "anyio",
    "attr": "attrs",
    "click": "click",
    "contourpy": "contourpy",
    "datasets": "datasets",
    "dateutil": "python-dateutil",
    "dill": "dill",
    "evaluate": "evaluate",
    "filelock": "filelock",
    "fontTools": "fonttools",
    "fsspec": "fsspec",
    "functorch": "torch",
    "huggingface_hub": "huggingface_hub",
    "jinja2": "jinja2",
    "joblib": "joblib",
    "matplotlib": "matplotlib",
    "mpl_toolkits": "matplotlib",
    "mpmath": "mpmath",
    "multidict": "multidict",
    "networkx": "networkx",
    "numpy": "numpy",
    "packaging": "packaging",
    "pandas": "pandas",
    "peft": "peft",
    "PIL": "pillow",
    "psutil": "psutil",
    "pyarrow": "pyarrow",
    "pyparsing": "pyparsing",
    "requests": "requests",
    "rich": "rich",
    "safetensors": "safetensors",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "sympy": "sympy",
    "tokenizers": "tokenizers",
    "torch": "torch",
    "torchgen": "torch",
    "tqdm": "tqdm",
    "transformers": "transformers",
    "typer": "typer",
    "urllib3": "urllib3",
    "yaml": "pyyaml",
    "yarl": "yarl",
}
# The packages with the most text: what the task docs-topic tells apart, in the order of its labels.
TOPIC_PACKAGES = (
    "matplotlib", "networkx", "numpy", "pandas", "scipy", "sklearn", "stdlib", "sympy", "torch", "transformers",
)  # fmt: skip
# Tests, copies of other projects, and parts of the standard library that some systems leave out.
SKIPPED_FOLDERS = {
    "__pycache__", "_internal", "_vendor", "dist-packages", "extern", "externals", "idlelib", "lib2to3",
    "site-packages", "test", "tests", "tkinter", "turtledemo", "vendored",
}  # fmt: skip
SUFFIXES = (".py", ".pyi", ".rst", ".md")
MIN_DOCUMENT_CHARACTERS = 80
MIN_COMMENT_CHARACTERS = 80

# What is held out of each package, in characters; TOPIC_PACKAGES give more where the task would have too little.
VALIDATION_FRACTION = 0.015
TASKS_FRACTION = 0.07
MIN_TOPIC_CHARACTERS = 150_000
MAX_TOPIC_FRACTION = 0.2

# Knows only what can hide a quote: `ast.parse` on every file takes over a minute.
LEXEME = re.compile(
    r"(?P<comment>#[^\n]*(?:\n[ \t]*#[^\n]*)*)"
    r'|"""(?P<double>[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*)"""'
    r"|'''(?P<single>[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*)'''"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'(?:[^'\\\n]|\\.)*'",
    re.DOTALL,
)
COMMENT_MARK = re.compile(r"^[ \t]*#[:!#]* ?", re.MULTILINE)
NAME = re.compile(r"\b\w*(?:[a-z][A-Z]|[A-Z]{2}|_|\d)\w*")
NOT_LETTERS = re.compile(r"[^a-z]+")


def find_docstrings(source: str, min_comment_characters: int = MIN_COMMENT_CHARACTERS) -> Iterator[str]:
    """Yields the texts that start a line of `source`, in order, as written (escapes unread, comment marks taken off).

    Triple-quoted strings: docstrings, attribute docstrings, and what is handed to helpers such as `add_docstr` on a
    line of its own. Blocks of comment lines of at least `min_comment_characters`. Nothing that has code before it.
    """
    for match in LEXEME.finditer(source):
        kind = match.lastgroup
        if kind is None or (kind == "comment" and len(match[0]) < min_comment_characters):
            continue
        before = source[source.rfind("\n", 0, match.start()) + 1 : match.start()].strip()
        if kind == "comment" and not before:
            yield COMMENT_MARK.sub("", match[0])
        elif kind != "comment" and before in ("", "r", "u", "R", "U"):
            yield match[kind]


def read_module(file: str) -> list[str]:
    """Returns the paragraphs of a file: of its docstrings and comments, or of the whole of it if it is not Python."""
    text = Path(file).read_text(encoding="utf-8", errors="ignore")
    if not file.endswith((".py", ".pyi")):
        return clean_docstring(text)
    return [paragraph for docstring in find_docstrings(text) for paragraph in clean_docstring(docstring)]


def list_modules() -> list[tuple[str, str, str]]:
    """Returns (package, path relative to site-packages, absolute path) of every file that may hold documentation.

    In the order of a hash of the path: the same everywhere, and the work falls evenly on processes.
    """
    modules = []
    for package in (STDLIB, *PACKAGES):
        root = _find_package(package)
        if root is None:
            logger.warning("python-docs: %s is not installed, so the corpus goes without it.", package)
            continue
        base = root if package == STDLIB else root.parent
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
            files = [os.path.join(folder, name) for name in names if name.endswith(SUFFIXES)]
            modules += [(package, Path(file).relative_to(base).as_posix(), file) for file in files]
    return sorted(modules, key=lambda module: hash_text(module[1]))


def _find_package(package: str) -> Path | None:
    if package == STDLIB:
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _generate_modules(modules: list[tuple[str, str, str]]) -> Iterator[dict[str, str]]:
    for package, path, file in modules:
        yield {"text": "\n".join(read_module(file)), "package": package, "path": path}


def _generate_descriptions() -> Iterator[dict[str, str]]:
    """The long descriptions of the distributions, and the chapters of the language reference that `help()` shows."""
    first_package = {distribution: package for package, distribution in reversed(PACKAGES.items())}
    for distribution, package in first_package.items():
        try:
            description = str(metadata.metadata(distribution).get_payload())
        except metadata.PackageNotFoundError:
            continue
        yield {"text": "\n".join(clean_docstring(description)), "package": package, "path": f"{package}/METADATA"}
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for topic, text in topics.items():
        yield {"text": "\n".join(clean_docstring(text)), "package": STDLIB, "path": f"pydoc_data/topics/{topic}"}


def hash_text(text: str) -> int:
    """A 64-bit hash that is the same in every process and on every machine (Python's own is not)."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def fold_paragraph(paragraph: str) -> str:
    """The key under which paragraphs count as the same: names of classes and variables, digits, case and marks go.

    "Constructs a BertModel ..." and "Constructs a GPT2Model ..." are one paragraph.
    """
    return NOT_LETTERS.sub(" ", NAME.sub("", paragraph).lower()).strip()


def drop_repeats(documents: Iterable[dict[str, str]]) -> Iterator[dict[str, str]]:
    """Leaves out every paragraph that came before in any document, and the documents that are too short after that."""
    seen: set[int] = set()
    for document in documents:
        kept = []
        for paragraph in document["text"].split("\n"):
            key = hash_text(fold_paragraph(paragraph))
            if key not in seen:
                seen.add(key)
                kept.append(paragraph)
        text = "\n".join(kept)
        if len(text) >= MIN_DOCUMENT_CHARACTERS:
            yield {**document, "text": text}


def choose_splits(documents: list[dict[str, str]]) -> list[str]:
    """Returns "train", "validation" or "tasks" for each document, in place.

    In every package the held-out parts take, in the given order, the documents that still fit their share.
    """
    total: Counter[str] = Counter()
    for document in documents:
        total[document["package"]] += len(document["text"])
    room: dict[tuple[str, str], float] = defaultdict(float)
    for package, size in total.items():
        floor = min(MIN_TOPIC_CHARACTERS, MAX_TOPIC_FRACTION * size) if package in TOPIC_PACKAGES else 0
        room[package, "tasks"] = max(TASKS_FRACTION * size, floor)
        room[package, "validation"] = VALIDATION_FRACTION * size
    splits = []
    for document in documents:
        package, size = document["package"], len(document["text"])
        split = next((name for name in ("tasks", "validation") if size <= room[package, name]), "train")
        room[package, split] -= size
        splits.append(split)
    return splits


def find_versions() -> dict[str, str]:
    """Returns what the corpus depends on: the versions of Python, of the packages and of this module's rules."""
    versions = {"python": platform.python_version(), "schema": str(SCHEMA_VERSION)}
    for distribution in sorted(set(PACKAGES.values())):
        try:
            versions[distribution] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            versions[distribution] = ""
    return versions


def build_python_docs(cache_dir: str | Path, num_proc: int | None = None) -> datasets.Dataset:
    """Returns the built-in corpus; the first call in an environment builds it (under a minute) and keeps it on disk.

    Args:
        cache_dir: folder that keeps it, under a name that carries the versions of the packages.
        num_proc: processes that read the packages; None takes up to 8 cores. The result does not depend on it.

    Returns:
        A data set with the columns `text` (paragraphs, one a line), `package`, `path` (of the module, relative to
        site-packages) and `split`: "train", "validation" (held out of pretraining) or "tasks" (kept for the built-in
        fine-tuning tasks). No paragraph occurs twice, so none is in two splits.
    """
    key = hashlib.sha256(json.dumps(find_versions(), sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(cache_dir) / f"python-docs-{key}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="python-docs-", dir=folder.parent) as building:
            docs = _build(building, num_proc or min(usable_cores(), 8))
            with explain_failed_write(folder), written_aside(folder) as aside:
                docs.save_to_disk(aside)
    return datasets.load_from_disk(str(folder))


def _build(folder: str, num_proc: int) -> datasets.Dataset:
    modules = datasets.Dataset.from_generator(
        _generate_modules,
        gen_kwargs={"modules": list_modules()},
        num_proc=num_proc,
        cache_dir=folder,
        split=datasets.NamedSplit("docs"),
    )
    documents = [*modules, *_generate_descriptions()]
    # Mixed, so that the first N documents are a fair sample.
    documents = list(drop_repeats(sorted(documents, key=lambda document: hash_text(document["path"]))))
    dataset = datasets.Dataset.from_list(documents)
    return dataset.add_column("split", choose_splits(documents))


def corpus_hash(*parts: datasets.Dataset) -> str:
    """Returns 16 hex digits of the SHA-256 over the column `text` of the parts, in order, zero bytes between."""
    digest = hashlib.sha256()
    for part in parts:
        for batch in part.select_columns("text").with_format("arrow").iter(batch_size=1000):
            for text in batch["text"]:
                digest.update(text.as_buffer())
                digest.update(b"\0")
        digest.update(b"\0")  # the same texts cut elsewhere into parts are another corpus
    return digest.hexdigest()[:16]
