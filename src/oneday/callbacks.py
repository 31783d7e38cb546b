"""What happens around the steps: evaluate, save and stop by the budget; metrics.jsonl; the progress bar."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from oneday.errors import SettingError
from oneday.recovery import SPIKE_DEVIATIONS, roll_back
from oneday.replay import ReplayClock

if TYPE_CHECKING:
    from oneday.hub import HubPusher
    from oneday.trainer import BudgetTrainer

logger = logging.getLogger(__name__)

# Evaluations before the last take at most this part of a clock's time: where they are slow, there are fewer.
EVALUATION_SHARE = 0.05
# Before one was timed, a checkpoint takes as many times as long as the model alone.
OPTIMIZER_SHARE = 4.0
# So far past the end of the plateau, as a fraction of the budget, a checkpoint is still one to extend from.
KEPT_LATENESS = 0.02


class BudgetCallback(TrainerCallback):
    """Counts each step on the clock and decides when to evaluate, save, roll back and stop."""

    def __init__(self, trainer: BudgetTrainer) -> None:
        self.trainer = trainer
        self.last_save = 0.0
        self.evaluations = 0
        self.is_past_plateau = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count saves and evaluations from here; a resumed run logs as often as is asked for now."""
        state.compute_steps(args, state.max_steps)
        self.last_save = time.monotonic()
        self.evaluations = self.evaluations_due()
        # Of a checkpoint from there on the plateau's end is kept already, or its learning rate has fallen.
        self.is_past_plateau = self.trainer.resumed_progress >= self.trainer.plateau_end

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The clock of a new run starts with its first step, unless preparing it has started the clock."""
        self.trainer.clock.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the step, then look at the budget."""
        trainer, record = self.trainer, self.trainer.step_record
        record.seconds = trainer.clock.now() - record.begun
        if record.bad_number is None:
            trainer.clock.count_step(record.tokens, record.flops, record.seconds)
            self.note_spike(trainer.guard.note_good(record.loss, trainer.clock.steps))
        else:
            trainer.clock.count_skip(record.seconds)
            trainer.loader.drop_ahead()
        state.epoch = trainer.loader.epoch or 0.0
        if record.bad_number is not None and trainer.guard.note_bad():
            roll_back(trainer)
        with trainer.clock.account("data"):
            try:
                fits = trainer.next_step_fits()
            except SettingError as error:  # of the stream, on every process; the step that was done is kept
                logger.warning("%s", error)
                fits, trainer.is_interrupted = False, True
                trainer.failure = error
        if trainer.clock.progress >= trainer.plateau_end and not self.is_past_plateau:
            self.is_past_plateau = trainer.save_as_kept = True
        trainer.save_as_kept &= record.plan.progress < trainer.plateau_end + KEPT_LATENESS
        wishes = self.schedule(args) if fits and not trainer.is_interrupted else (False, False)
        fits, control.should_evaluate, control.should_save = map(bool, trainer.ranks.decide(fits, *wishes))
        if trainer.is_interrupted:
            trainer.status = "interrupted"
            control.should_save = True
        if record.bad_number is None and not control.should_save:
            trainer.save_as_kept = False  # a later one would be of a learning rate that has fallen
        control.should_training_stop |= trainer.is_interrupted or not fits

    def note_spike(self, is_spike: bool) -> None:
        """Say that the loss has jumped."""
        self.trainer.step_record.is_spike = is_spike
        if is_spike:
            logger.warning(
                "The loss jumped to %.3f at step %d, %g standard deviations above the last %d steps.",
                self.trainer.step_record.loss, self.trainer.clock.steps, SPIKE_DEVIATIONS,
                len(self.trainer.guard.losses),
            )  # fmt: skip

    def schedule(self, args: TrainingArguments) -> tuple[bool, bool]:
        """Whether an evaluation and a checkpoint are due and still fit, with a step after them."""
        trainer, due = self.trainer, self.evaluations_due()
        if trainer.step_record.bad_number is not None:  # nothing new to score or keep
            return False, False
        clock, seconds = trainer.clock, trainer.clock.slow_step_seconds
        if args.eval_steps is None:
            wanted = due > self.evaluations and self.evaluation_is_cheap()
        else:
            wanted = clock.steps % int(args.eval_steps) == 0
        should_evaluate = wanted and clock.fits_seconds(seconds + trainer.eval_seconds)
        seconds += trainer.eval_seconds * should_evaluate + max(
            trainer.save_seconds, trainer.checkpoint_seconds or OPTIMIZER_SHARE * trainer.save_seconds
        )
        if args.save_steps is not None:
            wanted = clock.steps % int(args.save_steps) == 0
        else:
            wanted = time.monotonic() - self.last_save > args.save_minutes * 60
        wanted = wanted or trainer.save_as_kept
        if isinstance(clock, ReplayClock):
            wanted = clock.previous().is_saved
        should_save = wanted and clock.fits_seconds(seconds)
        self.evaluations = due
        if should_save:
            self.last_save = time.monotonic()
        return should_evaluate, should_save

    def evaluation_is_cheap(self) -> bool:
        """Whether one more keeps their share of the time so far; always, where no time ends the run."""
        trainer, clock = self.trainer, self.trainer.clock
        if not clock.budget.is_timed:
            return True
        seconds = trainer.last_eval_seconds
        if seconds is None:
            seconds = trainer.eval_seconds / len(trainer.eval_collators)
        return clock.ledger["evaluation"] + seconds <= EVALUATION_SHARE * clock.elapsed_seconds

    def evaluations_due(self) -> int:
        """How many of the evenly spaced evaluations the progress has passed; the last is the final one."""
        return int(self.trainer.clock.progress * max(1, self.trainer.args.num_evaluations) + 1e-9)


class MetricsCallback(TrainerCallback):
    """Writes metrics.jsonl: a line a step and a line an evaluation."""

    def __init__(self, trainer: BudgetTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The start of this process's share."""
        self.trainer.note_event("start", limits=self.trainer.clock.budget.limits)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One line a step, taken or skipped."""
        trainer, record, plan = self.trainer, self.trainer.step_record, self.trainer.step_record.plan
        facts = {
            "loss": record.loss,
            "lr": trainer.lr_scheduler.get_last_lr()[0],
            "lr_progress": record.progress,
            "grad_norm": record.grad_norm,
            "plan_progress": plan.progress,
            "num_rows": plan.num_rows,
            "micro_rows": plan.micro_rows,
            "row_length": plan.row_length,
        }
        if record.bad_number is not None:
            finite = {key: value for key, value in facts.items() if value is None or math.isfinite(value)}
            trainer.note_event("skip", not_finite=record.bad_number, **finite)
            return
        trainer.note_event(
            "step",
            **facts,
            **({"is_spike": True} if record.is_spike else {}),
            tokens_per_second=record.tokens / record.seconds,
            mfu=record.flops / record.seconds / (trainer.peak_flops * args.world_size),
            batch_tokens=record.tokens,
            num_predicted=next(iter(record.counts.values())),
        )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """One line an evaluation."""
        self.trainer.note_event("eval", **metrics)


class HubCallback(TrainerCallback):
    """Has each new checkpoint pushed, aside."""

    def __init__(self, trainer: BudgetTrainer, pusher: HubPusher) -> None:
        self.trainer, self.pusher = trainer, pusher

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Push what was written, unless writing failed."""
        if self.trainer.saved_at == self.trainer.clock.steps_taken:
            self.pusher.push_newest()


class BudgetProgressCallback(TrainerCallback):
    """A bar of the budget with loss, tokens per second and time left; a line every tenth where nobody watches."""

    def __init__(self, trainer: BudgetTrainer) -> None:
        self.trainer = trainer
        self.bar: tqdm | None = None
        self.told = 0
        self.recent: deque[tuple[int, float]] = deque(maxlen=20)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar where a person watches."""
        watched = sys.stderr.isatty() and not os.environ.get("CI") and not args.disable_tqdm
        if watched and state.is_world_process_zero:
            form = "{desc} {percentage:3.0f}%|{bar}| {postfix}"
            self.bar = tqdm(total=100, desc="budget", bar_format=form, dynamic_ncols=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar, or tell every tenth."""
        trainer = self.trainer
        self.recent.append((trainer.step_record.tokens, trainer.step_record.seconds))
        if self.bar is not None:
            self.bar.n = 100 * trainer.clock.progress
            self.bar.set_postfix_str(self.describe())
        elif state.is_world_process_zero and int(10 * trainer.clock.progress) > self.told:
            self.told = int(10 * trainer.clock.progress)
            logger.info("%3d %% of the budget, step %d, %s", 10 * self.told, trainer.clock.steps, self.describe())

    def describe(self) -> str:
        """`loss 4.12, 12.3k tok/s, 0:03:10 spent, 0:01:50 left`."""
        clock = self.trainer.clock
        rate = sum(tokens for tokens, _ in self.recent) / sum(seconds for _, seconds in self.recent)
        spent, progress = clock.elapsed_seconds, max(clock.progress, 1e-9)
        left = (spent - clock.origin.get("seconds", 0.0)) / progress * (1 - progress)
        held_out = self.trainer.last_eval.get("eval_loss")
        shown = "" if held_out is None else f", held-out {held_out:.3f}"
        return (
            f"loss {self.trainer.step_record.loss:.3f}{shown}, {tqdm.format_sizeof(rate)} tok/s, "
            f"{tqdm.format_interval(spent)} spent, {tqdm.format_interval(left)} left"
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
