"""A run directory begun, gone on with, fetched."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import time
from contextlib import ExitStack

import pytest
import yaml
from huggingface_hub import HfApi

from oneday import run_directory as rundir
from oneday.arguments import BudgetTrainingArguments
from oneday.checkpoints import seal_checkpoint
from oneday.errors import SettingError
from oneday.hub import HubPusher, push_checkpoint, refuse_older
from oneday.opening import open_run
from oneday.pretraining import perform_run
from oneday.refused_settings import REFUSED_SETTINGS
from oneday.run_directory import create_run, refresh_recipe


def test_what_was_asked_for_once_is_not_in_the_recipe_and_free_settings_are_those_of_now(run_script, tmp_path):
    run = tmp_path / "run"
    create_run(
        run, {"seed": 1, "resume_from_hub": "ann/tiny", "extend": True, "push_to_hub": True, "save_minutes": 20}
    )
    assert yaml.safe_load((run / "recipe.yaml").read_text()) == {
        "seed": 1, "resume_from_hub": None, "extend": False, "push_to_hub": False, "save_minutes": 20,
    }  # fmt: skip
    refresh_recipe(run, {"seed": 2, "hub_license": "cc-by-sa-3.0", "push_to_hub": True})
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert (recipe["seed"], recipe["hub_license"], recipe["push_to_hub"]) == (1, "cc-by-sa-3.0", False)
    assert recipe["save_minutes"] == 20


def test_how_a_run_logs_saves_and_pushes_may_change_when_it_goes_on(tmp_path):
    names = {field.name for field in dataclasses.fields(BudgetTrainingArguments)} - REFUSED_SETTINGS.keys()
    about = {name for name in names if re.match("log|save|hub|push|report|run_name|project|trackio|ddp_timeout", name)}
    assert {"logging_first_step", "log_level_replica", "trackio_space_id"} < about
    create_run(tmp_path, {"seed": 1})
    assert rundir.inspect_run(tmp_path, {"seed": 1, **dict.fromkeys(about, "another")}) == "resumed"
    with pytest.raises(SettingError, match="adam_beta1: None, now 0.5"):
        rundir.inspect_run(tmp_path, {"seed": 1, "adam_beta1": 0.5})


def test_what_a_killed_fetch_left_is_no_run(tmp_path):
    (tmp_path / ".staging" / "checkpoint-4").mkdir(parents=True)
    assert rundir.inspect_run(tmp_path, {}) == "new"
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(SettingError, match="is not empty and holds no run"):
        rundir.inspect_run(tmp_path, {})


def make_checkpoint(run, step):
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "oneday_state.json"):
        (folder / name).write_text("{}")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    seal_checkpoint(folder)
    return folder


def test_a_run_that_went_further_elsewhere_is_not_gone_on_with(asked_hub, tmp_path, caplog):
    """Else the next push would replace the newer checkpoint. A Hub that is away stops nobody."""
    here = tmp_path / "run"
    api = HfApi(asked_hub.url, token="hf_good")
    for step, strategy in ((4, "checkpoint"), (6, "checkpoint"), (8, "all_checkpoints")):
        folder = make_checkpoint(here, step)
        push_checkpoint(api, folder, "ann/tiny", strategy)
        refuse_older("ann/tiny", here)
        if step > 4:
            shutil.rmtree(folder)
            with pytest.raises(SettingError, match=f"stands at step {step}, the one in {here} at step 4; move that"):
                refuse_older("ann/tiny", here)
    assert not caplog.text
    (make_checkpoint(here, 9) / "model.safetensors").write_text("torn")
    with pytest.raises(SettingError, match="at step 4; move that"):  # what is damaged is not gone on with
        refuse_older("ann/tiny", here)
    refuse_older("ann/nothing", here)
    assert "Whether the run in ann/nothing has gone further could not be seen" in caplog.text


@pytest.mark.parametrize("code", [403, 500])
def test_a_hub_that_stumbles_is_no_hub_without_checkpoints(asked_hub, tmp_path, caplog, monkeypatch, code):
    """The client calls what it cannot have a missing file, or gives an older copy."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    api = HfApi(asked_hub.url, token="hf_good")
    for step in (4, 6):
        push_checkpoint(api, make_checkpoint(tmp_path, step), "ann/tiny", "checkpoint")
        refuse_older("ann/tiny", tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-6")
    asked_hub.errors[("HEAD", "/resolve/")] = [code] * 9
    caplog.clear()
    refuse_older("ann/tiny", tmp_path)
    assert "Whether the run in ann/tiny has gone further could not be seen" in caplog.text


def test_an_older_state_of_a_run_is_not_opened(tmp_path, monkeypatch):
    settings = {"output_dir": str(tmp_path / "run"), "resume_from_hub": "ann/tiny", "extend": False}
    create_run(tmp_path / "run", settings)
    asked = []
    monkeypatch.setattr("oneday.opening.refuse_older", lambda *given: asked.append(given))
    with ExitStack() as held:
        assert open_run(held, settings, None, "text", "config") == "resumed"
    assert asked == [("ann/tiny", str(tmp_path / "run"))]


def test_a_run_that_starts_opens_its_repository_and_its_line(make_trainer, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("oneday.hub.HubPusher.open_repository", lambda pusher: calls.append(pusher.repo_id))
    monkeypatch.setattr("oneday.pretraining.continue_line", lambda args: calls.append(args.output_dir))
    trainer = make_trainer("bert", budget_steps=1, push_to_hub=True, hub_model_id="ann/tiny", hub_strategy="end")
    monkeypatch.setattr(trainer, "run", lambda resume: setattr(trainer, "status", "interrupted"))
    assert perform_run(trainer, "new", lambda metrics: None) == 75
    assert calls == ["ann/tiny", trainer.args.output_dir]


def test_what_stands_in_the_way_of_pushing_is_said_at_once(asked_hub, tmp_path, caplog):
    for name, reason in (("tiny", None), ("other", "the Hub does not know the token")):
        asked_hub.errors[("POST", "/repos/create")] = [401] * (reason is not None)
        pusher = HubPusher(tmp_path, f"ann/{name}", "end", private=True)
        pusher.api = HfApi(asked_hub.url, token="hf_good")
        pusher.open_repository()
        until = time.monotonic() + 20
        while not (caplog.text if reason else asked_hub.branches) and time.monotonic() < until:
            time.sleep(0.02)
        assert (reason is None) == (not caplog.text) and (reason or "") in caplog.text
    asked = [json.loads(body) for path, body, _ in asked_hub.received if path.endswith("/repos/create")]
    assert [one["name"] for one in asked] == ["tiny", "other"] and list(asked_hub.branches) == ["ann/tiny"]
