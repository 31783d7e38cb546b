"""Held-out loss and bits a byte, on packed rows with fixed masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import nn

from oneday.collators import Collator
from oneday.objectives import Objective
from oneday.packed_dataset import PackedDataset


@torch.no_grad()
def evaluate_objective(
    model: nn.Module,
    objective: Objective,
    dataset: PackedDataset,
    micro_batch_tokens: int,
    precision: Callable[[], AbstractContextManager],
    collators: Mapping[str, Collator],
    rank: int = 0,
    num_processes: int = 1,
    reduce_sum: Callable[[torch.Tensor], torch.Tensor] = lambda value: value,
    max_parts: int | None = None,
) -> dict[str, float]:
    """Mean held-out losses a predicted token, in nats, under each collator.

    Decoders also get `eval_bits_per_byte`: all nats of the held-out text, in bits, over its UTF-8 bytes.

    Args:
        model: The stock model, after `objective.attach`.
        objective: What is predicted.
        dataset: Packed held-out rows.
        micro_batch_tokens: Tokens of one forward pass.
        precision: Opens the context in which the model computes.
        collators: By the name of the loss; of `objective.evaluation_collators`.
        rank: This process; it takes every `num_processes`-th micro-batch.
        num_processes: All of them.
        reduce_sum: Sums a tensor over the processes.
        max_parts: Only the first micro-batches, to see how long one takes.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    rows = max(1, micro_batch_tokens // dataset.row_length)
    parts = np.split(np.arange(len(dataset)), range(rows, len(dataset), rows))[rank::num_processes]
    metrics = {}
    for name, collator in collators.items():
        with precision():
            sums = [sum_part(model, objective, dataset, collator, part, device) for part in parts[:max_parts]]
        nats, predicted = (sum(values) for values in zip(*sums))
        if num_processes > 1:
            nats, predicted = reduce_sum(torch.tensor([nats, predicted], dtype=torch.float64, device=device)).tolist()
        metrics[name] = nats / max(predicted, 1)
        if objective.kind == "decoder":
            metrics["eval_bits_per_byte"] = nats / math.log(2) / dataset.num_bytes_text
    model.train(training)
    return metrics


def sum_part(
    model: nn.Module,
    objective: Objective,
    dataset: PackedDataset,
    collator: Collator,
    part: np.ndarray,
    device: torch.device,
) -> tuple[float, int]:
    """(nats, predicted tokens) of some rows."""
    token_rows, doc_lengths = dataset.get_rows(part)
    batch = collator(token_rows, doc_lengths, part).to(device)
    return objective.summed_loss(model, batch).item(), len(batch.labels)
