"""Text that several machines tokenise, a part each; rows packed from the parts are those that one machine makes.

    <folder>/part-00002-of-00008.arrow    an Arrow stream; a record batch holds what `pack_corpus` takes at once

Only tokenising is shared out: packing takes a hundredth of its time.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from oneday.corpus import count_bytes
from oneday.durable_files import explain_failed_write, written_aside
from oneday.errors import SettingError
from oneday.tokenization import encode_documents

logger = logging.getLogger(__name__)

TEXTS_AT_ONCE = 1000


class EncodedBatch(NamedTuple):
    """Documents as `encode_documents` gives them, the bytes of their text in UTF-8, and the seconds that took."""

    tokens: np.ndarray
    lengths: np.ndarray
    num_bytes: int
    seconds: float


def encode_batch(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> EncodedBatch:
    """Tokenise some documents."""
    started = time.perf_counter()
    tokens, lengths = encode_documents(tokenizer, texts)
    return EncodedBatch(tokens, lengths, count_bytes(texts), time.perf_counter() - started)


def write_part(
    texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, folder: Path, shard: int, num_shards: int
) -> Path:
    """Tokenise part `shard` of `num_shards` of a corpus into a file, which is whole once it has its name.

    Args:
        texts: All documents, with the one column `text`.
        tokenizer: A fast one.
        folder: Where the parts lie; made when missing.
        shard: From 0.
        num_shards: Into how many the corpus is cut, between batches of `TEXTS_AT_ONCE` documents.

    Returns:
        The file, which is left as it is when it is there.

    Raises:
        SettingError: It cannot be written.
    """
    path = locate_part(folder, shard, num_shards)
    if path.exists():
        logger.info("%s is there already.", path)
        return path
    own = texts.select(cut(len(texts), shard, num_shards))
    schema = pa.schema({"tokens": pa.list_(pa.uint32()), "num_bytes": pa.int64(), "seconds": pa.float64()})
    with explain_failed_write(path):
        folder.mkdir(parents=True, exist_ok=True)
        with (
            written_aside(path) as aside,
            pa.OSFile(str(aside), "wb") as sink,
            pa.ipc.new_stream(sink, schema) as writer,
            tqdm(total=len(own), desc="Tokenizing", unit=" documents", disable=None) as progress,
        ):
            for batch in own.iter(TEXTS_AT_ONCE):
                writer.write_batch(to_record_batch(encode_batch(tokenizer, batch["text"]), schema))
                progress.update(len(batch["text"]))
    return path


def locate_part(folder: Path, shard: int, num_shards: int) -> Path:
    """Where a part lies when it is done."""
    return folder / f"part-{shard:05d}-of-{num_shards:05d}.arrow"


def to_record_batch(batch: EncodedBatch, schema: pa.Schema) -> pa.RecordBatch:
    """A row a document; bytes and seconds, which are of all together, stand in the first."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(batch.lengths)]).astype(np.int32))
    rest = [0] * (len(batch.lengths) - 1)
    columns = [
        pa.ListArray.from_arrays(offsets, pa.array(batch.tokens)),
        pa.array([batch.num_bytes, *rest], pa.int64()),
        pa.array([batch.seconds, *rest], pa.float64()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def cut(num_documents: int, shard: int, num_shards: int) -> range:
    """The documents of part `shard` of `num_shards`."""
    number = -(-num_documents // TEXTS_AT_ONCE)
    first, last = (part * number // num_shards * TEXTS_AT_ONCE for part in (shard, shard + 1))
    return range(first, min(last, num_documents))


def find_parts(folder: Path, num_documents: int) -> list[Path]:
    """All parts of a corpus in their order; none where one is missing, which is said.

    Raises:
        SettingError: One does not hold its documents: it was cut off on its way here.
    """
    found: dict[int, list[Path]] = {}
    for path in sorted(folder.glob("part-*-of-*.arrow")):
        count = re.fullmatch(r"part-\d{5}-of-(\d{5})\.arrow", path.name)
        if count:
            found.setdefault(int(count[1]), []).append(path)
    for num_shards, paths in found.items():
        if len(paths) == num_shards:
            for shard, path in enumerate(paths):
                check_part(path, len(cut(num_documents, shard, num_shards)))
            return paths
    for num_shards, paths in found.items():
        logger.warning("%d of %d parts of the text lie in %s: all is tokenised here.", len(paths), num_shards, folder)
    return []


def check_part(path: Path, num_documents: int) -> None:
    """Raise SettingError where a part does not hold so many documents."""
    try:
        with pa.memory_map(str(path)) as source:
            found = sum(batch.num_rows for batch in pa.ipc.open_stream(source))
    except (pa.ArrowException, OSError):
        found = None
    if found != num_documents:
        raise SettingError(f"{path} is not whole; remove it, then copy it again or run its shard again.")


def read_parts(paths: list[Path]) -> Iterator[EncodedBatch]:
    """The batches of all parts, one after another."""
    for path in paths:
        with pa.memory_map(str(path)) as source:
            for batch in pa.ipc.open_stream(source):
                documents = batch.column("tokens")
                yield EncodedBatch(
                    documents.values.to_numpy(),
                    np.diff(documents.offsets.to_numpy()).astype(np.int64),
                    batch.column("num_bytes")[0].as_py(),
                    batch.column("seconds")[0].as_py(),
                )
