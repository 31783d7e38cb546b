"""Rows by sample index on disk: every row once a pass, each pass in another order."""

from __future__ import annotations

import numpy as np

from oneday.row_sources import ShuffledRows


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
