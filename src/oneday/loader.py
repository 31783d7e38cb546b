"""The batches of each optimizer step, in micro-batches, by rank.

The position is one number, `samples_seen`: which row a sample is follows from its index, so that resuming is exact at
any position and independent of how many processes there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from oneday.arguments import BudgetTrainingArguments
from oneday.collators import Batch, Collator
from oneday.errors import SettingError
from oneday.packing import cut_rows
from oneday.row_sources import RowSource

# The busiest process may have this many times its even share of a step's rows, for the sake of larger micro-batches.
UNEVENNESS = 1.125


@dataclass(frozen=True)
class StepPlan:
    """Size of one optimizer step.

    Attributes:
        num_rows: Rows over all processes; a multiple of `micro_rows`.
        micro_rows: Rows of one forward and backward pass.
        progress: Fraction of the budget spent.
        row_length: Tokens of the rows that the model sees, a divisor of the packed rows' length; None: that itself.
    """

    num_rows: int
    micro_rows: int
    progress: float
    row_length: int | None = None


@dataclass(frozen=True)
class TakenRows:
    """What one optimizer step reads, before it is cut into micro-batches.

    Attributes:
        plan: Its size.
        samples: (num_rows,) sample indices.
        rows: (num_rows, packed row length) token ids.
        doc_lengths: Lengths of each row's documents.
    """

    plan: StepPlan
    samples: np.ndarray
    rows: np.ndarray
    doc_lengths: list[np.ndarray]


def micro_tokens(args: BudgetTrainingArguments) -> int:
    """Tokens of a micro-batch; compiled layers get all of one size, that of the smallest step, and compile once."""
    smallest = args.batch_size_tokens_start if args.use_compile else None
    return min(args.micro_batch_tokens, smallest or args.micro_batch_tokens)


def plan_rows(args: BudgetTrainingArguments, batch_tokens: float, row_length: int) -> tuple[int, int]:
    """(rows of a step, rows of a micro-batch) for the tokens asked for; processes only share the step out.

    A batch that grows has multiples of a micro-batch; with compiled layers each of those is shared out alike, so that
    all passes are of one size. One that stays has the rows asked for, or the nearest number that micro-batches of at
    least half the size divide.

    Example: 16,384 tokens per step, 8,192 per micro-batch, rows of 128 -> (128, 64) for 1 or 2 processes, (128, 32)
    for 4.
    """
    wanted = num_rows_of(batch_tokens, row_length)
    unit = min(max(1, micro_tokens(args) // row_length), wanted)
    multiple = max(1, round(wanted / unit)) * unit
    num_rows = multiple
    if args.batch_size_tokens_start is None and multiple != wanted:
        for rows in sorted(range(1, wanted + unit), key=lambda rows: abs(rows - wanted)):
            if abs(rows - wanted) >= abs(multiple - wanted):
                break
            found = share_rows(rows, unit, 1)
            # Where memory runs out, half of them must divide the step as well as may be.
            if 2 * found >= unit and 4 * share_rows(rows, max(1, found // 2), 1) >= found:
                num_rows = rows
                break
    if args.use_compile and args.batch_size_tokens_start is not None:
        return num_rows, find_common_rows(unit, num_rows_of(args.batch_size_tokens_start, row_length), args.world_size)
    return num_rows, share_rows(num_rows, unit, args.world_size)


def num_rows_of(tokens: float, row_length: int) -> int:
    """Rows of so many tokens; at least one."""
    return max(1, round(tokens / row_length))


def find_common_rows(unit: int, smallest: int, num_processes: int) -> int:
    """Rows of a micro-batch that are the same for every step of a multiple of `unit` rows, from the smallest on.

    The most that divide `unit` and keep all processes about as busy.

    Raises:
        SettingError: When there are fewer rows than processes.
    """
    refuse_few_rows(smallest, num_processes)
    spare = (UNEVENNESS - 1) * smallest
    for rows in range(unit, 1, -1):
        if unit % rows == 0 and (unit % (rows * num_processes) == 0 or rows * num_processes <= spare):
            return rows
    return 1


def share_rows(num_rows: int, most: int, num_processes: int) -> int:
    """Rows of a micro-batch: the most, up to `most`, that divide the step and keep all processes about as busy.

    Raises:
        SettingError: When there are fewer rows than processes.
    """
    refuse_few_rows(num_rows, num_processes)
    even = -(-num_rows // num_processes)
    for rows in range(min(num_rows, max(1, most)), 1, -1):
        parts = num_rows // rows
        busiest = -(-parts // num_processes) * rows
        if num_rows % rows == 0 and parts >= num_processes and busiest <= UNEVENNESS * even:
            return rows
    return 1


def refuse_few_rows(num_rows: int, num_processes: int) -> None:
    """Raise SettingError where some process would have nothing to do."""
    if num_rows < num_processes:
        raise SettingError(
            f"A step of {num_rows} rows cannot be shared by {num_processes} processes; raise batch_size_tokens (or "
            "batch_size_tokens_start), or start fewer."
        )


def check_growing_rows(start: int | None, row_length: int, is_compiled: bool) -> None:
    """Refuse rows that cannot grow from `start` tokens to `row_length`.

    Raises:
        SettingError: Says what to set instead.
    """
    if start is not None and row_length % start:
        raise SettingError(
            f"The setting max_seq_length_start is {start}, which does not divide the max_seq_length {row_length}; set "
            f"a divisor, say {max(1, row_length // 4)}."
        )
    if start is not None and is_compiled:
        raise SettingError(
            "torch_compile is true and max_seq_length_start is set: every length of rows would be compiled anew; set "
            "one of them."
        )


def limit_micro_rows(plan: StepPlan, most: int, num_processes: int) -> StepPlan:
    """The same step in micro-batches of at most `most` rows."""
    return replace(plan, micro_rows=share_rows(plan.num_rows, min(plan.micro_rows, most), num_processes))


class StepLoader:
    """Iterates over optimizer steps; each is the list of this rank's micro-batches.

    Args:
        source: Gives rows for sample indices.
        collator: The objective's collator.
        plan: Asked for the size of a step at a progress; None: the present one.
        rank: This process.
        num_processes: All of them.
        largest_step_rows: Rows of the largest step to come; None: of the next one.

    Raises:
        SettingError: When the source has fewer rows than one step.
    """

    def __init__(
        self,
        source: RowSource,
        collator: Collator,
        plan: Callable[[float | None], StepPlan],
        rank: int = 0,
        num_processes: int = 1,
        largest_step_rows: int | None = None,
    ) -> None:
        self.source, self.collator, self.plan = source, collator, plan
        self.rank, self.num_processes = rank, num_processes
        self.samples_seen = 0
        self._taken: TakenRows | None = None
        self._waiting: list[Batch] | None = None
        needed = largest_step_rows or plan(None).num_rows
        if source.num_rows is not None and source.num_rows < needed:
            raise SettingError(
                f"The corpus fills {source.num_rows} rows of {source.row_length} tokens, fewer than the {needed} of "
                "one step; give more text or lower batch_size_tokens."
            )

    def __iter__(self) -> Iterator[list[Batch]]:
        """Step after step, without end."""
        while True:
            step = self.peek()
            self.samples_seen += self._taken.plan.num_rows
            self._waiting = None
            yield step

    def peek(self, progress: float | None = None) -> list[Batch]:
        """The next step's micro-batches, which iteration will give; planned for `progress`, None: the present one."""
        if self._waiting is None:
            plan = self.plan(progress)
            samples = np.arange(self.samples_seen, self.samples_seen + plan.num_rows)
            self._taken = TakenRows(plan, samples, *self.source.take(samples))
            self._waiting = self.collate(self._taken)
        return self._waiting

    def drop_ahead(self) -> None:
        """Forget the step that `peek` made: it was planned for a progress that was not reached."""
        self._waiting = None

    def collate(self, taken: TakenRows) -> list[Batch]:
        """This rank's micro-batches of a step."""
        plan = taken.plan
        batches = []
        for part in np.arange(plan.num_rows).reshape(-1, plan.micro_rows)[self.rank :: self.num_processes]:
            rows, samples = taken.rows[part], taken.samples[part]
            doc_lengths = [taken.doc_lengths[row] for row in part]
            if plan.row_length is not None and plan.row_length < rows.shape[1]:
                rows, doc_lengths, samples = cut_rows(rows, doc_lengths, samples, plan.row_length)
            batches.append(self.collator(rows, doc_lengths, samples, plan.progress))
        return batches

    @property
    def current_plan(self) -> StepPlan:
        """The size of the step that `peek` or iteration gave last."""
        return self._taken.plan

    def halve_micro_batches(self) -> list[Batch]:
        """The step given last, in micro-batches of half the rows (or fewer, where half does not divide the step).

        Masks are keyed by sample, so that the loss and its gradient stay what they were.

        Raises:
            SettingError: When a micro-batch is one row already.
        """
        plan = self.current_plan
        if plan.micro_rows == 1:
            raise SettingError(
                f"The memory does not hold one row of {self.source.row_length} tokens; lower max_seq_length or take a "
                "smaller model_config."
            )
        self._taken = replace(self._taken, plan=limit_micro_rows(plan, plan.micro_rows // 2, self.num_processes))
        batches = self.collate(self._taken)
        self._waiting = None if self._waiting is None else batches
        return batches

    @property
    def epoch(self) -> float | None:
        """Passes over the data so far; None for a stream."""
        return None if self.source.num_rows is None else self.samples_seen / self.source.num_rows

    def state_dict(self) -> dict[str, Any]:
        """Position in the data."""
        return {"samples_seen": self.samples_seen, "source": self.source.state_dict(self.samples_seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position; what was seen before it is not read again."""
        self.samples_seen, self._waiting, self._taken = state["samples_seen"], None, None
        self.source.load_state_dict(state["source"])
