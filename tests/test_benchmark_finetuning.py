"""The benchmark of fine-tuning: both sides really run, on one task of a few rows."""

from __future__ import annotations

import dataclasses
import json

import pytest
from classifiers import make_args
from transformers import AutoTokenizer

from oneday.benchmarks.finetuning import compare_seconds, describe_number
from oneday.benchmarks.stock_glue import load_rows, run_glue, tokenize
from oneday.glue_protocol import complete_arguments


def make_settings(model, data_dir, tmp_path, task, **changes):
    args = complete_arguments(make_args(model, data_dir, tmp_path, **changes))
    return dataclasses.asdict(args) | {"task_name": task, "seed": 0, "bf16": False}


def test_stock_learns_from_rows_of_one_length(bert, data_dir, tmp_path):
    settings = make_settings(bert, data_dir, tmp_path, "sst2", max_train_examples=120)
    result = run_glue(settings)
    assert result["scores"]["sst2"]["accuracy"] > 0.9
    assert result["phase_seconds"].keys() == {"load", "tokenise", "train", "score"}
    assert result["threads"] == 1
    task, data = load_rows(settings)
    rows = tokenize(data["train"], task, AutoTokenizer.from_pretrained(bert), 24)
    assert len(rows) == 120 and {len(ids) for ids in rows["input_ids"]} == {24}


@pytest.mark.parametrize(("task", "number"), [("stsb", "stsb"), ("mnli", "mnli_matched")])
def test_stock_takes_decoders_and_every_kind_of_task(gpt, data_dir, tmp_path, task, number):
    settings = make_settings(gpt, data_dir, tmp_path, task, num_train_epochs=1, max_seq_length=40)
    assert run_glue(settings)["scores"].keys() == {number}


def test_from_start_to_table(run_benchmark, bert, data_dir, tmp_path, monkeypatch, in_this_process):
    monkeypatch.setattr("oneday.benchmarks.records.SAME_SPEED", 100.0)  # other tests may run beside this one
    records = tmp_path / "records"
    argv = ["finetuning", "--model_name_or_path", bert, "--task_names", "sst2", "--task_data_dir", data_dir,
            "--num_seeds", 1, "--num_train_epochs", 6, "--learning_rate", 3e-3, "--use_cpu", "--num_threads", 1,
            "--records_dir", records]  # fmt: skip
    code, table, stderr = run_benchmark(*argv)
    assert code == 0, stderr
    assert max(map(len, table.splitlines())) <= 80, table
    (summary,), (ours,), (stock,) = (
        [json.loads(path.read_text()) for path in records.glob(f"{kind}-*.json")]
        for kind in ("finetuning", "ours", "stock")
    )
    for record in (ours, stock):
        assert record["scores"]["sst2"][0] > 0.9, "it learnt something"
        assert record["seconds"] > 0 and record["threads_a_run"] == 1
        assert {"date", "environment", "seed", "settings", "peak_flops_measured"} <= record.keys()
        assert str(tmp_path.parent) not in json.dumps(record), "no path of this machine"
    assert sum(stock["phase_seconds"].values()) < stock["seconds"], "starting the process counts"
    assert summary["seconds"] == pytest.approx({"ours": ours["seconds"], "stock": stock["seconds"]})
    assert summary["seconds_ratio"] == pytest.approx(stock["seconds"] / ours["seconds"])
    tokenising = stock["phase_seconds"]["tokenise"]
    assert summary["turn_ratios"] == [pytest.approx((stock["seconds"] - tokenising) / ours["seconds"])]
    assert f"{summary['seconds_ratio']:.2f} x" in table
    assert summary["rows"][0]["scores"] == {"ours": ours["scores"]["sst2"], "stock": stock["scores"]["sst2"]}
    assert run_benchmark(*argv)[1] == table, "from the records"
    for setting, value in (("protocol", "tuned"), ("peft", "lora"), ("random_baseline", "true")):
        code, _, stderr = run_benchmark(*argv, f"--{setting}", value)
        assert code == 1 and f"an example that has no {setting}" in stderr


def test_medians_and_spreads_by_hand():
    sides = {
        "ours": [{"scores": {"rte": [0.5, 0.7, 0.6]}}],
        "stock": [{"scores": {"rte": [0.4]}}, {"scores": {"cola": [0.1]}}, {"scores": {"rte": [0.6]}}],
    }
    row = describe_number("rte", sides)
    assert row["medians"] == {"ours": 0.6, "stock": 0.5} and row["metric"] == "accuracy"
    assert row["scores"]["stock"] == [0.4, 0.6]


def test_seconds_of_turns_by_hand():
    def stock(seconds, tokenise):
        return {"seconds": seconds, "phase_seconds": {"tokenise": tokenise}}

    turns = [
        ({"seconds": 10.0}, [stock(21.0, 1.0), stock(32.0, 2.0)]),
        ({"seconds": 20.0}, [stock(31.0, 1.0), stock(52.0, 2.0)]),
    ]
    seconds, ratios = compare_seconds(turns)
    # Both seeds without tokenising (50 and 80), which the example does once (3).
    assert seconds == {"ours": 15.0, "stock": 133.0}
    assert ratios == [10.0, 8.0]
