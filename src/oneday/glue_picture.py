"""A picture of fine-tuning scores: each number with its spread, and where the answers of each task went."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from oneday.curves import HELD_OUT_COLOR, QUIET_COLOR, TRAIN_COLOR  # noqa: E402

PICTURE_FILE = "glue_results.png"
PANELS_A_ROW, MAX_SHOWN_CLASSES = 4, 12
# Up to so many the shares are written into the matrix; of more its colours say enough.
MAX_WRITTEN_CLASSES = 5


def count_confusions(paths: list[Path], num_labels: int) -> np.ndarray:
    """Rows by their label and the answer, summed over files of predictions: (labels, answers) counts."""
    counts = np.zeros((num_labels, num_labels), np.int64)
    for path in paths:
        table = pq.read_table(path, columns=["label", "prediction"])
        np.add.at(counts, (table["label"].to_numpy(), table["prediction"].to_numpy()), 1)
    return counts


def draw_results(results: dict, confusions: dict[str, np.ndarray], path: Path) -> None:
    """Draw `glue_results.png`.

    Args:
        results: The contents of `glue_results.json`.
        confusions: Counts of each classification number, as `count_confusions` gives them.
        path: Where the picture goes.
    """
    with matplotlib.rc_context({"text.parse_math": False}):  # labels may have a $ in them
        draw_panels(results, confusions, path)


def draw_panels(results: dict, confusions: dict[str, np.ndarray], path: Path) -> None:
    """See `draw_results`."""
    num_rows = math.ceil(len(confusions) / PANELS_A_ROW)
    height = 1.2 + 0.45 * len(results["tasks"])
    figure = plt.figure(figsize=(13, height + 3.4 * num_rows), constrained_layout=True)
    grid = figure.add_gridspec(1 + num_rows, PANELS_A_ROW, height_ratios=[height, *[3.4] * num_rows])
    draw_scores(figure.add_subplot(grid[0, :]), results)
    for index, (name, counts) in enumerate(confusions.items()):
        axis = figure.add_subplot(grid[1 + index // PANELS_A_ROW, index % PANELS_A_ROW])
        draw_confusion(axis, name, counts, results["tasks"][name]["labels"])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_scores(axis: plt.Axes, results: dict) -> None:
    """One line a number: its seeds, their median, random weights and the majority class."""
    names = list(results["tasks"])
    for place, row in enumerate(results["tasks"].values()):
        random = row.get("random_weights", {"scores": [], "median": None})
        for scores, median, color, label in (
            (random["scores"], random["median"], TRAIN_COLOR, "random weights"),
            (row["scores"], row["median"], HELD_OUT_COLOR, "pretrained"),
        ):
            if median is not None:
                axis.plot([100 * score for score in scores], [place] * len(scores), "-", color=color, alpha=0.6, lw=3)
                axis.plot(100 * median, place, "o", color=color, label=label)
        axis.plot(100 * row["majority"], place, "|", color=QUIET_COLOR, markersize=14, label="majority class")
    handles, labels = axis.get_legend_handles_labels()
    by_label = dict(zip(labels, handles))
    axis.legend(by_label.values(), by_label, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    marks = [f"{name}{'*' * results['tasks'][name]['subset']} ({results['tasks'][name]['metric']})" for name in names]
    axis.set(yticks=range(len(names)), yticklabels=marks, xlabel="score (x 100), median and range over the seeds")
    subset = ", * a subset: no official score" if any(row["subset"] for row in results["tasks"].values()) else ""
    axis.set_title(f"protocol: {results['protocol']}{subset}")
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(alpha=0.3, axis="x")


def draw_confusion(axis: plt.Axes, name: str, counts: np.ndarray, labels: list[str]) -> None:
    """Shares of each label's rows by answer, all seeds together."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    places, is_small = range(len(labels)), len(labels) <= MAX_WRITTEN_CLASSES
    if is_small:
        for (row, column), share in np.ndenumerate(shares):
            axis.text(column, row, f"{share:.0%}", ha="center", va="center", color="w" if share > 0.5 else "k")
    if len(labels) <= MAX_SHOWN_CLASSES:
        axis.set_xticks(places, labels, rotation=30 if is_small else 90, ha="right" if is_small else "center")
        axis.set_yticks(places, labels)
    axis.set(title=name, xlabel="answer", ylabel="label")
