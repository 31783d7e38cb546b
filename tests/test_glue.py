from __future__ import annotations

import functools
import json
import logging
import math
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oneday.arguments import SettingError
from oneday.glue import (
    GLUE_NUMBERS,
    TASKS,
    expand_task_names,
    find_task,
    load_metric,
    load_task,
    normalize_labels,
    score_majority,
    score_predictions,
)
from oneday.glue_results import compare_with_full, format_results, summarize_average

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


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = ["\t".join(rows[0]), *("\t".join(str(value) for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")


def make_entry(median, subset=False):
    sizes = dict.fromkeys(("num_train", "num_validation", "official_num_train", "official_num_validation"), 10_000)
    cost = {"trainable_parameters": 180_000, "total_parameters": 6_300_000, "peak_memory_bytes": 1_020_000_000}
    cost |= {"task": "mnli", "diverged_runs": 0}
    return {"metric": "f1", "median": median, "scores": [median] * 5, "majority": 0.5, "subset": subset} | sizes | cost


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


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "tsv"])
def test_local_files_of_each_kind(tmp_path, kind):
    rows = [
        {"sentence": 'a "quote', "label": 1, "idx": 0},
        {"sentence": "NA", "label": 0, "idx": 1},
        {"sentence": "null", "label": 1, "idx": 2},
    ]
    for split in ("train", "validation"):
        write_rows(tmp_path / "sst2" / f"{split}.{kind}", rows)
    data = load_task("sst2", str(tmp_path))
    assert list(data) == ["train", "validation"]
    assert data["train"].column_names == ["sentence", "label", "row"]
    assert data["train"]["sentence"][:] == ['a "quote', "NA", "null"]
    assert data["train"]["label"][:] == [1, 0, 1]
    assert data["train"].features["label"].names == ["negative", "positive"]


def test_digits_alone_stay_text_in_a_tsv(tmp_path):
    for split in ("train", "validation"):
        write_rows(tmp_path / "sst2" / f"{split}.tsv", [{"sentence": "007", "label": 1}])
    assert load_task("sst2", str(tmp_path))["train"]["sentence"][:] == ["007"]


def test_label_names_are_mapped_and_missing_texts_are_empty(tmp_path, caplog):
    rows = [
        {"sentence1": "x", "sentence2": None, "label": "not_entailment"},
        {"sentence1": None, "sentence2": None, "label": "Entailment"},
    ]
    for split in ("train", "validation"):
        write_rows(tmp_path / "rte" / f"{split}.jsonl", rows)
    with caplog.at_level(logging.INFO):
        data = load_task("rte", str(tmp_path))
    assert data["train"]["label"][:] == [1, 0]
    assert data["train"]["sentence2"][:] == ["", ""]
    assert "label names mapped" in caplog.text and "1 rows have no text" in caplog.text


def test_a_number_that_is_not_finite_is_no_label():
    with pytest.raises(SettingError, match="the label inf, which is no finite number; correct the file"):
        normalize_labels(find_task("stsb"), "train", [1.0, float("inf")])
    with pytest.raises(SettingError, match="the label 2, outside 0..1; correct the file"):
        normalize_labels(find_task("rte"), "train", [2])


def test_regression_labels_are_floats(tmp_path):
    for split in ("train", "validation"):
        write_rows(tmp_path / "stsb" / f"{split}.tsv", [{"sentence1": "a", "sentence2": "b", "label": 3}])
    data = load_task("stsb", str(tmp_path))
    assert data["train"].features["label"].dtype == "float32" and data["train"]["label"][:] == [3.0]


def test_mnli_without_a_mismatched_split(tmp_path, caplog):
    rows = [{"premise": "a", "hypothesis": "b", "label": 2}]
    for split in ("train", "validation_matched"):
        write_rows(tmp_path / "mnli" / f"{split}.parquet", rows)
    with caplog.at_level(logging.INFO):
        data = load_task("mnli", str(tmp_path))
    assert list(data) == ["train", "validation_matched"]
    assert "no split validation_mismatched" in caplog.text


def test_diagnostics_train_on_mnli(tmp_path):
    write_rows(tmp_path / "mnli" / "train.jsonl", [{"premise": "a", "hypothesis": "b", "label": 2}] * 3)
    write_rows(tmp_path / "ax" / "test.jsonl", [{"premise": "c", "hypothesis": "d", "label": 0}])
    data = load_task("ax", str(tmp_path))
    assert (len(data["train"]), data["test"]["premise"][:]) == (3, ["c"])
    write_rows(tmp_path / "ax" / "test.jsonl", [{"premise": "c", "hypothesis": "d", "label": -1}])
    with pytest.raises(SettingError, match=r"the Hub hides them: write_submission with mnli answers .*AX.tsv"):
        load_task("ax", str(tmp_path))


@pytest.mark.parametrize("ids, rows", [([4, 2, 9], [4, 2, 9]), ([1, 1, 2], [0, 1, 2]), (["a", "b", "c"], [0, 1, 2])])
def test_rows_keep_the_ids_of_the_hub(tmp_path, ids, rows):
    for split in ("train", "validation"):
        write_rows(tmp_path / "sst2" / f"{split}.jsonl", [{"sentence": "x", "label": 1, "idx": one} for one in ids])
    assert load_task("sst2", str(tmp_path))["validation"]["row"][:] == rows


def test_a_hub_that_cannot_be_reached_gets_one_sentence(tmp_path):
    for name in ("rte", "cb"):
        with pytest.raises(SettingError, match=f"The task {name} cannot be read from the Hub .*; set task_data_dir"):
            load_task(name, cache_dir=str(tmp_path))


GOOD = [{"sentence": "x", "label": 1}]


@pytest.mark.parametrize(
    ("train", "validation", "words"),
    [
        (GOOD, None, ["sst2", "no validation split"]),
        (None, GOOD, ["sst2", "no training split"]),
        (GOOD, [{"text": "x", "label": 1}], ["sst2", "'sentence'", "text"]),
        (GOOD, [{"sentence": "x", "label": -1}], ["sst2", "validation", "-1", "0..1", "hidden test label"]),
        ([{"sentence": "x", "label": 2}], GOOD, ["sst2", "train", "2", "0..1"]),
        ([{"sentence": "x", "label": "great"}], GOOD, ["'great'", "negative, positive"]),
        ([{"sentence": "x", "label": 0.5}], GOOD, ["0.5", "0..1"]),
        ([{"sentence": "x", "label": None}], GOOD, ["None"]),
    ],
)
def test_bad_data_gets_one_sentence(tmp_path, train, validation, words):
    for split, rows in (("train", train), ("validation", validation)):
        if rows is not None:
            write_rows(tmp_path / "sst2" / f"{split}.jsonl", rows)
    (tmp_path / "sst2").mkdir(exist_ok=True)
    with pytest.raises(SettingError) as caught:
        load_task("sst2", str(tmp_path))
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_unreadable_file_and_missing_folder_get_one_sentence(tmp_path):
    with pytest.raises(SettingError, match="has no folder rte"):
        load_task("rte", str(tmp_path))
    (tmp_path / "rte").mkdir()
    (tmp_path / "rte" / "train.parquet").write_text("not parquet")
    with pytest.raises(SettingError, match="train.parquet cannot be read"):
        load_task("rte", str(tmp_path))


def test_unknown_task_names_the_nearest():
    with pytest.raises(SettingError, match="'sst2'"):
        find_task("sst-2")
    assert expand_task_names(["rte", "glue"])[0] == "rte" and len(expand_task_names(["rte", "glue"])) == 8


def test_only_nine_complete_numbers_make_the_glue_average():
    nine = {name: make_entry(0.1 * index) for index, name in enumerate(GLUE_NUMBERS)}
    full = summarize_average(nine | {"wnli": make_entry(1.0)})
    assert full["average_name"] == "GLUE average" and full["average"] == pytest.approx(0.4)
    assert full["average_over"] == list(GLUE_NUMBERS)
    eight = {name: entry for name, entry in nine.items() if name != "mnli_mismatched"}
    for tasks, count in ((eight, 8), (nine | {"qnli": make_entry(0.3, subset=True)}, 9)):
        partial = summarize_average(tasks)
        assert partial["average_name"] == f"average of {', '.join(tasks)}"
        assert len(tasks) == count and partial["average_over"] == list(tasks)


def test_table_fits_80_columns_and_says_what_did_not_help():
    tasks = {name: make_entry(0.5 + 0.05 * index) for index, name in enumerate(GLUE_NUMBERS)}
    tasks["mnli_mismatched"] = make_entry(1.0, subset=True) | {"metric": "matthews_correlation", "scores": [1.0, 1.0]}
    tasks["a task of one's own"] = make_entry(1.0, subset=True) | {"task": "a task of one's own"}
    tasks["rte"] = make_entry(0.6) | {"random_weights": {"median": 0.7, "scores": [0.7]}}
    header = {"tasks": tasks, "protocol": "custom", "device": "cpu", "settings": {"peft": "lora"}}
    chosen = {"learning_rate": 4e-5, "num_train_epochs": 1.0}
    chosen_for_sst2 = chosen | {"num_train_epochs": 2.5}
    tasks["cola"] |= {"tuning": {"pretrained": {"chosen": chosen, "num_held_out": 1710, "seeds": [5]}}}
    tasks["sst2"] |= {"tuning": {"pretrained": {"chosen": chosen_for_sst2, "num_held_out": 32, "seeds": [5, 6]}}}
    tasks["qnli"]["diverged_runs"] = 2
    table = format_results(header | summarize_average(tasks))
    assert "qnli: 2 of its runs diverged" in table and "qqp: 2" not in table
    assert "cola: learning rate 4e-05, 1 epoch, chosen on 1,710 held-out rows" in table
    assert "4e-05, 2.5 epochs, chosen on 2 x 32 held-out rows" in table
    assert max(map(len, table.splitlines())) <= 80
    assert "rte: pretraining does not help here" in table and "-10.0" in table
    assert "qqp: pretraining" not in table
    assert table.count("no official score") == 1
    assert "* a task of one's: 10,000 of 10,000 training rows, 10,000 of 10,000 scored" in table
    assert "lora: 0.18 M of 6.30 M parameters, peak memory 1.02 GB of the process" in table
    assert "average of 10 numbers" in table and "GLUE average" not in table and "protocol: custom" in table


def test_adapters_stand_beside_all_weights_only_where_the_rows_are_the_same():
    entries = [make_entry(0.5) | {"data_hash": rows} for rows in ("some", "others")]
    of_adapters = {"weights_hash": "w", "settings": {"peft": "lora"}, "tasks": {"rte": entries[0], "sst2": entries[0]}}
    full = {"weights_hash": "w", "settings": {"peft": None}, "protocol": "cramming", "device": "cpu"}
    full["tasks"] = {"rte": entries[0], "sst2": entries[1]}
    lines = compare_with_full(of_adapters, full)
    assert len(lines) == 3 and lines[1].split() == ["rte", "50.0", "/", "50.0"]
    assert compare_with_full(of_adapters, full | {"weights_hash": "v"}) == compare_with_full(of_adapters, {}) == []
    assert compare_with_full(of_adapters, full | {"tasks": {"rte": entries[0] | {"metric": "accuracy"}}}) == []


@pytest.mark.parametrize(
    ("name", "files"),
    [("rte", ["rte/train", "rte/validation"]), ("ax", ["mnli/train", "ax/test"]),
     ("mnli", ["mnli/train", "mnli/validation_matched", "mnli/validation_mismatched"])],
)  # fmt: skip
def test_a_hub_out_of_reach_names_the_files_that_serve(monkeypatch, name, files):
    def fail(*arguments, **settings):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(SettingError, match="no network") as said:
        load_task(name, None)
    assert f"a directory with {' and '.join(f'{file}.parquet' for file in files)}." in str(said.value)


def test_scores_of_a_task_cover_its_metrics():
    scores = score_predictions(find_task("mrpc"), np.array([1, 0, 1]), np.array([1, 1, 1]))
    assert scores == pytest.approx({"f1": 0.8, "accuracy": 2 / 3})


@pytest.mark.skipif("ONEDAY_DATA" not in os.environ, reason="needs ONEDAY_DATA, a directory with glue/<task>")
@pytest.mark.parametrize("name", ["rte", "mrpc", "cola", "stsb", "wnli"])
def test_real_tasks_have_their_official_sizes(name):
    data = load_task(name, os.path.join(os.environ["ONEDAY_DATA"], "glue"))
    assert len(data["train"]) == find_task(name).num_train
    assert len(data["validation"]) == find_task(name).num_validation[0]
