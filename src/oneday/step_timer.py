"""Steps timed part by part, of a run that does not end by itself and does nothing else."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from oneday.throughput import synchronize
from oneday.trainer import BudgetTrainer

# Choices over a recipe that is measured: only the final evaluation, and no trackers.
QUIET = {"num_evaluations": 1, "eval_steps": None, "eval_on_start": False, "report_to": "none"}
# A budget that does not end, so that the steps are those of a run's beginning, at the full batch.
ENDLESS = {
    **dict.fromkeys(("budget_minutes", "budget_tokens", "budget_flops", "budget_steps", "budget_usd", "budget_kwh")),
    "budget_hours": 1e6,
    "batch_size_tokens_start": None,
    "max_seq_length_start": None,
    "save_minutes": 1e6,
    "save_steps": None,
}
WARMUP_STEPS = 3


class StepTimer(TrainerCallback):
    """Takes the time of steps after a warm-up, and ends the training when there are enough.

    Args:
        trainer: The trainer it is added to.
        measure_seconds: How long to measure.

    Attributes:
        warmup: Seconds of each warm-up step, compilation included.
        steps: One dictionary a measured step: seconds of `data`, `forward_backward`, `optimizer`, and the `step`.
    """

    def __init__(self, trainer: BudgetTrainer, measure_seconds: float) -> None:
        self.trainer, self.measure_seconds = trainer, measure_seconds
        self.warmup: list[float] = []
        self.steps: list[dict[str, float]] = []
        self.tokens, self.flops = 0, 0.0
        self.data_before = self.gradients_at = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The first step's data were read before the clock started; later ones are on its ledger."""
        self.step_from = self.trainer.clock.now() if not self.warmup else self.step_from

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gradients are there, and clipped."""
        synchronize(args.device)
        self.gradients_at = self.trainer.clock.now()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Enter the step; what the trainer did since the last one's end belongs to it."""
        synchronize(args.device)
        trainer, now = self.trainer, self.trainer.clock.now()
        seconds, self.step_from = now - self.step_from, now
        data, self.data_before = trainer.clock.ledger["data"] - self.data_before, trainer.clock.ledger["data"]
        if len(self.warmup) < WARMUP_STEPS:
            self.warmup.append(seconds)
            return
        record = trainer.step_record
        forward_backward = self.gradients_at - record.begun
        self.steps.append(
            {
                "step": seconds,
                "data": data,
                "forward_backward": forward_backward,
                "optimizer": max(0.0, seconds - data - forward_backward),
            }
        )
        self.tokens += record.tokens
        self.flops += record.flops
        if sum(step["step"] for step in self.steps) >= self.measure_seconds:
            control.should_training_stop = True
