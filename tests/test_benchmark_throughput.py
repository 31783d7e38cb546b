"""Throughput over a grid."""

from __future__ import annotations

import itertools
import json
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROW_LENGTH

from oneday.assembly import CLASSES
from oneday.benchmarks.planning import Plan
from oneday.benchmarks.records import RecordStore
from oneday.benchmarks.throughput import describe_peaks, measure_throughput, pick_figures
from oneday.benchmarks.throughput import format_table as format_grid
from oneday.benchmarks.throughput import make_job as make_throughput_job
from oneday.errors import SettingError
from oneday.recipe import complete_settings
from oneday.throughput import has_fast_bf16
from oneday.trainer import BudgetTrainer


def test_throughput_over_a_grid_with_a_point_that_cannot_run(run_benchmark, recipe, tmp_path, in_this_process):
    records = tmp_path / "records"
    code, table, stderr = run_benchmark(
        "throughput", recipe, "--grid", "optim=adamw,adamw_9bit", "--measure_seconds", 0.5, "--records_dir", records
    )
    assert code == 0, stderr
    assert max(map(len, table.splitlines())) <= 80, table
    assert "cannot run: The setting optim is 'adamw_9bit'" in " ".join(table.split())
    precision = "bfloat16" if has_fast_bf16(torch.device("cpu")) else "float32"
    assert "beside each point's own steps, " in " ".join(table.split()) and f" TFLOP/s in {precision};" in table
    record = json.loads((records / "throughput-mini-pretrain-optim=adamw.json").read_text())
    assert record["tokens_per_second"] > 0
    assert record["mfu"] == pytest.approx(record["flops_per_second"] / record["peak_flops_measured"])
    steps = record["step_seconds"]
    assert all(0 < steps[name] < steps["step"] for name in ("data", "forward_backward", "optimizer"))
    assert steps["data"] + steps["forward_backward"] + steps["optimizer"] == pytest.approx(steps["step"], rel=0.3)
    assert 8 * record["num_parameters"] == pytest.approx(record["optimizer_state_bytes"], rel=0.01), "two moments"
    assert record["batch_size_tokens"] == record["micro_batch_tokens"] == 512
    summary = json.loads((records / "throughput-mini-pretrain.json").read_text())
    assert [row["point"]["optim"] for row in summary["rows"]] == ["adamw", "adamw_9bit"]
    assert summary["environment"]["packages"]["torch"] == metadata.version("torch")


def make_point(recipe, tmp_path, **point):
    plan = Plan("tiny", complete_settings(CLASSES, yaml.safe_load(recipe.read_text())), RecordStore(tmp_path, {}))
    return make_throughput_job(plan, point, 0.2)


def test_throughput_says_what_micro_batch_ran(recipe, tmp_path, monkeypatch):
    """A batch of 512 tokens caps it; a memory that does not hold it makes the point one that cannot run."""
    monkeypatch.setenv("ONEDAY_CACHE", str(tmp_path / "cache"))
    job = make_point(recipe, tmp_path, micro_batch_tokens=4096)
    record = measure_throughput(job) | {"name": job.name, "seed": 1}
    assert (record["batch_size_tokens"], record["micro_batch_tokens"]) == (512, 512)
    row = {"point": {"micro_batch_tokens": 4096}} | pick_figures(record)
    assert "ran in micro-batches of 512 tokens" in format_grid(SimpleNamespace(
        name="tiny", store=SimpleNamespace(environment=record["environment"])), [row], [record])  # fmt: skip

    def refuse(trainer, model, batch, counts, backward=BudgetTrainer.backward):
        if batch.inputs["input_ids"].numel() > 128:
            raise torch.OutOfMemoryError("injected")
        return backward(trainer, model, batch, counts)

    monkeypatch.setattr(BudgetTrainer, "backward", refuse)
    assert measure_throughput(make_point(recipe, tmp_path, micro_batch_tokens=128))["micro_batch_tokens"] == 128
    with pytest.raises(SettingError, match="does not hold a micro-batch of 256 tokens; it held 128"):
        measure_throughput(make_point(recipe, tmp_path, micro_batch_tokens=256))


def test_peaks_are_named_as_the_points_have_them():
    points = [("float32", 0.93e12), ("bfloat16 autocast", 1.8e12), ("float32", 0.91e12)]
    points.append(("bfloat16, float32 master weights", 1.8001e12))
    records = [{"precision": precision, "peak_flops_measured": peak} for precision, peak in points]
    assert describe_peaks(records) == "0.910 to 0.930 TFLOP/s in float32, 1.800 TFLOP/s in bfloat16"


def test_a_stream_that_breaks_off_gives_no_rate(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("ONEDAY_CACHE", str(tmp_path / "cache"))
    fits = itertools.chain([True] * 4, [SettingError("a file is damaged")])

    def next_step_fits(trainer):
        found = next(fits)
        if found is not True:
            raise found
        return True

    monkeypatch.setattr("oneday.trainer.BudgetTrainer.next_step_fits", next_step_fits)
    with pytest.raises(SettingError, match="a file is damaged"):
        measure_throughput(make_point(recipe, tmp_path))


def test_rows_that_grow_are_measured_at_their_full_length(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("ONEDAY_CACHE", str(tmp_path / "cache"))
    job = make_point(recipe, tmp_path, max_seq_length_start=ROW_LENGTH // 2)
    assert job.recipe["max_seq_length_start"] == ROW_LENGTH // 2, "asked for by name"
    settings = yaml.safe_load(recipe.read_text()) | {"max_seq_length_start": ROW_LENGTH // 2}
    recipe.write_text(yaml.safe_dump(settings))
    assert make_point(recipe, tmp_path).recipe["max_seq_length_start"] is None
