"""What dashboards are told of a run, and that an interrupted one stays one line."""

from __future__ import annotations

import json
import os

import pytest
from conftest import ROOT
from program_parts import SMALL, flags

from oneday.arguments import BudgetTrainingArguments
from oneday.assembly import CLASSES, assemble_trainer
from oneday.public_copies import RESUMED_FILES
from oneday.recipe import build_arguments, complete_settings, resolve_settings
from oneday.trackers import continue_line


@pytest.fixture
def variables(monkeypatch):
    """W&B's, as they were before and after the test."""
    names = ("WANDB_RUN_ID", "WANDB_RESUME")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return names


def test_an_interrupted_run_goes_on_in_its_line(variables, tmp_path, monkeypatch):
    args = BudgetTrainingArguments(output_dir=str(tmp_path), report_to=["wandb"], budget_steps=1)
    ids = []
    for _ in range(2):
        continue_line(args)
        ids.append(os.environ["WANDB_RUN_ID"])
        assert os.environ["WANDB_RESUME"] == "allow"
        for name in variables:
            monkeypatch.delenv(name)
    assert ids[0] == ids[1] == json.loads((tmp_path / "wandb_run.json").read_text())["id"]
    assert "wandb_run.json" in RESUMED_FILES, "on another machine too"
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    monkeypatch.setenv("WANDB_RESUME", "must")
    continue_line(args)
    assert json.loads((tmp_path / "wandb_run.json").read_text()) == {"id": "mine"}
    assert os.environ["WANDB_RESUME"] == "must"


def test_without_wandb_nothing_is_kept(variables, tmp_path):
    continue_line(BudgetTrainingArguments(output_dir=str(tmp_path), report_to=["none"], budget_steps=1))
    assert "WANDB_RUN_ID" not in os.environ and not list(tmp_path.iterdir())


def test_dashboards_show_the_settings_of_the_recipe(text_file, tmp_path):
    """Not what the parent class was given instead."""
    settings = {**SMALL, "optim": "adamw", "bf16": "true", "push_to_hub": "true", "hub_model_id": "ann/tiny"}
    argv = flags(**settings, dataset_name=text_file, cache_dir=tmp_path / "cache", output_dir=tmp_path / "run")
    settings = complete_settings(CLASSES, resolve_settings(CLASSES, argv))
    trainer, _ = assemble_trainer(*build_arguments(CLASSES, settings))
    shown = json.loads(trainer.args.to_json_string())
    assert (shown["optim"], shown["bf16"], shown["push_to_hub"]) == ("adamw", True, True)
    assert shown["dataset_name"] == str(text_file) and shown["model_config"] == str(ROOT / SMALL["model_config"])
    assert (shown["max_seq_length"], shown["budget_steps"], shown["torch_compile"]) == (32, 3, False)
    assert not shown.keys() & {"max_steps", "lr_scheduler_type", "num_train_epochs", "per_device_train_batch_size"}
