"""Whole runs of a tiny model: budgets, schedules, what stands in the run directory, what a checkpoint loads as."""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DECODERS, ENCODERS, ROW_LENGTH, steps_of, weights
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, Trainer, TrainerCallback

from oneday.budget import Budget
from oneday.budget_clock import BudgetClock
from oneday.callbacks import BudgetProgressCallback
from oneday.checkpoints import list_checkpoints
from oneday.compilation import find_layers
from oneday.errors import SettingError
from oneday.evaluation import measure_held_out
from oneday.loader import StepPlan, find_common_rows, plan_rows
from oneday.pretraining import measure_end
from oneday.run_directory import read_metrics
from oneday.saving import RunTrainer
from oneday.steps import say_small_passes, share_plan
from oneday.trainer import BudgetTrainer


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_every_architecture_learns_and_loads_as_a_stock_class(make_trainer, tmp_path, name):
    trainer = make_trainer(name, budget_steps=30, learning_rate=1e-2, eval_on_start=True)
    before = trainer.evaluate()["eval_loss"]
    after = trainer.run()["eval_loss"]
    assert after < before - 0.5
    auto_class = AutoModelForMaskedLM if name in ENCODERS else AutoModelForCausalLM
    model = auto_class.from_pretrained(tmp_path / "run")
    AutoTokenizer.from_pretrained(tmp_path / "run")
    assert all(torch.equal(value, trainer.model.state_dict()[key]) for key, value in model.state_dict().items())


def test_token_budget_and_learning_rate_to_zero(make_trainer):
    trainer = make_trainer(budget_tokens=5000, lr_shape="linear", warmup_fraction=0.1)
    trainer.run()
    steps = steps_of(trainer)
    assert 5000 - 8 * ROW_LENGTH <= trainer.clock.tokens <= 5000
    assert steps[-1]["tokens"] == trainer.clock.tokens == sum(step["batch_tokens"] for step in steps)
    assert max(step["lr"] for step in steps) > 0.9 * trainer.args.learning_rate
    assert steps[-1]["lr"] < 0.08 * trainer.args.learning_rate


def test_wall_clock_budget_is_used_and_kept(make_trainer):
    trainer = make_trainer(budget_minutes=0.1, num_evaluations=3, save_steps=40)
    trainer.run()
    report = json.loads((trainer_path(trainer) / "budget.json").read_text())
    assert report["status"] == "finished"
    assert 0.85 < report["used_fraction"] <= 1.02
    assert sum(report["ledger_seconds"].values()) == pytest.approx(report["spent"]["seconds"], rel=0.01)
    progress = [step["lr_progress"] for step in steps_of(trainer)]
    assert progress == sorted(progress)
    assert progress[-1] > 0.9


@pytest.mark.parametrize(
    ("budget", "expected"), [({"budget_minutes": 0.1}, range(0, 2)), ({"budget_steps": 40}, range(3, 4))]
)
def test_slow_evaluations_leave_the_clock_to_the_steps(make_trainer, monkeypatch, budget, expected):
    trainer = make_trainer(num_evaluations=4, **budget)

    def measure_slowly(*args, **settings):
        time.sleep(0.2)
        return measure_held_out(*args, **settings)

    # Only of evaluations: `pretraining` estimates beforehand how long one takes, and has the name to itself.
    monkeypatch.setattr("oneday.trainer.measure_held_out", measure_slowly)
    trainer.run()
    events = [event["event"] for event in read_metrics(trainer.args.output_dir)]
    before_the_end = events[: len(events) - events[::-1].index("step")]
    assert before_the_end.count("eval") in expected and events[-3:].count("eval") == 1


class JumpingSteps(TrainerCallback):
    """Makes steps slow at random."""

    def __init__(self, seconds):
        self.seconds, self.generator = seconds, np.random.default_rng(0)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        time.sleep(self.generator.uniform(0.0, self.seconds))


@pytest.mark.parametrize(
    ("minutes", "least"), [(0.3, 0.93), pytest.param(10, 0.99, marks=pytest.mark.slow, id="ten minutes")]
)
def test_a_clock_is_kept_while_step_times_jump(make_trainer, minutes, least):
    """Compiling at the start, then steps slow at random, evaluations and checkpoints in between."""
    settings = {"torch_compile": True, "num_evaluations": 4, "save_steps": 15}
    if minutes < 1:  # on a slow machine compiling alone would take longer, but for the second time
        for number in range(2):
            first = make_trainer(output=f"first{number}", budget_steps=1, batch_size_tokens=8 * ROW_LENGTH, **settings)
            first.run()
        short, minutes = minutes, minutes + 1.5 * first.clock.ledger["compilation"] / 60
        least = 1 - (1 - least) * short / minutes  # no more seconds left over for that
    trainer = make_trainer(output="timed", budget_minutes=minutes, batch_size_tokens=8 * ROW_LENGTH, **settings)
    trainer.add_callback(JumpingSteps(0.4))
    trainer.run()
    report = json.loads((trainer_path(trainer) / "budget.json").read_text())
    ledger = report["ledger_seconds"]
    assert least <= report["used_fraction"] <= 1.0
    assert min(ledger[part] for part in ("compilation", "steps", "evaluation", "checkpoints")) > 0
    assert sum(ledger.values()) == pytest.approx(report["spent"]["seconds"], rel=0.01)


def trainer_path(trainer):
    from pathlib import Path

    return Path(trainer.args.output_dir)


@pytest.mark.parametrize("what", ["text or tokenizer of dataset_name", "file of model_config"])
def test_processes_that_read_something_else_are_refused(make_trainer, monkeypatch, what):
    def gather(self, fingerprint):
        return [fingerprint, "another"] if calls.pop() == what.split()[0] else [fingerprint, fingerprint]

    calls = ["file", "text"]  # what is asked for first is last
    monkeypatch.setattr("oneday.ranks.Ranks.all_gather", gather)
    with pytest.raises(SettingError, match=f"The {what} is not the same for all processes"):
        make_trainer("bert", budget_steps=1)


# The name that every version of transformers here knows.
RECOMPUTED = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


@RECOMPUTED
@pytest.mark.parametrize(("name", "objective"), [("bert", "mlm"), ("electra", "rtd"), ("qwen3", "clm")])
def test_activations_that_are_computed_again_change_no_step(make_trainer, name, objective):
    """The same loss, gradient and weights to the bit, also where dropout must drop the same units again."""
    settings = {"objective": objective, "budget_steps": 1, "lr_shape": "linear"}
    steps, ends, calls = [], [], Counter()
    for is_on in (False, True):
        trainer = make_trainer(name, f"{is_on}", gradient_checkpointing=is_on, **settings)
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        linear = next(part for part in find_layers(trainer.model)[0].modules() if isinstance(part, torch.nn.Linear))
        linear.register_forward_hook(lambda *given, is_on=is_on: calls.update([is_on]))
        is_known = any(getattr(part, "gradient_checkpointing", False) for part in trainer.model.modules())
        assert is_known == is_on, "to what is rehearsed and compiled before the steps"
        trainer.train()
        steps += [(step["loss"], step["grad_norm"]) for step in steps_of(trainer)]
        ends.append(weights(trainer))
    assert calls[True] == 2 * calls[False] > 0
    assert len(steps) == 2 and steps[0] == steps[1]
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


@RECOMPUTED
def test_a_model_that_cannot_compute_activations_again_is_refused(make_trainer):
    with pytest.raises(SettingError, match="gradient_checkpointing. is true, which XLNetLMHeadModel does not support"):
        make_trainer("xlnet", objective="plm", budget_steps=1, gradient_checkpointing=True)


def test_flop_budget(make_trainer):
    trainer = make_trainer(budget_flops=3e8)
    trainer.run()
    assert 0.5 * 3e8 < trainer.clock.flops <= 3e8


def test_batch_grows_with_the_budget(make_trainer):
    trainer = make_trainer(
        budget_steps=20,
        batch_size_tokens_start=4 * ROW_LENGTH,
        batch_size_tokens=16 * ROW_LENGTH,
        batch_ramp_fraction=0.5,
    )
    trainer.run()
    sizes = [round(step["batch_tokens"] / ROW_LENGTH / 4) for step in steps_of(trainer)]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (1, 4)


class NormKeeper(TrainerCallback):
    """Keeps the norm of the gradient that the optimizer saw."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()


def test_clipping_bounds_the_gradient(make_trainer):
    trainer = make_trainer(budget_steps=1, max_grad_norm=1e-3)
    keeper = NormKeeper()
    trainer.add_callback(keeper)
    trainer.run()
    assert keeper.norm == pytest.approx(1e-3, rel=1e-2)
    assert steps_of(trainer)[0]["grad_norm"] > 1e-2, "the norm before clipping is what is logged"


def test_the_budget_is_kept_when_nothing_was_evaluated_before_the_end(make_trainer):
    """Without an evaluation on the way the reserve comes from a measured part of one."""
    trainer = make_trainer("gpt2", budget_minutes=0.1, num_evaluations=1)
    trainer.run()
    assert trainer.eval_seconds > 0
    assert 0.8 < trainer.clock.used_fraction() <= 1.02


class DisturbedEstimate(TrainerCallback):
    """What was extrapolated before the first step, as on a machine that was busy just then."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        if self.trainer.last_eval_seconds is None:
            self.trainer.eval_seconds = 1000.0


def test_the_held_out_loss_is_shown_once_there_is_one_of_trained_weights(make_trainer, caplog):
    with caplog.at_level("INFO"):
        make_trainer(budget_steps=10, num_evaluations=2, eval_on_start=True).run()
    shown = {line.split("%")[0].strip(): "held-out" in line for line in caplog.messages if "% of the budget" in line}
    assert not shown["10"] and shown["90"], shown


def test_a_whole_evaluation_replaces_what_a_part_of_one_promised(make_trainer):
    trainer = make_trainer(budget_steps=4, num_evaluations=2)
    trainer.add_callback(DisturbedEstimate(trainer))
    trainer.run()
    assert trainer.last_eval_seconds is not None
    assert 0 < trainer.eval_seconds < 100
    assert trainer.clock.reserve_seconds < 100


def test_the_shorter_of_two_trial_saves_counts(make_trainer, monkeypatch):
    trainer = make_trainer(budget_steps=1)
    save, delays = trainer.save_trial, [2.0, 0.0]

    def save_late_at_first():
        time.sleep(delays.pop(0))
        save()

    monkeypatch.setattr(trainer, "save_trial", save_late_at_first)
    measure_end(trainer)
    assert 0 < trainer.save_seconds < 2.0
    assert delays == []


def test_old_checkpoints_go_and_the_last_stays(make_trainer):
    trainer = make_trainer(budget_steps=9, save_steps=2, save_total_limit=2)
    trainer.run()
    assert [folder.name for folder in list_checkpoints(trainer.args.output_dir)] == [
        "checkpoint-5", "checkpoint-6", "checkpoint-8",
    ], "the first is kept for --extend: its learning rate had not fallen yet"  # fmt: skip
    assert not list(trainer_path(trainer).glob(".staging*"))


def test_budget_smaller_than_a_step_is_refused(make_trainer):
    trainer = make_trainer(budget_tokens=100)
    with pytest.raises(SettingError, match="too small for one step"):
        trainer.run()


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "rows"),
    [
        (16384, 8192, 1, (128, 64)),
        (16384, 8192, 4, (128, 32)),
        (5120, 4096, 1, (40, 20)),
        (6000, 4096, 1, (48, 24)),  # 46.9 rows; 47 are divided by nothing, 46 by 23, which halves to 1
        (24576, 16384, 1, (192, 96)),
        (24576, 20480, 1, (192, 96)),
        (24576, 8192, 2, (192, 48)),
        (50000, 16384, 1, (390, 78)),
        (50000, 16384, 4, (390, 26)),
        (15600, 8192, 1, (120, 60)),  # 122 rows are 2 x 61, which halves to 2
        (100, 4096, 1, (1, 1)),
    ],
)
def test_a_batch_is_the_one_asked_for_whatever_the_micro_batch(batch, micro, processes, rows):
    args = SimpleNamespace(
        micro_batch_tokens=micro, world_size=processes, batch_size_tokens_start=None, use_compile=False
    )
    assert plan_rows(args, batch, row_length=128) == rows
    args.batch_size_tokens_start = batch
    assert plan_rows(args, batch, row_length=128)[0] % min(micro // 128, rows[0]) == 0, "one that grows has multiples"


@pytest.mark.parametrize(
    ("micro", "processes", "micro_rows", "within_memory"),
    [
        (128, 1, 128, 64),
        (128, 2, 64, 64),
        (128, 3, 8, 8),
        (128, 8, 16, 16),
        (16, 5, 4, 4),
        (14, 4, 7, 7),
        (8, 16, 2, 2),
    ],
)  # fmt: skip
def test_compiled_passes_are_of_one_size_while_the_batch_grows(micro, processes, micro_rows, within_memory):
    """From 256 to 2,048 rows, which are the same for any number of processes; none has much more to do than others."""
    args = SimpleNamespace(
        micro_batch_tokens=micro * 512, world_size=processes, batch_size_tokens_start=256 * 512, use_compile=True
    )
    plans = [plan_rows(args, rows * 512, row_length=512) for rows in range(256, 2049, micro)]
    assert all(num_rows % micro == 0 and rows == micro_rows for num_rows, rows in plans)
    for num_rows, rows in plans:
        assert -(-num_rows // rows // processes) * rows <= 1.125 * -(-num_rows // processes)
    trainer = SimpleNamespace(ranks=SimpleNamespace(decide=lambda *values: values), micro_batch_limit=100 * 512)
    shared = {share_plan(trainer, args, StepPlan(*plan, 0.0), 512).micro_rows for plan in plans}
    assert shared == {within_memory}


def test_passes_that_many_processes_make_small_are_said(caplog, make_trainer, monkeypatch):
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr("oneday.steps.say_small_passes", lambda args, row_length: asked.append(row_length))
        make_trainer("bert", budget_steps=1)
    assert asked == [ROW_LENGTH]
    caplog.set_level("INFO")
    args = {"micro_batch_tokens": 65_536, "batch_size_tokens_start": 131_072, "process_index": 0}
    for processes, is_compiled in ((1, True), (8, False), (8, True)):
        say_small_passes(SimpleNamespace(**args, world_size=processes, use_compile=is_compiled), 512)
        assert bool(caplog.text) == (processes == 8 and is_compiled)
    assert "Passes are of 8192 tokens, not of micro_batch_tokens (65536)" in caplog.text


def test_a_step_that_grows_from_fewer_rows_than_processes_is_refused():
    with pytest.raises(
        SettingError, match="A step of 2 rows cannot be shared by 4 processes; raise batch_size_tokens"
    ):
        find_common_rows(2, 2, 4)


def test_the_time_left_leaves_out_what_prepared_the_first_step():
    """A minute of compiling in a budget of three, then a tenth of what is left."""
    seconds = [0.0]
    clock = BudgetClock(Budget(seconds=180), now=lambda: seconds[0])
    clock.start()
    seconds[0] = 60.0
    clock.start_progress()
    seconds[0] = 72.0
    callback = BudgetProgressCallback(
        SimpleNamespace(clock=clock, last_eval={}, step_record=SimpleNamespace(loss=4.0))
    )
    callback.recent.append((1000, 1.0))
    assert callback.describe() == "loss 4.000, 1.00k tok/s, 01:12 spent, 01:48 left"


def test_mixed_precision_of_an_accelerate_config_changes_nothing(make_trainer, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trainer = make_trainer("bert", budget_steps=1, bf16=False)
    assert not trainer.accelerator.native_amp and trainer.describe_precision() == "float32"


def test_an_accelerate_config_does_not_compile_the_model(make_trainer, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    trainer = make_trainer("bert", budget_steps=1)
    assert trainer.accelerator.prepare(trainer.model) is trainer.model
    assert os.environ["ACCELERATE_DYNAMO_BACKEND"] == "EAGER"


def test_corpus_smaller_than_a_step_is_refused(make_trainer):
    with pytest.raises(SettingError, match="fewer than the .* of one step"):
        make_trainer(budget_steps=1, batch_size_tokens=10**7)


@pytest.mark.parametrize("trainer_class", [RunTrainer, BudgetTrainer])
def test_what_is_overridden_is_there_in_the_parent(trainer_class):
    """A method that transformers renames would be called no more, and nothing would say so."""
    own = {name for name in vars(trainer_class) if re.fullmatch(r"_[a-z]\w*", name)} - {"_staging_dir"}
    assert own and not own - set(dir(Trainer))


def test_what_is_overridden_without_a_mark_is_there_too():
    names = {"store_flos", "floating_point_ops", "get_batch_samples", "create_accelerator_and_postprocess"}
    assert names < set(vars(BudgetTrainer)) and names < set(dir(Trainer))


def test_the_rate_of_each_step_is_its_tokens_in_its_seconds(make_trainer):
    trainer = make_trainer(budget_steps=4)
    trainer.run()
    steps, clock = steps_of(trainer), trainer.clock
    assert sum(step["batch_tokens"] / step["tokens_per_second"] for step in steps) == pytest.approx(
        clock.ledger["steps"]
    )
    executed = sum(step["mfu"] * step["batch_tokens"] / step["tokens_per_second"] for step in steps)
    assert executed * trainer.peak_flops == pytest.approx(clock.flops)
    assert clock.tokens_per_second == pytest.approx(clock.tokens / (clock.ledger["steps"] + clock.ledger["data"]))
