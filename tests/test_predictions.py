"""What is kept of a run's answers, and the submission files that are made of it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from oneday.classification import PreparedTask
from oneday.glue import find_task
from oneday.glue_picture import count_confusions
from oneday.predictions import (
    are_answered,
    read_test_splits,
    remove_submission,
    spell_answer,
    write_predictions,
    write_submission,
)

PAIRS = [{"premise": "a", "hypothesis": str(number), "label": -1, "idx": number} for number in range(3)]


def prepare(name, labels, tests):
    rows = Dataset.from_dict({"label": labels, "row": [7, 5, 6][: len(labels)]})
    tests = {file: Dataset.from_dict({"label": [0] * 3, "row": [2, 0, 1]}) for file in tests}
    split = find_task(name).validation_splits[0]
    return PreparedTask(find_task(name), {"train": rows, split: rows}, "hash", tests)


def test_predictions_hold_row_label_answer_and_outputs(tmp_path):
    outputs = np.array([[0.1, 0.9], [2.0, -1.0], [0.3, 0.2]], np.float32)
    write_predictions(tmp_path, prepare("rte", [1, 1, 0], ["RTE"]), {"validation": outputs, "RTE": outputs})
    table = pq.read_table(tmp_path / "validation.parquet").to_pydict()
    assert (table["row"], table["label"], table["prediction"]) == ([7, 5, 6], [1, 1, 0], [1, 0, 0])
    assert np.array_equal(np.array(table["logits"], np.float32), outputs)
    assert pq.read_table(tmp_path / "RTE.parquet").column_names == ["row", "prediction", "logits"]


@pytest.mark.parametrize("file", ["validation.parquet", "RTE.parquet"])
def test_answers_that_are_gone_or_torn_are_none(tmp_path, file):
    """A disk that lost its power may leave a file without its bytes."""
    task = prepare("rte", [1, 1, 0], ["RTE"])
    outputs = np.zeros((3, 2), np.float32)
    write_predictions(tmp_path, task, {"validation": outputs, "RTE": outputs})
    assert are_answered(tmp_path, task)
    assert not are_answered(
        tmp_path, dataclasses.replace(task, test_splits=prepare("rte", [1], ["other"]).test_splits)
    )
    content = (tmp_path / file).read_bytes()
    for left in (content[: len(content) // 2], b""):
        (tmp_path / file).write_bytes(left)
        assert not are_answered(tmp_path, task)
    (tmp_path / file).unlink()
    assert not are_answered(tmp_path, task)


def test_confusions_count_labels_down_and_answers_across(tmp_path):
    outputs = np.array([[0.1, 0.9], [2.0, -1.0], [0.3, 0.2]], np.float32)
    write_predictions(tmp_path, prepare("rte", [1, 1, 0], []), {"validation": outputs})
    path = tmp_path / "validation.parquet"
    assert count_confusions([path, path], 2).tolist() == [[2, 0], [2, 2]]


def test_submission_is_the_median_runs_in_the_servers_words(tmp_path):
    prepared = prepare("mnli", [0, 1, 2], ["MNLI-m", "AX"])
    runs = []
    for score, answer in ((0.5, 0), (0.9, 1), (0.6, 2)):
        folder = tmp_path / f"run{answer}"
        outputs = np.eye(3)[[answer, 0, 1]]
        write_predictions(folder, prepared, {"MNLI-m": outputs, "AX": outputs})
        runs.append(({"seed": 4 + answer, "scores": {"mnli_matched": {"accuracy": score}}}, folder))
    assert write_submission(tmp_path, prepared, runs) == {"seed": 6, "files": ["MNLI-m.tsv", "AX.tsv"]}
    assert sorted(path.name for path in (tmp_path / "submission").iterdir()) == ["AX.tsv", "MNLI-m.tsv"]
    expected = "index\tprediction\n0\tentailment\n1\tneutral\n2\tcontradiction\n"
    assert (tmp_path / "submission" / "MNLI-m.tsv").read_text() == expected
    remove_submission(tmp_path, ["rte"])
    assert len(list((tmp_path / "submission").iterdir())) == 2
    remove_submission(tmp_path, ["rte", "mnli"])
    assert not list((tmp_path / "submission").iterdir())


@pytest.mark.parametrize(
    ("name", "answer", "text"),
    [("qnli", 1, "not_entailment"), ("rte", 0, "entailment"), ("wnli", 1, "1"), ("cola", 0, "0"), ("mrpc", 1, "1"),
     ("stsb", 2.71828, "2.718"), ("stsb", 5.3, "5.000"), ("stsb", -0.1, "0.000")],
)  # fmt: skip
def test_answers_are_spelt_as_the_server_reads_them(name, answer, text):
    assert spell_answer(find_task(name), answer) == text


def test_hidden_labels_are_no_error_and_diagnostics_go_with_mnli(tmp_path):
    for task, split in (("mnli", "test_matched"), ("mnli", "test_mismatched"), ("ax", "test")):
        (tmp_path / task).mkdir(exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in PAIRS)
        (tmp_path / task / f"{split}.jsonl").write_text(lines)
    found = read_test_splits("mnli", str(tmp_path), None)
    assert list(found) == ["MNLI-m", "MNLI-mm", "AX"]
    assert found["AX"]["hypothesis"][:] == ["0", "1", "2"]


def test_what_has_no_test_rows_is_said_and_left_out(tmp_path, caplog):
    for task, split in (("mnli", "test_matched"), ("rte", "train")):
        (tmp_path / task).mkdir()
        (tmp_path / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    assert list(read_test_splits("mnli", str(tmp_path), None)) == ["MNLI-m"]
    assert read_test_splits("rte", str(tmp_path), None) == {}
    assert read_test_splits("boolq", str(tmp_path), None) == {}
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert "mnli has no split test_mismatched in" in said[0] and "rte has no split test in" in said[1]
    assert "takes no file for boolq" in said[2]
