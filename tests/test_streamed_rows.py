"""Rows of a stream: read ahead in a thread, the same whatever the timing, and going on exactly where they stood."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_row_sources import take

from oneday import streamed_rows, text_streams
from oneday.errors import SettingError
from oneday.packed_dataset import pack_documents
from oneday.ranks import Ranks
from oneday.stream_files import ParquetPart, TablePart
from oneday.streamed_rows import BlockReader, StreamedRows
from oneday.text_streams import FileStream, MixedStream, PassKey, StreamInterrupted
from oneday.tokenization import encode_documents

BLOCK = 40


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(streamed_rows, "STREAM_BLOCK_DOCUMENTS", BLOCK)


@pytest.fixture
def stream(texts, tmp_path):
    """Seven parquet files of several row groups, three of them read at once."""
    paths = [str(tmp_path / f"{number}.parquet") for number in range(7)]
    for number, path in enumerate(paths):
        pq.write_table(pa.table({"text": texts[number::7]}), path, 9)
    return FileStream([ParquetPart(path, "text") for path in paths], 3)


@pytest.fixture
def make_rows(stream, tokenizers):
    """Builds the rows as a fresh process would; ends their threads."""
    made = []

    def make(seed=0, stream=stream):
        made.append(StreamedRows(stream, tokenizers["encoder"], "encoder", 32, "best_fit", seed))
        return made[-1]

    yield make
    for rows in made:
        rows.close()


def test_a_mixture_goes_on_pass_after_pass(make_rows):
    parts = [datasets.Dataset.from_dict({"text": [f"{name} {number}" for number in range(20)]}) for name in "ab"]
    mixed = MixedStream([FileStream([TablePart(part, 0, 1)], 1) for part in parts], [0.5, 0.5])
    assert len(take(make_rows(0, mixed), 0, 400)) == 400  # of some 1,200 short documents


def read_ahead_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@pytest.mark.parametrize("position", [0, 8, 88, 240, 1200])
def test_stream_goes_on_exactly_from_any_position(make_rows, position):
    whole = make_rows()
    rows = take(whole, 0, position)
    state = json.loads(json.dumps(whole.state_dict(position)))
    rows += take(whole, position, position + 200)
    again = make_rows()
    again.load_state_dict(state)
    assert take(again, position, position + 200) == rows[position:]


def test_state_is_of_the_sample_asked_for_even_when_the_next_block_is_read(make_rows):
    source = make_rows()
    source.take(np.arange(8))
    end = source.blocks[0].end
    expected = take(source, end - 1, end + 7)
    assert len(source.blocks) == 2
    again = make_rows()
    again.load_state_dict(source.state_dict(end - 1))
    assert take(again, end - 1, end + 7) == expected


def test_how_full_rows_are_is_unknown_before_one_was_read(make_rows):
    rows = make_rows()
    assert rows.packing_efficiency is None
    take(rows, 0, 8)
    assert 0.9 < rows.packing_efficiency <= 1.0


def test_a_step_may_be_longer_than_many_blocks(make_rows):
    assert take(make_rows(), 0, 500, size=500) == take(make_rows(), 0, 500)


@pytest.mark.parametrize("slow", ["reader", "taker"])
def test_timing_changes_nothing(make_rows, monkeypatch, slow):
    """Neither a thread that is behind nor one that is as far ahead as it may be."""
    expected, rows = take(make_rows(), 0, 300), make_rows()
    if slow == "reader":
        ordinary = BlockReader.read_block
        monkeypatch.setattr(BlockReader, "read_block", lambda *given: time.sleep(0.1) or ordinary(*given))
        assert take(rows, 0, 300) == expected
        return
    got = []
    for first in range(0, 300, 20):
        got += take(rows, first, first + 20)
        while not all(future.done() for future in rows._reader.ahead):
            time.sleep(0.01)
        state = rows.state_dict(first + 20)
        assert state["first_sample"] <= first + 20, "what is read ahead does not count"
    assert got == expected


def test_blocks_are_the_stream_packed_in_order(make_rows, stream, tokenizers):
    """Two passes by hand, without a thread: the documents of the stream, all tokens of them, another shuffle each."""
    source, tokenizer, first = make_rows(seed=3), tokenizers["encoder"], 0
    for number in range(2):
        reader, texts = stream.open_pass(PassKey(3, number)), []
        while (text := reader.read()) is not None:
            texts.append(text)
        for start in range(0, len(texts), BLOCK):
            encoded = encode_documents(tokenizer, texts[start : start + BLOCK])
            rows = pack_documents(*encoded, tokenizer, "encoder", 32, "best_fit")
            tokens, _ = source.take(np.arange(first, first + len(rows.input_ids)))
            assert sorted(tokens.tolist()) == sorted(rows.input_ids.tolist())
            assert tokens.tolist() != rows.input_ids.tolist()
            first += len(rows.input_ids)


def test_blocks_mix_files(stream, texts):
    """The first block has documents of all files that are read at once, in equal parts."""
    reader = stream.open_pass(PassKey(0, 0))
    files = [texts.index(reader.read()) % 7 for _ in range(BLOCK)]
    counts = sorted(np.bincount(files))[-3:]
    assert sum(counts) == BLOCK and counts[2] - counts[0] <= 1


def test_stream_without_text_is_refused(make_rows):
    blank = FileStream([TablePart(datasets.Dataset.from_dict({"text": [" ", None]}), 0, 1)], 8)
    with pytest.raises(SettingError, match="no document with text"):
        make_rows(stream=blank).take(np.arange(4))


class Failing(FileStream):
    """A stream whose reads fail as a network does, at the hundredth document, so many times."""

    def __init__(self, stream, error, times):
        super().__init__(stream.files, stream.files_at_once)
        self.error, self.left = error, times

    def open_pass(self, key, state=None):
        reader, stream, count = super().open_pass(key, state), self, 0
        ordinary = reader.read

        def read():
            nonlocal count
            if count == 100 and stream.left:
                stream.left -= 1
                raise stream.error
            count += 1
            return ordinary()

        reader.read = read
        return reader


def test_a_network_that_comes_back_changes_nothing(make_rows, stream, monkeypatch, caplog):
    monkeypatch.setattr(text_streams, "RETRY_SECONDS", (0.01,) * 5)
    failing = Failing(stream, ConnectionError("reset by peer"), 5)
    assert take(make_rows(stream=failing), 0, 300) == take(make_rows(), 0, 300)
    assert caplog.text.count("Reading the stream failed and is tried again in 0.01 s (ConnectionError: reset by") == 5


@pytest.mark.parametrize("error", [ConnectionError("reset by peer"), FileNotFoundError("gone")])
def test_an_error_of_the_thread_comes_up_at_the_take_that_needs_it(make_rows, stream, monkeypatch, error):
    """What was read before it is given; the take that needs more is refused with one sentence."""
    monkeypatch.setattr(text_streams, "RETRY_SECONDS", (0.01,) * 2)
    rows = make_rows(stream=Failing(stream, error, 99))
    before = take(rows, 0, 60)
    assert before == take(make_rows(), 0, 60)
    with pytest.raises(SettingError, match=f"cannot be read on.*{type(error).__name__}: {error}"):
        take(rows, 60, 1000)
    assert rows._reader is None, "its thread has ended"


def test_a_footer_that_did_not_all_arrive_is_read_again(make_rows, stream, monkeypatch):
    monkeypatch.setattr(text_streams, "RETRY_SECONDS", (0.01,) * 5)
    failing = Failing(stream, pa.ArrowInvalid("no parquet"), 2)
    assert take(make_rows(stream=failing), 0, 300) == take(make_rows(), 0, 300)


def test_a_damaged_file_on_the_way_is_left_out_and_said(make_rows, stream, monkeypatch, caplog, texts):
    """In every pass, by every process and after every resumption alike; a run that had begun comes to its end."""
    monkeypatch.setattr(text_streams, "RETRY_SECONDS", (0.01,) * 6)
    path = Path(stream.files[0].url)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    reader, read = stream.open_pass(PassKey(0, 0)), []
    while (text := text_streams.read_patiently(reader)) is not None:
        read.append(text)
    assert sorted(read) == sorted(text for number in range(1, 7) for text in texts[number::7])
    assert caplog.text.count(f"{path} is damaged and left out from row 0 on (ArrowInvalid") == 1
    assert len(take(make_rows(), 0, 2000)) == 2000


def test_a_stream_of_damaged_files_alone_is_refused(make_rows, stream, monkeypatch):
    monkeypatch.setattr(text_streams, "RETRY_SECONDS", (0.0,) * 6)
    for file in stream.files:
        Path(file.url).write_bytes(b"no parquet")
    with pytest.raises(SettingError, match="no document with text"):
        make_rows().take(np.arange(4))


def test_a_stream_that_stands_still_is_not_waited_for_when_the_run_must_end(make_rows, stream, monkeypatch):
    monkeypatch.setattr(streamed_rows, "LOOK_SECONDS", 0.01)
    goes_on, asked = threading.Event(), []

    class Standing(FileStream):
        def open_pass(self, key, state=None):
            reader = super().open_pass(key, state)
            reader.read = lambda: goes_on.wait() and None
            return reader

    rows = make_rows(stream=Standing(stream.files, 3))
    rows.share_among(Ranks(), lambda: asked.append(1) or len(asked) > 3)
    try:
        with pytest.raises(StreamInterrupted, match="stood still when the run was to end"):
            rows.take(np.arange(4))
        assert len(asked) == 4
    finally:
        goes_on.set()


def test_closing_ends_the_thread_in_the_middle_of_a_block(make_rows, monkeypatch):
    """Also while it waits for the network."""
    monkeypatch.setattr(text_streams, "RETRY_SECONDS", (3600,))
    rows, begun = make_rows(), time.monotonic()
    expected = take(rows, 0, 8)
    rows.close()
    assert not read_ahead_threads()
    stuck = make_rows(stream=Failing(rows.stream, ConnectionError("reset"), 99))
    stuck.take(np.arange(8))
    time.sleep(0.2)
    stuck.close()
    assert time.monotonic() - begun < 20 and not read_ahead_threads()
    rows.load_state_dict(json.loads(json.dumps(rows.state_dict(0))))
    assert take(rows, 0, 8) == expected


def test_processes_that_have_read_other_text_do_not_go_on(make_rows, monkeypatch):
    rows = make_rows()
    monkeypatch.setattr(rows.ranks, "all_gather", lambda found: [found, (None, {"row": "of another file"})])
    with pytest.raises(StreamInterrupted, match="have not read the same text; run the same command again"):
        take(rows, 0, 10)
