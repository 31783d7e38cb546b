"""Disks that are full, slow or gone while a run writes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from conftest import StopAt
from program_parts import SMALL, flags

from oneday import run_directory as rundir
from oneday import saving
from oneday.beating import heartbeat
from oneday.checkpoints import find_fault, list_checkpoints
from oneday.durable_files import write_json
from oneday.errors import SettingError
from oneday.pretraining import perform_run
from oneday.run_directory import append_metrics, is_disk_full, lock_run, read_metrics


def test_a_full_disk_at_the_reports_is_one_sentence(make_trainer):
    """The model is there, and the same command makes them."""

    def fill_disk(metrics):
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = make_trainer("bert", budget_steps=2)
    with pytest.raises(SettingError, match="The disk of output_dir .* is full"):
        perform_run(trainer, "new", fill_disk)
    assert (Path(trainer.args.output_dir) / "model.safetensors").exists()


def test_a_disk_that_has_gone_does_not_say_how_full_it_is(tmp_path):
    stale = OSError(errno.ESTALE, "Stale file handle")
    assert not is_disk_full(stale, tmp_path / "gone") and is_disk_full(OSError(errno.ENOSPC, ""), tmp_path / "gone")


def test_a_line_of_the_metrics_that_a_disk_refuses_does_not_end_the_training(make_trainer, monkeypatch, caplog):
    trainer = make_trainer("bert", "stumbling", budget_steps=4)
    dump = json.dumps

    def stumble(event, **given):
        if isinstance(event, dict) and event.get("event") == "step" and event["step"] == 2:
            raise OSError(errno.ESTALE, "Stale file handle")
        return dump(event, **given)

    monkeypatch.setattr("oneday.durable_files.json.dumps", stumble)
    trainer.run()
    assert "It was not written (Stale file handle): step of step 2 is not in metrics.jsonl" in caplog.text
    monkeypatch.undo()
    steps = [event["step"] for event in read_metrics(trainer.args.output_dir) if event["event"] == "step"]
    assert steps == [1, 3, 4]


def test_a_full_disk_at_a_checkpoint_does_not_end_the_training(make_trainer, monkeypatch, caplog):
    publish = saving.publish_checkpoint
    calls = []

    def fail_once(source, target):
        calls.append(target.name)
        if target.name == "checkpoint-4":
            (source / "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        publish(source, target)

    monkeypatch.setattr(saving, "publish_checkpoint", fail_once)
    trainer = make_trainer("bert", budget_steps=7, save_steps=2)
    trainer.run()
    folder = Path(trainer.args.output_dir)
    assert calls == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert "The checkpoint of step 4 was not written: the disk is full" in caplog.text
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-6"]
    assert not list(folder.glob(".staging*")) and trainer.clock.steps == 7


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full(make_trainer, tmp_path, caplog):
    """Something else fills it after six steps: the training goes to its end, and only the final model is refused."""
    disk = tmp_path / "run"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")

    class Filler(StopAt):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == self.step:
                with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as handle:
                    while True:
                        handle.write(bytes(4096))

    try:
        trainer = make_trainer("bert", budget_steps=12, save_steps=4, save_total_limit=5)
        trainer.add_callback(Filler(6))
        with pytest.raises(SettingError, match="is full"):
            trainer.run()
        assert trainer.clock.steps == 12
        assert "The checkpoint of step 8 was not written: the disk is full" in caplog.text
        checkpoints = list_checkpoints(disk)
        assert [path.name for path in checkpoints] == ["checkpoint-4", "checkpoint-6"]
        assert not any(find_fault(checkpoint) for checkpoint in checkpoints)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_long_step_is_on_the_heartbeat(make_trainer, monkeypatch):
    """The process may be killed within a step of minutes: what it has spent is on the disk all the same."""
    trainer = make_trainer("bert", budget_minutes=1, budget_steps=2)
    path = Path(trainer.args.output_dir) / "budget.json"
    seen = []

    class Slow(StopAt):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                time.sleep(4.5)
                seen.append(json.loads(path.read_text())["spent"]["seconds"])

    trainer.add_callback(Slow(0))
    trainer.run()
    assert seen[0] > 1.5


def test_a_stumble_of_the_disk_at_the_last_beat_ends_no_run(caplog):
    def stumble():
        raise OSError(errno.EIO, "Input/output error")

    with heartbeat(stumble):
        pass
    assert "budget.json was not written" in caplog.text
    with pytest.raises(KeyboardInterrupt), heartbeat(stumble):
        raise KeyboardInterrupt


def test_a_file_system_without_locks_is_no_other_process(tmp_path, monkeypatch, caplog):
    def refuse(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    first = lock_run(tmp_path)
    with pytest.raises(SettingError, match="Another process is training"):
        lock_run(tmp_path)
    first.close()
    monkeypatch.setattr("oneday.run_directory.fcntl.flock", refuse)
    lock_run(tmp_path).close()
    assert "cannot be locked (No locks available)" in caplog.text


def test_a_torn_line_swallows_no_other(tmp_path):
    for number in range(3):
        append_metrics(tmp_path, {"event": "step", "step": number, "taken": number})
        with open(tmp_path / "metrics.jsonl", "a") as handle:
            handle.write('{"event": "st')
    assert [event["step"] for event in read_metrics(tmp_path)] == [0, 1, 2]


def test_full_disk_while_saving_is_said(run_script, text_file, tmp_path, monkeypatch):
    def fail(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rundir, "publish_files", fail)
    out = tmp_path / "run"
    code, _, stderr = run_script("pretrain", *flags(**SMALL, dataset_name=text_file, output_dir=out))
    assert code == 1
    assert "is full" in stderr
    weights = list(out.rglob("*.safetensors"))
    assert {path.parent.name for path in weights} == {"checkpoint-2"}, "only that of before the cool-down"
    assert find_fault(out / "checkpoint-2") is None


def test_an_old_checkpoint_that_cannot_be_removed_is_said_and_the_new_one_counts(make_trainer, monkeypatch, caplog):
    def refuse(folder, limit):
        time.sleep(0.3)
        raise OSError(errno.EBUSY, "a file is open elsewhere")

    monkeypatch.setattr("oneday.saving.remove_old_checkpoints", refuse)
    trainer = make_trainer(budget_steps=4, save_steps=2)
    trainer.run()
    assert trainer.saved_at == 2 and "An old checkpoint could not be removed" in caplog.text
    assert "was not written" not in caplog.text
    assert trainer.checkpoint_seconds >= 0.3, "by this is judged whether another one fits"
    assert [event["step"] for event in read_metrics(trainer.args.output_dir) if event["event"] == "checkpoint"] == [2]


@pytest.mark.parametrize("is_durable", [True, False])
def test_a_file_that_is_durable_has_its_name_on_the_disk_too(tmp_path, monkeypatch, is_durable):
    names = []
    monkeypatch.setattr("oneday.durable_files.synchronize_path", lambda path: names.append(path.name))
    write_json(tmp_path / "report.json", {}, is_durable)
    assert (names[-1:] == [tmp_path.name]) is is_durable and (tmp_path / "report.json").exists()


@pytest.mark.parametrize(
    ("number", "is_passed_over"), [(errno.EINVAL, True), (errno.EACCES, True), (errno.EIO, False)]
)
def test_a_directory_that_cannot_be_synchronised_takes_no_file_away(tmp_path, monkeypatch, number, is_passed_over):
    def synchronize(path):
        if path == tmp_path:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr("oneday.durable_files.synchronize_path", synchronize)
    with contextlib.nullcontext() if is_passed_over else pytest.raises(OSError):
        write_json(tmp_path / "report.json", {})
    assert (tmp_path / "report.json").exists()
