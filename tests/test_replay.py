"""A wall-clock run done again on another clock."""

from __future__ import annotations

import random
import time

import pytest
import torch
from conftest import ROW_LENGTH, steps_of, weights
from test_recovery import Poison, SmallMemory
from transformers import TrainerCallback

from oneday.budget import Budget
from oneday.checkpoints import list_checkpoints, read_state
from oneday.errors import SettingError
from oneday.replay import ReplayClock, read_replayed_settings, read_script
from oneday.run_directory import append_metrics

SETTINGS = {
    "batch_size_tokens_start": 4 * ROW_LENGTH, "max_seq_length_start": ROW_LENGTH // 4, "mlm_probability_end": 0.15,
    "lr_shape": "trapezoid", "num_evaluations": 2, "optim": "muon",
}  # fmt: skip


class Jitter(TrainerCallback):
    """Steps that take a random time."""

    def __init__(self, seed):
        self.generator = random.Random(seed)

    def on_step_begin(self, args, state, control, **kwargs):
        time.sleep(self.generator.choice([0.0, 0.01, 0.08]))


@pytest.mark.parametrize("trouble", ["none", "bad numbers", "memory"])
def test_a_wall_clock_run_is_repeated_to_the_bit(make_trainer, trouble):
    first = make_trainer("bert", "first", budget_minutes=0.07, save_steps=9, max_bad_steps=2, **SETTINGS)
    first.add_callback(Jitter(1))
    if trouble == "bad numbers":
        first.add_callback(Poison(first, [12, 13]))
    if trouble == "memory":
        SmallMemory(first, 2)
    first.run()
    assert first.clock.steps > 12
    again = make_trainer(
        "bert", "again", budget_minutes=0.07, max_bad_steps=2, replay=first.args.output_dir, **SETTINGS
    )
    again.add_callback(Jitter(2))
    if trouble == "bad numbers":
        again.add_callback(Poison(again, [12, 13]))
    again.run()
    assert again.clock.steps == first.clock.steps
    assert [step["lr"] for step in steps_of(again)] == [step["lr"] for step in steps_of(first)]
    assert all(torch.equal(value, weights(first)[key]) for key, value in weights(again).items())
    for checkpoint in list_checkpoints(again.args.output_dir):  # whoever goes on from it knows where its rate was
        clock = read_state(checkpoint)["clock"]
        plans = [attempt.plan.progress for attempt in read_script(first.args.output_dir)]
        assert clock["progress"] == [*plans, 1.0][clock["steps_taken"]] > 0.0


def test_a_replay_can_be_repeated_too_and_keeps_what_it_may(make_trainer, tmp_path):
    first = make_trainer("bert", "first", budget_minutes=0.04, **SETTINGS)
    first.run()
    again = make_trainer("bert", "again", budget_minutes=0.04, replay=first.args.output_dir, **SETTINGS)
    again.run()
    assert read_script(again.args.output_dir) == read_script(first.args.output_dir)
    (tmp_path / "first" / "recipe.yaml").write_text("budget_minutes: 0.04\noptim: muon\noutput_dir: first\n")
    given = {"replay": str(tmp_path / "first"), "budget_minutes": 0.04, "dataset_name": "moved/*.txt"}
    with pytest.raises(SettingError, match="is repeated in a directory of its own; set output_dir"):
        read_replayed_settings(given)
    given |= {"output_dir": "again", "save_steps": 3}
    settings = read_replayed_settings(given)
    assert settings["optim"] == "muon" and settings["output_dir"] == "again" and settings["save_steps"] == 3
    assert settings["dataset_name"] == "moved/*.txt", "where the same text lies here"
    with pytest.raises(SettingError, match="use_cpu is True and the run in .* does not set it; leave use_cpu out"):
        read_replayed_settings({**given, "use_cpu": True})
    with pytest.raises(SettingError, match="optim is 'adamw' and the run in .* has 'muon'; leave optim out"):
        read_replayed_settings({**given, "optim": "adamw"})


def test_a_replay_that_takes_longer_is_no_fault():
    clock = ReplayClock(Budget(seconds=10.0), script=[])
    clock.load_carried({"spent": {"seconds": 20.0}})
    assert clock.describe_spending().startswith("200.0 % of 10 s spent (a replay takes the time it takes)")


def test_a_replay_with_less_memory_takes_smaller_micro_batches(make_trainer):
    first = make_trainer("bert", "first", budget_steps=6, micro_batch_tokens=4 * ROW_LENGTH)
    first.run()
    again = make_trainer("bert", "again", budget_steps=6, replay=first.args.output_dir)
    memory = SmallMemory(again, 2)
    again.run()
    assert memory.failures == 1, "once, not at every step"
    assert again.clock.steps == 6


def test_a_run_whose_extension_is_not_finished_is_not_replayed(tmp_path):
    """Its old end is among the events that a resume from there leaves standing."""
    for event in ({"event": "step", "step": 1, "taken": 1}, {"event": "end", "step": 1}, {"event": "resume", "step": 1,
                  "from_step": 1}, {"event": "step", "step": 2, "taken": 2}):  # fmt: skip
        append_metrics(tmp_path, event)
    with pytest.raises(SettingError, match="holds no finished run"):
        read_script(tmp_path)


def test_what_cannot_be_replayed_is_refused(make_trainer, tmp_path):
    with pytest.raises(SettingError, match="holds no run"):
        read_replayed_settings({"replay": str(tmp_path / "nowhere")})
    with pytest.raises(SettingError, match="no finished run"):
        make_trainer("bert", budget_minutes=1, replay=str(tmp_path / "nowhere"))
    trainer = make_trainer("bert", "whole", budget_steps=5)
    trainer.run()
    path = tmp_path / "whole" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if '"taken": 3,' not in line) + "\n")
    with pytest.raises(SettingError, match="lacks steps"):
        make_trainer("bert", replay=str(tmp_path / "whole"), budget_steps=5)
