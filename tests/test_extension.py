"""More budget for a finished run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import steps_of
from transformers import TrainerCallback

from oneday import extension
from oneday.budget import Budget
from oneday.checkpoints import list_checkpoints, list_kept, read_state, seal_checkpoint
from oneday.errors import SettingError
from oneday.evaluation import measure_held_out
from oneday.extension import extend_run
from oneday.run_directory import inspect_run, read_metrics


def finish(trainer, settings):
    """Runs it, and leaves what the program would."""
    trainer.run()
    folder = Path(trainer.args.output_dir)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    (folder / "results.json").write_text(json.dumps({"steps": trainer.clock.steps}))
    return folder


@pytest.mark.parametrize("lr_shape", ["trapezoid", "one_minus_sqrt"])
def test_it_goes_on_from_before_the_cool_down_as_if_planned_that_long(make_trainer, lr_shape):
    settings = {"lr_shape": lr_shape, "decay_fraction": 0.4, "save_steps": 7, "optim": "muon"}
    folder = finish(make_trainer("bert", budget_steps=20, **settings), settings | {"budget_steps": 20})
    kept = [path for path in list_checkpoints(folder) if read_state(path)["is_kept"]]
    assert [path.name for path in kept] == ["checkpoint-12"]
    longer = settings | {"budget_steps": 40, "extend": True, "push_to_hub": True}
    assert inspect_run(folder, longer) == "extended"
    scored = {"glue/glue_results.json", "glue-lora/glue_results.json", "zero_shot_results.json"}
    for name in scored:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    extend_run(folder, longer, Budget(steps=40), "", "")
    assert not any((folder / name).exists() for name in scored), "they are of weights that move on"
    assert (folder / "glue" / "glue_results-20-steps.json").exists()
    once = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert not once["extend"] and not once["push_to_hub"], "who runs the recipe again did not ask for these"
    assert inspect_run(folder, longer) == "resumed"
    extended = make_trainer("bert", budget_steps=40, **settings)
    extended.run(resume=True)
    planned = make_trainer("bert", "planned", budget_steps=40, **settings)
    planned.run()
    assert [step["step"] for step in steps_of(extended)] == list(range(1, 41))
    rates = [[step["lr"] for step in steps_of(trainer)] for trainer in (extended, planned)]
    assert rates[0][12:] == pytest.approx(rates[1][12:])
    plans = [[step["plan_progress"] for step in steps_of(trainer)] for trainer in (extended, planned)]
    assert plans[0][13:] == pytest.approx(plans[1][13:]), "batch, rows and masks follow it as if planned that long"
    losses = [measure_held_out(trainer)["eval_loss"] for trainer in (extended, planned)]
    assert losses[0] == pytest.approx(losses[1], abs=0.05)


def test_a_second_extension_goes_on_from_the_second_plateau(make_trainer):
    settings = {"lr_shape": "trapezoid", "decay_fraction": 0.5}
    folder = finish(make_trainer("bert", budget_steps=8, **settings), settings | {"budget_steps": 8})
    for steps, base in ((16, 4), (32, 8)):
        extend_run(folder, settings | {"budget_steps": steps}, Budget(steps=steps), "", "")
        resumed = make_trainer("bert", budget_steps=steps, **settings)
        resumed.run(resume=True)
        (folder / "results.json").write_text(json.dumps({"steps": steps}))
        went_on = [event for event in read_metrics(folder) if event["event"] == "resume"][-1]
        assert went_on["from_step"] == base
        assert read_state(list_kept(folder)[-1])["clock"]["steps"] == steps // 2


def test_discarded_time_is_reported_and_not_counted_again(make_trainer, monkeypatch):
    monkeypatch.setattr("oneday.pretraining.process_age_seconds", lambda: 0.0)  # this process is all of the tests'
    settings = {"lr_shape": "trapezoid", "decay_fraction": 0.5}
    folder = finish(make_trainer("bert", budget_minutes=0.05, **settings), settings | {"budget_minutes": 0.05})
    spent = json.loads((folder / "budget.json").read_text())["spent"]["seconds"]
    longer = settings | {"budget_minutes": 0.3, "extend": True}
    extend_run(folder, longer, Budget(seconds=18.0), "", "")
    base = json.loads((folder / "budget.json").read_text())
    assert base["spent"]["seconds"] + base["discarded_seconds"] == pytest.approx(spent)
    assert base["spent"]["seconds"] == pytest.approx(spent / 2, rel=0.35)
    assert inspect_run(folder, longer) == "resumed"
    extended = make_trainer("bert", budget_minutes=0.3, **settings)
    extended.run(resume=True)
    report = json.loads((folder / "budget.json").read_text())
    assert 0.8 * 18 < report["spent"]["seconds"] <= 1.02 * 18
    assert report["discarded_seconds"] == base["discarded_seconds"]


def test_a_shape_without_a_flat_phase_warms_up_again(make_trainer, caplog):
    caplog.set_level("INFO")
    settings = {"lr_shape": "linear", "warmup_fraction": 0.2}
    folder = finish(make_trainer("bert", budget_steps=10, **settings), settings | {"budget_steps": 10})
    extend_run(folder, settings | {"budget_steps": 30, "decay_fraction": 0.5}, Budget(steps=30), "", "")
    assert "warms up again" in caplog.text
    extended = make_trainer("bert", budget_steps=30, **settings)
    extended.run(resume=True)
    rates = [step["lr"] for step in steps_of(extended)]
    assert len(rates) == 30 and rates[10] < rates[12] and max(rates[10:]) > 0.8 * max(rates[:10])
    assert rates[-1] < 0.1 * max(rates)


def test_a_shape_without_a_flat_phase_goes_on_from_any_checkpoint_of_its_end(make_trainer):
    """A run whose last step was that of a checkpoint keeps no other: a signal there, or no step left after it."""
    settings = {"lr_shape": "cosine", "decay_fraction": 0.5, "save_steps": 4}
    folder = finish(make_trainer("bert", budget_steps=8, **settings), settings | {"budget_steps": 8})
    for checkpoint in list_checkpoints(folder):
        state = read_state(checkpoint)
        (checkpoint / "oneday_state.json").write_text(json.dumps(state | {"is_kept": False}))
        (checkpoint / "checksums.json").unlink()
        seal_checkpoint(checkpoint)
    extend_run(folder, settings | {"budget_steps": 16}, Budget(steps=16), "", "")
    assert [path.name for path in list_checkpoints(folder)][-1] == "checkpoint-8"
    shutil.rmtree(folder / "checkpoint-8")
    with pytest.raises(SettingError, match="from before its learning rate fell is not there"):
        extend_run(folder, settings | {"budget_steps": 16}, Budget(steps=16), "", "")


def test_a_checkpoint_of_after_the_plateau_is_never_kept(make_trainer, tmp_path):
    """Fetched from the Hub it comes without the one before: a run that goes on from it cannot be extended."""
    settings = {"lr_shape": "trapezoid", "decay_fraction": 0.5, "save_steps": 2}
    trainer = make_trainer("bert", "whole", budget_steps=12, **settings)
    finish(trainer, settings | {"budget_steps": 12})
    folder = tmp_path / "elsewhere"
    source = Path(trainer.args.output_dir)
    newest = max(list_checkpoints(source), key=lambda path: read_state(path)["clock"]["steps"])
    assert read_state(newest)["clock"]["progress"] > 0.5 and not read_state(newest)["is_kept"]
    shutil.copytree(newest, folder / newest.name)
    shutil.copy(source / "recipe.yaml", folder)
    resumed = make_trainer("bert", "elsewhere", budget_steps=12, **settings)
    resumed.run(resume=True)
    assert list_checkpoints(folder) and not list_kept(folder)
    with pytest.raises(SettingError, match="from before its learning rate fell is not there"):
        extend_run(folder, settings | {"budget_steps": 24}, Budget(steps=24), "", resumed.model_fingerprint)


@pytest.mark.parametrize("left", ["no state", "half a state"])
def test_an_extension_that_was_cut_off_is_taken_up_again(make_trainer, left):
    """Killed while it removed the checkpoints of the cool-down."""
    settings = {"lr_shape": "trapezoid", "decay_fraction": 0.5, "save_steps": 2}
    trainer = make_trainer("bert", budget_steps=12, **settings)
    folder = finish(trainer, settings | {"budget_steps": 12})
    base = list_kept(folder)[-1]
    undone = [path for path in list_checkpoints(folder) if path != base]
    assert undone
    state = undone[-1] / "oneday_state.json"
    state.write_text(state.read_text()[: 50 * (left == "half a state")])
    extend_run(folder, settings | {"budget_steps": 24}, Budget(steps=24), "", trainer.model_fingerprint)
    assert list_checkpoints(folder) == [base]
    report = json.loads((folder / "budget.json").read_text())
    assert report["status"] == "extending"


def test_energy_that_was_only_metered_goes_back_too(make_trainer):
    settings = {"lr_shape": "trapezoid", "decay_fraction": 0.5}
    trainer = make_trainer("bert", budget_steps=8, **settings)
    folder = finish(trainer, settings | {"budget_steps": 8})
    base = list_kept(folder)[-1]
    state = read_state(base)
    state["clock"]["metered_kwh"] = 2.0
    (base / "oneday_state.json").write_text(json.dumps(state))
    (base / "checksums.json").unlink()
    seal_checkpoint(base)
    report = json.loads((folder / "budget.json").read_text())
    (folder / "budget.json").write_text(json.dumps(report | {"spent": report["spent"] | {"kwh": 3.0}}))
    extend_run(folder, settings | {"budget_steps": 24}, Budget(steps=24), "", trainer.model_fingerprint)
    assert json.loads((folder / "budget.json").read_text())["spent"]["kwh"] == 2.0


def test_a_checkpoint_that_cannot_be_read_now_is_not_removed(make_trainer, monkeypatch):
    settings = {"lr_shape": "trapezoid", "decay_fraction": 0.5, "save_steps": 2}
    trainer = make_trainer("bert", budget_steps=12, **settings)
    folder = finish(trainer, settings | {"budget_steps": 12})
    before, base, report = list_checkpoints(folder), list_kept(folder)[-1], (folder / "budget.json").read_text()
    read, find = extension.read_state, extension.find_fault

    def fail(path):
        raise SettingError(f"{path} cannot be read")

    monkeypatch.setattr(extension, "read_state", lambda path: read(path) if path == base else {})
    monkeypatch.setattr(extension, "find_fault", lambda path: find(path) if path == base else fail(path))
    with pytest.raises(SettingError, match="cannot be read"):
        extend_run(folder, settings | {"budget_steps": 24}, Budget(steps=24), "", trainer.model_fingerprint)
    assert list_checkpoints(folder) == before and (folder / "budget.json").read_text() == report


def test_what_cannot_be_extended_is_refused(make_trainer, tmp_path):
    settings = {"lr_shape": "trapezoid", "decay_fraction": 0.5}
    trainer = make_trainer("bert", budget_steps=8, **settings)
    trainer.model_fingerprint = "one"
    folder = finish(trainer, settings | {"budget_steps": 8})
    assert inspect_run(folder, settings | {"budget_steps": 8, "extend": True}) == "finished"
    for budget in (Budget(steps=6), Budget(steps=8), Budget(steps=20, tokens=1000)):
        with pytest.raises(SettingError, match="larger in every kind"):
            extend_run(folder, settings, budget, "", "one")
    with pytest.raises(SettingError, match="is not what .* was trained on"):
        extend_run(folder, settings, Budget(steps=20), "another", "one")
    with pytest.raises(SettingError, match="The file of model_config is not what"):
        extend_run(folder, settings, Budget(steps=20), "", "another")
    assert (folder / "results.json").exists(), "nothing is taken apart"
    with pytest.raises(SettingError, match="on a replay"):
        extend_run(folder, {**settings, "replay": "runs/first"}, Budget(steps=20), "", "one")
    with pytest.raises(SettingError, match="other settings"):
        inspect_run(folder, settings | {"budget_steps": 20, "extend": True, "optim": "muon"})
    weights_file = next(path for path in list_checkpoints(folder) if read_state(path)["is_kept"]) / "optimizer.pt"
    weights_file.write_bytes(b"broken")
    with pytest.raises(SettingError, match="is damaged"):
        extend_run(folder, settings | {"budget_steps": 20}, Budget(steps=20), "", "one")
    assert (folder / "results.json").exists(), "nothing was touched"


class SlowDisk(TrainerCallback):
    """A checkpoint before the sixth step would take longer than there is time."""

    def __init__(self, trainer):
        self.trainer = trainer
        trainer.clock.fits_seconds = lambda seconds: seconds < 1000

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.checkpoint_seconds = 1e6 if state.global_step < 5 else 0.0


class LatePlateau(TrainerCallback):
    """The end of the plateau is met when most of the cool-down is over, as after many bad steps."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.plateau_end = 2.0 if state.global_step < 5 else 0.5


@pytest.mark.parametrize(("callback", "save_steps"), [(SlowDisk, 7), (LatePlateau, 6)])
def test_a_checkpoint_of_a_rate_that_has_fallen_is_none_to_extend_from(make_trainer, callback, save_steps):
    """One that did not fit at the plateau's end is not made later."""
    settings = {"lr_shape": "trapezoid", "decay_fraction": 0.5, "save_steps": save_steps}
    trainer = make_trainer("bert", budget_steps=8, **settings)
    trainer.add_callback(callback(trainer))
    folder = finish(trainer, settings | {"budget_steps": 8})
    assert [path.name for path in list_checkpoints(folder)] == [f"checkpoint-{save_steps}"] and not list_kept(folder)
