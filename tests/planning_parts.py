"""What tests of planning share: figures of a machine and a model, two tiny models to plan with."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml
from conftest import ROW_LENGTH

from oneday.assembly import CLASSES
from oneday.machines import Machine
from oneday.planning import PlanArguments, plan_budget
from oneday.probing import Probe
from oneday.recipe import resolve_settings

PROBE = Probe(4_000_000, 2_000_000, 1e7, 50_000_000, 10_000.0, {"muon": 30_000_000, "muon_8bit": 20_000_000})
MACHINE = Machine("machine", 100e6, 1e12, 200.0, None)
SETTINGS = {
    "batch_size_tokens": 4096, "batch_size_tokens_start": None, "batch_ramp_fraction": 0.6, "micro_batch_tokens": 4096,
    "max_seq_length": 128, "optim": "muon",
}  # fmt: skip


@pytest.fixture
def small_recipe(texts, tmp_path, monkeypatch):
    """Two tiny models of one architecture and a recipe that extends another."""
    monkeypatch.setenv("ONEDAY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    shape = {"model_type": "bert", "num_attention_heads": 2, "vocab_size": 192, "max_position_embeddings": 64}
    for name, width, layers in (("small", 16, 1), ("wide", 96, 6)):
        config = {**shape, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    base = {
        "model_config": str(tmp_path / "small.json"), "dataset_name": str(tmp_path / "texts.jsonl"),
        "validation_fraction": 0.1, "vocab_size": 150, "max_seq_length": ROW_LENGTH, "batch_size_tokens": 256,
        "micro_batch_tokens": 256, "budget_minutes": 5, "bf16": False, "optim": "muon",
    }  # fmt: skip
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"extends": "base.yaml", "learning_rate": 2e-3}))
    return tmp_path / "recipe.yaml"


def plan(recipe, target, **settings):
    argv = [str(recipe), *[word for key, value in settings.items() for word in (f"--{key}", str(value))]]
    given = resolve_settings((PlanArguments, *CLASSES), argv)
    own = {field.name for field in dataclasses.fields(PlanArguments)}
    plan_args = PlanArguments(**{key: value for key, value in given.items() if key in own}, plan_recipe=str(target))
    return plan_budget(str(recipe), {key: value for key, value in given.items() if key not in own}, plan_args)
