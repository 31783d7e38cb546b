"""Packing by hand, against a plain best-fit-decreasing, and: every token appears exactly once."""

from __future__ import annotations

import doctest
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oneday.packing
from oneday.packing import GATHER_CHUNK_TOKENS, build_rows, cut_rows, pack_best_fit, pack_padded, split_long

PAD = 0


def test_docstrings():
    results = doctest.testmod(oneday.packing)
    assert results.attempted >= 5 and results.failed == 0


def test_split_long_by_hand():
    pieces = split_long(np.array([4, 9, 0, 1, 8]), 4)
    assert pieces.doc_index.tolist() == [0, 1, 1, 1, 3, 4, 4]
    assert pieces.start.tolist() == [0, 0, 4, 8, 0, 0, 4]
    assert pieces.length.tolist() == [4, 4, 4, 1, 1, 4, 4]


def test_best_fit_by_hand():
    # 8 | 7 3 | 6 4 | 5 5: the 3 goes to the room of 3, not to a larger one; the second 5 fills the first.
    assert pack_best_fit(np.array([5, 3, 8, 6, 4, 7, 5]), 10).tolist() == [3, 1, 0, 2, 2, 1, 3]
    # A full piece has its own row, and nothing joins it.
    assert pack_best_fit(np.array([1, 10, 10]), 10).tolist() == [2, 0, 1]
    assert pack_best_fit(np.array([], dtype=np.int64), 10).tolist() == []
    with pytest.raises(AssertionError):
        pack_best_fit(np.array([11]), 10)


def fit_naively(lengths, capacity):
    """Room left of each row by the textbook: search all rows for the least room that is enough."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [(room, i) for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting)[1]] -= length
        else:
            rooms.append(capacity - length)
    return rooms


@settings(deadline=None)
@given(capacity=st.integers(1, 200), data=st.data())
def test_best_fit_is_the_textbook_one(capacity, data):
    lengths = np.array(data.draw(st.lists(st.integers(1, capacity), max_size=60)), dtype=np.int64)
    rows = pack_best_fit(lengths, capacity)
    rooms = capacity - np.bincount(rows, weights=lengths).astype(int)
    assert sorted(rooms.tolist()) == sorted(fit_naively(lengths.tolist(), capacity))


def unpack(packed, pieces, row_of_piece, num_documents, num_prefix, num_suffix):
    """Documents from rows, by the document lengths alone."""
    documents = [[] for _ in range(num_documents)]
    piece = iter(np.argsort(row_of_piece, kind="stable"))
    for row, first, last in zip(packed.input_ids, packed.offsets, packed.offsets[1:]):
        position = 0
        for length in packed.doc_lengths[first:last]:
            body = row[position + num_prefix : position + length - num_suffix]
            documents[pieces.doc_index[next(piece)]].append(body.tolist())
            position += length
        assert (row[position:] == PAD).all()
    return [sum(parts, []) for parts in documents]


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(0, 70), max_size=30),
    row_length=st.integers(4, 40),
    prefix=st.lists(st.just(1), max_size=2),
    suffix=st.lists(st.just(2), max_size=1),
    strategy=st.sampled_from(["best_fit", "padded"]),
    chunk=st.sampled_from([7, GATHER_CHUNK_TOKENS]),
)
def test_every_token_appears_exactly_once(lengths, row_length, prefix, suffix, strategy, chunk):
    num_special = len(prefix) + len(suffix)
    lengths = np.array(lengths, dtype=np.int64)
    tokens = np.arange(10, 10 + lengths.sum(), dtype=np.uint32)
    pieces = split_long(lengths, row_length - num_special)
    with_special = pieces.length + num_special
    rows = pack_best_fit(with_special, row_length) if strategy == "best_fit" else pack_padded(with_special)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oneday.packing, "GATHER_CHUNK_TOKENS", chunk)
        packed = build_rows(tokens, lengths, pieces, rows, prefix, suffix, row_length, PAD)
    ends = np.cumsum(lengths)
    expected = [tokens[end - length : end].tolist() for end, length in zip(ends, lengths)]
    assert unpack(packed, pieces, rows, len(lengths), len(prefix), len(suffix)) == expected
    assert packed.doc_lengths.sum() == len(tokens) + num_special * len(rows)
    for row, first, last in zip(packed.input_ids, packed.offsets, packed.offsets[1:]):
        starts = np.cumsum(packed.doc_lengths[first:last]) - packed.doc_lengths[first:last]
        for start, length in zip(starts, packed.doc_lengths[first:last]):
            assert row[start : start + len(prefix)].tolist() == prefix
            assert row[start + length - len(suffix) : start + length].tolist() == suffix


def test_rows_hold_the_dtype_and_refuse_ids_that_do_not_fit():
    arguments = (np.array([1]), split_long(np.array([1]), 4), np.array([0]), [], [], 4, PAD)
    assert build_rows(np.array([70_000]), *arguments, np.uint32).input_ids.tolist() == [[70_000, PAD, PAD, PAD]]
    with pytest.raises(AssertionError):
        build_rows(np.array([70_000]), *arguments, np.uint16)


@pytest.mark.parametrize("row_length", [128, 512, 1024])
def test_efficiency_and_speed(row_length):
    lengths = np.random.default_rng(0).lognormal(5.0, 1.2, 100_000).astype(np.int64) + 1
    pieces = split_long(lengths, row_length - 2)
    started = time.perf_counter()
    rows = pack_best_fit(pieces.length + 2, row_length)
    assert time.perf_counter() - started < 5  # about 0.05 s
    num_tokens = (pieces.length + 2).sum()
    assert num_tokens / ((rows.max() + 1) * row_length) > 0.99
    assert num_tokens / (len(rows) * row_length) < 0.95
    assert np.array_equal(rows, pack_best_fit(pieces.length + 2, row_length))


def test_rows_are_cut_with_their_documents():
    rows = np.array([[1, 2, 3, 4, 5, 6, 7, 0], [8, 9, 0, 0, 0, 0, 0, 0]])
    lengths = [np.array([3, 3, 1]), np.array([2])]
    short, pieces, samples = cut_rows(rows, lengths, np.array([10, 4]), 4)
    assert short.tolist() == [[1, 2, 3, 4], [5, 6, 7, 0], [8, 9, 0, 0]]
    assert [piece.tolist() for piece in pieces] == [[3, 1], [2, 1], [2]]
    assert samples.tolist() == [20, 21, 8], "what holds only padding is left out"
    assert sum(int(piece.sum()) for piece in pieces) == sum(int(length.sum()) for length in lengths)
    on_disk = cut_rows(rows, [part.astype(np.uint16) for part in lengths], np.array([10, 4]), 4)[1]
    assert all(np.issubdtype(piece.dtype, np.signedinteger) for piece in on_disk), "they are places in a row"
    assert [piece.tolist() for piece in on_disk] == [piece.tolist() for piece in pieces]
    same = cut_rows(rows, lengths, np.array([10, 4]), 8)
    assert same[0].tolist() == rows.tolist() and same[2].tolist() == [10, 4]
