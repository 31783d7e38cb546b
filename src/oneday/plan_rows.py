"""What one model makes of a budget, and which of them to take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from oneday.budget import JOULES_PER_KWH, SECONDS_PER_HOUR, Budget
from oneday.errors import SettingError
from oneday.machines import Machine
from oneday.probing import Pace, Probe, optimizer_pair
from oneday.recipe import Settings
from oneday.scaling_law import Prediction, ScalingLaw

# What is left of the memory for the largest layer's own work, the optimizer's and the allocator's gaps.
USABLE_MEMORY = 0.8
# Up to four passes over a text are nearly as good as new text (Muennighoff et al. 2023, arXiv 2305.16264).
MAX_EPOCHS = 4.0
# Where no law says better: Hoffmann et al. 2022 (arXiv 2203.15556) found the best size at about this many.
TOKENS_PER_PARAMETER = 20.0
# A model that even at the machine's peak would see fewer tokens than parameters is not probed.
LEAST_TOKENS_PER_PARAMETER = 1.0


@dataclass(frozen=True)
class Row:
    """One model in the budget.

    Attributes:
        model_config: Its file.
        probe: Its sizes.
        tokens: That the budget holds.
        hours: That it takes.
        epochs: Passes over the text; None: a stream.
        micro_batch_tokens: The largest that fits; 0: none does.
        optim: The recipe's optimizer, or its 8-bit form where only that fits.
        prediction: Of the held-out loss; None: no law.
        usd: Cost; None: no price was given.
        kwh: Energy; None: no power is known.
    """

    model_config: str
    probe: Probe
    tokens: float
    hours: float
    epochs: float | None
    micro_batch_tokens: int
    optim: str
    prediction: Prediction | None
    usd: float | None
    kwh: float | None


def is_within_reach(num_parameters: int, flops_per_token: float, budget: Budget, machine: Machine) -> bool:
    """Whether the budget's clock could show a model as many tokens as it has parameters, at the peak."""
    seconds = budget.clock_limit_seconds
    tokens = math.inf if seconds is None else seconds * machine.peak_flops / flops_per_token
    return tokens >= LEAST_TOKENS_PER_PARAMETER * num_parameters


def mean_batch_tokens(settings: Settings) -> float:
    """Tokens of a step on average over a run of so many steps, in which the batch may grow."""
    start, end, until = (
        settings[name] for name in ("batch_size_tokens_start", "batch_size_tokens", "batch_ramp_fraction")
    )
    return end if start is None else end - until * (end - start) / 2


def count_tokens(
    probe: Probe, pace: Pace, budget: Budget, watts: float | None, batch_tokens: float, step_tokens: float
) -> float:
    """Tokens that the nearest limit of a budget leaves.

    Args:
        probe: Of the model.
        pace: Its speed.
        budget: What may be spent.
        watts: Power drawn; None: not known.
        batch_tokens: Tokens of a step at the end of the run.
        step_tokens: Tokens of a step on average.
    """
    counts = [budget.tokens, budget.flops and budget.flops / probe.flops_per_token]
    counts.append(budget.steps and budget.steps * step_tokens)
    seconds = budget.clock_limit_seconds
    if budget.needs_meter:
        if not watts:
            raise SettingError("budget_kwh is set and no power is known here; set stated_watts.")
        seconds = min(seconds or float("inf"), budget.kwh * JOULES_PER_KWH / watts)
    if seconds is not None:
        counts.append(max(0.0, seconds - pace.fixed_seconds) * pace.tokens_per_second(batch_tokens))
    return min(count for count in counts if count is not None)


def make_row(
    model: str,
    probe: Probe,
    pace: Pace,
    budget: Budget,
    machine: Machine,
    settings: Settings,
    num_tokens: int | None,
    law: ScalingLaw | None,
) -> Row:
    """What one model makes of the budget; `law` is of models of its kind."""
    batch, watts = probe.token_share * settings["batch_size_tokens"], machine.watts or pace.watts
    size = probe.num_parameters_without_embeddings
    tokens = count_tokens(probe, pace, budget, watts, batch, probe.token_share * mean_batch_tokens(settings))
    hours = (tokens / pace.tokens_per_second(batch) + pace.fixed_seconds) / SECONDS_PER_HOUR
    names = [settings["optim"], *[name for name in optimizer_pair(settings["optim"]) if name]]
    fits = {name: largest_micro_batch(probe, name, machine, settings) for name in names}
    optim = next((name for name in names if fits[name]), settings["optim"])
    return Row(
        model_config=model,
        probe=probe,
        tokens=tokens,
        hours=hours,
        epochs=None if num_tokens is None else tokens / num_tokens,
        micro_batch_tokens=fits[optim],
        optim=optim,
        prediction=law.predict(size, tokens) if law and law.covers(size) and tokens else None,
        usd=hours * budget.usd_per_hour if budget.usd_per_hour else None,
        kwh=hours * watts / 1000 if watts else None,
    )


def memory_bytes(probe: Probe, optim: str, micro_batch_tokens: float) -> float:
    """Weights, gradients, optimizer state and activations."""
    return probe.model_bytes + probe.state_bytes[optim] + probe.activation_bytes * micro_batch_tokens


def largest_micro_batch(probe: Probe, optim: str, machine: Machine, settings: Settings) -> int:
    """Tokens of the largest micro-batch that divides the batch and fits; on a CPU not above the recipe's; 0: none.

    A GPU is busier with a larger one, a CPU is not.
    """
    row = settings["max_seq_length"]
    is_gpu = machine.card is not None or torch.cuda.is_available()
    rows = max(1, settings["batch_size_tokens"] // row)
    for count in sorted((n for n in range(1, rows + 1) if rows % n == 0), reverse=True):
        allowed = is_gpu or count == 1 or count * row <= settings["micro_batch_tokens"]  # training takes a row, too
        if allowed and memory_bytes(probe, optim, count * row) <= USABLE_MEMORY * machine.memory_bytes:
            return count * row
    return 0


def choose_row(rows: Sequence[Row], own_config: str) -> int:
    """Place of the model to take.

    By a law the one with the lowest loss, but the recipe's own where the law cannot tell them apart: its interval
    holds the lowest loss. Without a law the largest that sees its share of tokens; where none does, the recipe's own,
    or the smallest.

    Args:
        rows: At least one, smallest first.
        own_config: The recipe's `model_config`.

    Raises:
        SettingError: When none fits.
    """
    fitting = [place for place, row in enumerate(rows) if row.micro_batch_tokens]
    if not fitting:
        raise SettingError("No model fits into the memory; name smaller ones in models, or lower max_seq_length.")
    own = [place for place in fitting if rows[place].model_config == own_config]
    if all(rows[place].prediction is not None for place in fitting):
        best = min(fitting, key=lambda place: rows[place].prediction.loss)
        return next((p for p in own if rows[p].prediction.low <= rows[best].prediction.loss), best)
    fed = [p for p in fitting if rows[p].tokens >= TOKENS_PER_PARAMETER * rows[p].probe.num_parameters]
    return max(fed or own or fitting[:1], key=lambda place: rows[place].probe.flops_per_token)
