"""Interrupted runs: they go on to the bit, from a checkpoint that is whole, inside the same budget."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import datasets
import pytest
import torch
from conftest import ROW_LENGTH, StopAt, steps_of, weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from oneday import saving, streamed_rows, text_streams
from oneday.arguments import BudgetTrainingArguments, SettingError
from oneday.beating import heartbeat
from oneday.checkpoints import find_fault, list_checkpoints, read_state
from oneday.durable_files import read_json
from oneday.modeling import build_model
from oneday.objectives import find_objective
from oneday.pretraining import load_state, perform_run, prepare_first_step
from oneday.run_directory import append_metrics, is_disk_full, lock_run, read_metrics
from oneday.stream_files import StreamShard, TablePart
from oneday.streamed_rows import StreamedRows
from oneday.text_streams import FileStream, StreamInterrupted
from oneday.trainer import BudgetTrainer


def run_killed(make, step, **settings):
    """A run that dies before a step (a process that is killed leaves the same on the disk)."""
    killed = make(**settings)
    killed.add_callback(StopAt(step))
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    return Path(killed.args.output_dir)


def assert_same_weights(one, other):
    expected, got = weights(one), weights(other)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)


RESUMED = {
    "adamw": {},
    "muon": {"bf16": True},
    "adamw_8bit": {},
    "muon_8bit": {"bf16": True, "embedding_init": "cooccurrence"},
}


@pytest.mark.parametrize("optim", RESUMED)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_resume_gives_the_same_weights_to_the_bit(make_trainer, name, optim):
    settings = {"budget_steps": 12, "optim": optim, "save_steps": 4, "batch_size_tokens_start": 4 * ROW_LENGTH}
    settings |= RESUMED[optim] | {"attention_init": "neighbours"}
    whole = make_trainer(name, "whole", **settings)
    whole.run()
    killed = make_trainer(name, "killed", **settings)
    killed.add_callback(StopAt(6))
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    resumed = make_trainer(name, "killed", **settings)
    resumed.run(resume=True)
    assert resumed.clock.steps == 12
    expected, got = weights(whole), weights(resumed)
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    losses = [[step["loss"] for step in steps_of(trainer)] for trainer in (whole, resumed)]
    assert losses[0] == losses[1], "the reader leaves out the two steps that were done again"
    assert len(losses[0]) == 12


def test_resume_restores_the_random_numbers_of_dropout(make_trainer):
    def make(output):
        trainer = make_trainer("bert", output, budget_steps=8, save_steps=4)
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        return trainer

    whole = make("whole")
    whole.run()
    killed = make("killed")
    killed.add_callback(StopAt(6))
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    resumed = make("killed")
    resumed.run(resume=True)
    assert all(torch.equal(value, weights(whole)[key]) for key, value in weights(resumed).items())


def test_a_model_saved_but_not_scored_is_scored_and_not_trained_again(make_trainer, monkeypatch):
    first = make_trainer("bert", budget_steps=4)
    monkeypatch.setattr(first, "evaluate", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        first.run()
    elsewhere = make_trainer("bert", budget_steps=4)
    elsewhere.data_fingerprint = "another"
    with pytest.raises(SettingError, match="is not what .* was trained on"):
        elsewhere.run(resume=True)
    second = make_trainer("bert", budget_steps=4)
    metrics = second.run(resume=True)
    assert second.state.log_history[-1]["step"] == 4, "where the trackers draw the held-out loss"
    assert second.clock.steps == 4
    assert len(steps_of(second)) == 4
    assert all(torch.equal(value, weights(first)[key]) for key, value in weights(second).items())
    assert metrics["eval_loss"] == pytest.approx(make_scored(first), abs=1e-6)


def test_a_step_rehearsed_after_a_run_without_a_checkpoint_is_planned_from_its_start(make_trainer, monkeypatch):
    """A process that was killed had spent half of the time; masks and batch are again those of progress 0."""
    trainer = make_trainer("bert", budget_minutes=1, batch_size_tokens_start=4 * ROW_LENGTH)
    trainer.clock.carried_seconds, trainer.args.use_compile = 30.0, True
    monkeypatch.setattr(trainer, "rehearse_step", lambda: bool(trainer.loader.peek()))
    prepare_first_step(trainer, is_new=True)
    trainer.loader.peek()
    assert trainer.loader.current_plan.progress == pytest.approx(0.0, abs=0.01)


def test_a_run_whose_time_is_spent_without_a_checkpoint_says_so(make_trainer):
    trainer = make_trainer("bert", budget_minutes=1)
    spent = {"status": "running", "spent": {"seconds": 59.9}}
    Path(trainer.args.output_dir, "budget.json").write_text(json.dumps(spent))
    with pytest.raises(SettingError, match="The 60 s that the run in .* had spent left no checkpoint"):
        trainer.run(resume=True)


def test_a_mixture_of_experts_is_read_back(tokenizers, packed, tmp_path):
    """Its file names each expert, as the Hub does; the model holds all of a layer in one tensor."""
    ids = {f"{name}_token_id": getattr(tokenizers["decoder"], f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, max_position_embeddings=64, **ids,
    )  # fmt: skip

    def make(output, seed):
        settings = {"batch_size_tokens": 4 * ROW_LENGTH, "micro_batch_tokens": 4 * ROW_LENGTH, "objective": "clm"}
        args = BudgetTrainingArguments(
            output_dir=str(tmp_path / output), budget_steps=4, save_steps=2, bf16=False, optim="adamw", **settings
        )
        Path(args.output_dir).mkdir(exist_ok=True)
        objective = find_objective("clm")(tokenizers["decoder"], args)
        torch.manual_seed(seed)
        return BudgetTrainer(build_model(config), args, objective, *packed["decoder"], objective.tokenizer)

    whole = make("whole", 0)
    whole.run()
    run_killed(lambda: make("killed", 0), 3)
    resumed = make("killed", 1)
    resumed.run(resume=True)
    assert_same_weights(whole, resumed)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "killed")
    assert all(torch.equal(value, weights(whole)[key]) for key, value in stock.state_dict().items())
    assert stock.config.use_cache is True, "it is to generate with its cache"


def test_a_resumed_run_logs_as_often_as_is_asked_for_now(make_trainer):
    settings = {"budget_steps": 6, "save_steps": 3}
    run_killed(lambda **given: make_trainer("bert", **given, logging_steps=5), 4, **settings)
    resumed = make_trainer("bert", **settings, logging_steps=2)
    resumed.run(resume=True)
    logged = [entry["step"] for entry in resumed.state.log_history if "loss" in entry]
    assert logged == [4, 6]
    assert not any("train_samples_per_second" in entry for entry in resumed.state.log_history)


def make_scored(trainer):
    return trainer.measure_held_out()["eval_loss"]


@pytest.mark.parametrize(
    ("name", "said"), [("data_fingerprint", "is not what .* was trained on"), ("model_fingerprint", "model_config")]
)
def test_another_corpus_or_model_is_not_trained_by_a_resumed_run(make_trainer, name, said):
    killed = make_trainer("bert", budget_steps=8, save_steps=2)
    setattr(killed, name, "one")
    killed.add_callback(StopAt(4))
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    resumed = make_trainer("bert", budget_steps=8, save_steps=2)
    setattr(resumed, name, "another")
    with pytest.raises(SettingError, match=said):
        resumed.run(resume=True)


def test_a_signal_saves_and_the_run_goes_on(make_trainer):
    whole = make_trainer("bert", "whole", budget_steps=8)
    whole.run()
    told = make_trainer("bert", "told", budget_steps=8)
    told.add_callback(StopAt(3, signal.SIGTERM))
    assert told.run() == {}
    assert told.status == "interrupted"
    assert [folder.name for folder in list_checkpoints(told.args.output_dir)] == ["checkpoint-4"]
    environment = Path(told.args.output_dir) / "environment.json"
    hardware = read_json(environment)
    assert hardware["device"] and hardware["packages"]["torch"]
    environment.write_text('{"device": "another machine"}')
    again = make_trainer("bert", "told", budget_steps=8)
    again.run(resume=True)
    assert read_json(environment) == hardware, "that on which it ended"
    assert all(torch.equal(value, weights(whole)[key]) for key, value in weights(again).items())


def test_neither_the_text_nor_the_random_weights_are_charged_again(make_trainer, monkeypatch):
    """A run that was killed before its first checkpoint; reading the text took 5 of the 7 seconds of starting up."""
    settings = {"budget_minutes": 5, "eval_on_start": True}
    run_killed(make_trainer, 2, **settings)
    resumed = make_trainer(**settings)
    resumed.preparation_seconds = 5.0
    monkeypatch.setattr("oneday.pretraining.process_age_seconds", lambda: 7.0)
    spent, evaluate = [], resumed.evaluate

    def evaluate_timed():
        spent.append(resumed.clock.elapsed_seconds)
        time.sleep(0.1)
        metrics = evaluate()
        spent.append(resumed.clock.elapsed_seconds)
        return metrics

    resumed.evaluate = evaluate_timed
    resumed.add_callback(StopAt(1))
    with pytest.raises(KeyboardInterrupt):
        resumed.run(resume=True)
    assert spent[0] == spent[1] and resumed.clock.ledger["evaluation"] == 0.0
    assert 2.0 <= resumed.clock.ledger["lost"] - resumed.clock.carried_seconds < 3.0


def test_a_budget_used_up_before_the_resume_ends_with_the_last_checkpoint(make_trainer):
    settings = {"budget_minutes": 0.2, "save_steps": 3}
    killed = make_trainer("bert", **settings)
    killed.add_callback(StopAt(4))
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    path = Path(killed.args.output_dir) / "budget.json"
    report = json.loads(path.read_text())
    report["spent"]["seconds"] = 11.99
    path.write_text(json.dumps(report))
    resumed = make_trainer("bert", **settings)
    resumed.run(resume=True)
    saved = AutoModelForMaskedLM.from_pretrained(Path(killed.args.output_dir) / "checkpoint-3").state_dict()
    final = AutoModelForMaskedLM.from_pretrained(Path(killed.args.output_dir)).state_dict()
    assert all(torch.equal(value, final[key]) for key, value in saved.items())


SCHEDULED = {"max_seq_length_start": ROW_LENGTH // 4, "mlm_probability_end": 0.15, "batch_size_tokens_start": 128}


def test_every_schedule_goes_on_where_it_stood(make_trainer):
    settings = {"budget_tokens": 6000, "save_steps": 3, **SCHEDULED}
    whole = make_trainer("bert", "whole", **settings)
    whole.run()
    lengths = [step["row_length"] for step in steps_of(whole)]
    assert lengths == sorted(lengths) and {8, 16, 32} == set(lengths)
    run_killed(lambda **given: make_trainer("bert", "killed", **given), 8, **settings)
    resumed = make_trainer("bert", "killed", **settings)
    resumed.run(resume=True)
    assert_same_weights(whole, resumed)


def test_a_streamed_corpus_goes_on_where_it_stood(make_trainer, texts, tokenizers, packed, tmp_path, monkeypatch):
    monkeypatch.setattr(streamed_rows, "STREAM_BLOCK_DOCUMENTS", 40)
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def make(output, **settings):
        shards = datasets.load_dataset("json", data_files=str(path), split="train", streaming=True)
        stream = FileStream([StreamShard(shards, "text", 0)], 8)
        rows = StreamedRows(stream, tokenizers["encoder"], "encoder", ROW_LENGTH, "best_fit", 0)
        base = make_trainer("bert", output, **settings)
        model, args, objective = base.model, base.args, base.objective
        return BudgetTrainer(model, args, objective, rows, packed["encoder"][1], tokenizers["encoder"])

    settings = {"budget_steps": 30, "save_steps": 7}
    whole = make("whole", **settings)
    whole.run()
    run_killed(lambda **given: make("killed", **given), 18, **settings)
    resumed = make("killed", **settings)
    resumed.run(resume=True)
    assert_same_weights(whole, resumed)


class Ending(FileStream):
    """A stream whose network goes away for good after so many texts."""

    def open_pass(self, key, state=None):
        reader, read = super().open_pass(key, state), []
        ordinary = reader.read

        def read_or_fail():
            if len(read) == 130:
                raise ConnectionError("reset by peer")
            read.append(ordinary())
            return read[-1]

        reader.read = read_or_fail
        return reader


def test_a_network_that_goes_away_costs_no_step(make_trainer, texts, tokenizers, packed, monkeypatch, caplog):
    """The run ends as after a signal, with a checkpoint of its last step, and goes on to the same weights."""
    monkeypatch.setattr(streamed_rows, "STREAM_BLOCK_DOCUMENTS", 40)
    monkeypatch.setattr(text_streams, "RETRY_SECONDS", (0.01,))

    def make(output, kind=FileStream):
        stream = kind([TablePart(datasets.Dataset.from_dict({"text": texts}), 0, 1)], 1)
        rows = StreamedRows(stream, tokenizers["encoder"], "encoder", ROW_LENGTH, "best_fit", 0)
        base = make_trainer("bert", output, budget_steps=30, save_steps=1000)
        return BudgetTrainer(base.model, base.args, base.objective, rows, packed["encoder"][1], tokenizers["encoder"])

    whole = make("whole")
    whole.run()
    cut = make("cut", Ending)
    assert cut.run() == {}
    assert cut.status == "interrupted" and 0 < cut.clock.steps < 30
    assert "cannot be read on (ConnectionError: reset by peer); check the network" in caplog.text
    assert list_checkpoints(cut.args.output_dir)[-1].name == f"checkpoint-{cut.clock.steps}"
    resumed = make("cut")
    resumed.run(resume=True)
    assert_same_weights(whole, resumed)


def test_resuming_reads_nothing_of_what_was_seen(make_trainer, monkeypatch):
    settings = {"budget_steps": 12, "save_steps": 8}
    run_killed(lambda **given: make_trainer("bert", **given), 9, **settings)
    resumed = make_trainer("bert", **settings)
    asked = []
    take = resumed.loader.source.take
    monkeypatch.setattr(resumed.loader.source, "take", lambda samples: asked.append(samples[0]) or take(samples))
    resumed.run(resume=True)
    assert min(asked) == 8 * 8


@pytest.mark.parametrize("fault", ["truncated", "changed", "missing", "unsealed"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(make_trainer, caplog, fault):
    settings = {"budget_steps": 10, "save_steps": 3}
    whole = make_trainer("bert", "whole", **settings)
    whole.run()
    folder = run_killed(lambda **given: make_trainer("bert", "killed", **given), 7, **settings)
    newest = list_checkpoints(folder)[-1]
    file = newest / ("checksums.json" if fault == "unsealed" else "optimizer.pt")
    if fault in ("missing", "unsealed"):
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content if fault == "changed" else content[:-5])
    resumed = make_trainer("bert", "killed", **settings)
    resumed.run(resume=True)
    assert "checkpoint-6 is damaged" in caplog.text and file.name in caplog.text
    words = {
        "truncated": "bytes instead of",
        "changed": "has changed",
        "missing": "is missing",
        "unsealed": "is missing",
    }
    assert words[fault] in caplog.text
    assert next(event for event in read_metrics(folder) if event["event"] == "resume")["from_step"] == 5
    assert_same_weights(whole, resumed)
    assert (folder / "damaged-checkpoint-6").is_dir()
    assert all(find_fault(checkpoint) is None for checkpoint in list_checkpoints(folder))


def test_where_no_checkpoint_is_whole_or_one_cannot_be_read_nothing_is_begun_again(make_trainer, monkeypatch):
    """Nor set aside: what a disk does not give now it may give later."""
    settings = {"budget_steps": 10, "save_steps": 3}
    folder = run_killed(lambda **given: make_trainer("bert", "killed", **given), 7, **settings)
    before = list_checkpoints(folder)

    def fail_to_read(path):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr("oneday.checkpoints.hash_file", fail_to_read)
        with pytest.raises(SettingError, match="checkpoint-6 cannot be read .Input/output error.*same command"):
            make_trainer("bert", "killed", **settings).run(resume=True)
    assert list_checkpoints(folder) == before and len(before) > 1
    for checkpoint in before:
        (checkpoint / "optimizer.pt").unlink()
    others = f"as are {len(before) - 1} before it"
    with pytest.raises(SettingError, match=f"checkpoint-6 is damaged .optimizer.pt is missing., {others}"):
        make_trainer("bert", "killed", **settings).run(resume=True)
    assert list_checkpoints(folder) == before
    for checkpoint in before:
        shutil.rmtree(checkpoint)
    again = make_trainer("bert", "killed", **settings)
    again.run(resume=True)
    assert again.clock.steps == 10


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


def test_a_stream_that_breaks_off_leaves_a_checkpoint(make_trainer, monkeypatch, tmp_path):
    """A damaged file ends the run with its sentence, after a checkpoint; the network's end may be waited for."""
    for number, (error, ends) in enumerate(((SettingError("damaged"), "raises"), (StreamInterrupted("away"), 75))):
        trainer = make_trainer("bert", f"run{number}", budget_steps=6)
        whole, count = trainer.next_step_fits, []

        def next_step_fits(whole=whole, count=count, error=error):
            count.append(1)
            if len(count) == 4:
                raise error
            return whole()

        monkeypatch.setattr(trainer, "next_step_fits", next_step_fits)
        if ends == "raises":
            with pytest.raises(SettingError, match="damaged"):
                perform_run(trainer, "new", lambda metrics: None)
        else:
            assert perform_run(trainer, "new", lambda metrics: None) == ends
        (checkpoint,) = list_checkpoints(trainer.args.output_dir)
        assert checkpoint.name == "checkpoint-3" and find_fault(checkpoint) is None


def test_a_stream_that_breaks_off_when_the_budget_is_used_up_ends_the_run(make_trainer, monkeypatch):
    """The step that would come after the last one is not needed, nor when what is finished is only to be scored."""
    trainer = make_trainer("bert", budget_steps=3, save_steps=3)
    whole = trainer.loader.peek

    def peek(progress=None):
        if trainer.clock.steps == 3:
            raise SettingError("damaged")
        return whole(progress)

    monkeypatch.setattr(trainer.loader, "peek", peek)
    assert perform_run(trainer, "new", lambda metrics: None) == 0
    assert trainer.clock.steps == 3 and trainer.status == "finished"


@pytest.mark.parametrize("compiles", [False, True])
def test_a_signal_while_the_first_block_is_waited_for_means_run_me_again(make_trainer, monkeypatch, compiles):
    """Also where the compiler asks for it; the directory of a run without a step is left empty."""
    trainer = make_trainer("bert", "waiting", budget_steps=3)
    trainer.args.use_compile = compiles

    def peek(progress=None):
        trainer.signals.append(signal.SIGTERM)
        raise StreamInterrupted("stood still")

    monkeypatch.setattr(trainer.loader, "peek", peek)
    with pytest.raises(SystemExit) as stop:
        perform_run(trainer, "new", lambda metrics: None)
    assert stop.value.code == 75 and not Path(trainer.args.output_dir).exists()
    Path(trainer.args.output_dir).mkdir()
    monkeypatch.setattr(trainer.loader, "peek", lambda progress=None: (_ for _ in ()).throw(StreamInterrupted("away")))
    with pytest.raises(StreamInterrupted, match="away"):
        perform_run(trainer, "new", lambda metrics: None)


def test_a_small_micro_batch_stays_only_where_memory_was_small(make_trainer, monkeypatch):
    first = make_trainer("bert", budget_steps=4, save_steps=2)
    first.micro_batch_limit = 2 * ROW_LENGTH
    first.run()
    state = read_state(list_checkpoints(first.args.output_dir)[-1])
    again = make_trainer("bert", budget_steps=4)
    load_state(again, state)
    assert again.micro_batch_limit == 2 * ROW_LENGTH
    other = make_trainer("bert", budget_steps=4, micro_batch_tokens=2 * ROW_LENGTH)
    load_state(other, state)
    assert other.micro_batch_limit is None
    monkeypatch.setattr("oneday.saving.name_device", lambda device: "a larger card")
    elsewhere = make_trainer("bert", budget_steps=4)
    load_state(elsewhere, state)
    assert elsewhere.micro_batch_limit is None


def test_a_finished_run_whose_reports_are_missing_is_only_scored_again(make_trainer):
    """Killed after its budget.json said finished: the final model must not become an earlier checkpoint."""
    first = make_trainer("bert", budget_steps=9, save_steps=4)
    metrics = first.run()
    again = make_trainer("bert", budget_steps=9, save_steps=4)
    assert again.run(resume=True) == pytest.approx(metrics)
    assert_same_weights(first, again)
    saved = AutoModelForMaskedLM.from_pretrained(first.args.output_dir).state_dict()
    assert all(torch.equal(value, weights(first)[key]) for key, value in saved.items())
    assert again.clock.steps == 9 and again.loader.epoch == first.loader.epoch
    events = [event["event"] for event in read_metrics(first.args.output_dir)]
    assert "resume" not in events and events.count("step") == 9, "nothing was trained again"


def test_a_torn_line_swallows_no_other(tmp_path):
    for number in range(3):
        append_metrics(tmp_path, {"event": "step", "step": number, "taken": number})
        with open(tmp_path / "metrics.jsonl", "a") as handle:
            handle.write('{"event": "st')
    assert [event["step"] for event in read_metrics(tmp_path)] == [0, 1, 2]


def test_strange_directories_and_states_are_no_checkpoints(make_trainer):
    settings = {"budget_steps": 8, "save_steps": 3}
    folder = run_killed(lambda **given: make_trainer("bert", **given), 7, **settings)
    shutil.copytree(folder / "checkpoint-6", folder / "checkpoint-6-backup")
    (folder / "checkpoint-3" / "oneday_state.json").write_text("{")
    (folder / "checkpoint-4" / "checksums.json").write_text("{}")
    resumed = make_trainer("bert", **settings)
    resumed.run(resume=True)
    assert resumed.clock.steps == 8


def test_files_left_by_a_killed_process_go(tmp_path):
    (tmp_path / ".budget.json.123.456").write_text("{")
    lock_run(tmp_path / "new" / "run").close()
    lock_run(tmp_path).close()
    assert not list(tmp_path.glob(".budget*"))


def test_a_checkpoint_killed_while_it_was_removed_is_gone_and_not_half(make_trainer, monkeypatch):
    """The soak found it: removing files first left a directory of a checkpoint's name without its weights."""

    remove = shutil.rmtree

    def killed(path, **kwargs):
        if "checkpoint-" in path.name and path.exists():
            (path / "model.safetensors").unlink()
            raise KeyboardInterrupt("killed")
        remove(path, **kwargs)

    trainer = make_trainer(budget_steps=9, save_steps=2, save_total_limit=1)
    monkeypatch.setattr("oneday.checkpoints.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt, match="killed"):
        trainer.run()
    monkeypatch.undo()
    left = list_checkpoints(trainer.args.output_dir)
    assert left and not any(find_fault(checkpoint) for checkpoint in left)
    make_trainer(budget_steps=9, save_steps=2, save_total_limit=1).run(resume=True)
    assert not list(Path(trainer.args.output_dir).glob(".removed-*"))
