"""Pictures of a run, from its metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from oneday import run_directory as rundir  # noqa: E402
from oneday.durable_files import read_json

# 1,430 pixels wide; shrunk to the 900 of a README its letters are still 9 pixels high.
FIGURE_INCHES, DPI = (11, 6.4), 130
TRAIN_COLOR, HELD_OUT_COLOR, QUIET_COLOR = "#9db7d5", "#c1440e", "#4a4a4a"


def draw_curve(output_dir: str | Path) -> Path:
    """Draw training_curve.png: loss against tokens and against time, learning rate, throughput, where time went."""
    events = rundir.read_metrics(output_dir)
    steps = [event for event in events if event["event"] == "step"]
    evals = [event for event in events if event["event"] == "eval"]
    figure, axes = plt.subplots(2, 3, figsize=FIGURE_INCHES, constrained_layout=True)
    draw_loss(axes[0, 0], steps, evals, "tokens", 1e-6, "tokens seen (millions)")
    draw_loss(axes[0, 1], steps, evals, "budget_seconds", 1 / 60, "budget time (minutes)")
    draw_ledger(axes[0, 2], read_json(Path(output_dir) / rundir.BUDGET))
    minutes = [step["budget_seconds"] / 60 for step in steps]
    draw_series(axes[1, 0], minutes, [step["lr"] for step in steps], "learning rate")
    draw_series(
        axes[1, 1], minutes, [step["tokens_per_second"] / 1000 for step in steps], "thousand tokens / second", 0
    )
    draw_series(axes[1, 2], minutes, [100 * step["mfu"] for step in steps], "MFU (% of the peak at start)", 0)
    figure.suptitle(Path(output_dir).name, fontsize=14)
    path = Path(output_dir) / rundir.CURVE
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path


def draw_loss(
    axis: plt.Axes, steps: list[dict[str, Any]], evals: list[dict[str, Any]], key: str, scale: float, label: str
) -> None:
    """Training loss, smoothed, and the held-out loss, against one key of the events."""
    axis.plot([step[key] * scale for step in steps], smooth([step["loss"] for step in steps]), color=TRAIN_COLOR,
              label="training (smoothed)")  # fmt: skip
    axis.plot([event[key] * scale for event in evals], [event["eval_loss"] for event in evals], "o-",
              color=HELD_OUT_COLOR, label="held out")  # fmt: skip
    if evals:
        end = (evals[-1][key] * scale, evals[-1]["eval_loss"])
        axis.annotate(f"{end[1]:.2f}", end, (0, 8), textcoords="offset points", ha="center", color=HELD_OUT_COLOR)
    axis.set(xlabel=label, ylabel="loss (nats)")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)


def draw_series(
    axis: plt.Axes, minutes: list[float], values: list[float], label: str, bottom: float | None = None
) -> None:
    """One quantity against time."""
    axis.plot(minutes, values, color=QUIET_COLOR, linewidth=1)
    axis.set(xlabel="budget time (minutes)", ylabel=label)
    if bottom is not None:
        axis.set_ylim(bottom=bottom)
    axis.grid(alpha=0.3)


def draw_ledger(axis: plt.Axes, budget: dict[str, Any]) -> None:
    """Where the budget's seconds went, as horizontal bars."""
    ledger = {entry: seconds for entry, seconds in budget.get("ledger_seconds", {}).items() if seconds >= 0.05}
    bars = axis.barh(list(ledger), list(ledger.values()), color=TRAIN_COLOR)
    axis.bar_label(bars, fmt="%.1f s", padding=3)
    axis.margins(x=0.3)  # room for the figures beside the bars
    axis.invert_yaxis()
    axis.set(xlabel="seconds", title="where the budget went")


def smooth(values: list[float], share: float = 0.02) -> np.ndarray:
    """Exponential moving average over about `share` of the series, bias-corrected."""
    weight = 1.0 - 1.0 / max(1.0, share * len(values))
    smoothed, total, mass = [], 0.0, 0.0
    for value in values:
        total, mass = weight * total + (1 - weight) * value, weight * mass + (1 - weight)
        smoothed.append(total / mass)
    return np.array(smoothed)
