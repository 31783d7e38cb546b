"""The files of a stream: what each gives from any row on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import datasets
import fsspec
import pyarrow.parquet as pq

TEXTS_AT_ONCE = 100
# Of a column that is read; a file may be a single row group.
BYTES_AT_ONCE = 8 * 2**20


class TextFile(Protocol):
    """A file, or a part of one."""

    def read(self, first: int) -> Iterator[str | None]:
        """Its rows from one on, blank ones included."""


@dataclass(frozen=True)
class ParquetPart:
    """Some row groups of a parquet file, here or on the Hub: part `part` of `num_parts`."""

    url: str
    column: str
    part: int = 0
    num_parts: int = 1

    def read(self, first: int) -> Iterator[str | None]:
        """See TextFile. The footer is read, and the column of the row groups from that of row `first` on."""
        system, path = fsspec.url_to_fs(self.url)
        with system.open(path, "rb", cache_type="none") as stream:
            # Pre-buffering would keep every row group that was read until the file is through.
            file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=BYTES_AT_ONCE)
            number = file.metadata.num_row_groups
            groups = range(self.part * number // self.num_parts, (self.part + 1) * number // self.num_parts)
            while groups and first >= file.metadata.row_group(groups[0]).num_rows:
                first -= file.metadata.row_group(groups[0]).num_rows
                groups = groups[1:]
            if not groups:
                return
            for batch in file.iter_batches(TEXTS_AT_ONCE, list(groups), [self.column], use_threads=False):
                yield from batch.column(0)[first:].to_pylist()
                first = max(0, first - len(batch))


@dataclass(frozen=True)
class StreamShard:
    """One file, of any format, of a data set that `datasets` streams."""

    stream: datasets.IterableDataset
    column: str
    shard: int

    def read(self, first: int) -> Iterator[str | None]:
        """See TextFile. Everything before row `first` is read too."""
        shard = self.stream.shard(self.stream.num_shards, self.shard).select_columns(self.column)
        for table in shard.with_format("arrow").iter(TEXTS_AT_ONCE):
            yield from table[self.column][first:].to_pylist()
            first = max(0, first - len(table))


@dataclass(frozen=True)
class TablePart:
    """Part `part` of `num_parts` of a data set on disk, as it takes its place in a mixture with a stream."""

    texts: datasets.Dataset
    part: int
    num_parts: int

    def read(self, first: int) -> Iterator[str | None]:
        """See TextFile."""
        start, end = (part * len(self.texts) // self.num_parts for part in (self.part, self.part + 1))
        for row in range(start + first, end, TEXTS_AT_ONCE):
            yield from self.texts[row : min(row + TEXTS_AT_ONCE, end)]["text"]


def list_stream_files(
    builder: datasets.DatasetBuilder, texts: datasets.IterableDataset, split: str, column: str, files_at_once: int
) -> list[TextFile]:
    """The files of a split of a data set that is streamed: parquet ones by their addresses, others by their number.

    Parquet files that are fewer than are read at once are cut into parts, by row groups.
    """
    urls = list((builder.config.data_files or {}).get(split, []))
    if not urls or not all(url.endswith(".parquet") for url in urls):
        return [StreamShard(texts, column, shard) for shard in range(texts.num_shards)]
    num_parts = -(-files_at_once // len(urls))
    return [ParquetPart(url, column, part, num_parts) for url in urls for part in range(num_parts)]
