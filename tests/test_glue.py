"""The table of tasks and its metrics, against scikit-learn and scipy."""

from __future__ import annotations

import functools
import logging
import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oneday.errors import SettingError
from oneday.glue import (
    GLUE_NUMBERS,
    TASKS,
    expand_task_names,
    find_task,
    load_metric,
    score_majority,
    score_predictions,
)

# The Hub's columns (nyu-mll/glue and aps/super_glue), label names in the order of their ids, and rows, written down
# apart from the table under test.
HUB = {
    "cola": ("sentence", "unacceptable acceptable", 8551, 1043),
    "sst2": ("sentence", "negative positive", 67349, 872),
    "mrpc": ("sentence1 sentence2", "not_equivalent equivalent", 3668, 408),
    "stsb": ("sentence1 sentence2", "", 5749, 1500),
    "qqp": ("question1 question2", "not_duplicate duplicate", 363846, 40430),
    "mnli": ("premise hypothesis", "entailment neutral contradiction", 392702, 9815),
    "qnli": ("question sentence", "entailment not_entailment", 104743, 5463),
    "rte": ("sentence1 sentence2", "entailment not_entailment", 2490, 277),
    "wnli": ("sentence1 sentence2", "not_entailment entailment", 635, 71),
    "ax": ("premise hypothesis", "entailment neutral contradiction", 392702, 1104),
    "boolq": ("question passage", "False True", 9427, 3270),
    "cb": ("premise hypothesis", "entailment contradiction neutral", 250, 56),
    "copa": ("premise question choice1 choice2", "choice1 choice2", 400, 100),
}


@pytest.mark.parametrize("name", HUB)
def test_row_has_the_hubs_columns_labels_and_sizes(name):
    columns, labels, num_train, num_validation = HUB[name]
    task = find_task(name)
    assert task.columns == tuple(columns.split())
    assert task.label_names == tuple(labels.split())
    assert task.num_labels == (len(labels.split()) or 1)
    assert (task.num_train, task.num_validation[0]) == (num_train, num_validation)


def test_every_row_is_whole():
    for name, task in TASKS.items():
        assert task.name == name
        assert not task.num_validation or len(task.num_validation) == len(task.validation_splits)
        for metric in task.metrics:
            load_metric(metric)
    numbers = {task.name_number(split) for task in TASKS.values() for split in task.validation_splits}
    assert set(GLUE_NUMBERS) <= numbers and len(GLUE_NUMBERS) == 9


@pytest.mark.parametrize("seed", range(3))
def test_metrics_equal_sklearn_and_scipy(seed):
    rng = np.random.default_rng(seed)
    labels, predictions = rng.integers(0, 2, (2, 50))
    truth, guess = rng.normal(size=(2, 50)).round(1)
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(labels, predictions),
        "f1": sklearn.metrics.f1_score(labels, predictions),
        "f1_macro": sklearn.metrics.f1_score(labels, predictions, average="macro"),
        "matthews_correlation": sklearn.metrics.matthews_corrcoef(labels, predictions),
    }
    for name, value in expected.items():
        assert load_metric(name).compute(predictions=predictions, references=labels)[name] == pytest.approx(
            value, abs=1e-12
        )
    correlations = {"pearson": scipy.stats.pearsonr, "spearmanr": scipy.stats.spearmanr}
    for name, function in correlations.items():
        value = load_metric(name).compute(predictions=guess, references=truth)[name]
        assert value == pytest.approx(function(truth, guess).statistic, abs=1e-12)


OUTPUTS = st.one_of(st.sampled_from([0.0, 1.0, 2.5, math.nan, math.inf]), st.floats(-1e3, 1e3))
EXPECTED = {
    "accuracy": sklearn.metrics.accuracy_score,
    "f1_macro": functools.partial(sklearn.metrics.f1_score, average="macro", zero_division=0.0),
    "matthews_correlation": sklearn.metrics.matthews_corrcoef,
    "pearson": lambda truth, guess: scipy.stats.pearsonr(truth, guess).statistic,
    "spearmanr": lambda truth, guess: scipy.stats.spearmanr(truth, guess).statistic,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXPECTED)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_metrics_of_any_answers_equal_sklearn_and_scipy_or_are_zero_with_a_warning(name, data, caplog):
    """Any number of classes, ties, constant answers, and the nan and inf of a training that diverged."""
    is_regression = name in ("pearson", "spearmanr")
    size = data.draw(st.integers(2, 12))
    values = (st.sampled_from([0.0, 1.25, 3.4, 5.0]), OUTPUTS) if is_regression else (st.integers(0, 4),) * 2
    truth, guess = (data.draw(st.lists(kind, min_size=size, max_size=size)) for kind in values)
    caplog.clear()
    score = load_metric(name).compute(predictions=guess, references=truth)[name]
    expected = float(EXPECTED[name](truth, guess))
    assert score == pytest.approx(expected if math.isfinite(expected) else 0.0, abs=1e-12)
    assert ("0.0 is used" in caplog.text) == (not math.isfinite(expected))


def test_metrics_by_hand():
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
    labels = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    predictions = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    scores = {
        name: load_metric(name).compute(predictions=predictions, references=labels)[name]
        for name in ("accuracy", "f1", "matthews_correlation")
    }
    assert scores["accuracy"] == pytest.approx(0.7)
    assert scores["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert scores["matthews_correlation"] == pytest.approx((3 * 4 - 1 * 2) / np.sqrt(4 * 5 * 5 * 6))


@pytest.mark.parametrize("name", ["pearson", "spearmanr"])
@pytest.mark.parametrize("predictions", [[2.0, 2.0, 2.0], [np.nan, 1.0, 2.0]])
def test_undefined_correlation_is_zero_with_a_warning(name, predictions, caplog):
    with caplog.at_level(logging.WARNING):
        assert load_metric(name).compute(predictions=predictions, references=[1.0, 2.0, 3.0]) == {name: 0.0}
    assert "0.0 is used" in caplog.text


@pytest.mark.parametrize("name", ["f1", "matthews_correlation"])
def test_one_class_only_is_zero(name):
    assert load_metric(name).compute(predictions=[0, 0, 0], references=[0, 0, 0]) == {name: 0.0}


def test_majority_is_taken_from_the_training_split():
    train, labels = np.array([1, 1, 0]), np.array([1, 0, 0, 0])
    assert score_majority(find_task("rte"), train, labels) == 0.25
    assert score_majority(find_task("stsb"), train.astype(float), labels.astype(float)) == 0.0


def test_unknown_task_names_the_nearest():
    with pytest.raises(SettingError, match="'sst2'"):
        find_task("sst-2")
    assert expand_task_names(["rte", "glue"])[0] == "rte" and len(expand_task_names(["rte", "glue"])) == 8


def test_scores_of_a_task_cover_its_metrics():
    scores = score_predictions(find_task("mrpc"), np.array([1, 0, 1]), np.array([1, 1, 1]))
    assert scores == pytest.approx({"f1": 0.8, "accuracy": 2 / 3})


@pytest.mark.parametrize("name", ["pearson", "spearmanr", "matthews_correlation"])
def test_a_correlation_of_one_row_is_zero(name):
    kind = int if name == "matthews_correlation" else float
    assert load_metric(name).compute(predictions=[kind(1)], references=[kind(1)])[name] == 0.0
