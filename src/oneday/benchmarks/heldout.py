"""The held-out curve of a run: both sides are measured on the same rows, masks and positions, off the clock."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from oneday.budget_clock import BudgetClock
from oneday.collators import Batch, mark_documents
from oneday.evaluation import evaluate_objective
from oneday.modeling import count_parameters
from oneday.objectives import COMPANION, Objective
from oneday.packed_dataset import PackedDataset
from oneday.throughput import describe_environment, measure_peak_again, peak_memory_bytes, synchronize

logger = logging.getLogger(__name__)

# Time of point i of n is budget * (i / n)^this.
DENSER_EARLY = 1.7


def point_times(budget_seconds: float, num_points: int) -> list[float]:
    """Seconds at which a curve is measured, denser early; the last of the `num_points`, at the end, is not among them.

    >>> point_times(100.0, 2)
    [30.778610333622904]
    """
    return [budget_seconds * (i / num_points) ** DENSER_EARLY for i in range(1, num_points)]


def name_measure(objective: Objective) -> str:
    """The held-out loss that recipes and stock are compared by: encoders at 15 % masks, whatever they train with."""
    return "eval_mlm_loss" if "eval_mlm_loss" in objective.evaluation_collators(0) else "eval_loss"


class HeldOutLoss:
    """The held-out loss of a model, in nats a predicted token, summed in float32.

    Args:
        model: A model; `objective.attach` is called for it unless it has been.
        objective: Gives masks and predicted positions.
        dataset: Packed held-out rows.
        micro_batch_tokens: Tokens of one forward pass.
        precision: Opens the context in which the model computes, that of its training.
        position_offset: First position id of the architecture.
        plain: The model sees a row as stock models are trained: `input_ids` alone, as one text. Padding is hidden
            from it, because its training has none.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        dataset: PackedDataset,
        micro_batch_tokens: int,
        precision: Callable[[], AbstractContextManager],
        position_offset: int = 0,
        plain: bool = False,
    ) -> None:
        if not hasattr(model, "selected_positions"):
            objective.attach(model)
        self.model, self.objective, self.dataset, self.plain = model, objective, dataset, plain
        self.micro_batch_tokens, self.precision = micro_batch_tokens, precision
        self.measure_name = name_measure(objective)
        self.collator = objective.evaluation_collators(position_offset)[self.measure_name]

    def measure(self) -> dict[str, float]:
        """The loss of the present weights; for decoders also `bits_per_byte` of the held-out text."""
        losses = evaluate_objective(
            self.model,
            self.objective,
            self.dataset,
            self.micro_batch_tokens,
            self.precision,
            {self.measure_name: self.collate},
        )
        if "eval_bits_per_byte" in losses:
            losses["bits_per_byte"] = losses.pop("eval_bits_per_byte")
        return losses

    def collate(self, rows: np.ndarray, doc_lengths: list[np.ndarray], sample_indices: np.ndarray) -> Batch:
        """The objective's held-out batch of these rows, of a plain one only what stock models are trained on."""
        batch = self.collator(rows, doc_lengths, sample_indices)
        if self.plain:
            batch.inputs = {key: batch.inputs[key] for key in ("input_ids", "use_cache") if key in batch.inputs}
            is_text = mark_documents(doc_lengths, rows.shape[1])
            if not is_text.all():
                batch.inputs["attention_mask"] = torch.from_numpy(is_text.astype(np.int64))
        return batch


class CurveCallback(TrainerCallback):
    """Measures the held-out loss at given times of a clock, which stands still meanwhile.

    Args:
        clock: Counts the run's seconds, tokens and steps.
        times: Ascending seconds of that clock.
        measure: Returns the losses of the present weights.
        device: Waited for before the clock is read.

    Attributes:
        points: One dictionary a point: `clock_seconds`, `train_seconds`, `tokens`, `step` and the losses.
        place: The same facts, without losses, at the end of the last step.
    """

    def __init__(
        self, clock: BudgetClock, times: list[float], measure: Callable[[], dict[str, float]], device: torch.device
    ) -> None:
        self.clock, self.measure, self.device = clock, measure, device
        self.waiting = list(times)
        self.points: list[dict[str, float]] = []
        self.place: dict[str, float] = {}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure if a time has come; times passed within one step make one point."""
        if not self.waiting or self.clock.elapsed_seconds < self.waiting[0]:
            return
        synchronize(self.device)
        self.note_place()
        while self.waiting and self.waiting[0] <= self.place["clock_seconds"]:
            self.waiting.pop(0)
        with self.clock.paused():
            self.add_point(self.measure())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The weights of the last point are those of now."""
        synchronize(self.device)
        self.note_place()

    def note_place(self) -> None:
        """Where the run is."""
        self.place = {
            "clock_seconds": self.clock.elapsed_seconds,
            "train_seconds": self.clock.train_seconds,
            "tokens": self.clock.tokens,
            "step": self.clock.steps,
        }

    def add_point(self, losses: dict[str, float]) -> None:
        """Enter losses measured at the place noted last, instead of a point that is there already."""
        self.points = [point for point in self.points if point["step"] < self.place["step"]]
        self.points.append({**self.place, **losses})
        shown = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
        logger.info("  %.1f s, step %d: %s", self.place["clock_seconds"], self.place["step"], shown)


def describe_result(
    clock: BudgetClock, curve: CurveCallback, model: nn.Module, device: torch.device, peak_flops: float, bf16: bool
) -> dict[str, Any]:
    """What a record holds of a finished run of either side; the curve's last point is the final one.

    Rates are over the clock from the first step's beginning to the last one's end, whatever happened between. The peak
    is the better of `peak_flops`, from before the run, and one after: a machine is not always as fast.
    """
    parameters, without_embeddings = count_parameters(model, COMPANION)
    seconds = curve.place["clock_seconds"]
    memory = peak_memory_bytes(device)  # before the products, which take their own
    peak_flops = measure_peak_again(peak_flops, device, bf16)
    return {
        "curve": curve.points,
        "final": curve.points[-1],
        "clock_seconds": clock.elapsed_seconds,
        "train_seconds": curve.place["train_seconds"],
        "tokens": clock.tokens,
        "steps": clock.steps,
        "flops": clock.flops,
        "tokens_per_second": clock.tokens / seconds,
        "flops_per_second": clock.flops / seconds,
        "mfu": clock.flops / seconds / peak_flops,
        "peak_flops_measured": peak_flops,
        "peak_memory_bytes": memory,
        "num_parameters": parameters,
        "num_parameters_without_embeddings": without_embeddings,
        "environment": describe_environment(device),
    }
