"""Numbers that are not finite and memory that does not suffice, put into real runs."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import ROW_LENGTH, steps_of, weights
from transformers import AutoModelForMaskedLM, TrainerCallback

from oneday.compilation import try_compiled
from oneday.errors import SettingError
from oneday.evaluation import measure_held_out
from oneday.recovery import SPIKE_LEAST_STEPS, StepGuard
from oneday.run_directory import read_metrics

OPTIMIZERS = ["adamw", "muon", "adamw_8bit", "muon_8bit"]


class Poison(TrainerCallback):
    """Makes loss or gradient of the steps with these numbers (from 0, skipped ones counted) not finite."""

    def __init__(self, trainer, steps, what="loss"):
        self.trainer, self.steps, self.what = trainer, set(steps), what
        self.before, self.after = [], []
        self.backward = trainer.backward
        trainer.backward = self.run_backward

    def run_backward(self, model, batch, counts):
        loss = self.backward(model, batch, counts)
        if self.trainer.clock.steps_taken in self.steps:
            if self.what == "loss":
                return loss * float("nan")
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(torch.inf)
        return loss

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before.append(self.snapshot())

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.after.append(self.snapshot())

    def snapshot(self):
        states = [value for optimizer in self.trainer.composite.optimizers for value in optimizer.state.values()]
        tensors = [x for state in states for x in state.values() if torch.is_tensor(x)]
        return [x.clone() for x in [*self.trainer.model.parameters(), *tensors]]


def same(one, other):
    return len(one) == len(other) and all(torch.equal(x, y) for x, y in zip(one, other))


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_bad_step_moves_nothing_and_is_counted(make_trainer, optim, what):
    trainer = make_trainer("bert", budget_steps=6, optim=optim)
    poison = Poison(trainer, [3], what)
    trainer.add_callback(poison)
    trainer.run()
    assert trainer.clock.steps == 6 and trainer.clock.skipped_steps == 1
    moved = [not same(before, after) for before, after in zip(poison.before, poison.after)]
    assert moved == [True, True, True, False, True, True, True]
    events = read_metrics(trainer.args.output_dir)
    skips = [event for event in events if event["event"] == "skip"]
    assert [(skip["step"], skip["not_finite"]) for skip in skips] == [(3, what)]
    assert len(steps_of(trainer)) == 6
    assert json.loads((Path(trainer.args.output_dir) / "budget.json").read_text())["skipped_steps"] == 1
    assert "NaN" not in (Path(trainer.args.output_dir) / "metrics.jsonl").read_text()


def test_tokens_of_a_skipped_step_are_not_in_the_weights(make_trainer):
    plain, skipping = (make_trainer("bert", name, budget_tokens=4000) for name in ("plain", "skipping"))
    skipping.add_callback(Poison(skipping, [2]))
    for trainer in (plain, skipping):
        trainer.run()
        assert 4000 - 8 * ROW_LENGTH <= trainer.clock.tokens <= 4000
        assert trainer.clock.tokens == sum(step["batch_tokens"] for step in steps_of(trainer))
    assert skipping.loader.samples_seen >= plain.loader.samples_seen


@pytest.mark.parametrize("reads_ahead", [False, True])
def test_each_step_is_planned_for_what_was_trained_on_before_it(make_trainer, reads_ahead):
    """As on a GPU, the next step is made while one is computed; after a bad step it is dropped and made again."""
    settings = {"batch_size_tokens_start": 4 * ROW_LENGTH, "batch_size_tokens": 16 * ROW_LENGTH}
    trainer = make_trainer("bert", budget_tokens=4000, **settings)
    assert not trainer.reads_ahead, "on a CPU nothing runs meanwhile"
    trainer.reads_ahead, made = reads_ahead, []
    trainer.ranks.sum_gradients = lambda model, loss: made.append(trainer.loader._waiting is not None) or loss
    trainer.add_callback(Poison(trainer, [2]))
    trainer.run()
    assert made == [reads_ahead] * len(made) and made
    attempts = [e for e in read_metrics(trainer.args.output_dir) if e["event"] in ("step", "skip")]
    begun = [0.0, *(event["tokens"] / 4000 for event in attempts[:-1])]
    planned = [event["plan_progress"] for event in attempts]
    skipped = attempts[2]["num_rows"] * ROW_LENGTH / 4000
    # Progress does not fall below the middle of the bad step, where its learning rate was read.
    assert attempts[2]["event"] == "skip" and planned[3] < begun[3] + 0.75 * skipped
    assert planned[:3] + planned[4:] == begun[:3] + begun[4:]
    assert len({event["num_rows"] for event in attempts}) > 1


def test_many_bad_steps_roll_back_and_skip_that_text(make_trainer, caplog):
    trainer = make_trainer("bert", budget_steps=12, save_steps=3, max_bad_steps=3)
    trainer.add_callback(Poison(trainer, [5, 6, 7]))
    trainer.run()
    assert trainer.clock.steps == 12 and trainer.clock.skipped_steps == 3
    events = read_metrics(trainer.args.output_dir, undone_by_rollback=True)
    back = next(event for event in events if event["event"] == "rollback")
    assert back["from_step"] == 3 and "3 steps in a row were not finite" in caplog.text
    steps = steps_of(trainer)
    assert [step["step"] for step in steps] == list(range(1, 13)), "the reader leaves out what was undone"
    assert trainer.loader.samples_seen == (12 + 3 + 2) * 8, "two good steps were undone, and their text not read again"
    assert all(bool(torch.isfinite(value).all()) for value in weights(trainer).values())


def test_rolling_back_goes_on_where_no_checkpoint_can_be_read(make_trainer, monkeypatch, caplog):
    """The bad steps have moved nothing: the weights at hand are good."""
    trainer = make_trainer("bert", budget_steps=8, save_steps=3, max_bad_steps=2)
    trainer.add_callback(Poison(trainer, [5, 6]))

    def fail():
        raise SettingError("checkpoint-3 cannot be read")

    monkeypatch.setattr(trainer, "find_good_checkpoint", fail)
    trainer.run()
    assert "checkpoint-3 cannot be read" in caplog.text and "going on from step 5" in caplog.text
    assert (trainer.clock.steps, trainer.clock.skipped_steps) == (8, 2)


def test_rolling_back_without_end_ends_with_a_sentence(make_trainer):
    trainer = make_trainer("bert", budget_steps=12, save_steps=3, max_bad_steps=2)
    trainer.add_callback(Poison(trainer, range(4, 100)))
    with pytest.raises(SettingError, match="not finite in 2 steps in a row, 4 times, at step 3 .*is kept"):
        trainer.run()
    assert not (Path(trainer.args.output_dir) / "model.safetensors").exists()


def test_bad_steps_where_a_checkpoint_is_due_push_no_good_one_out(make_trainer):
    """They stand on a multiple of save_steps, with a limit of one."""
    trainer = make_trainer("bert", budget_steps=8, save_steps=3, save_total_limit=1, max_bad_steps=4, decay_fraction=0)
    trainer.add_callback(Poison(trainer, [3, 4, 5, 6]))
    trainer.run()
    saved = [event["taken"] for event in read_metrics(trainer.args.output_dir) if event["event"] == "checkpoint"]
    assert 3 in saved and not {4, 5, 6, 7} & set(saved)
    assert trainer.clock.steps == 8


def test_a_run_that_always_fails_at_the_same_place_ends(make_trainer):
    """Good steps lie between its rollbacks, but it never gets further."""
    trainer = make_trainer("bert", budget_steps=30, save_steps=4, max_bad_steps=2)

    class Wall(Poison):
        def run_backward(self, model, batch, counts):
            loss = self.backward(model, batch, counts)
            return loss * float("nan") if self.trainer.clock.steps >= 7 else loss

    trainer.add_callback(Wall(trainer, []))
    with pytest.raises(SettingError, match="not finite in 2 steps in a row, 4 times"):
        trainer.run()


def test_weights_that_are_not_finite_are_not_kept(make_trainer, caplog):
    trainer = make_trainer("bert", budget_steps=6, save_steps=1, max_bad_steps=2)

    class Spoil(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                next(model.parameters()).data[0] = float("nan")

    trainer.add_callback(Spoil())
    trainer.run()
    assert "The checkpoint of step 4 was not written: a weight is not finite" in caplog.text
    assert trainer.clock.steps == 6 and all(bool(torch.isfinite(value).all()) for value in weights(trainer).values())


def test_trackers_never_see_nan(make_trainer):
    trainer = make_trainer("bert", budget_steps=6, logging_steps=2)
    trainer.add_callback(Poison(trainer, [1]))
    trainer.run()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    first, *others = [step["loss"] for step in steps_of(trainer)]
    assert logged[0] == pytest.approx(first, abs=1e-4), "a step that was skipped is no loss of 0"
    assert all(math.isfinite(loss) and loss > min(others) - 0.1 for loss in logged)


def test_no_final_model_with_nan(make_trainer, caplog):
    trainer = make_trainer("bert", budget_steps=7, save_steps=3)

    class Spoil(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 6:
                next(model.parameters()).data[0] = float("nan")

    trainer.add_callback(Spoil())
    trainer.run()
    folder = Path(trainer.args.output_dir)
    saved, checkpoint = (
        AutoModelForMaskedLM.from_pretrained(path).state_dict() for path in (folder, folder / "checkpoint-6")
    )
    assert all(torch.equal(value, checkpoint[key]) for key, value in saved.items())
    assert "checkpoint-6 becomes the final model" in caplog.text


def test_a_spike_is_named():
    guard = StepGuard(5)
    assert not any(guard.note_good(5.0 + 0.01 * (i % 3), i) for i in range(SPIKE_LEAST_STEPS))
    assert not guard.note_good(5.03, 30)
    assert guard.note_good(6.0, 31)
    assert not guard.note_good(4.0, 32), "a fall is none"


class SmallMemory:
    """A memory that holds so many rows of a micro-batch; fails within the backward pass, as a GPU's does."""

    def __init__(self, trainer, rows, error=None):
        self.rows, self.failures, self.error = rows, 0, error or torch.OutOfMemoryError("injected")
        self.summed_loss = trainer.objective.summed_loss
        trainer.objective.summed_loss = self.run

    def run(self, model, batch):
        loss = self.summed_loss(model, batch)
        if batch.inputs["input_ids"].numel() > self.rows * ROW_LENGTH:
            self.failures += 1
            if loss.requires_grad:
                loss.backward()
            raise self.error
        return loss


def test_out_of_memory_keeps_a_batch_that_its_micro_batches_do_not_divide(make_trainer):
    """12 rows in micro-batches of at most 8 are two of 6, then four of 3."""
    settings = {"budget_steps": 6, "batch_size_tokens": 12 * ROW_LENGTH, "micro_batch_tokens": 8 * ROW_LENGTH}
    trainer = make_trainer("bert", **settings)
    SmallMemory(trainer, 5)
    trainer.run()
    assert {(step["num_rows"], step["micro_rows"]) for step in steps_of(trainer)} == {(12, 3)}


@pytest.mark.parametrize("bf16", [False, True])
def test_out_of_memory_halves_the_micro_batch_and_not_the_batch(make_trainer, caplog, bf16):
    whole = make_trainer("bert", "whole", budget_steps=8, bf16=bf16, micro_batch_tokens=2 * ROW_LENGTH)
    whole.run()
    small = make_trainer("bert", "small", budget_steps=8, bf16=bf16, micro_batch_tokens=8 * ROW_LENGTH)
    memory = SmallMemory(small, 2)
    small.run()
    assert memory.failures == 2 and "micro-batches of 64 tokens" in caplog.text
    assert all(torch.equal(value, weights(whole)[key]) for key, value in weights(small).items())
    ooms = [event for event in read_metrics(small.args.output_dir) if event["event"] == "oom"]
    assert [event["micro_batch_tokens"] for event in ooms] == [4 * ROW_LENGTH, 2 * ROW_LENGTH]
    sizes = {(step["num_rows"], step["micro_rows"]) for step in steps_of(small)}
    assert sizes == {(8, 2)}


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_memory_that_others_than_the_allocator_asked_for_counts_too(make_trainer, error, is_one):
    trainer = make_trainer("bert", budget_steps=2, micro_batch_tokens=4 * ROW_LENGTH)
    expected = measure_held_out(trainer)
    memory = SmallMemory(trainer, 2, error)
    with nullcontext() if is_one else pytest.raises(RuntimeError, match="illegal memory access"):
        assert measure_held_out(trainer) == pytest.approx(expected)
        trainer.run()
    assert memory.failures == (2 if is_one else 1), "in the evaluation and in a step"

    def fail():
        raise error

    refusals = []
    with pytest.raises(RuntimeError) if is_one else nullcontext():
        assert not try_compiled(trainer.model, fail, lambda *reasons: refusals.append(reasons))
    assert len(refusals) == (not is_one), "memory that runs out is no fault of the compiler's"


def test_graphs_of_a_micro_batch_that_did_not_fit_are_forgotten(make_trainer, monkeypatch):
    """They would count towards the few that a layer may have; three of one layer are compiled in ModernBERT."""
    resets = []
    monkeypatch.setattr("torch._dynamo.reset", lambda: resets.append(1))
    for is_compiled in (False, True):
        trainer = make_trainer("bert", f"{is_compiled}", budget_steps=2, micro_batch_tokens=4 * ROW_LENGTH)
        trainer.args.use_compile = is_compiled
        trainer.rehearse_step = lambda: True
        memory = SmallMemory(trainer, 2)
        trainer.run()
        assert memory.failures >= 1 and len(resets) == is_compiled


def test_dropout_is_drawn_again_after_running_out_of_memory(make_trainer):
    results = []
    for name, rows in (("whole", 2), ("small", 4)):
        trainer = make_trainer("bert", name, budget_steps=3, micro_batch_tokens=rows * ROW_LENGTH)
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        memory = SmallMemory(trainer, 2)
        trainer.run()
        assert memory.failures == (rows == 4)
        results.append(weights(trainer))
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


def test_an_evaluation_that_does_not_fit_takes_smaller_batches(make_trainer):
    trainer = make_trainer("bert", budget_steps=2, micro_batch_tokens=8 * ROW_LENGTH)
    expected = measure_held_out(trainer)
    memory = SmallMemory(trainer, 3)
    assert measure_held_out(trainer) == pytest.approx(expected)
    assert memory.failures == 2 and trainer.args.micro_batch_tokens == 8 * ROW_LENGTH


def test_a_row_that_does_not_fit_is_refused(make_trainer):
    trainer = make_trainer("bert", budget_steps=2)
    SmallMemory(trainer, 0)
    with pytest.raises(SettingError, match="does not hold one row of 32 tokens"):
        trainer.run()
