"""Records of benchmarks: which stand, and which fall."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from benchmark_parts import ENVIRONMENT, make_job, write_record

from oneday.assembly import CLASSES
from oneday.benchmarks.planning import find_machine_changes
from oneday.benchmarks.records import RecordStore, find_speed_difference
from oneday.recipe import complete_settings


def test_a_record_stands_while_nothing_changes(tmp_path):
    store = RecordStore(tmp_path, ENVIRONMENT)
    assert store.find(make_job()) is None
    write_record(tmp_path, make_job())
    assert store.find(make_job())["settings"]["seed"] == 1
    assert store.obtain([make_job()]).keys() == {"a-record"}
    moved = ENVIRONMENT | {"commit": "def", "packages": ENVIRONMENT["packages"] | {"oneday": "0.2.0"}}
    assert RecordStore(tmp_path, moved).find(make_job()), "a new commit of the same code changes nothing"


def test_a_record_that_no_longer_stands_is_set_aside(tmp_path, in_this_process):
    """On other text, say, whose run has the same name."""
    store, made = RecordStore(tmp_path, ENVIRONMENT), []

    def run(job):
        made.append(job.settings["text"])
        return {"environment": ENVIRONMENT, "text": job.settings["text"]}

    for text in ("a", "a", "b", "a"):
        job = dataclasses.replace(make_job(text=text), run=run)
        assert store.obtain([job])["a-record"]["text"] == text
    assert made == ["a", "b", "a"]
    aside = sorted(tmp_path.glob("a-record.*.replaced"))
    assert {json.loads(path.read_text())["text"] for path in aside} == {"a", "b"}
    assert json.loads((tmp_path / "a-record.json").read_text())["text"] == "a"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "Another"}, "device was A processor, now Another"),
        ({"threads": 1}, "threads was 2, now 1"),
        ({"packages": {"oneday": "0.1.0", "torch": "2.14.0"}}, "torch was 2.13.0, now 2.14.0"),
    ],
)
def test_a_record_falls_with_its_machine(tmp_path, caplog, change, words):
    caplog.set_level("INFO")
    write_record(tmp_path, make_job("stock"))
    assert RecordStore(tmp_path, ENVIRONMENT | change).find(make_job("stock")) is None
    assert words in caplog.text


def test_a_run_whose_own_settings_change_the_machine_keeps_its_record(tmp_path):
    """One of one thread, or in another precision, was never made with the threads and at the peak of the recipe."""
    job = dataclasses.replace(make_job(), machine={"threads": 1, "peak_flops": 1e12})
    write_record(tmp_path, job, ENVIRONMENT | {"threads": 1}, peak_flops_measured=1.1e12)
    store = RecordStore(tmp_path, ENVIRONMENT, peak_flops=2e11)
    assert store.find(job) and store.find(make_job()) is None
    assert store.find(dataclasses.replace(job, machine={"threads": 1})) is None
    assert store.find(dataclasses.replace(job, machine={"threads": 1, "peak_flops": None}))


def test_what_settings_change_of_the_machine(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("oneday.benchmarks.planning.measure_peak_flops", lambda *args: asked.append(args) or 3e12)
    base = {"bf16": False, "num_threads": None, "use_cpu": True, "optim": "muon", "budget_steps": 1}
    settings = complete_settings(CLASSES, base | {"output_dir": str(tmp_path)})
    assert find_machine_changes(settings, settings | {"optim": "adamw", "budget_steps": 2}) == {}
    assert find_machine_changes(settings, settings | {"bf16": True})["peak_flops"] == 3e12
    assert asked == [(torch.device("cpu"), True)]
    changed = find_machine_changes(settings, settings | {"num_threads": 3})
    assert (changed["threads"], changed["peak_flops"]) == (3, None)


def test_a_record_falls_with_its_settings(tmp_path, caplog):
    caplog.set_level("INFO")
    write_record(tmp_path, make_job("stock"))
    assert RecordStore(tmp_path, ENVIRONMENT).find(make_job("stock", seed=2)) is None
    assert "seed was 1, now 2" in caplog.text
    assert RecordStore(tmp_path, ENVIRONMENT).find(make_job("stock", new=3)) is None
    assert "new was None, now 3" in caplog.text


def test_only_our_side_falls_with_our_code(tmp_path, caplog):
    caplog.set_level("INFO")
    write_record(tmp_path, make_job(), source_hash="other")
    assert RecordStore(tmp_path, ENVIRONMENT).find(make_job("ours")) is None
    assert "code has changed" in caplog.text
    assert RecordStore(tmp_path, ENVIRONMENT, reuse_ours=True).find(make_job("ours"))
    assert RecordStore(tmp_path, ENVIRONMENT).find(make_job("stock"))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_record_falls(tmp_path, caplog, text):
    caplog.set_level("INFO")
    (tmp_path / "a-record.json").write_text(text)
    assert RecordStore(tmp_path, ENVIRONMENT).find(make_job()) is None
    assert "damaged" in caplog.text


def test_a_record_of_a_machine_of_another_speed_does_not_stand():
    record = {"peak_flops_measured": 4.0e11}
    assert find_speed_difference(record, 4.5e11) is None
    assert find_speed_difference(record, None) is None
    assert find_speed_difference(record, 7.6e11) == "the machine's peak was 0.40 TFLOP/s, now 0.76"


@pytest.mark.parametrize(
    ("details", "stands"), [({}, False), ({"budget_seconds": 9.0}, False), ({"budget_seconds": None}, True)]
)
def test_a_run_of_so_many_tokens_stands_whatever_the_machines_speed(tmp_path, details, stands):
    job = dataclasses.replace(make_job("stock"), details=details)
    write_record(tmp_path, job, peak_flops_measured=4.0e11)
    assert (RecordStore(tmp_path, ENVIRONMENT, peak_flops=7.6e11).find(job) is not None) == stands
