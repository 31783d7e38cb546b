"""Runs beside each other: their held-out curves in one picture, and when one had what another ended with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from oneday import run_directory as rundir
from oneday.errors import SettingError

# The first that every run has is what they are compared by.
MEASURES = {
    "eval_bits_per_byte": "bits / byte",
    "eval_mlm_loss": "held-out loss at 15 % masks (nats / masked token)",
    "eval_loss": "held-out loss",
}
# Key in results.json -> of what the runs are different, and the measures that this leaves without a comparison.
DIFFERENCES = {
    "validation_hash": ("held-out texts", tuple(MEASURES)),
    "tokenizer_hash": ("tokenizers", ("eval_mlm_loss", "eval_loss")),
    "objective": ("objectives", ("eval_loss",)),
    "masks_hash": ("masks", ("eval_loss",)),
}
# Name -> evaluations.
Runs = dict[str, list[dict[str, Any]]]
# Name -> results.json, empty of a run that is not finished.
Facts = dict[str, dict[str, Any]]
AXES = {"budget_seconds": (1 / 60, "budget time (minutes)"), "tokens": (1e-6, "tokens seen (millions)")}


def read_evaluations(run_dir: str | Path) -> list[dict[str, Any]]:
    """The evaluations that led to a run's weights, those of the random weights left out.

    Raises:
        SettingError: When there is none.
    """
    events = [event for event in rundir.read_metrics(run_dir) if event["event"] == "eval" and event["step"] > 0]
    if not events:
        raise SettingError(f"The run {run_dir} has no held-out evaluation; name a run that has been trained.")
    return events


def choose_measure(runs: Runs, facts: Facts) -> tuple[str, Runs]:
    """What the runs' ends share, and the evaluations that have it.

    Bits per byte where every run has it, which compares across tokenizers; the runs' own loss where it is one and the
    same, which alone has a curve; else the loss at 15 % masks, which an encoder takes at its end alone.
    """
    shared = set.intersection(*[set(events[-1]) for events in runs.values()])
    measure = next(measure for measure in MEASURES if measure in shared)
    if measure == "eval_mlm_loss" and not find_differences("eval_loss", facts) and all(map(has_masks, facts.values())):
        measure = "eval_loss"
    return measure, {name: [event for event in events if measure in event] for name, events in runs.items()}


def has_masks(results: dict[str, Any]) -> bool:
    """Whether it is known what a run's own loss is of; results of earlier versions do not say."""
    return "masks_hash" in results


def find_differences(measure: str, facts: Facts) -> list[str]:
    """Of what the finished runs are different, so that this measure does not compare."""
    finished = [results for results in facts.values() if results]
    is_older = any("validation_hash" not in results for results in finished)  # it knew the hash of all text alone
    found = []
    for key, (words, measures) in DIFFERENCES.items():
        key = "corpus_hash" if is_older and key == "validation_hash" else key
        if key == "masks_hash" and found:
            continue  # another text is hidden otherwise
        if measure in measures and len({results[key] for results in finished if key in results}) > 1:
            found.append(words)
    return found


@dataclass(frozen=True)
class Match:
    """How many times sooner one run has what another ended with.

    Attributes:
        ratio: The other's time over the time at which its loss is passed; None: never.
        is_bound: It was passed before the first point, so the ratio is at least this.
    """

    ratio: float | None
    is_bound: bool = False

    def __str__(self) -> str:
        if self.ratio is None:
            return "not reached"
        return f"{'> ' if self.is_bound else ''}{self.ratio:.2f} x"


def time_to_match(
    points: Sequence[dict[str, Any]], target: float, seconds: float, measure: str, clock: str = "clock_seconds"
) -> Match:
    """A run's time over the time at which a curve first reaches its loss, linear between the curve's points.

    >>> curve = [{"clock_seconds": 10.0, "loss": 5.0}, {"clock_seconds": 20.0, "loss": 3.0}]
    >>> str(time_to_match(curve, 4.5, 25.0, "loss"))
    '2.00 x'

    Args:
        points: Of the curve, ascending in time.
        target: The loss to reach.
        seconds: What the run took for it.
        measure: Name of the loss.
        clock: Name of the time.
    """
    first = points[0]
    if first[measure] <= target:
        return Match(seconds / first[clock], is_bound=True)
    for before, after in itertools.pairwise(points):
        if after[measure] <= target:
            share = (before[measure] - target) / (before[measure] - after[measure])
            return Match(seconds / (before[clock] + share * (after[clock] - before[clock])))
    return Match(None)


def name_runs(run_dirs: list[str]) -> dict[str, str]:
    """Short name -> directory; the last part of the path, or all of it where two are alike."""
    short = [Path(run_dir).name for run_dir in run_dirs]
    return {name if short.count(name) == 1 else run_dir: run_dir for name, run_dir in zip(short, run_dirs)}


def format_comparison(runs: Runs, facts: Facts) -> str:
    """A line a run: its end, and how many times sooner the best run had that; in 80 columns.

    Args:
        runs: Name -> evaluations.
        facts: Say whether losses compare.
    """
    measure, runs = choose_measure(runs, facts)
    best = min(runs, key=lambda name: runs[name][-1][measure])
    has_curve = len(runs[best]) > 1
    head = f"match by {best[:11]}" if has_curve else ""
    lines = [f"{'run':30}{'tokens':>10}{'minutes':>9}{'final':>9}  {head}".rstrip(), "-" * 78]
    for name, events in sorted(runs.items(), key=lambda item: item[1][-1][measure]):
        end = events[-1]
        ratio = ""
        if has_curve and name != best:
            ratio = str(time_to_match(runs[best], end[measure], end["budget_seconds"], measure, "budget_seconds"))
        amounts = f"{end['tokens'] / 1e6:>8.2f} M{end['budget_seconds'] / 60:>9.1f}{end[measure]:>9.4f}"
        lines.append(f"{name[:29]:30}{amounts}  {ratio}".rstrip())
    lines += ["-" * 78, f"final: {MEASURES[measure]}"]
    if not has_curve:
        lines.append("Measured at the end alone, which gives no time to match.")
    lines += [
        f"The runs are of different {words}: their losses do not compare."
        for words in find_differences(measure, facts)
    ]
    return "\n".join(lines)


def draw_comparison(path: Path, runs: Runs, facts: Facts) -> None:
    """Held-out curves of all runs against time and against tokens.

    Raises:
        SettingError: When the picture cannot be written.
    """
    measure, runs = choose_measure(runs, facts)
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), constrained_layout=True, sharey=True)
    for axis, (key, (scale, label)) in zip(axes, AXES.items()):
        for name, events in runs.items():
            axis.plot([event[key] * scale for event in events], [e[measure] for e in events], "o-", label=name)
        axis.set(xlabel=label)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel=MEASURES[measure])
    axes[1].legend(frameon=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise SettingError(
            f"The setting picture is {path}, which cannot be written ({error}); name another."
        ) from None
    finally:
        plt.close(figure)
