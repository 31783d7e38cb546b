"""Accuracy, F1, Matthews, Pearson and Spearman for `evaluate`, one configuration each; works without a network.

`evaluate` reads the imports of this file by itself, so each stands on its own line.
"""

import logging
import math
import warnings

import datasets
import evaluate
import numpy as np
import scipy.stats
import sklearn.metrics

logger = logging.getLogger(__name__)

REGRESSION = ("pearson", "spearmanr")


def compute_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """F1 of the class 1; 0 when there is neither a positive label nor a positive prediction."""
    return sklearn.metrics.f1_score(labels, predictions, pos_label=1, zero_division=0.0)


def compute_macro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """The mean over the classes of their F1, unweighted."""
    return sklearn.metrics.f1_score(labels, predictions, average="macro", zero_division=0.0)


def compute_pearson(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Pearson's correlation; nan when either side is constant, or one row alone."""
    if len(labels) < 2:
        return float("nan")
    return scipy.stats.pearsonr(predictions, labels).statistic


def compute_spearman(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Spearman's rank correlation, ties at their mean rank; nan when either side is constant."""
    return scipy.stats.spearmanr(predictions, labels).statistic


COMPUTE = {
    "accuracy": sklearn.metrics.accuracy_score,
    "f1": compute_f1,
    "f1_macro": compute_macro_f1,
    "matthews_correlation": sklearn.metrics.matthews_corrcoef,
    "pearson": compute_pearson,
    "spearmanr": compute_spearman,
}


class GlueMetric(evaluate.Metric):
    """One number from predictions and references, chosen by the configuration's name."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in COMPUTE:
            raise KeyError(f"unknown configuration {self.config_name!r}; there are {sorted(COMPUTE)}")
        kind = datasets.Value("float64" if self.config_name in REGRESSION else "int64")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions and references: class ids, or numbers for pearson and spearmanr",
            features=datasets.Features({"predictions": kind, "references": kind}),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        # Not through `format="numpy"`, which would round the numbers to float32.
        predictions, references = np.asarray(predictions), np.asarray(references)
        with warnings.catch_warnings():
            # One sentence of our own below instead of each library's.
            warnings.simplefilter("ignore")
            value = float(COMPUTE[self.config_name](references, predictions))
        if not math.isfinite(value):
            logger.warning("%s is not defined here (constant or non-finite values); 0.0 is used", self.config_name)
            value = 0.0
        return {self.config_name: value}
