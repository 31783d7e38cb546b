"""The picture of a comparison: held-out loss against time, a thin line a seed."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from oneday.benchmarks.records import Record  # noqa: E402

OURS_COLOR = "#c1440e"
STOCK_COLORS = ("#2f5d8a", "#6a994e", "#7b5ea7", "#8a6d3b")


def draw_versus_stock(path: Path, sides: dict[str, list[Record]], measure: str, budget_seconds: float) -> None:
    """Draw every side's held-out curves; a dotted line marks each stock side's final loss.

    Args:
        path: Of the PNG file.
        sides: Records by side; `ours` is one of them.
        measure: Name of the loss.
        budget_seconds: Of all runs.
    """
    figure, axis = plt.subplots(figsize=(9, 5.5), constrained_layout=True)
    colors = iter(STOCK_COLORS * len(sides))
    for side, records in sides.items():
        color = OURS_COLOR if side == "ours" else next(colors)
        for place, record in enumerate(records):
            minutes = [point["clock_seconds"] / 60 for point in record["curve"]]
            losses = [point[measure] for point in record["curve"]]
            label = side if side == "ours" else f"stock {side}"
            axis.plot(minutes, losses, color=color, linewidth=1.1, label=None if place else label)
            axis.plot(minutes[-1:], losses[-1:], "o", color=color, markersize=4)
            if side != "ours":
                axis.axhline(losses[-1], color=color, linewidth=0.6, linestyle=":", alpha=0.7)
    axis.axvline(budget_seconds / 60, color="#4a4a4a", linewidth=0.8, linestyle="--")
    axis.set(
        xlabel="wall clock of the budget (minutes)",
        ylabel="held-out loss (nats / predicted token)",
        xlim=(0, None),
    )
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
