"""What happens around the steps: evaluate, save and stop by the budget; metrics.jsonl; the progress bar."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from oneday import run_directory as rundir

if TYPE_CHECKING:
    from oneday.trainer import BudgetTrainer

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 2.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextmanager
def note_signals() -> Iterator[list[str]]:
    """Notes the signals that mean "save and go away"; a second interrupt from the keyboard ends at once."""
    names: list[str] = []

    def note(number: int, frame: object) -> None:
        if names and number == signal.SIGINT:
            raise KeyboardInterrupt
        names.append(signal.Signals(number).name)

    previous = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield names
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class BudgetCallback(TrainerCallback):
    """Counts each step on the clock and decides when to evaluate, save and stop."""

    def __init__(self, trainer: BudgetTrainer) -> None:
        self.trainer = trainer
        self.last_save = self.last_beat = 0.0
        self.evaluations = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count saves and evaluations from here."""
        self.last_save = time.monotonic()
        self.evaluations = self.evaluations_due()

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
        trainer.step_loss = float(record.loss)
        trainer.step_seconds = trainer.clock.now() - record.begun
        trainer.clock.count_step(record.tokens, record.flops, trainer.step_seconds)
        state.epoch = trainer.loader.epoch or 0.0
        with trainer.clock.account("data"):
            fits = trainer.next_step_fits()
        if trainer.signals:
            trainer.status = "interrupted"
            control.should_save = control.should_training_stop = True
        elif not fits:
            control.should_training_stop = True
        else:
            self.schedule(args, control)
        if time.monotonic() - self.last_beat > HEARTBEAT_SECONDS:
            trainer.write_budget()
            self.last_beat = time.monotonic()

    def schedule(self, args: TrainingArguments, control: TrainerControl) -> None:
        """Ask for an evaluation or a checkpoint when one is due and still fits, with a step after it."""
        trainer, due = self.trainer, self.evaluations_due()
        clock, seconds = trainer.clock, trainer.clock.slow_step_seconds
        wanted = due > self.evaluations if args.eval_steps is None else clock.steps % int(args.eval_steps) == 0
        control.should_evaluate = wanted and clock.fits_seconds(seconds + trainer.eval_seconds)
        seconds += trainer.eval_seconds * control.should_evaluate + max(
            trainer.save_seconds, trainer.checkpoint_seconds
        )
        if args.save_steps is not None:
            wanted = clock.steps % int(args.save_steps) == 0
        else:
            wanted = time.monotonic() - self.last_save > args.save_minutes * 60
        control.should_save = wanted and clock.fits_seconds(seconds)
        self.evaluations = due
        if control.should_save:
            self.last_save = time.monotonic()

    def evaluations_due(self) -> int:
        """How many of the evenly spaced evaluations the progress has passed; the last is the final one."""
        return int(self.trainer.clock.progress * max(1, self.trainer.args.num_evaluations) + 1e-9)


class MetricsCallback(TrainerCallback):
    """Writes metrics.jsonl: a line a step and a line an evaluation."""

    def __init__(self, trainer: BudgetTrainer) -> None:
        self.trainer = trainer
        self.grad_norm: float | None = None

    def write(self, event: str, **values: Any) -> None:
        """Add one line, from the first process only."""
        if self.trainer.args.should_save:
            rundir.append_metrics(
                self.trainer.args.output_dir, {"event": event, **self.trainer.describe_place(), **values}
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The start of this process's share."""
        self.write("start", limits=self.trainer.clock.budget.limits)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the gradient norm that clipping just computed."""
        self.grad_norm = self.trainer.grad_norm

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One line a step."""
        trainer, record = self.trainer, self.trainer.step_record
        self.write(
            "step",
            loss=trainer.step_loss,
            lr=trainer.lr_scheduler.get_last_lr()[0],
            lr_progress=record.progress,
            grad_norm=None if self.grad_norm is None else float(self.grad_norm),
            tokens_per_second=record.tokens / trainer.step_seconds,
            mfu=record.flops / trainer.step_seconds / (trainer.peak_flops * args.world_size),
            batch_tokens=record.tokens,
            num_predicted=record.num_predicted,
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
        self.write("eval", **metrics)


class BudgetProgressCallback(TrainerCallback):
    """A bar of the budget with loss, tokens a second and time left; a line every tenth where nobody watches."""

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
        self.recent.append((trainer.step_record.tokens, trainer.step_seconds))
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
        left = spent / progress * (1 - progress)
        held_out = self.trainer.last_eval.get("eval_loss")
        shown = "" if held_out is None else f", held-out {held_out:.3f}"
        return (
            f"loss {self.trainer.step_loss:.3f}{shown}, {tqdm.format_sizeof(rate)} tok/s, "
            f"{tqdm.format_interval(spent)} spent, {tqdm.format_interval(left)} left"
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
