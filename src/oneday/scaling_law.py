"""A scaling law: held-out loss from parameters and tokens, fitted on finished runs, with an interval.

L(N, D) = E + A N^-a + B D^-b (Hoffmann et al. 2022, arXiv 2203.15556, equation 2), fitted as there: Huber's loss on
log L, by L-BFGS from many starts. A ladder of a few short runs does not tell E from b, and would follow the noise of
its seeds: the exponents are drawn to those published, with a stated width; many runs outweigh that. N is in millions
of parameters without embeddings, D in millions of tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import softmax

MILLION = 1e6
# Residuals of log L up to this count as noise: three seeds of the 10-minute recipe ended half a per cent apart.
HUBER_DELTA = 5e-3
# a and b of Besiroglu et al. 2024 (arXiv 2404.10102), who fitted the data of Hoffmann et al. again, and how far others
# may lie from them.
EXPONENTS, EXPONENT_WIDTH = np.array([0.3478, 0.3658]), 0.1
PLACES = [2, 4]
# (log E, log A, a, log B, b): a loss is above zero, and exponents found elsewhere lie well inside these bounds.
BOUNDS = ((-3.0, 3.0), (-8.0, 4.0), (0.02, 2.0), (-8.0, 4.0), (0.02, 2.0))
STARTS = ((-1.0, 1.0), (-1.0, 1.0), (0.3,), (0.0, 1.5), (0.2, 0.6))
NUM_PARAMETERS_OF_LAW = 5
# Fitted for several sizes and for one, the drawn exponents (two, one) among them.
NUM_FITTED, NUM_FITTED_OF_ONE_SIZE = (5, 2), (3, 1)
# Models of fewer sizes do not tell E from A N^-a: one constant stands for both, and the law is of that size alone.
LEAST_SIZES = 3
# Up to this ratio two runs of one size had one budget, and say nothing of what more tokens bring.
SAME_BUDGET = 1.2
BOOTSTRAPS, BOOTSTRAP_SEED = 100, 0
INTERVAL = (5.0, 95.0)


@dataclass(frozen=True)
class Point:
    """One finished run.

    Attributes:
        parameters: Without embeddings.
        tokens: Trained on.
        loss: Held out, at the end, in nats a predicted token.
    """

    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class Prediction:
    """A loss with its 90 % interval, and how far it lies outside the runs the law was fitted on.

    Attributes:
        loss: In nats a predicted token.
        low: 5 % bound.
        high: 95 % bound.
        outside: In words, what is asked beyond the law's range; empty: nothing.
    """

    loss: float
    low: float
    high: float
    outside: str = ""


@dataclass(frozen=True)
class ScalingLaw:
    """A fitted law.

    Attributes:
        values: (log E, log A, a, log B, b).
        resampled: (bootstraps, 5) the same, fitted on resampled residuals.
        spread: Standard deviation of the residuals of log L, corrected for what was fitted.
        points: What it was fitted on.
    """

    values: np.ndarray
    resampled: np.ndarray
    spread: float
    points: tuple[Point, ...]

    def predict(self, parameters: float, tokens: float) -> Prediction:
        """The loss of a model after so many tokens, with a schedule that ends there.

        Args:
            parameters: Without embeddings.
            tokens: To be trained on.
        """
        place = [Point(parameters, tokens, math.nan)]
        draws = np.array([log_losses(values, place)[0] for values in self.resampled])
        noise = np.random.default_rng(BOOTSTRAP_SEED).normal(0.0, self.spread, len(draws))
        low, high = np.exp(np.percentile(draws + noise, INTERVAL))
        loss = float(np.exp(log_losses(self.values, place)[0]))
        outside = self.describe_outside(parameters, tokens)
        return Prediction(loss, min(float(low), loss), max(float(high), loss), outside)

    def covers(self, parameters: float) -> bool:
        """Whether the law says anything of models of this size; one of a single size does not of others."""
        return self.num_sizes >= LEAST_SIZES or parameters == self.points[0].parameters

    def describe_outside(self, parameters: float, tokens: float) -> str:
        """`parameters 4.1 x above, tokens 3.0 x above`; empty inside the range."""
        parts = []
        for name, value in (("parameters", parameters), ("tokens", tokens)):
            known = [getattr(point, name) for point in self.points]
            if value > 1.01 * max(known):
                parts.append(f"{name} {value / max(known):.1f} x above")
            elif value < 0.99 * min(known):
                parts.append(f"{name} {min(known) / value:.1f} x below")
        return ", ".join(parts)

    def describe(self) -> str:
        """The law in one line: E, and the two terms."""
        log_e, log_a, a, log_b, b = self.values
        if self.num_sizes < LEAST_SIZES:
            return f"L = {math.exp(log_e):.3f} + {math.exp(log_b):.3f} D^-{b:.3f}"
        return f"L = {math.exp(log_e):.3f} + {math.exp(log_a):.3f} N^-{a:.3f} + {math.exp(log_b):.3f} D^-{b:.3f}"

    @property
    def num_sizes(self) -> int:
        """Model sizes that it was fitted on."""
        return count_sizes(self.points)


def count_sizes(points: Sequence[Point]) -> int:
    """Different numbers of parameters."""
    return len({point.parameters for point in points})


def count_budgets(points: Sequence[Point]) -> int:
    """Budgets of tokens that differ, over all sizes; seeds of one wall clock, a few per cent apart, are one."""
    count, last = 0, (math.nan, math.nan)
    for point in sorted(points, key=lambda point: (point.parameters, point.tokens)):
        if point.parameters != last[0] or point.tokens > SAME_BUDGET * last[1]:
            count, last = count + 1, (point.parameters, point.tokens)
    return count


def log_terms(values: np.ndarray, points: Sequence[Point]) -> np.ndarray:
    """(3, points) logarithms of E, A N^-a and B D^-b."""
    log_e, log_a, a, log_b, b = values
    sizes, tokens = log_axes(points)
    return np.stack([np.full_like(sizes, log_e), log_a - a * sizes, log_b - b * tokens])


def log_axes(points: Sequence[Point]) -> np.ndarray:
    """(2, points) logarithms of N and D in millions."""
    return np.log([[p.parameters / MILLION for p in points], [p.tokens / MILLION for p in points]])


def log_losses(values: np.ndarray, points: Sequence[Point]) -> np.ndarray:
    """(points,) log L."""
    return np.logaddexp.reduce(log_terms(values, points), axis=0)


def objective_and_slope(
    values: np.ndarray, points: Sequence[Point], targets: np.ndarray, free: np.ndarray, exponents: np.ndarray
) -> tuple[float, np.ndarray]:
    """Huber's loss of the residuals of log L and the pull of the exponents, with the gradient.

    Args:
        values: (5,) of the law.
        points: Runs.
        targets: (points,) log L that they had.
        free: (5,) which values may move.
        exponents: (2,) what a and b are drawn to.
    """
    terms = log_terms(values, points)
    residuals = np.logaddexp.reduce(terms, axis=0) - targets
    size = np.abs(residuals)
    loss = np.where(size <= HUBER_DELTA, residuals**2 / 2, HUBER_DELTA * (size - HUBER_DELTA / 2)).sum()
    pulls = np.clip(residuals, -HUBER_DELTA, HUBER_DELTA) * softmax(terms, axis=0)
    sizes, tokens = log_axes(points)
    slope = [pulls[0].sum(), pulls[1].sum(), -(pulls[1] * sizes).sum(), pulls[2].sum(), -(pulls[2] * tokens).sum()]
    distance = (values[PLACES] - exponents) / EXPONENT_WIDTH
    slope = np.array(slope) / HUBER_DELTA**2
    slope[PLACES] += distance / EXPONENT_WIDTH
    return loss / HUBER_DELTA**2 + (distance**2).sum() / 2, np.where(free, slope, 0.0)


def search(
    points: Sequence[Point], targets: np.ndarray, starts: Sequence[np.ndarray], exponents: np.ndarray = EXPONENTS
) -> np.ndarray:
    """The best values found from several starts."""
    free = np.full(NUM_PARAMETERS_OF_LAW, True)
    if count_sizes(points) < LEAST_SIZES:
        free[1:3] = False
        starts = [np.where(free, start, [0.0, BOUNDS[1][0], 0.3, 0.0, 0.0]) for start in starts]
    found = [
        minimize(objective_and_slope, start, (points, targets, free, exponents), "L-BFGS-B", jac=True, bounds=BOUNDS)
        for start in starts
    ]
    return min(found, key=lambda result: result.fun).x


def fit_law(points: Sequence[Point]) -> ScalingLaw | None:
    """The law of some runs, its interval from resampled residuals; None: too few runs to tell anything.

    Args:
        points: Runs of one family on one text; with fewer than three sizes those of the size with most runs count.
    """
    points = keep_one_size(points) if count_sizes(points) < LEAST_SIZES else tuple(points)
    num_fitted, num_drawn = NUM_FITTED if count_sizes(points) >= LEAST_SIZES else NUM_FITTED_OF_ONE_SIZE
    if count_budgets(points) <= num_fitted - num_drawn:
        return None
    targets = np.log([point.loss for point in points])
    starts = [np.array(start) for start in itertools.product(*STARTS)]
    values = search(points, targets, starts)
    fitted = log_losses(values, points)
    residuals = (targets - fitted) * math.sqrt(len(points) / max(1, len(points) - num_fitted))
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    resampled = [
        search(
            points,
            fitted + generator.choice(residuals, len(points)),
            [values],
            EXPONENTS + generator.normal(0.0, EXPONENT_WIDTH, 2),
        )
        for _ in range(BOOTSTRAPS)
    ]
    return ScalingLaw(values, np.array(resampled), float(np.sqrt((residuals**2).mean())), tuple(points))


def keep_one_size(points: Sequence[Point]) -> tuple[Point, ...]:
    """The runs of the size that has most of them."""
    sizes = [point.parameters for point in points]
    return tuple(point for point in points if point.parameters == max(sizes, key=sizes.count))
