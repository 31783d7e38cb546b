"""What is kept of a run's answers, and the submission files that are made of it."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from classifiers import make_args, make_texts
from datasets import Dataset

from oneday.classification import PreparedTask
from oneday.errors import SettingError
from oneday.finetuning import run_protocol
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


def test_answers_are_kept_in_the_order_of_the_rows_and_submitted(bert, data_dir, tmp_path):
    folder = tmp_path / "tasks" / "sst2"
    shutil.copytree(data_dir / "sst2", folder)
    texts = [row["sentence"] + " town" * (index % 9) for index, row in enumerate(make_texts(60))]  # of many lengths
    truth = [index % 2 for index in range(60)]
    for split, labels in (("validation", truth), ("test", [-1] * 60)):
        rows = [{"sentence": text, "label": label} for text, label in zip(texts, labels)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = make_args(bert, tmp_path / "tasks", tmp_path, max_eval_examples=50)
    median = run_protocol(dataclasses.replace(args, save_models=True))["tasks"]["sst2"]["median"]
    (path,) = (tmp_path / "out" / "runs").glob("*/validation.parquet")
    kept = pq.read_table(path).to_pydict()
    assert len(set(kept["row"])) == 50 and [truth[row] for row in kept["row"]] == kept["label"]
    right = [label == answer for label, answer in zip(kept["label"], kept["prediction"])]
    assert sum(right) / 50 == pytest.approx(median) and median > 0.9
    counts = count_confusions([path], 2)
    assert counts.sum() == 50 and np.trace(counts) == sum(right)
    assert (tmp_path / "out" / "glue_results.png").stat().st_size > 10_000
    # The finished run has no answers to the test split yet: asked for these, it is run again.
    asked = dataclasses.replace(args, write_submission=True, random_baseline=True)
    entry = run_protocol(asked)["tasks"]["sst2"]
    assert entry["submission"] == {"seed": 0, "files": ["SST-2.tsv"]}
    assert (path.parent / "model" / "config.json").exists(), "the model kept before"
    (random,) = (tmp_path / "out" / "runs").glob("sst2-random-*")
    assert [file.name for file in random.iterdir()] == ["validation.parquet"]
    lines = (tmp_path / "out" / "submission" / "SST-2.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction" and [line.split("\t")[0] for line in lines[1:]] == [*map(str, range(60))]
    answers = [int(line.split("\t")[1]) for line in lines[1:]]
    assert sum(answer == label for answer, label in zip(answers, truth)) / 60 > 0.9
    # Other test rows under the same name are answered anew.
    (folder / "test.jsonl").write_text(json.dumps({"sentence": texts[0], "label": -1}) + "\n")
    run_protocol(asked)
    assert (tmp_path / "out" / "submission" / "SST-2.tsv").read_text() == "\n".join(lines[:2]) + "\n"
    # All files of a submission are of one table of scores; what is not of it is not taken away.
    for name in ("RTE.tsv", "notes.txt"):
        (tmp_path / "out" / "submission" / name).write_text("mine")
    run_protocol(asked)
    assert (tmp_path / "out" / "submission" / "RTE.tsv").exists()
    with (folder / "train.jsonl").open("a") as file:
        file.write(json.dumps({"sentence": "one more good film", "label": 1}) + "\n")
    run_protocol(dataclasses.replace(asked, write_submission=False, random_baseline=False))
    left = {path.name for path in (tmp_path / "out" / "submission").iterdir()}
    assert left == {"RTE.tsv", "notes.txt"}, "answers of a model that was trained on other rows go"
    other = dataclasses.replace(asked, learning_rate=1e-3, num_train_epochs=1)
    run_protocol(dataclasses.replace(other, write_submission=False))
    run_protocol(other)
    assert {path.name for path in (tmp_path / "out" / "submission").iterdir()} == {"SST-2.tsv", "notes.txt"}
    # A merged model too is kept where the same run is asked for its answers alone.
    lora = dataclasses.replace(args, peft="lora", output_dir=str(tmp_path / "lora"))
    run_protocol(dataclasses.replace(lora, save_models=True, merge_adapters=True))
    run_protocol(dataclasses.replace(lora, write_submission=True))
    assert (tmp_path / "lora" / "submission" / "SST-2.tsv").is_file()
    assert len(list((tmp_path / "lora" / "runs").glob("*/model/config.json"))) == 1


def test_a_task_without_test_rows_is_left_out_of_the_submission(bert, data_dir, tmp_path, caplog):
    tasks = tmp_path / "tasks"
    shutil.copytree(data_dir, tasks)
    shutil.copy(tasks / "sst2" / "validation.jsonl", tasks / "sst2" / "test.jsonl")
    shared = {"num_train_epochs": 1, "max_train_examples": 16, "write_submission": True, "num_seeds": 2, "seed": 3}
    results = run_protocol(make_args(bert, tasks, tmp_path, task_names=["stsb", "sst2"], **shared))
    assert caplog.text.count("write_submission: stsb has no split test") == 1
    assert [path.name for path in (tmp_path / "out" / "submission").iterdir()] == ["SST-2.tsv"]
    assert "submission" not in results["tasks"]["stsb"]
    entry = results["tasks"]["sst2"]
    lower = entry["seeds"][entry["scores"].index(min(entry["scores"]))]
    assert entry["submission"] == {"seed": lower, "files": ["SST-2.tsv"]}
    args = make_args(bert, tasks, tmp_path, task_names=["stsb"], output_dir=str(tmp_path / "none"), **shared)
    with pytest.raises(SettingError, match="no task of task_names has a test split"):
        run_protocol(args)
    assert not (tmp_path / "none").exists()
