"""From settings to what the trainer takes: tokenizer and packed rows, each kept in the cache under a content key."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import datasets
from transformers import PreTrainedTokenizerBase

from oneday.arguments import DataArguments, ShardArguments
from oneday.corpus import Corpus, load_corpus, resolve_cache_dir, sample_bytes
from oneday.durable_files import written_aside
from oneday.errors import SettingError
from oneday.packed_dataset import PackedDataset, pack_corpus, packing_key
from oneday.streamed_rows import StreamedRows
from oneday.text_streams import TextStream
from oneday.tokenization import hash_tokenizer, load_tokenizer, unknown_rate
from oneday.tokenized_parts import TEXTS_AT_ONCE, EncodedBatch, find_parts, read_parts, write_part
from oneday.tokenizer_training import train_tokenizer

logger = logging.getLogger(__name__)


@dataclass
class PreparedData:
    """What a run trains on.

    Attributes:
        corpus: Where the text came from.
        tokenizer: Trained or loaded.
        train: Packed training rows, on disk or streamed.
        validation: Packed held-out rows.
        seconds: Wall time of preparing, which no budget counts.
    """

    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    train: PackedDataset | StreamedRows
    validation: PackedDataset
    seconds: float

    @property
    def unknown_rate(self) -> float:
        """Fraction of the held-out tokens that are [UNK]; 0 for byte-level tokenizers."""
        return unknown_rate(self.tokenizer, list(self.corpus.validation["text"]))

    @property
    def fingerprint(self) -> str:
        """Equal only for the same text under the same tokenizer: weights do not outlive a change of it."""
        return f"{self.corpus.corpus_hash}-{hash_tokenizer(self.tokenizer)}"


class TrainSplit(NamedTuple):
    """Training text: its name in the cache, the documents, and where its tokenised parts and packed rows belong."""

    name: str
    texts: datasets.Dataset
    tokenizer: PreTrainedTokenizerBase
    parts: Path
    rows: Path
    cache: Path


def prepare_data(args: DataArguments, kind: str, seed: int) -> PreparedData:
    """Read the corpus, train or load the tokenizer, pack both splits.

    Args:
        args: Which text, tokenizer and packing.
        kind: `encoder` or `decoder`; decides the special tokens around each document.
        seed: Seed of a stream's order and shuffle.

    Raises:
        SettingError: When the text or a setting cannot be used.
    """
    begun = time.monotonic()
    corpus = load_corpus(args)
    cache = resolve_cache_dir(args.cache_dir)
    tokenizer = prepare_tokenizer(args, corpus, kind, cache)
    if isinstance(corpus.train, TextStream):
        train = StreamedRows(corpus.train, tokenizer, kind, args.max_seq_length, args.packing_strategy, seed)
    else:
        train = prepare_rows(args, corpus.train, f"{corpus.corpus_hash}/train", tokenizer, kind, cache)
    validation = prepare_rows(args, corpus.validation, f"{corpus.corpus_hash}/validation", tokenizer, kind, cache)
    data = PreparedData(corpus, tokenizer, train, validation, time.monotonic() - begun)
    if data.unknown_rate == 1.0:
        raise SettingError(
            "The held-out text is nothing but unknown tokens: it has other letters than what the tokenizer was "
            "trained on; set validation_name or tokenizer_name."
        )
    return data


def tokenize_shard(args: DataArguments, kind: str, part: ShardArguments) -> Path:
    """Tokenise one part of the training text into the cache, where `prepare_data` finds it; returns its file.

    Raises:
        SettingError: When there is no such part, or nothing to prepare.
    """
    if not 0 <= part.shard < part.num_shards:
        raise SettingError(
            f"The setting shard is {part.shard}; it must be from 0 to num_shards - 1, {part.num_shards - 1}."
        )
    split = load_split(args, kind, "shard")
    return write_part(split.texts, split.tokenizer, split.parts, part.shard, part.num_shards)


def load_split(args: DataArguments, kind: str, asked_by: str) -> TrainSplit:
    """The training text before it is tokenised.

    Raises:
        SettingError: When it is a stream, for which the setting `asked_by` is none, or cannot be used.
    """
    corpus = load_corpus(args)
    if isinstance(corpus.train, TextStream):
        raise SettingError(
            f"The setting {asked_by} is given for a stream, which is tokenised in training; leave streaming out."
        )
    cache = resolve_cache_dir(args.cache_dir)
    tokenizer = prepare_tokenizer(args, corpus, kind, cache)
    name = f"{corpus.corpus_hash}/train"
    _, rows = locate_rows(args, name, tokenizer, kind, cache)
    return TrainSplit(name, corpus.train, tokenizer, locate_parts(cache, name, tokenizer), rows, cache)


def locate_rows(
    args: DataArguments, name: str, tokenizer: PreTrainedTokenizerBase, kind: str, cache: Path
) -> tuple[str, Path]:
    """The key of a split's packed rows, and where they lie."""
    settings = {"kind": kind, "row_length": args.max_seq_length, "strategy": args.packing_strategy}
    key = packing_key(name, tokenizer, settings)
    return key, cache / "packed" / key


def locate_parts(cache: Path, name: str, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Where the tokenised parts of a split lie."""
    return cache / "tokenized" / digest(name, hash_tokenizer(tokenizer))


def prepare_tokenizer(args: DataArguments, corpus: Corpus, kind: str, cache: Path) -> PreTrainedTokenizerBase:
    """The named tokenizer, or one trained on the corpus (once a corpus and setting)."""
    if args.tokenizer_name is not None:
        return load_tokenizer(args.tokenizer_name)
    settings = ("sampled", args.tokenizer_type, args.vocab_size, args.lowercase, args.tokenizer_train_bytes, kind)
    folder = cache / "tokenizers" / digest(corpus.corpus_hash, *settings)
    if not (folder / "tokenizer.json").exists():
        logger.info("Training a %s tokenizer of %d tokens.", args.tokenizer_type, args.vocab_size)
        texts = sample_bytes(corpus.train, args.tokenizer_train_bytes)
        tokenizer = train_tokenizer(texts, args.tokenizer_type, args.vocab_size, args.lowercase, kind)
        keep_tokenizer(tokenizer, folder)
    return load_tokenizer(str(folder))


def keep_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer into a directory of the cache, whole or not at all.

    Raises:
        SettingError: When it cannot be written.
    """
    try:
        with written_aside(folder) as aside:
            tokenizer.save_pretrained(aside)
        if not (folder / "tokenizer.json").exists():
            raise OSError("something else is there")
    except Exception as error:  # tokenizers raises a plain one
        raise SettingError(
            f"{folder} could not be written ({error}): free some space or set cache_dir elsewhere."
        ) from None


def prepare_rows(
    args: DataArguments, texts: datasets.Dataset, name: str, tokenizer: PreTrainedTokenizerBase, kind: str, cache: Path
) -> PackedDataset:
    """Packed rows of one split, from the cache when they are there, from tokenised parts when all of them are."""
    key, folder = locate_rows(args, name, tokenizer, kind, cache)

    def batches() -> Iterator[list[str] | EncodedBatch]:
        """Asked for only where the rows are not there yet."""
        parts = find_parts(locate_parts(cache, name, tokenizer), len(texts))
        yield from read_parts(parts) if parts else (batch["text"] for batch in texts.iter(TEXTS_AT_ONCE))

    return pack_corpus(batches(), tokenizer, kind, args.max_seq_length, args.packing_strategy, folder, len(texts), key)


def digest(*parts: object) -> str:
    """A short name for a combination of settings."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
