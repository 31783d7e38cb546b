"""Runs over a stream that goes on, stumbles or ends."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import datasets
import pytest
from conftest import ROW_LENGTH, assert_same_weights, run_killed

from oneday import streamed_rows, text_streams
from oneday.checkpoints import find_fault, list_checkpoints
from oneday.errors import SettingError
from oneday.pretraining import perform_run
from oneday.stream_files import StreamShard, TablePart
from oneday.streamed_rows import StreamedRows
from oneday.text_streams import FileStream, StreamInterrupted
from oneday.trainer import BudgetTrainer


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
