"""Documents -> rows of equal length: pure functions on numpy arrays.

A document longer than a row is cut into pieces; each piece gets the special tokens of `special_layout` around it; the
pieces are put into rows by best-fit-decreasing; a row's tail is padding. Lengths are in tokens throughout.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Bounds the index arrays of `build_rows` to a few hundred megabytes.
GATHER_CHUNK_TOKENS = 4_000_000


class Pieces(NamedTuple):
    """Parts of documents, in document order; three int64 arrays of one length."""

    doc_index: np.ndarray
    start: np.ndarray
    length: np.ndarray


class PackedRows(NamedTuple):
    """Rows and where the pieces stand in them.

    Attributes:
        input_ids: (num_rows, row_length) uint16 or uint32.
        doc_lengths: (num_pieces,) int64, tokens of each piece with its special tokens, row after row.
        offsets: (num_rows + 1,) int64; row i holds `doc_lengths[offsets[i]:offsets[i + 1]]`, which sum to its tokens
            without padding.
    """

    input_ids: np.ndarray
    doc_lengths: np.ndarray
    offsets: np.ndarray


def split_long(lengths: np.ndarray, capacity: int) -> Pieces:
    """Cuts documents into pieces of `capacity` tokens and a rest. An empty document has no piece.

    >>> split_long(np.array([5, 0, 12]), 5)
    Pieces(doc_index=array([0, 2, 2, 2]), start=array([ 0,  0,  5, 10]), length=array([5, 5, 5, 2]))
    """
    assert capacity > 0, capacity
    lengths = np.asarray(lengths, dtype=np.int64)
    num_pieces = -(-lengths // capacity)
    doc_index = np.repeat(np.arange(len(lengths)), num_pieces)
    start = capacity * _count_within(num_pieces)
    return Pieces(doc_index, start, np.minimum(capacity, lengths[doc_index] - start))


def pack_best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit-decreasing: longest piece first, each to the row with the least room that is still enough.

    Of equal pieces the earlier goes first; of equal rows the one that reached this room last is taken.

    Args:
        lengths: (num_pieces,) from 1 to `capacity`.
        capacity: room of a row.

    Returns:
        (num_pieces,) int64, the row of each piece; rows are numbered in the order in which they were opened.

    >>> pack_best_fit(np.array([4, 10, 6, 3, 3]), 10)  # rows: 10 | 6 4 | 3 3
    array([1, 0, 1, 2, 2])
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    assert not len(lengths) or (lengths.min() > 0 and lengths.max() <= capacity), "a piece must fit a row"
    order = np.argsort(-lengths, kind="stable")
    num_full = int(np.count_nonzero(lengths == capacity))
    rows = np.empty(len(lengths), dtype=np.int64)
    rows[order[:num_full]] = np.arange(num_full)
    rest = order[num_full:]
    rows[rest] = num_full + np.array(_fit_rest(lengths[rest].tolist(), capacity), dtype=np.int64)
    return rows


def _fit_rest(descending: list[int], capacity: int) -> list[int]:
    """Best fit of pieces that come longest first. Bit r of `open_rooms` says that a row with room r exists."""
    rows_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    open_rooms, num_rows, assigned = 0, 0, []
    for length in descending:
        fitting = open_rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                open_rooms ^= 1 << room
        else:
            room, row = capacity, num_rows
            num_rows += 1
        assigned.append(row)
        if room > length:
            rows_by_room[room - length].append(row)
            open_rooms |= 1 << (room - length)
    return assigned


def pack_padded(lengths: np.ndarray) -> np.ndarray:
    """One piece a row.

    >>> pack_padded(np.array([4, 10, 6]))
    array([0, 1, 2])
    """
    return np.arange(len(lengths), dtype=np.int64)


def build_rows(
    tokens: np.ndarray,
    lengths: np.ndarray,
    pieces: Pieces,
    row_of_piece: np.ndarray,
    prefix_ids: list[int],
    suffix_ids: list[int],
    row_length: int,
    pad_id: int,
    dtype: type = np.uint16,
) -> PackedRows:
    """Writes pieces into their rows; within a row they stand in document order.

    Args:
        tokens: (sum of lengths,) all documents, one after another.
        lengths: (num_documents,) tokens of each.
        pieces: from `split_long`, with `row_length - len(prefix_ids) - len(suffix_ids)` as capacity.
        row_of_piece: (num_pieces,) from `pack_best_fit` or `pack_padded`; every row from 0 to the last has a piece.
        prefix_ids: ids before each piece.
        suffix_ids: ids after each piece.
        row_length: tokens of a row.
        pad_id: fills the tail of a row, which no document length counts.
        dtype: of the rows; np.uint16 holds vocabularies up to 65,536.

    >>> pieces = split_long(np.array([2, 1]), 4)
    >>> packed = build_rows(np.array([7, 8, 9]), np.array([2, 1]), pieces, np.array([0, 0]), [1], [2], 8, 0)
    >>> packed.input_ids, packed.doc_lengths, packed.offsets
    (array([[1, 7, 8, 2, 1, 9, 2, 0]], dtype=uint16), array([4, 3]), array([0, 2]))
    """
    assert not len(tokens) or tokens.max() <= np.iinfo(dtype).max, "ids would wrap around"
    num_special = len(prefix_ids) + len(suffix_ids)
    by_row = np.argsort(row_of_piece, kind="stable")
    source = (_starts(lengths)[pieces.doc_index] + pieces.start)[by_row]
    length = pieces.length[by_row]
    num_rows = int(row_of_piece.max()) + 1 if len(row_of_piece) else 0
    offsets = _starts(np.bincount(row_of_piece, minlength=num_rows), with_end=True)
    doc_lengths = length + num_special
    # Where a piece stands: its row's start plus what the row's earlier pieces take.
    taken = _starts(doc_lengths)
    row = row_of_piece[by_row]
    target = row * row_length + taken - taken[offsets[row]]
    input_ids = np.full(num_rows * row_length, pad_id, dtype=dtype)
    for position, token in enumerate(prefix_ids):
        input_ids[target + position] = token
    _copy_runs(tokens, source, input_ids, target + len(prefix_ids), length)
    for position, token in enumerate(suffix_ids):
        input_ids[target + len(prefix_ids) + length + position] = token
    return PackedRows(input_ids.reshape(num_rows, row_length), doc_lengths, offsets)


def _copy_runs(
    tokens: np.ndarray, source: np.ndarray, rows: np.ndarray, target: np.ndarray, length: np.ndarray
) -> None:
    """rows[target[i] : target[i] + length[i]] = tokens[source[i] : source[i] + length[i]] for all i."""
    cuts = np.searchsorted(np.cumsum(length), np.arange(0, length.sum(), GATHER_CHUNK_TOKENS)[1:])
    for part in np.split(np.arange(len(length)), cuts):
        within = _count_within(length[part])
        rows[np.repeat(target[part], length[part]) + within] = tokens[np.repeat(source[part], length[part]) + within]


def _count_within(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... within each run: [3, 1, 2] -> [0, 1, 2, 0, 0, 1]."""
    return np.arange(counts.sum()) - np.repeat(_starts(counts), counts)


def _starts(counts: np.ndarray, with_end: bool = False) -> np.ndarray:
    """Where each run starts: [3, 1, 2] -> [0, 3, 4], and with its end [0, 3, 4, 6]."""
    ends = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
    return ends if with_end else ends[:-1]


def cut_rows(
    rows: np.ndarray, doc_lengths: list[np.ndarray], samples: np.ndarray, length: int
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Cuts each packed row into shorter ones; a document that lies across a cut becomes two.

    >>> rows, lengths, samples = cut_rows(np.array([[1, 2, 3, 4, 5, 0]]), [np.array([2, 3])], np.array([7]), 3)
    >>> rows.tolist(), [part.tolist() for part in lengths], samples.tolist()
    ([[1, 2, 3], [4, 5, 0]], [[2, 1], [2]], [14, 15])

    Args:
        rows: (rows, row_length) token ids.
        doc_lengths: Lengths of each row's documents; they need not fill the row.
        samples: (rows,) sample indices.
        length: Tokens of the short rows; divides `row_length`.

    Returns:
        Short rows with at least one token, the lengths of their documents, and an index for each: that of its row
        times the number of parts, plus the part.
    """
    parts = rows.shape[1] // length
    assert parts * length == rows.shape[1], (rows.shape, length)
    pieces, kept = [], []
    for row, lengths in enumerate(doc_lengths):
        ends = np.cumsum(lengths, dtype=np.int64)  # they are kept as uint16
        for part in range(parts):
            cuts = np.clip(np.concatenate([[0], ends]), part * length, (part + 1) * length)
            inside = np.diff(cuts)
            if inside.any():
                pieces.append(inside[inside > 0])
                kept.append(row * parts + part)
    indices = (samples[:, None] * parts + np.arange(parts)).ravel()
    return rows.reshape(-1, length)[kept], pieces, indices[kept]
