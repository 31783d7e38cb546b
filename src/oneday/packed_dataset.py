"""Packed rows on disk: Arrow shards that are mapped into memory, and the index that makes a directory complete.

    <directory>/shard-00000.arrow ...   columns input_ids: fixed-size list of uint16 or uint32, doc_lengths: list
    <directory>/index.json              counts, row_length, hashes, the settings' key

A directory is written under another name and renamed when all of it is on disk, so one that has its name is complete.
Each shard is an Arrow stream of one record batch, which `datasets.Dataset.from_file` opens too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from oneday.durable_files import explain_failed_write
from oneday.errors import SettingError
from oneday.packing import PackedRows, build_rows, pack_best_fit, pack_padded, split_long
from oneday.tokenization import ObjectiveKind, hash_tokenizer, special_layout
from oneday.tokenized_parts import EncodedBatch, encode_batch

logger = logging.getLogger(__name__)

INDEX_FILE = "index.json"
FORMAT_VERSION = 1
# Packing looks at this many tokens at once, which bounds memory; a block becomes a shard.
BLOCK_TOKENS = 32_000_000


@dataclass
class PackedIndex:
    """What `index.json` holds."""

    row_length: int
    dtype: str
    key: str = ""
    kind: str = ""
    packing_strategy: str = ""
    tokenizer_hash: str = ""
    num_rows: int = 0
    num_pieces: int = 0
    # With special tokens, without padding.
    num_tokens: int = 0
    num_documents: int = 0
    # UTF-8 bytes of all documents, for bits per byte.
    num_bytes_text: int = 0
    packing_efficiency: float = 0.0
    tokenize_seconds: float = 0.0
    pack_seconds: float = 0.0
    shards: list[dict] = field(default_factory=list)
    format_version: int = FORMAT_VERSION


class PackedWriter:
    """Writes shards beside `path` and gives them their name in `close`; as a context manager, an error removes them.

    Args:
        path: the directory to make; it must not exist, or be empty.
        row_length: tokens of a row.
        vocab_size: number of ids; above 65,536 the rows are uint32.
        facts: further fields of `PackedIndex`; `index` may be changed until `close`.

    Raises:
        SettingError: `path` holds something, or it cannot be written (disk full, no permission).
    """

    def __init__(self, path: str | Path, row_length: int, vocab_size: int, **facts: object) -> None:
        self.path = Path(path).absolute()
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise SettingError(f"{self.path} exists and is not empty: packed rows are not written over it; remove it.")
        self.index = PackedIndex(row_length=row_length, dtype=smallest_dtype(vocab_size).name, **facts)
        self._partial = self.path.with_name(f".{self.path.name}.partial-{socket.gethostname()}-{os.getpid()}")
        with explain_failed_write(self.path):
            _remove_orphans(self.path)
            self._partial.mkdir(parents=True)

    def write_shard(self, rows: PackedRows) -> None:
        """Appends rows as one shard, on disk when this returns."""
        name = f"shard-{len(self.index.shards):05d}.arrow"
        batch = _to_record_batch(rows, self.index.row_length, self.index.dtype)
        with explain_failed_write(self.path), open(self._partial / name, "wb") as sink:
            with pa.ipc.new_stream(sink, batch.schema) as writer:
                writer.write_batch(batch)
            _flush(sink)
            num_bytes = sink.tell()
        self.index.shards.append({"file": name, "num_rows": len(rows.input_ids), "num_bytes": num_bytes})
        self.index.num_rows += len(rows.input_ids)
        self.index.num_pieces += len(rows.doc_lengths)
        self.index.num_tokens += int(rows.doc_lengths.sum())

    def close(self) -> None:
        """Writes the index and gives the directory its name."""
        self.index.packing_efficiency = self.index.num_tokens / max(1, self.index.num_rows * self.index.row_length)
        with explain_failed_write(self.path):
            with open(self._partial / INDEX_FILE, "w") as sink:
                json.dump(asdict(self.index), sink, indent=1)
                _flush(sink)
            try:
                os.replace(self._partial, self.path)
            except OSError:
                # Another process made the same rows meanwhile: theirs are as good.
                if not (self.path / INDEX_FILE).exists():
                    raise
                self.abandon()

    def abandon(self) -> None:
        """Removes what was written."""
        shutil.rmtree(self._partial, ignore_errors=True)

    def __enter__(self) -> PackedWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self.close()
        finally:
            # After a successful close there is nothing under this name.
            self.abandon()


class PackedDataset:
    """A directory of packed rows, mapped into memory. Pickles as its path.

    Attributes:
        index: the facts in `index.json`.

    Raises:
        SettingError: no complete directory, or a shard that is not as the index says.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.index = _read_index(self.path)
        shards = [_map_shard(self.path, shard, self.index.row_length) for shard in self.index.shards]
        self._input_ids = [shard.input_ids for shard in shards]
        self._doc_lengths = [shard.doc_lengths for shard in shards]
        self._offsets = [shard.offsets for shard in shards]
        self._first_rows = np.cumsum([0] + [len(rows) for rows in self._input_ids])

    def __reduce__(self) -> tuple:
        return PackedDataset, (self.path,)

    def __len__(self) -> int:
        return self.index.num_rows

    @property
    def row_length(self) -> int:
        """Tokens of a row, padding included."""
        return self.index.row_length

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, special ones included, padding not."""
        return self.index.num_tokens

    @property
    def num_bytes_text(self) -> int:
        """UTF-8 bytes of the text in all rows."""
        return self.index.num_bytes_text

    @property
    def packing_efficiency(self) -> float:
        """Share of all tokens that are not padding."""
        return self.index.packing_efficiency

    def get_rows(self, indices: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Reads rows in any order.

        Args:
            indices: (n,) from 0 to len - 1.

        Returns:
            input_ids: (n, row_length) uint16 or uint32, a copy.
            doc_lengths: n arrays, views of the file: tokens of each piece of the row, special ones included. What
                they leave of row_length is padding.
        """
        indices = np.asarray(indices, dtype=np.int64)
        assert not len(indices) or (indices.min() >= 0 and indices.max() < len(self)), "row index out of range"
        shard_of_row = np.searchsorted(self._first_rows, indices, side="right") - 1
        within = indices - self._first_rows[shard_of_row]
        input_ids = np.empty((len(indices), self.row_length), dtype=self.index.dtype)
        for shard in np.unique(shard_of_row):
            chosen = shard_of_row == shard
            input_ids[chosen] = self._input_ids[shard][within[chosen]]
        doc_lengths = []
        for shard, row in zip(shard_of_row.tolist(), within.tolist()):
            offsets = self._offsets[shard]
            doc_lengths.append(self._doc_lengths[shard][offsets[row] : offsets[row + 1]])
        return input_ids, doc_lengths


def packing_key(corpus_hash: str, tokenizer: PreTrainedTokenizerBase, settings: dict) -> str:
    """20 hex digits that name packed rows: same text, tokenizer, settings and format give the same.

    Args:
        corpus_hash: over the documents and their order.
        tokenizer: counts by what it does, not by where it lies.
        settings: everything else that decides rows (kind, row_length, packing_strategy ...), as JSON.
    """
    parts = [FORMAT_VERSION, BLOCK_TOKENS, corpus_hash, hash_tokenizer(tokenizer), settings]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def pack_corpus(
    texts: Iterable[list[str] | EncodedBatch],
    tokenizer: PreTrainedTokenizerBase,
    kind: ObjectiveKind,
    row_length: int,
    strategy: str,
    out_dir: str | Path,
    num_documents_hint: int | None = None,
    key: str = "",
) -> PackedDataset:
    """Tokenizes and packs a corpus, or opens `out_dir` when it already holds the rows of this key.

    Rows of a block stand in the order of packing: shuffling is the loader's. A tokenizer without a pad token pads with
    its end token, else id 0: nothing reads past the document lengths.

    Args:
        texts: documents in batches, of which about a thousand keep all cores busy, or tokenised already.
        tokenizer: a fast one.
        kind: whose special tokens go around a piece.
        row_length: tokens of a row.
        strategy: `best_fit` or `padded` (one piece a row).
        out_dir: the directory to make; its parents are made too.
        num_documents_hint: total for the progress bar.
        key: from `packing_key`; with an empty one an existing directory is refused.

    Raises:
        SettingError: bad strategy, row_length without room for text, no token in the corpus, a full disk, or an
            `out_dir` that holds something else.
    """
    if key and (Path(out_dir) / INDEX_FILE).exists() and _read_index(Path(out_dir)).key == key:
        logger.info("Packed rows in %s are used again.", out_dir)
        return PackedDataset(out_dir)
    if strategy not in ("best_fit", "padded"):
        raise SettingError(f"packing_strategy={strategy!r} is not known: use best_fit or padded.")
    prefix, suffix = special_layout(tokenizer, kind)
    if row_length <= len(prefix) + len(suffix):
        raise SettingError(f"max_seq_length={row_length} leaves no room for text beside the special tokens; raise it.")
    facts = {"key": key, "kind": kind, "packing_strategy": strategy, "tokenizer_hash": hash_tokenizer(tokenizer)}
    with PackedWriter(out_dir, row_length, len(tokenizer), **facts) as writer:
        for tokens, lengths in _encode_blocks(texts, tokenizer, writer.index, num_documents_hint):
            started = time.perf_counter()
            writer.write_shard(pack_documents(tokens, lengths, tokenizer, kind, row_length, strategy))
            writer.index.pack_seconds += time.perf_counter() - started
        if not writer.index.num_tokens:
            raise SettingError("dataset_name or validation_name gave no token at all: choose text that has words.")
    _report(writer.index, out_dir)
    return PackedDataset(out_dir)


def _encode_blocks(
    texts: Iterable[list[str] | EncodedBatch],
    tokenizer: PreTrainedTokenizerBase,
    index: PackedIndex,
    num_documents_hint: int | None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of at least BLOCK_TOKENS (the last one smaller) as `encode_documents` gives them; counts into `index`."""
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    num_tokens = 0
    with tqdm(total=num_documents_hint, desc="Tokenizing and packing", unit=" documents", disable=None) as progress:
        for batch in texts:
            encoded = batch if isinstance(batch, EncodedBatch) else encode_batch(tokenizer, batch)
            parts.append((encoded.tokens, encoded.lengths))
            index.tokenize_seconds += encoded.seconds
            index.num_documents += len(encoded.lengths)
            index.num_bytes_text += encoded.num_bytes
            num_tokens += len(encoded.tokens)
            progress.update(len(encoded.lengths))
            if num_tokens >= BLOCK_TOKENS:
                yield _join(parts)
                parts, num_tokens = [], 0
    if num_tokens:
        yield _join(parts)


def _join(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([tokens for tokens, _ in parts]), np.concatenate([lengths for _, lengths in parts])


def pack_documents(
    tokens: np.ndarray,
    lengths: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    kind: ObjectiveKind,
    row_length: int,
    strategy: str,
) -> PackedRows:
    """Packs documents as `encode_documents` gives them; arguments as for `pack_corpus`."""
    prefix, suffix = special_layout(tokenizer, kind)
    num_special = len(prefix) + len(suffix)
    pieces = split_long(lengths, row_length - num_special)
    with_special = pieces.length + num_special
    rows = pack_best_fit(with_special, row_length) if strategy == "best_fit" else pack_padded(with_special)
    pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    dtype = smallest_dtype(len(tokenizer))
    return build_rows(tokens, lengths, pieces, rows, prefix, suffix, row_length, pad_id, dtype)


def smallest_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _report(index: PackedIndex, out_dir: str | Path) -> None:
    logger.info(
        "Packed %d documents (%d bytes) into %d rows of %d, %d tokens, efficiency %.4f, in %s; "
        "tokenizing took %.1f s, packing %.1f s.",
        *(index.num_documents, index.num_bytes_text, index.num_rows, index.row_length, index.num_tokens),
        *(index.packing_efficiency, out_dir, index.tokenize_seconds, index.pack_seconds),
    )


def _to_record_batch(rows: PackedRows, row_length: int, dtype: str) -> pa.RecordBatch:
    length_type = np.uint16 if row_length < 1 << 16 else np.int32
    input_ids = pa.array(rows.input_ids.reshape(-1).astype(dtype, copy=False))
    doc_lengths = pa.array(rows.doc_lengths.astype(length_type))
    columns = {
        "input_ids": pa.FixedSizeListArray.from_arrays(input_ids, row_length),
        "doc_lengths": pa.ListArray.from_arrays(pa.array(rows.offsets.astype(np.int32)), doc_lengths),
    }
    return pa.RecordBatch.from_pydict(columns)


def _map_shard(directory: Path, shard: dict, row_length: int) -> PackedRows:
    """Numpy views of a shard's buffers; nothing is read."""
    path = directory / shard["file"]
    if not path.exists() or path.stat().st_size != shard["num_bytes"]:
        raise SettingError(f"{path} is damaged or missing: remove {directory}, and it will be made again.")
    batch = pa.ipc.open_stream(pa.memory_map(str(path))).read_next_batch()
    input_ids, doc_lengths = batch.column("input_ids"), batch.column("doc_lengths")
    return PackedRows(
        input_ids.values.to_numpy(zero_copy_only=True).reshape(-1, row_length),
        doc_lengths.values.to_numpy(zero_copy_only=True),
        doc_lengths.offsets.to_numpy(zero_copy_only=True),
    )


def _read_index(directory: Path) -> PackedIndex:
    try:
        facts = json.loads((directory / INDEX_FILE).read_text())
    except FileNotFoundError:
        raise SettingError(f"{directory} holds no packed rows: pack a corpus there first.") from None
    if facts["format_version"] != FORMAT_VERSION:
        raise SettingError(f"{directory} has packed rows of another version of this program: remove it.")
    return PackedIndex(**facts)


def _flush(sink: IO) -> None:
    sink.flush()
    os.fsync(sink.fileno())


def _remove_orphans(path: Path) -> None:
    """Removes what writers of this path left behind when they were killed, on this machine."""
    for orphan in path.parent.glob(f".{path.name}.partial-{socket.gethostname()}-*"):
        pid = int(orphan.name.rpartition("-")[2])
        if pid == os.getpid() or not _is_running(pid):
            shutil.rmtree(orphan, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
