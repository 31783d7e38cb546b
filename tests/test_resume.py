"""Interrupted runs: they go on to the bit, from a checkpoint that is whole, inside the same budget."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import ROW_LENGTH, StopAt, assert_same_weights, run_killed, steps_of, weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from oneday.arguments import BudgetTrainingArguments
from oneday.checkpoints import find_fault, list_checkpoints, read_state
from oneday.durable_files import read_json
from oneday.errors import SettingError
from oneday.evaluation import measure_held_out
from oneday.modeling import build_model
from oneday.objectives import find_objective
from oneday.pretraining import load_state, prepare_first_step
from oneday.run_directory import lock_run, read_metrics
from oneday.trainer import BudgetTrainer

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
    return measure_held_out(trainer)["eval_loss"]


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
