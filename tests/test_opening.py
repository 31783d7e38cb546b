"""A run directory begun, gone on with, fetched."""

from __future__ import annotations

import dataclasses
import re

import pytest
import yaml

from oneday import run_directory as rundir
from oneday.arguments import REFUSED_SETTINGS, BudgetTrainingArguments
from oneday.errors import SettingError
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
