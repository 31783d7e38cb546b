"""Shapes over the budget: functions of progress, for learning rate, batch size and mask rate.

A shape knows nothing of clocks or steps: `progress` in [0, 1] comes from the BudgetClock, whatever the budget is of.
To add one, write the function and enter it in LR_SHAPES, with where its flat phase ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.optim.lr_scheduler import LRScheduler

from oneday.errors import SettingError


class Shape(NamedTuple):
    """A learning rate over the budget.

    Attributes:
        multiplier: Of (progress, warmup, decay), each a fraction of the budget: the share of the peak.
        plateau_end: Of the decay: progress up to which a run does not depend on how long it will be; 0: nowhere.
    """

    multiplier: Callable[[float, float, float], float]
    plateau_end: Callable[[float], float]


def trapezoid(progress: float, warmup: float, decay: float) -> float:
    """Rise over `warmup`, stay at 1, fall linearly to 0 over the last `decay` of the budget (WSD)."""
    return min(1.0, ramp(progress, warmup), (1.0 - progress) / max(decay, 1e-9))


def one_minus_sqrt(progress: float, warmup: float, decay: float) -> float:
    """As trapezoid, falling as 1 - sqrt(x) (Hägele et al. 2024, arXiv 2405.18392)."""
    into = (progress - (1.0 - decay)) / max(decay, 1e-9)
    return min(ramp(progress, warmup), 1.0 - math.sqrt(max(0.0, into)))


def linear(progress: float, warmup: float, decay: float) -> float:
    """Rise over `warmup`, then fall linearly to 0 at the end (Bergsma et al. 2025, arXiv 2502.15938)."""
    return min(ramp(progress, warmup), (1.0 - progress) / max(1.0 - warmup, 1e-9))


def cosine(progress: float, warmup: float, decay: float) -> float:
    """Rise over `warmup`, then half a cosine to 0."""
    into = max(0.0, progress - warmup) / max(1.0 - warmup, 1e-9)
    return min(ramp(progress, warmup), 0.5 * (1.0 + math.cos(math.pi * into)))


def triangle(progress: float, warmup: float, decay: float) -> float:
    """From 25 % of the peak up to it at `1 - decay`, then to 0 (Geiping & Goldstein 2022, arXiv 2212.14034)."""
    peak = 1.0 - decay
    return 0.25 + 0.75 * progress / max(peak, 1e-9) if progress < peak else (1.0 - progress) / max(decay, 1e-9)


def constant(progress: float, warmup: float, decay: float) -> float:
    """Rise over `warmup`, then stay."""
    return ramp(progress, warmup)


def ramp(progress: float, until: float) -> float:
    """From 0 to 1 over the first `until` of the budget."""
    return 1.0 if until <= 0 else min(1.0, progress / until)


LR_SHAPES = {
    "trapezoid": Shape(trapezoid, lambda decay: 1.0 - decay),
    "one_minus_sqrt": Shape(one_minus_sqrt, lambda decay: 1.0 - decay),
    "linear": Shape(linear, lambda decay: 0.0),
    "cosine": Shape(cosine, lambda decay: 0.0),
    "triangle": Shape(triangle, lambda decay: 0.0),
    "constant": Shape(constant, lambda decay: 1.0),
}


def learning_rate_multiplier(shape: str, warmup_fraction: float, decay_fraction: float) -> Callable[[float], float]:
    """A function of progress in [0, 1] that gives the multiplier of the peak learning rate, never below 0.

    Raises:
        SettingError: When the shape is unknown or a fraction is outside [0, 1].
    """
    if shape not in LR_SHAPES:
        raise SettingError(f"The setting lr_shape is {shape!r}; it must be one of {', '.join(LR_SHAPES)}.")
    for name, value in (("warmup_fraction", warmup_fraction), ("decay_fraction", decay_fraction)):
        if not 0.0 <= value <= 1.0:
            raise SettingError(f"The setting {name} is {value:g}; it must lie in 0 to 1.")
    multiplier = LR_SHAPES[shape].multiplier
    return lambda progress: max(0.0, multiplier(min(1.0, progress), warmup_fraction, decay_fraction))


def find_plateau_end(shape: str, decay_fraction: float) -> float:
    """Progress up to which a run does not depend on how long it will be; 0: the shape has no flat phase."""
    return LR_SHAPES[shape].plateau_end(decay_fraction)


def interpolate(start: float | None, end: float, progress: float, until: float = 1.0) -> float:
    """From `start` (None: constant at `end`) linearly to `end`, reached at progress `until`."""
    return end if start is None else start + (end - start) * ramp(progress, until)


def choose_row_length(start: int | None, end: int, progress: float, until: float) -> int:
    """Tokens of a row: `start` doubled as often as it stays under a line from `start` to `end`, reached at `until`.

    >>> [choose_row_length(128, 1024, progress, 0.5) for progress in (0.0, 0.1, 0.25, 0.5)]
    [128, 256, 512, 1024]
    """
    if start is None:
        return end
    wanted, length = interpolate(start, end, progress, until), start
    while 2 * length <= wanted and end % (2 * length) == 0:
        length *= 2
    return end if progress >= until else length


class ProgressScheduler(LRScheduler):
    """Learning rates as a function of progress, set at the start of a step; the Trainer's own `step()` is inert."""

    def __init__(self, optimizer: torch.optim.Optimizer, multiplier: Callable[[float], float]) -> None:
        self.multiplier, self.progress = multiplier, 0.0
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        """One learning rate a parameter group."""
        return [base * self.multiplier(self.progress) for base in self.base_lrs]

    def set_progress(self, progress: float) -> None:
        """Apply the learning rates of this progress."""
        self.progress = progress
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def step(self, epoch: int | None = None) -> None:
        """Called by the Trainer after each step; progress, not the number of calls, decides here."""
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Base rates and progress; the shape comes from the settings."""
        return {"base_lrs": self.base_lrs, "progress": self.progress}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        self.base_lrs = state_dict["base_lrs"]
        self.set_progress(state_dict["progress"])
