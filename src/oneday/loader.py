"""The batches of each optimizer step: a shuffled pass over packed rows, in micro-batches, by rank.

The whole state is one number, `samples_seen`: which row a sample is follows from (seed, sample index), so resuming is
immediate and exact at any position, and independent of how many processes there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from oneday.arguments import SettingError
from oneday.collators import Batch, Collator
from oneday.packed_dataset import PackedDataset


@dataclass(frozen=True)
class StepPlan:
    """Size of one optimizer step.

    Attributes:
        num_rows: Rows over all processes; a multiple of `micro_rows` times the number of processes.
        micro_rows: Rows of one forward and backward pass.
        progress: Fraction of the budget spent.
    """

    num_rows: int
    micro_rows: int
    progress: float


def plan_rows(batch_tokens: float, micro_tokens: int, row_length: int, num_processes: int) -> tuple[int, int]:
    """(rows of a step, rows of a micro-batch) nearest to the tokens asked for.

    Example: 16,384 tokens a step, 8,192 a micro-batch, rows of 128, 1 process -> (128, 64).
    """
    micro_rows = max(1, micro_tokens // row_length)
    wanted = max(num_processes, round(batch_tokens / row_length))
    micro_rows = min(micro_rows, wanted // num_processes)
    unit = micro_rows * num_processes
    return max(1, round(wanted / unit)) * unit, micro_rows


class StepLoader:
    """Iterates over optimizer steps; each is the list of this rank's micro-batches.

    Args:
        dataset: Packed rows.
        collator: The objective's collator.
        plan: Asked before each step for its size.
        seed: Seed of the shuffle.
        rank: This process.
        num_processes: All of them.

    Raises:
        SettingError: When the data set has fewer rows than one step.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        collator: Collator,
        plan: Callable[[], StepPlan],
        seed: int,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.dataset, self.collator, self.plan, self.seed = dataset, collator, plan, seed
        self.rank, self.num_processes = rank, num_processes
        self.samples_seen = 0
        self._order: tuple[int, np.ndarray] | None = None
        self._waiting: tuple[list[Batch], int] | None = None
        needed = plan().num_rows
        if len(dataset) < needed:
            raise SettingError(
                f"The corpus fills {len(dataset)} rows of {dataset.row_length} tokens, fewer than the {needed} of one "
                "step; give more text or lower batch_size_tokens."
            )

    def __iter__(self) -> Iterator[list[Batch]]:
        """Step after step, without end."""
        while True:
            step = self.peek()
            self.samples_seen += self._waiting[1]
            self._waiting = None
            yield step

    def peek(self) -> list[Batch]:
        """The next step's micro-batches, which iteration will give."""
        if self._waiting is None:
            plan = self.plan()
            samples = np.arange(self.samples_seen, self.samples_seen + plan.num_rows)
            micros = samples.reshape(-1, plan.micro_rows)[self.rank :: self.num_processes]
            self._waiting = [self.collate(part, plan.progress) for part in micros], plan.num_rows
        return self._waiting[0]

    def collate(self, samples: np.ndarray, progress: float) -> Batch:
        """The batch of these sample indices."""
        rows, doc_lengths = self.dataset.get_rows(self.rows_of(samples))
        return self.collator(rows, doc_lengths, samples, progress)

    def rows_of(self, samples: np.ndarray) -> np.ndarray:
        """Which row each sample is: every pass over the data is a new permutation of it."""
        epochs, places = np.divmod(samples, len(self.dataset))
        rows = np.empty_like(samples)
        for epoch in np.unique(epochs):
            rows[epochs == epoch] = self.order(int(epoch))[places[epochs == epoch]]
        return rows

    def order(self, epoch: int) -> np.ndarray:
        """The permutation of one pass."""
        if self._order is None or self._order[0] != epoch:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._order = epoch, generator.permutation(len(self.dataset))
        return self._order[1]

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.samples_seen / len(self.dataset)

    def rewind(self, samples_seen: int) -> None:
        """Go on after this many samples."""
        self.samples_seen, self._waiting = samples_seen, None
