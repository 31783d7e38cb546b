"""Where the loader's rows come from: packed rows on disk, shuffled for each pass; `streamed_rows` has the other one.

Both answer for sample indices: sample s of a run is always the same row, so that a position in the data is one number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from oneday.packed_dataset import PackedDataset
from oneday.ranks import Ranks


class RowSource(Protocol):
    """Gives rows for sample indices that never decrease between calls."""

    row_length: int
    num_rows: int | None

    def take(self, samples: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Rows (n, row_length) and the document lengths of each."""

    def state_dict(self, sample: int) -> dict[str, Any]:
        """What `load_state_dict` needs to give the rows from `sample` on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""

    def share_among(self, ranks: Ranks, must_end: Callable[[], bool]) -> None:
        """Say what processes there are, all of which take the same samples, and what tells when to wait no longer."""

    def close(self, waits: bool = True) -> None:
        """End what goes on in the background, and wait until it has ended or not."""


class ShuffledRows:
    """Every pass over the packed rows is a new permutation of them, by (seed, pass).

    Args:
        dataset: Packed rows.
        seed: Seed of the shuffle.
    """

    def __init__(self, dataset: PackedDataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.row_length, self.num_rows = dataset.row_length, len(dataset)
        self._order: tuple[int, np.ndarray] | None = None

    def take(self, samples: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """See RowSource; any order of samples will do here."""
        passes, places = np.divmod(samples, self.num_rows)
        rows = np.empty_like(samples)
        for number in np.unique(passes):
            rows[passes == number] = self.order(int(number))[places[passes == number]]
        return self.dataset.get_rows(rows)

    def order(self, number: int) -> np.ndarray:
        """The permutation of one pass."""
        if self._order is None or self._order[0] != number:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, number]))
            self._order = number, generator.permutation(self.num_rows)
        return self._order[1]

    def state_dict(self, sample: int) -> dict[str, Any]:
        """Nothing: a row follows from its sample index."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""

    def share_among(self, ranks: Ranks, must_end: Callable[[], bool]) -> None:
        """Every process maps the same files, and never waits."""

    def close(self, waits: bool = True) -> None:
        """Nothing goes on."""
