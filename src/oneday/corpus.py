"""Where text comes from: the built-in corpus, local files, the Hub (whole or as a stream), and mixtures of them."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from oneday import hub_texts
from oneday.arguments import DataArguments
from oneday.corpus_names import name_corpus, split_names
from oneday.durable_files import make_folder
from oneday.errors import SettingError, describe_error
from oneday.held_out import HeldOut
from oneday.mixtures import Texts, mix
from oneday.python_docs import PYTHON_DOCS, build_python_docs, corpus_hash, hash_text
from oneday.text_files import is_local, list_files, load_files
from oneday.text_streams import FileStream, FirstTexts, TextStream

logger = logging.getLogger(__name__)

MIN_STREAM_VALIDATION_DOCUMENTS = 64
# How long a stream is taken to be when `max_train_documents` does not say it.
STREAM_DOCUMENTS = 100_000
# Held-out text of more than this share of all is said: the documents are few and long.
MUCH_HELD_OUT = 0.1
# Of the documents that a tokenizer is trained on.
SAMPLE_SEED = 0
# What is read of a data set of the Hub that `validation_name` names.
VALIDATION_SPLIT = "validation"


@dataclass
class Corpus:
    """Text to train on and text held out, both with the one column `text`.

    Attributes:
        name: what it is called on the model card; no local folders in it.
        train: documents to train on; a `TextStream` if any part of it is one.
        validation: documents held out.
        corpus_hash: 16 hex digits of the content (train, then validation), or for a stream of its name, configuration,
            split, revision and how it is read.
    """

    name: str
    train: Texts
    validation: datasets.Dataset
    corpus_hash: str


def resolve_cache_dir(cache_dir: str | None) -> Path:
    """Returns the folder for prepared data: `cache_dir`, or $ONEDAY_CACHE, or ~/.cache/oneday; makes it when missing.

    Raises:
        SettingError: it cannot be made or written.
    """
    folder = Path(cache_dir or os.environ.get("ONEDAY_CACHE") or "~/.cache/oneday").expanduser().absolute()
    make_folder(folder, "cache_dir")
    return folder


def count_bytes(texts: Iterable[str]) -> int:
    """Returns the length of all `texts` together, in bytes of UTF-8."""
    return sum(len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass")) for text in texts)


def load_corpus(args: DataArguments) -> Corpus:
    """Loads what `args.dataset_name` names and holds a part of it out.

    Held out is what `validation_name` names; without it, of map-style text the documents whose content hash falls
    below `validation_fraction` (so equal texts are on one side, whatever the order), of a stream the first documents
    of a few files (see `hold_out_of_stream`), and of python-docs its own validation modules.

    A mixture takes every document once; with `dataset_weights` it is drawn in that proportion of documents until one
    part runs out, so that nothing is repeated, and what is left of the others is not used. With a stream in it a part
    that runs out begins again.

    Raises:
        SettingError: something named is missing, unreadable, empty, or has no such column.
    """
    names = split_names(args.dataset_name)
    check_data(args, names)
    if args.validation_name:
        held_out = load_validation(args)
        files = list_held_out_files(args)
        parts = [load_part(name, args, without=files) for name in names]
        validation = keep_bytes(held_out, args.max_validation_bytes)
    else:
        parts = [load_part(name, args) for name in names]
        pieces = [hold_out(name, part, args) for name, part in zip(names, parts)]
        held_out = validation = keep_bytes(datasets.concatenate_datasets(pieces), args.max_validation_bytes)
        warn_of_much(names, parts, held_out, args.validation_fraction)
    trains = [drop_held_out(name, part, held_out, args) for name, part in zip(names, parts)]
    on_disk = [corpus_hash(train) for train in trains if len(trains) > 1 and isinstance(train, datasets.Dataset)]
    train = mix(trains, args)
    if args.max_train_documents is not None:
        train = take_first(train, args.max_train_documents)
    return Corpus(name_corpus(names, args), train, validation, hash_corpus(train, validation, names, on_disk, args))


def check_data(args: DataArguments, names: list[str]) -> None:
    """Raises `SettingError` for settings that cannot work, before anything is read."""
    if not names:
        raise SettingError(f"dataset_name {args.dataset_name!r} names nothing: give python-docs, a Hub id or a path.")
    weights = args.dataset_weights
    if weights is not None and len(weights) != len(names):
        raise SettingError(
            f"dataset_weights has {len(weights)} numbers for {len(names)} data sets in dataset_name: give one each."
        )
    if weights is not None and not all(0 < weight < math.inf for weight in weights):
        raise SettingError(
            f"dataset_weights {weights} must all be finite and above zero: leave out a data set you do not want."
        )
    if args.stream_files < 1:
        raise SettingError(f"stream_files {args.stream_files} must be at least 1.")
    if args.max_train_documents is not None and args.max_train_documents < 1:
        raise SettingError(f"max_train_documents {args.max_train_documents} must be at least 1.")
    if not args.validation_name and not 0 < args.validation_fraction < 1:
        raise SettingError(f"validation_fraction {args.validation_fraction} must lie between 0 and 1.")
    both = set(names) & set(split_names(args.validation_name or "")) - {PYTHON_DOCS}
    if args.dataset_split != VALIDATION_SPLIT:  # of a data set of the Hub it is another split
        both = {name for name in both if is_local(name)}
    if both:
        raise SettingError(f"validation_name {min(both)!r} is trained on too: leave it empty to hold a part out.")


def list_held_out_files(args: DataArguments) -> set[str]:
    """The real paths of the local files that `validation_name` names."""
    names = [name for name in split_names(args.validation_name or "") if is_local(name)]
    return {os.path.realpath(file) for name in names for file in list_files(name)}


def load_part(name: str, args: DataArguments, split: str | None = None, without: Collection[str] = ()) -> Texts:
    """Loads one part as documents with the one column `text`; blank documents are dropped, and files in `without`."""
    if name == PYTHON_DOCS:
        return load_python_docs(args, split or "train")
    if is_local(name):
        texts = load_files(name, args.text_column, resolve_cache_dir(args.cache_dir) / "text", without)
    else:
        texts = hub_texts.load_hub(name, split or args.dataset_split, args)
    if isinstance(texts, TextStream):
        return texts
    texts = drop_blank(texts, name)
    if not len(texts):
        raise SettingError(f"dataset_name {name!r} holds no text: every {args.text_column!r} in it is empty.")
    return texts


def load_python_docs(args: DataArguments, split: str) -> datasets.Dataset:
    """The part `split` ("train", "validation" or "tasks") of the built-in corpus."""
    docs = build_python_docs(resolve_cache_dir(args.cache_dir))
    rows = np.flatnonzero(np.array(docs["split"]) == split)
    return docs.select(rows).select_columns("text")


def drop_blank(texts: datasets.Dataset, name: str) -> datasets.Dataset:
    """Leaves out the documents of a data set that are missing or only white space.

    Raises:
        SettingError: One is not UTF-8.
    """
    kept = [np.zeros(0, bool)]
    for number, batch in enumerate(texts.with_format("arrow").iter(batch_size=1000)):
        try:
            batch["text"].validate(full=True)
        except pa.ArrowInvalid as error:
            raise SettingError(
                f"dataset_name {name!r} holds text that is not UTF-8, in documents {1000 * number} to "
                f"{1000 * number + len(batch) - 1} ({describe_error(error)}): write it again."
            ) from None
        filled = pc.not_equal(pc.utf8_trim_whitespace(batch["text"]), "")
        kept.append(pc.fill_null(filled, False).to_numpy(zero_copy_only=False))
    mask = np.concatenate(kept)
    return texts if mask.all() else texts.select(np.flatnonzero(mask))


def hash_documents(texts: datasets.Dataset) -> np.ndarray:
    """Returns (num_documents,) uint64: a content hash of each document."""
    batches = texts.with_format("arrow").iter(batch_size=1000)
    hashes = (hash_text(text) for batch in batches for text in batch["text"].to_pylist())
    return np.fromiter(hashes, np.uint64, len(texts))


def hold_out(name: str, texts: Texts, args: DataArguments) -> datasets.Dataset:
    """Documents of one part to hold out, before `max_validation_bytes`."""
    if name == PYTHON_DOCS:
        return load_python_docs(args, "validation")
    if isinstance(texts, FileStream):
        num_documents = args.max_train_documents or STREAM_DOCUMENTS
        return hold_out_of_stream(texts, args.validation_fraction, num_documents, args.max_validation_bytes)
    return hold_out_by_hash(texts, args.validation_fraction)


def hold_out_by_hash(texts: datasets.Dataset, fraction: float) -> datasets.Dataset:
    """The documents of lowest content hash: equal texts fall on one side, and more documents move none of the others.

    Raises:
        SettingError: there are not two different documents.
    """
    hashes = hash_documents(texts)
    if len(np.unique(hashes)) < 2:
        raise SettingError(
            f"dataset_name has {len(np.unique(hashes))} different document(s), too few to hold one out: "
            "add text or set validation_name."
        )
    # Never none and never all, however small the corpus.
    limit = np.clip(np.uint64(fraction * 2**64), hashes.min(), hashes[hashes < hashes.max()].max())
    return texts.select(np.flatnonzero(hashes <= limit))


def warn_of_much(names: list[str], parts: list[Texts], held_out: datasets.Dataset, fraction: float) -> None:
    """Say it where far more of texts on disk is held out than was asked for."""
    if PYTHON_DOCS in names or not all(isinstance(part, datasets.Dataset) for part in parts):
        return
    texts, num_bytes = datasets.concatenate_datasets(parts), count_bytes(held_out["text"])
    if not exceeds_bytes(texts, int(num_bytes / max(MUCH_HELD_OUT, 2 * fraction))):
        logger.warning(
            "%.0f %% of the text is held out (%d of %d documents, %.0f kB); set validation_name, or cut it into "
            "shorter documents.",
            100 * num_bytes / count_bytes(texts["text"]),
            len(held_out),
            len(texts),
            num_bytes / 1e3,
        )


def hold_out_of_stream(stream: FileStream, fraction: float, num_documents: int, max_bytes: int) -> datasets.Dataset:
    """Holds `fraction` of `num_documents` out, at least 64; no more than are needed for `max_bytes`.

    Held out are the first documents of as many files as are read at once, evenly spaced in the publisher's order: the
    same whatever the seed, and less mixed than a split by hash would be.
    """
    num_held_out = max(MIN_STREAM_VALIDATION_DOCUMENTS, int(fraction * num_documents))
    texts = list(take_bytes(({"text": text} for text in stream.take_spread(num_held_out)), max_bytes))
    if len(texts) < num_held_out and count_bytes(texts) < max_bytes:
        raise SettingError(
            f"dataset_name streams only {len(texts)} documents, too few to hold {num_held_out} out: "
            "set streaming to false."
        )
    return datasets.Dataset.from_dict({"text": texts})


def keep_bytes(texts: datasets.Dataset, max_bytes: int) -> datasets.Dataset:
    """The documents with the lowest content hashes that fit into `max_bytes` of UTF-8; at least one.

    The first that does not fit ends them, once there is half of what may be held out; before that it is passed over.
    """
    order, kept, num_bytes = np.argsort(hash_documents(texts), kind="stable").tolist(), [], 0
    for row in order:
        size = count_bytes([texts[row]["text"]])
        if num_bytes + size <= max_bytes:
            kept.append(row)
            num_bytes += size
        elif 2 * num_bytes >= max_bytes:
            break
    kept = kept or order[:1]
    return texts if len(kept) == len(texts) else texts.select(sorted(kept))


def load_validation(args: DataArguments) -> datasets.Dataset:
    """Loads what `validation_name` names; of a Hub data set its split "validation", of a stream what is needed."""
    assert args.validation_name
    try:
        parts = [load_part(name, args, split=VALIDATION_SPLIT) for name in split_names(args.validation_name)]
        return datasets.concatenate_datasets([read_first(part, args.max_validation_bytes) for part in parts])
    except SettingError as error:
        raise SettingError(str(error).replace("dataset_name", "validation_name")) from error


def read_first(texts: Texts, num_bytes: int) -> datasets.Dataset:
    """The first documents of a stream, up to so many bytes of them; texts on disk as they are."""
    if isinstance(texts, datasets.Dataset):
        return texts
    return datasets.Dataset.from_dict({"text": list(take_bytes(texts, num_bytes))})


def take_bytes(texts: Iterable[dict[str, str]], limit: int) -> Iterator[str]:
    """Texts from the start until `limit` bytes of UTF-8 are given."""
    given = 0
    for row in texts:
        yield row["text"]
        given += count_bytes([row["text"]])
        if given >= limit:
            return


def sample_bytes(texts: Texts, limit: int) -> Iterator[str]:
    """Texts of about `limit` bytes, or all: drawn from everywhere; of a stream the first."""
    if isinstance(texts, datasets.Dataset) and exceeds_bytes(texts, limit):
        texts = texts.select(np.random.default_rng(SAMPLE_SEED).permutation(len(texts)))
    return take_bytes(texts, limit)


def exceeds_bytes(texts: datasets.Dataset, limit: int) -> bool:
    """Whether the documents are of more than so many bytes of UTF-8; read up to there."""
    num_bytes = 0
    for batch in texts.with_format("arrow").iter(batch_size=1000):
        num_bytes += pc.sum(pc.binary_length(batch["text"])).as_py() or 0
        if num_bytes > limit:
            return True
    return False


def drop_held_out(name: str, train: Texts, held_out: datasets.Dataset, args: DataArguments) -> Texts:
    """Leaves out of the part `name` the documents that are also held out, word for word.

    With `validation_name` also by paragraphs: one side may be whole files and the other cut at blank lines. Documents
    that hold held-out paragraphs beside others stay, and are counted in a warning (not those of a stream).
    """
    known = HeldOut(held_out["text"], by_paragraph=bool(args.validation_name))
    if isinstance(train, FileStream):
        return train.without(known)
    batches = train.with_format("arrow").iter(batch_size=1000)
    found = (text in known for batch in batches for text in batch["text"].to_pylist())
    repeated = np.fromiter(found, bool, len(train))
    if repeated.all() and args.validation_name:
        raise SettingError(f"validation_name holds every document of dataset_name {name!r}: none is left to train on.")
    if repeated.all():
        raise SettingError(
            f"dataset_name {name!r} has no document that is not held out of all its parts: leave it out, or set "
            "validation_name."
        )
    if repeated.any() and args.validation_name:
        logger.warning("%d documents that are also held out are not trained on.", repeated.sum())
    train = train.select(np.flatnonzero(~repeated)) if repeated.any() else train
    if args.validation_name:
        batches = train.with_format("arrow").iter(batch_size=1000)
        num_touched = sum(known.holds_some(text) for batch in batches for text in batch["text"].to_pylist())
        if num_touched:
            logger.warning(
                "%d documents of %s hold held-out paragraphs beside others and are trained on.", num_touched, name
            )
    return train


def take_first(texts: Texts, num_documents: int) -> Texts:
    """The first documents of `texts`, all of them if there are fewer."""
    if isinstance(texts, TextStream):
        return FirstTexts(texts, num_documents)
    return texts.select(range(min(num_documents, len(texts))))


def hash_corpus(
    train: Texts, validation: datasets.Dataset, names: list[str], on_disk: list[str], args: DataArguments
) -> str:
    """The hash that `Corpus.corpus_hash` describes; `on_disk`: those of a mixture's parts that are no streams."""
    if isinstance(train, datasets.Dataset):
        return corpus_hash(train, validation)
    streams = [name for name in names if name != PYTHON_DOCS and not is_local(name)]
    revisions = [hub_texts.find_revision(name) for name in streams]
    hub_names = [name.partition("@")[0] for name in streams]
    settings = (
        args.dataset_config_name,
        args.dataset_split,
        args.text_column,
        args.dataset_weights,
        args.stream_files,
    )
    parts = (len(names), hub_names, revisions, on_disk, settings, args.max_train_documents, corpus_hash(validation))
    return f"{hash_text(repr(parts)):016x}"
