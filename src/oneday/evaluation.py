"""Held-out loss and bits per byte, on packed rows with fixed masks."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from oneday.collators import Collator
from oneday.errors import is_out_of_memory
from oneday.objectives import Objective
from oneday.packed_dataset import PackedDataset
from oneday.recovery import describe_full_memory
from oneday.throughput import synchronize

if TYPE_CHECKING:
    from oneday.trainer import BudgetTrainer

HASHED_ROWS = 64
# Name of a loss -> term -> [sum, count].
Totals = dict[str, dict[str, list[float]]]


def evaluate_objective(
    model: nn.Module,
    objective: Objective,
    dataset: PackedDataset,
    micro_batch_tokens: int,
    precision: Callable[[], AbstractContextManager],
    collators: Mapping[str, Collator],
) -> dict[str, float]:
    """Mean held-out losses under each collator, by one process; see `sum_held_out` and `name_losses`."""
    totals = sum_held_out(model, objective, dataset, micro_batch_tokens, precision, collators)
    return name_losses(objective, totals, dataset)


def measure_held_out(trainer: BudgetTrainer, own_only: bool = False, max_parts: int | None = None) -> dict[str, float]:
    """Held-out losses of a trainer's present weights, over all processes; in smaller batches where memory runs out.

    Args:
        trainer: Has the model, the objective and the held-out rows.
        own_only: Only the objective's own loss.
        max_parts: Only the first micro-batches, to see how long one takes.
    """
    collators = list(trainer.eval_collators.items())
    trainer.eval_batch_tokens = min(trainer.eval_batch_tokens, trainer.micro_batch_limit or trainer.eval_batch_tokens)
    try:
        totals = sum_held_out(
            trainer.model,
            trainer.objective,
            trainer.eval_dataset,
            trainer.eval_batch_tokens,
            trainer.evaluation_precision,
            dict(collators[:1] if own_only else collators),
            trainer.args.process_index,
            trainer.args.world_size,
            max_parts,
        )
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        trainer.ranks.refuse_to_repeat(*describe_full_memory(trainer.eval_batch_tokens))
        if trainer.eval_batch_tokens <= trainer.eval_dataset.row_length:
            raise
        totals = None
    shares = trainer.ranks.all_gather(totals)
    if None in shares:
        trainer.eval_batch_tokens //= 2
        return measure_held_out(trainer, own_only, max_parts)
    metrics = name_losses(trainer.objective, add_totals(shares), trainer.eval_dataset)
    synchronize(trainer.args.device)
    return metrics


@torch.no_grad()
def sum_held_out(
    model: nn.Module,
    objective: Objective,
    dataset: PackedDataset,
    micro_batch_tokens: int,
    precision: Callable[[], AbstractContextManager],
    collators: Mapping[str, Collator],
    rank: int = 0,
    num_processes: int = 1,
    max_parts: int | None = None,
) -> Totals:
    """Sums over this process's share of the held-out rows, under each collator.

    Args:
        model: The stock model, after `objective.attach`.
        objective: What is predicted.
        dataset: Packed held-out rows.
        micro_batch_tokens: Tokens of one forward pass.
        precision: Opens the context in which the model computes.
        collators: By the name of the loss; of `objective.evaluation_collators`.
        rank: This process; it takes every `num_processes`-th micro-batch. All make as many passes, the last of which
            may count nowhere: sharded weights are gathered by all.
        num_processes: All of them.
        max_parts: Only the first micro-batches, to see how long one takes.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    rows = max(1, micro_batch_tokens // dataset.row_length)
    parts = np.split(np.arange(len(dataset)), range(rows, len(dataset), rows))
    passes = [*range(rank, len(parts), num_processes)]
    missing = -(-len(parts) // num_processes) - len(passes)
    totals: Totals = {name: defaultdict(lambda: [0.0, 0]) for name in collators}
    for name, collator in collators.items():
        with precision():
            for index in passes[:max_parts]:
                add_terms(totals[name], sum_part(model, objective, dataset, collator, parts[index], device))
            for _ in range(missing if max_parts is None else min(missing, max_parts - len(passes))):
                sum_part(model, objective, dataset, collator, parts[0], device)
    model.train(training)
    return {name: dict(terms) for name, terms in totals.items()}


def add_totals(shares: Sequence[Totals]) -> Totals:
    """The sums of several processes, in one."""
    sums: Totals = {name: defaultdict(lambda: [0.0, 0]) for name in shares[0]}
    for share in shares:
        for name, terms in share.items():
            add_terms(sums[name], terms)
    return sums


def add_terms(sums: dict[str, list[float]], terms: Mapping[str, Sequence[float]]) -> None:
    """Add each term's sum and count."""
    for term, (value, count) in terms.items():
        sums[term][0] += value
        sums[term][1] += count


def name_losses(objective: Objective, totals: Totals, dataset: PackedDataset) -> dict[str, float]:
    """Mean held-out losses, in nats, under each collator.

    Decoders also get `eval_bits_per_byte`: all nats of the held-out text, in bits, over its UTF-8 bytes. Not where the
    tokenizer loses some of the text: what it does not predict would count as known.

    Args:
        objective: Weighs the terms.
        totals: Over all processes.
        dataset: Packed held-out rows.
    """
    metrics: dict[str, float] = {}
    for name, terms in totals.items():
        metrics |= name_metrics(objective, name, terms)
        if objective.kind == "decoder" and objective.keeps_text:
            metrics["eval_bits_per_byte"] = terms["loss"][0] / math.log(2) / dataset.num_bytes_text
    return metrics


def name_metrics(objective: Objective, name: str, totals: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The loss under `name`; of the objective's own, `eval_loss`, also its terms where there are several.

    Args:
        objective: Weighs the terms.
        name: Of the collator.
        totals: Term -> (sum, count).
    """
    means = {term: value / count for term, (value, count) in totals.items() if count}
    metrics = {name: sum(weight * means[term] for term, weight in objective.weights.items() if term in means)}
    if name == "eval_loss" and len(means) > 1:
        names = {term: f"eval_{term}_loss" if term in objective.weights else f"eval_{term}" for term in means}
        metrics |= {names[term]: mean for term, mean in means.items()}
    return metrics


def hash_evaluation(objective: Objective, dataset: PackedDataset, name: str) -> str:
    """16 hex digits of the first held-out rows as they are scored; losses of two runs compare where these are equal.

    Of the model's inputs, the predicted positions, their labels and, where there are several terms, their weights; not
    of what the generator of `rtd` puts in: each run's discriminator is scored on its own generator's words.

    Args:
        objective: Hides, predicts and weighs.
        dataset: Packed held-out rows.
        name: Of the loss, as `objective.evaluation_collators` has it.
    """
    indices = np.arange(min(HASHED_ROWS, len(dataset)))
    rows, lengths = dataset.get_rows(indices)
    batch = objective.evaluation_collators(0)[name](rows, lengths, indices)
    digest = hashlib.sha256()
    for key, tensor in sorted({**batch.inputs, "positions": batch.positions, "labels": batch.labels}.items()):
        if torch.is_tensor(tensor):
            digest.update(key.encode() + tensor.numpy().tobytes())
    if len(objective.weights) > 1:
        digest.update(repr(sorted(objective.weights.items())).encode())
    return digest.hexdigest()[:16]


def sum_part(
    model: nn.Module,
    objective: Objective,
    dataset: PackedDataset,
    collator: Collator,
    part: np.ndarray,
    device: torch.device,
) -> dict[str, tuple[float, int]]:
    """Term -> (sum, count) of some rows."""
    token_rows, doc_lengths = dataset.get_rows(part)
    batch = collator(token_rows, doc_lengths, part).to(device)
    counts = objective.count_terms(batch)
    return {term: (value.item(), counts[term]) for term, value in objective.summed_terms(model, batch).items()}
