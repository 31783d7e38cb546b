"""What goes wrong while training and how it goes on: numbers that are not finite, memory that does not suffice."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from oneday.checkpoints import read_state
from oneday.collators import Batch
from oneday.errors import SettingError, is_out_of_memory
from oneday.ranks import Ranks, read_own

if TYPE_CHECKING:
    from oneday.trainer import BudgetTrainer

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
# A loss is a spike when it stands this many standard deviations above the mean of the good steps before it.
SPIKE_DEVIATIONS, SPIKE_WINDOW, SPIKE_LEAST_STEPS = 6.0, 100, 20
# Rollbacks without a good step between them, after which a run ends instead.
MAX_ROLLBACKS = 3


@dataclass
class StepGuard:
    """Counts steps that must not move the weights, and says what a spike is.

    Attributes:
        max_in_row: Bad steps in a row that make a rollback.
        in_row: Bad steps since the last good one or the last rollback.
        rollbacks: Rollbacks since the run got further than before.
        furthest: Steps that were in the weights at the last rollback.
    """

    max_in_row: int
    in_row: int = 0
    rollbacks: int = 0
    furthest: int = 0
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=SPIKE_WINDOW))

    def note_bad(self) -> bool:
        """Count a step that was not finite; whether it is time to roll back."""
        self.in_row += 1
        return self.in_row >= self.max_in_row

    def note_good(self, loss: float, steps: int) -> bool:
        """Count a good step, after which `steps` are in the weights; whether its loss is a spike."""
        self.in_row = 0
        self.rollbacks = self.rollbacks if steps <= self.furthest else 0
        known = len(self.losses) >= SPIKE_LEAST_STEPS
        is_spike = known and loss > fmean(self.losses) + SPIKE_DEVIATIONS * stdev(self.losses)
        self.losses.append(loss)
        return is_spike


def are_finite(model: torch.nn.Module, ranks: Ranks) -> bool:
    """Whether every weight is, on every process."""
    bad = sum(not bool(torch.isfinite(read_own(parameter)).all()) for parameter in model.parameters())
    return not any(ranks.all_reduce(bad))


def find_bad_number(loss: float, grad_norm: Any) -> str | None:
    """Which of the two is not finite, `loss` or `gradient`; None: neither."""
    for name, value in (("loss", loss), ("gradient", grad_norm)):
        if value is not None and not math.isfinite(float(value)):
            return name
    return None


def roll_back(trainer: BudgetTrainer) -> None:
    """Take weights, optimizer and counts of the last good checkpoint; the data read since is not read again.

    Without one that can be read the weights stay as they are: bad steps have not moved them.

    Raises:
        SettingError: When rolling back has not helped several times.
    """
    guard, clock = trainer.guard, trainer.clock
    try:
        folder = trainer.find_good_checkpoint()
    except SettingError as error:  # damaged, or the disk does not give it now
        logger.warning("%s", error)
        folder = None
    if guard.rollbacks >= MAX_ROLLBACKS:
        kept = f"{folder.name} is kept" if folder else "there is no checkpoint yet"
        raise SettingError(
            f"Loss or gradient were not finite in {guard.max_in_row} steps in a row, {MAX_ROLLBACKS + 1} times, at "
            f"step {clock.steps} ({kept}); lower learning_rate or muon_learning_rate, or set bf16 to false."
        )
    guard.rollbacks, guard.in_row, guard.furthest = guard.rollbacks + 1, 0, max(guard.furthest, clock.steps)
    if folder is not None:
        restore_checkpoint(trainer, folder)
    logger.warning(
        "%d steps in a row were not finite: going on from step %d with the text that follows.",
        guard.max_in_row, clock.steps,
    )  # fmt: skip
    trainer.note_event("rollback", from_step=clock.steps)


def restore_checkpoint(trainer: BudgetTrainer, folder: Path) -> None:
    """Put the weights, the optimizer's state and the clock's counts of a checkpoint into a running trainer."""
    trainer._load_from_checkpoint(str(folder))
    trainer._load_optimizer_and_scheduler(str(folder))
    trainer.clock.rewind(read_state(folder)["clock"])


def describe_full_memory(micro_batch_tokens: int) -> tuple[str, str]:
    """What has failed, and what to do; for `Ranks.refuse_to_repeat`."""
    failure = f"The memory does not hold a micro-batch of {micro_batch_tokens} tokens"
    return failure, "lower micro_batch_tokens"


def fit_into_memory(
    trainer: BudgetTrainer, step: list[Batch], run: Callable[[list[Batch]], Result], progress: float = 0.0
) -> tuple[Result, float]:
    """`run(step)`, on every process again in smaller micro-batches as long as memory runs out on one of them.

    Args:
        trainer: Its loader makes the micro-batches smaller.
        step: This process's micro-batches.
        run: Talks to no other process, where it is to be done again.
        progress: A word of process 0 that goes along.

    Returns:
        What `run` returned, and process 0's `progress`.

    Raises:
        SettingError: When a micro-batch of one row does not fit, or nothing can be done again.
    """
    device, ranks = trainer.args.device, trainer.ranks
    random_states = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    while True:
        result, has_failed = None, False
        try:
            result = run(step)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            ranks.refuse_to_repeat(*describe_full_memory(trainer.args.micro_batch_tokens))
            has_failed = True
        num_failed, progress = ranks.all_reduce(has_failed, progress if ranks.is_first else 0.0)
        if not num_failed:
            return result, progress
        step, result = [], None  # nothing holds the tensors of the failed pass
        trainer.model.zero_grad()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.set_rng_state(random_states[1], device)
        torch.set_rng_state(random_states[0])
        step = shrink_micro_batches(trainer)


def shrink_micro_batches(trainer: BudgetTrainer) -> list[Batch]:
    """Halve the micro-batches from the present step on; the optimizer step stays the same size."""
    step = trainer.loader.halve_micro_batches()
    if trainer.args.use_compile:
        torch._dynamo.reset()  # graphs of the old size would count towards the few that a layer may have
    tokens = trainer.loader.current_plan.micro_rows * trainer.loader.source.row_length
    trainer.micro_batch_limit = tokens
    logger.warning("Out of memory: going on with micro-batches of %d tokens, the batch stays the same.", tokens)
    trainer.note_event("oom", micro_batch_tokens=tokens)
    return step
