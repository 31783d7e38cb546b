"""Rows by sample index: every row once a pass on disk, and a stream that goes on exactly where it stood."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest

from oneday import row_sources
from oneday.arguments import SettingError
from oneday.row_sources import ShuffledRows, StreamedRows


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(row_sources, "STREAM_BLOCK_DOCUMENTS", 40)


@pytest.fixture
def make_stream(texts, tokenizers, tmp_path):
    """Builds the rows of a streamed JSON-lines file, as a fresh process would."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def make(seed=0):
        stream = datasets.load_dataset("json", data_files=str(path), split="train", streaming=True)
        return StreamedRows(stream, tokenizers["encoder"], "encoder", 32, "best_fit", seed)

    return make


def take(source, start, stop, size=8):
    """The rows of samples start..stop as plain lists."""
    rows = []
    for first in range(start, stop, size):
        tokens, lengths = source.take(np.arange(first, min(first + size, stop)))
        rows += [(token.tolist(), length.tolist()) for token, length in zip(tokens, lengths)]
    return rows


def test_shuffled_rows_are_a_new_permutation_each_pass(packed):
    source = ShuffledRows(packed["encoder"][0], seed=3)
    passes = [take(source, start, start + source.num_rows) for start in (0, source.num_rows)]
    on_disk, lengths = packed["encoder"][0].get_rows(np.arange(source.num_rows))
    expected = sorted((row.tolist(), length.tolist()) for row, length in zip(on_disk, lengths))
    assert [sorted(rows) for rows in passes] == [expected, expected]
    assert passes[0] != passes[1]
    assert take(ShuffledRows(packed["encoder"][0], seed=3), 5, 20) == passes[0][5:20]
    assert take(ShuffledRows(packed["encoder"][0], seed=4), 5, 20) != passes[0][5:20]


@pytest.mark.parametrize("position", [0, 8, 88, 240, 1200])
def test_stream_goes_on_exactly_from_any_position(make_stream, position):
    whole = make_stream()
    rows = take(whole, 0, position)
    state = json.loads(json.dumps(whole.state_dict(position)))
    rows += take(whole, position, position + 200)
    again = make_stream()
    again.load_state_dict(state)
    assert take(again, position, position + 200) == rows[position:]


def test_state_is_of_the_sample_asked_for_even_when_the_next_block_is_read(make_stream):
    source = make_stream()
    source.take(np.arange(8))
    end = source.end(source.blocks[0])
    expected = take(source, end - 1, end + 7)
    assert len(source.blocks) == 2
    again = make_stream()
    again.load_state_dict(source.state_dict(end - 1))
    assert take(again, end - 1, end + 7) == expected


def test_a_step_may_be_longer_than_many_blocks(make_stream):
    source = make_stream()
    rows = take(source, 0, 500, size=500)
    assert rows == take(make_stream(), 0, 500)


def test_what_read_the_stream_before_does_not_matter(make_stream):
    """A tokenizer trained on the stream leaves it somewhere in the middle."""
    fresh = make_stream()
    stream = make_stream().stream
    start_state = stream.state_dict()
    documents = iter(stream)
    for _ in range(70):
        next(documents)
    source = StreamedRows(stream, fresh.tokenizer, "encoder", 32, "best_fit", 0, start_state)
    assert take(source, 0, 60) == take(fresh, 0, 60)


def test_stream_starts_over_and_loses_no_token(make_stream, texts, tokenizers):
    source = make_stream()
    num_blocks = -(-len(texts) // 40)
    blocks = [source.read_block() for _ in range(2 * num_blocks)]
    per_pass = sum(len(tokenizers["encoder"](text)["input_ids"]) - 2 for text in texts)
    for half in (blocks[:num_blocks], blocks[num_blocks:]):
        tokens = np.concatenate([block.rows.input_ids.ravel() for block in half])
        assert np.isin(tokens, tokenizers["encoder"].all_special_ids, invert=True).sum() == per_pass
    assert not np.array_equal(blocks[0].order, blocks[num_blocks].order), "another shuffle in the second pass"


def test_stream_without_text_is_refused(tokenizers):
    stream = datasets.Dataset.from_dict({"text": ["a"]}).to_iterable_dataset().filter(lambda row: False)
    source = StreamedRows(stream, tokenizers["encoder"], "encoder", 32, "best_fit", 0)
    with pytest.raises(SettingError, match="no document with text"):
        source.take(np.arange(4))
