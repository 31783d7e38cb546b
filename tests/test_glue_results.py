"""The table of scores: what it says of its runs, and which of them belong together."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from classifiers import make_args

from oneday import finetuning_processes
from oneday.finetuning import run_protocol
from oneday.glue import (
    GLUE_NUMBERS,
)
from oneday.glue_picture import draw_results
from oneday.glue_results import compare_with_full, format_results, summarize_average


def test_a_later_task_joins_the_earlier_ones_only_under_the_same_settings(bert, data_dir, tmp_path):
    """And the same inputs; of a task that is scored again on fewer splits none stays from before."""
    args = make_args(bert, data_dir, tmp_path, num_train_epochs=1, max_train_examples=16, max_eval_examples=8)
    run_protocol(args)
    assert list(run_protocol(dataclasses.replace(args, task_names=["stsb"]))["tasks"]) == ["sst2", "stsb"]
    other = dataclasses.replace(args, task_names=["stsb"], learning_rate=1e-4)
    assert list(run_protocol(other)["tasks"]) == ["stsb"]
    shutil.copytree(data_dir / "mnli", tmp_path / "both" / "mnli")
    matched = tmp_path / "both" / "mnli" / "validation_matched.jsonl"
    shutil.copy(matched, matched.with_name("validation_mismatched.jsonl"))
    of_mnli = dataclasses.replace(other, task_names=["mnli"], task_data_dir=str(tmp_path / "both"))
    assert list(run_protocol(of_mnli)["tasks"]) == ["stsb", "mnli_matched", "mnli_mismatched"]
    less = dataclasses.replace(of_mnli, task_data_dir=str(data_dir))
    assert list(run_protocol(less)["tasks"]) == ["stsb", "mnli_matched"]
    copy = shutil.copytree(bert, tmp_path / "copy")
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer | {"normalizer": {"type": "Lowercase"}}))
    assert list(run_protocol(dataclasses.replace(other, model_name_or_path=str(copy)))["tasks"]) == ["stsb"]


def test_each_number_says_on_which_machines_its_runs_were_made(bert, data_dir, tmp_path, monkeypatch):
    """Those of a finished run are not those of the call that reads it."""
    args = make_args(bert, data_dir, tmp_path, num_train_epochs=1, max_train_examples=16, max_eval_examples=8)
    first = run_protocol(args)["tasks"]["sst2"]["environments"]
    describe = finetuning_processes.describe_environment
    monkeypatch.setattr(
        finetuning_processes, "describe_environment", lambda device: describe(device) | {"commit": "another"}
    )
    assert run_protocol(args)["tasks"]["sst2"]["environments"] == first
    both = run_protocol(dataclasses.replace(args, num_seeds=2))["tasks"]["sst2"]["environments"]
    assert both == [*first, first[0] | {"commit": "another"}]
    kept = run_protocol(dataclasses.replace(args, num_seeds=2, task_names=["stsb"]))["tasks"]
    assert kept["sst2"]["environments"] == both and kept["stsb"]["environments"] == both[1:]


def test_a_dollar_in_a_label_is_drawn(tmp_path):
    labels = ["Up to $5 (5%) or $6", "<$10_$20"]
    row = {"scores": [0.5], "median": 0.5, "majority": 0.5, "metric": "accuracy", "subset": False, "labels": labels}
    results = {"protocol": "cramming", "tasks": {"price_$_vs_$_x": row}}
    draw_results(results, {"price_$_vs_$_x": np.eye(2)}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_diverge_are_counted(bert, data_dir, tmp_path, caplog):
    changes = {"num_train_epochs": 1, "max_train_examples": 32, "learning_rate": 1e30, "num_seeds": 2}
    entry = run_protocol(make_args(bert, data_dir, tmp_path, **changes))["tasks"]["sst2"]
    assert entry["diverged_runs"] == 2 and "the training diverged" in caplog.text


def test_answers_that_are_all_the_same_are_said(bert, data_dir, tmp_path, caplog):
    run_protocol(make_args(bert, data_dir, tmp_path, num_train_epochs=1, max_train_examples=16, learning_rate=1e-9))
    assert "sst2: every answer is the same" in caplog.text


def make_entry(median, subset=False):
    sizes = dict.fromkeys(("num_train", "num_validation", "official_num_train", "official_num_validation"), 10_000)
    cost = {"trainable_parameters": 180_000, "total_parameters": 6_300_000, "peak_memory_bytes": 1_020_000_000}
    cost |= {"task": "mnli", "diverged_runs": 0}
    return {"metric": "f1", "median": median, "scores": [median] * 5, "majority": 0.5, "subset": subset} | sizes | cost


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
