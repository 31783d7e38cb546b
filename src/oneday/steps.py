"""The steps of a run: how large the next one is to be, what is in it, what it was."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from oneday.arguments import BudgetTrainingArguments
from oneday.collators import Batch
from oneday.flops import FlopCounter
from oneday.loader import StepLoader, StepPlan, check_growing_rows, limit_micro_rows, plan_rows
from oneday.objectives import Objective
from oneday.packed_dataset import PackedDataset
from oneday.replay import ReplayClock
from oneday.row_sources import RowSource, ShuffledRows
from oneday.schedules import choose_row_length, interpolate

if TYPE_CHECKING:
    from oneday.trainer import BudgetTrainer

logger = logging.getLogger(__name__)


@dataclass
class StepRecord:
    """What one optimizer step was: global counts, the mean loss in nats, how long it took, what was wrong with it.

    `counts` says over how many things each term of the loss is a mean; the first are the predicted tokens. `loss`
    becomes a number, and `grad_norm` is known, where the norm of the gradients is waited for, `seconds` at the end.
    """

    begun: float
    tokens: int
    flops: float
    counts: dict[str, int]
    progress: float
    loss: torch.Tensor | float
    plan: StepPlan
    grad_norm: float = 0.0
    seconds: float = 0.0
    bad_number: str | None = None
    is_spike: bool = False


def build_loader(
    trainer: BudgetTrainer, args: BudgetTrainingArguments, dataset: PackedDataset | RowSource
) -> StepLoader:
    """The loader of this rank; before the trainer has its settings."""
    source = ShuffledRows(dataset, args.shuffle_seed) if isinstance(dataset, PackedDataset) else dataset
    source.share_among(trainer.ranks, trainer.must_end)
    check_growing_rows(args.max_seq_length_start, source.row_length, args.use_compile)
    largest = max(args.batch_size_tokens, args.batch_size_tokens_start or 0)
    largest_rows, _ = plan_rows(args, largest, source.row_length)
    say_small_passes(args, source.row_length)
    return StepLoader(
        source,
        trainer.objective.training_collator(trainer.position_offset),
        functools.partial(plan_step, trainer, args, source.row_length),
        args.process_index,
        args.world_size,
        largest_rows,
    )


def say_small_passes(args: BudgetTrainingArguments, row_length: int) -> None:
    """Where a compiled step grows, passes are of one size, which many processes make small."""
    if args.world_size == 1 or not args.use_compile or args.batch_size_tokens_start is None:
        return
    _, micro_rows = plan_rows(args, args.batch_size_tokens_start, row_length)
    if args.process_index == 0 and 2 * micro_rows * row_length <= args.micro_batch_tokens:
        logger.info(
            "Passes are of %d tokens, not of micro_batch_tokens (%d): a step that is compiled and grows is shared out "
            "to %d processes in passes of one size; batch_size_tokens_start: null would lift that.",
            micro_rows * row_length, args.micro_batch_tokens, args.world_size,
        )  # fmt: skip


def plan_step(
    trainer: BudgetTrainer, args: BudgetTrainingArguments, row_length: int, progress: float | None = None
) -> StepPlan:
    """Size of the next step, as the schedules say at a progress of process 0; None: the present one."""
    if isinstance(trainer.clock, ReplayClock):
        return share_plan(trainer, args, trainer.clock.current().plan, row_length)
    progress = trainer.clock.progress if progress is None else progress
    tokens = interpolate(args.batch_size_tokens_start, args.batch_size_tokens, progress, args.batch_ramp_fraction)
    rows = plan_rows(args, tokens, row_length)
    cut = choose_row_length(args.max_seq_length_start, row_length, progress, args.seq_length_ramp_fraction)
    return share_plan(trainer, args, StepPlan(*rows, progress, cut), row_length)


def share_plan(trainer: BudgetTrainer, args: BudgetTrainingArguments, plan: StepPlan, row_length: int) -> StepPlan:
    """Process 0's plan, in micro-batches that the memory has been found to hold."""
    rows, micro_rows, progress, cut = trainer.ranks.decide(
        plan.num_rows, plan.micro_rows, plan.progress, plan.row_length or 0
    )
    plan = StepPlan(int(rows), int(micro_rows), progress, int(cut) or None)
    most = trainer.micro_batch_limit // row_length if trainer.micro_batch_limit is not None else plan.micro_rows
    if args.use_compile and args.batch_size_tokens_start is not None:  # all of one size, compiled once
        _, common = plan_rows(args, args.batch_size_tokens_start, row_length)
        return replace(plan, micro_rows=max(rows for rows in range(1, min(common, most) + 1) if common % rows == 0))
    return limit_micro_rows(plan, most, args.world_size)


def count_share(objective: Objective, counter: FlopCounter, step: list[Batch]) -> tuple[int, float, dict[str, int]]:
    """(tokens, FLOPs, counts of the loss's terms) of this process's share of a step.

    Padding is no token, but executed: FLOPs count it. Windows count as they are.
    """
    lengths = np.concatenate([batch.attended_lengths for batch in step])
    counts = Counter()
    for batch in step:
        counts.update(objective.count_terms(batch))
    tokens = sum(int(batch.doc_lengths.sum()) for batch in step)
    executed, squares = int(lengths.sum()), int((lengths**2).sum())
    predicted = sum(len(batch.labels) for batch in step)
    return tokens, counter.step_flops(executed, squares, predicted, lengths), dict(counts)
