"""Texts of streams: every document once a pass, mixed over the files, and the same from any position on."""

from __future__ import annotations

import errno
import json
import os
import tracemalloc
import zlib

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oneday import text_streams
from oneday.errors import SettingError
from oneday.held_out import HeldOut
from oneday.stream_files import ParquetPart, StreamShard, TablePart
from oneday.text_streams import FileStream, FirstTexts, MixedStream, PassKey

# Rows of each file, blank ones included; one file is empty, and one is much longer than the others.
FILE_ROWS = (40, 95, 0, 33, 260, 7, 58, 40, 41, 40, 12, 88)
ROW_GROUP = 20


def name_text(file, row):
    """Blank, missing, or unlike any other."""
    return {3: " ", 11: None}.get(row % 17, f"file {file} row {row}")


ALL_TEXTS = [text for f, n in enumerate(FILE_ROWS) for r in range(n) if (text := name_text(f, r)) and text.strip()]


@pytest.fixture(scope="module", params=["parquet", "jsonl"])
def stream(request, tmp_path_factory):
    """The same documents in parquet files with several row groups, and in JSON-lines files that `datasets` streams."""
    folder = tmp_path_factory.mktemp(request.param)
    tables = [[name_text(file, row) for row in range(rows)] for file, rows in enumerate(FILE_ROWS)]
    paths = [str(folder / f"{number:02d}.{request.param}") for number in range(len(tables))]
    if request.param == "parquet":
        for path, texts in zip(paths, tables):
            pq.write_table(pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string())}), path, ROW_GROUP)
        return FileStream([ParquetPart(path, "text") for path in paths], 4)
    for path, texts in zip(paths, tables):
        with open(path, "w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    shards = datasets.load_dataset("json", data_files=paths, split="train", streaming=True)
    return FileStream([StreamShard(shards, "text", shard) for shard in range(shards.num_shards)], 4)


FIRST_PASS = PassKey(0, 0)


def read_pass(stream, key=FIRST_PASS, state=None):
    reader, texts = stream.open_pass(key, state), []
    while (text := reader.read()) is not None:
        texts.append(text)
    assert reader.read() is None
    return texts


def check_every_position(stream, key, step=1):
    """What a reader gives after a JSON round trip of its state is what it would have given."""
    whole, reader, states = read_pass(stream, key), stream.open_pass(key), []
    for _ in range(len(whole) + 1):
        states.append(json.loads(json.dumps(reader.state_dict())))
        reader.read()
    for place in [*range(0, len(whole), step), len(whole)]:
        assert read_pass(stream, key, states[place]) == whole[place:], place


def test_each_document_once_a_pass_and_each_pass_in_another_order(stream):
    passes = [read_pass(stream, PassKey(7, number)) for number in range(3)]
    for texts in passes:
        assert sorted(texts) == sorted(ALL_TEXTS)
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert passes[0] == read_pass(stream, PassKey(7, 0)) != read_pass(stream, PassKey(8, 0))


@pytest.mark.parametrize("key", [PassKey(7, 0), PassKey(7, 1)])
def test_goes_on_from_every_position(stream, key):
    """Mid-file, at the end of a file or of a row group, and at the end of a pass."""
    check_every_position(stream, key, step=1 if isinstance(stream.files[0], ParquetPart) else 7)


def test_files_take_turns(stream):
    """Documents that come one after another are of as many files as are open."""
    files = [text.split()[1] for text in read_pass(stream, PassKey(7, 0))]
    assert all(len(set(files[place : place + 4])) >= 3 for place in range(0, 100, 4))


def test_what_was_read_of_a_parquet_file_is_not_read_again(tmp_path, monkeypatch):
    """A row of the last row group costs the footer and that row group: by bytes read."""
    path, generator = str(tmp_path / "a.parquet"), np.random.default_rng(0)
    texts = ["".join(map(chr, generator.integers(97, 123, 4000))) for _ in range(1000)]
    pq.write_table(pa.table({"text": texts, "id": texts}), path, 100, write_statistics=False)
    read = []
    ordinary = pq.ParquetFile

    class Counting:
        """A file that notes what is asked of it."""

        closed = False

        def __init__(self, file):
            self.file = file

        def read(self, size=-1):
            data = self.file.read(size)
            read.append(len(data))
            return data

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(pq, "ParquetFile", lambda file, **how: ordinary(Counting(file), **how))

    def count(first):
        read.clear()
        assert next(ParquetPart(path, "text").read(first)) == texts[first]
        return sum(read)

    group_bytes = ordinary(path).metadata.row_group(0).column(0).total_compressed_size
    assert count(950) == pytest.approx(count(50), rel=0.01)
    assert group_bytes < count(950) < group_bytes + 70_000, "one column of one row group, and the file's end"


def test_what_was_read_of_a_parquet_file_is_not_kept(tmp_path):
    """Forty row groups of half a megabyte: at no time are more than two of them held."""
    path, generator = str(tmp_path / "a.parquet"), np.random.default_rng(0)
    texts = [generator.bytes(2500).hex() for _ in range(4000)]
    pq.write_table(pa.table({"text": texts}), path, 100, compression="none")
    tracemalloc.start()
    held = [tracemalloc.get_traced_memory()[0] for _ in ParquetPart(path, "text").read(0)]
    tracemalloc.stop()
    assert len(held) == len(texts)
    assert max(held) < 1_500_000 < os.path.getsize(path) / 10


@pytest.mark.parametrize("num_parts", [1, 3, 8])
def test_parts_of_a_file_are_the_file(tmp_path, num_parts):
    path, texts = str(tmp_path / "a.parquet"), [f"row {row}" for row in range(130)]
    pq.write_table(pa.table({"text": texts}), path, ROW_GROUP)
    stored = datasets.Dataset.from_dict({"text": texts})
    for parts in (
        [ParquetPart(path, "text", part, num_parts) for part in range(num_parts)],
        [TablePart(stored, part, num_parts) for part in range(num_parts)],
    ):
        assert [text for part in parts for text in part.read(0)] == texts
        whole = list(parts[-1].read(0))
        for first in range(len(whole) + 1):
            assert list(parts[-1].read(first)) == whole[first:]


def test_held_out_documents_are_spread_and_stay_held_out(stream):
    texts = list(stream.take_spread(100))
    assert texts[:4] == [f"file {file} row 0" for file in (0, 3, 6, 9)]
    assert len(texts) == len(set(texts)) == 100
    train = stream.without(HeldOut(texts, by_paragraph=False))
    for number in range(2):
        assert sorted(read_pass(train, PassKey(0, number)) + texts) == sorted(ALL_TEXTS)
    assert sorted(stream.take_spread(10**6)) == sorted(ALL_TEXTS)


def test_mixture_follows_its_shares_and_goes_on_from_any_position(stream):
    other = FileStream([TablePart(datasets.Dataset.from_dict({"text": [f"b {i}" for i in range(500)]}), 0, 1)], 1)
    mixed = MixedStream([stream, other], [0.25, 0.75])
    texts = read_pass(mixed, PassKey(1, 0))
    assert set(texts) == {*ALL_TEXTS, *other.files[0].texts["text"]}
    share = sum(text.startswith("b") for text in texts) / len(texts)
    assert abs(share - 0.75) < 0.05
    assert texts != read_pass(mixed, PassKey(1, 1))
    check_every_position(mixed, PassKey(1, 1), step=83)


def make_small(texts):
    return FileStream([TablePart(datasets.Dataset.from_dict({"text": texts}), 0, 1)], 1)


def test_a_small_part_of_a_mixture_begins_again_until_the_large_one_is_through(stream):
    """All that read one pass, a tokenizer say, meet the whole of the large part; in the next pass each goes on."""
    mixed, state, large, small = MixedStream([stream, make_small(["b 0", "b 1", "b 2"])], [0.5, 0.5]), None, [], []
    for number in range(3):
        reader, texts = mixed.open_pass(PassKey(1, number), state), []
        while (text := reader.read()) is not None:
            texts.append(text)
        assert {*ALL_TEXTS, "b 0", "b 1", "b 2"} == set(texts)
        assert abs(sum(text.startswith("b") for text in texts) / len(texts) - 0.5) < 0.1
        large += [text for text in texts if text.startswith("file")]
        small += [text for text in texts if text.startswith("b")]
        state = json.loads(json.dumps(reader.next_state()))
    for number in range(3):
        assert sorted(large[number * len(ALL_TEXTS) :][: len(ALL_TEXTS)]) == sorted(ALL_TEXTS)
    assert large[: len(ALL_TEXTS)] != large[len(ALL_TEXTS) : 2 * len(ALL_TEXTS)]
    assert all(set(small[place : place + 3]) == {"b 0", "b 1", "b 2"} for place in range(0, len(small) - 2, 3))
    check_every_position(mixed, PassKey(1, 1), step=83)


def test_a_part_of_a_mixture_without_text_is_left_out(stream):
    mixed = MixedStream([stream, make_small([" ", None])], [0.5, 0.5])
    assert sorted(read_pass(mixed)) == sorted(ALL_TEXTS)
    assert read_pass(MixedStream([make_small([" "]), make_small([None])], [0.5, 0.5])) == []


@pytest.mark.parametrize("error", [OSError("Corrupt snappy compressed data."), EOFError("ended"), zlib.error("bad")])
def test_whatever_a_damaged_file_raises_it_is_left_out(monkeypatch, error, caplog):
    """Also where several follow each other; an error of the system or the network is none of a file."""
    monkeypatch.setattr(text_streams, "RETRY_SECONDS", (0.0,) * 6)

    class Damaged:
        def __init__(self, *texts):
            self.texts = texts

        def read(self, first):
            yield from self.texts[first:]
            raise error

    whole = make_small(["a", "b"]).files[0]
    unread = FileStream([Damaged(), Damaged(), Damaged(), whole], 1)
    assert sorted(row["text"] for row in unread) == ["a", "b"]
    stream = FileStream([Damaged("begun"), Damaged("begun"), Damaged("begun"), whole], 1)
    reader, read = stream.open_pass(PassKey(0, 0)), []
    while (text := text_streams.read_patiently(reader)) is not None:
        read.append(text)
    assert sorted(read) == ["a", "b", "begun", "begun", "begun"]
    assert caplog.text.count("is damaged and left out from row 1 on") == 3
    for other in (OSError(errno.EIO, "Input/output error"), ConnectionError("reset"), TimeoutError("slow")):
        assert not text_streams.is_damage(other)


def test_first_documents_are_the_same_in_every_pass(stream):
    first = FirstTexts(stream, 50)
    assert read_pass(first, PassKey(3, 4)) == read_pass(stream)[:50] == [row["text"] for row in first]
    check_every_position(first, PassKey(3, 1), step=7)


def test_column_without_text_is_refused(tmp_path):
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(SettingError, match="text_column holds int"):
        read_pass(FileStream([ParquetPart(str(tmp_path / "a.parquet"), "text")], 1))
