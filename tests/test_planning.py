"""A plan of a budget: which models are in it, its notes, what is refused, and the recipe it writes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROW_LENGTH
from planning_parts import PROBE, plan

from oneday.assembly import CLASSES
from oneday.errors import SettingError
from oneday.ladder import FamilyLaw
from oneday.plan_table import format_plan, make_notes
from oneday.planning import find_material, list_models
from oneday.probing import COUNTED_ROWS, Pace, measure_model
from oneday.recipe import complete_settings, parse_recipe, resolve_settings, split_command_line
from oneday.scaling_law import Prediction


def test_the_note_names_the_rule_by_which_was_chosen():
    """A model that does not fit has no say in it."""
    said = Prediction(2.0, 1.9, 2.1)
    fits = SimpleNamespace(micro_batch_tokens=128, prediction=said, epochs=1.0)
    for other, words in (
        (SimpleNamespace(micro_batch_tokens=0, prediction=None), ">: the lowest loss"),
        (SimpleNamespace(micro_batch_tokens=128, prediction=None), ">: the largest that fits"),
    ):
        plan = SimpleNamespace(rows=[fits, other], best=0, fitted=None, family="f", mfu=None, left_out=[], unfit=[])
        assert any(note.startswith(words) for note in make_notes(plan))


def test_a_plan_of_this_machine(small_recipe, tmp_path):
    """Two real models probed; the recipe written is the given one with the choice, and can be launched."""
    target = tmp_path / "plans" / "mine.yaml"
    made = plan(small_recipe, target, budget_minutes=2, probe_seconds=1, usd_per_hour=6, stated_watts=100)
    assert [Path(row.model_config).stem for row in made.rows] == ["small", "wide"]
    assert made.rows[0].tokens > made.rows[1].tokens > 0
    assert all(row.usd == pytest.approx(0.2, rel=1e-3) for row in made.rows)
    assert all(row.kwh == pytest.approx(0.1 / 30, rel=1e-3) for row in made.rows)
    assert made.fitted is None
    table = format_plan(made)
    assert max(map(len, table.splitlines()[:-1])) <= 80
    assert "no law" in table
    assert "no scaling law is fitted for bert" in " ".join(table.split())

    model_args, data_args, args = parse_recipe(CLASSES, [str(target)])
    assert model_args.model_config == made.rows[made.best].model_config
    assert (args.budget_minutes, args.learning_rate, args.usd_per_hour) == (2, 2e-3, 6)
    assert (args.optimizer_name, args.micro_batch_tokens, data_args.max_seq_length) == ("muon", 256, ROW_LENGTH)
    assert yaml.safe_load(target.read_text())["extends"] == "../base.yaml"
    assert args.output_dir == "runs/mine"


@pytest.mark.parametrize(
    ("compiles", "embedding_init", "gain", "fixed_seconds"),
    [(True, "cooccurrence", 0.25, 30.0), (True, "random", 0.25, 30.0), (False, "cooccurrence", 1.0, 30.0),
     (False, "random", 1.0, 0.0)],
)  # fmt: skip
@pytest.mark.parametrize("is_set", [True, False])
def test_what_the_own_model_gains_and_waits_for_stands_for_all(
    small_recipe, tmp_path, monkeypatch, is_set, compiles, embedding_init, gain, fixed_seconds
):
    """By hand: compiled it takes a quarter of the time a token, and 30 of the 120 s pass before its first step."""
    if not is_set:
        monkeypatch.setattr("oneday.planning.decide_compiling", lambda args, is_packed: compiles)
    plain, asked = {"small": Pace(4e-4, 0.2), "wide": Pace(1e-3, 0.5)}, []

    def measure(material, settings, seconds):
        name = Path(settings["model_config"]).stem
        asked.append((name, settings["torch_compile"], seconds))
        return Pace(1e-4, 0.3, 30.0) if settings["torch_compile"] else plain[name]

    monkeypatch.setattr("oneday.planning.measure_pace", measure)
    monkeypatch.setattr("oneday.planning.measure_fixed_seconds", lambda material, settings: 30.0)
    monkeypatch.setattr("oneday.planning.measure_model", lambda material, settings: PROBE)
    torch_compile = compiles if is_set else "null"
    given = {"torch_compile": torch_compile, "embedding_init": embedding_init, "batch_size_tokens_start": "null"}
    made = plan(small_recipe, tmp_path / "mine.yaml", budget_minutes=2, probe_seconds=6, **given)
    for row in made.rows:
        pace = plain[Path(row.model_config).stem]
        rate = 256 / (256 * gain * pace.seconds_per_token + pace.seconds_per_step)
        assert row.tokens == pytest.approx((120 - fixed_seconds) * rate)
        assert row.hours == pytest.approx(120 / 3600)
    seconds = 6 / (2 + compiles)
    whole = [("small", True, seconds)] if compiles else []
    assert asked == [("small", False, seconds), ("wide", False, seconds), *whole]


def test_a_law_says_nothing_of_another_architecture_nor_a_budget_without_a_step(small_recipe, tmp_path, monkeypatch):
    law = SimpleNamespace(covers=lambda size: True, predict=lambda size, tokens: Prediction(4.0, 3.9, 4.1))
    fitted = FamilyLaw(law, [], "eval_loss", "text", "held out")
    monkeypatch.setattr("oneday.planning.fit_family", lambda *args: fitted)
    monkeypatch.setattr("oneday.planning.measure_pace", lambda *args: Pace(1e-4, 0.0, 30.0))
    own = resolve_settings(CLASSES, [str(small_recipe)])["model_config"]
    other = tmp_path / "other.json"
    config = json.loads(Path(own).read_text())
    other.write_text(json.dumps(config | {"model_type": "roberta"}))
    target, given = tmp_path / "both.yaml", {"models": f"{own},{other}", "output_dir": tmp_path / "here"}
    made = plan(small_recipe, target, budget_minutes=2, **given)
    said = {Path(row.model_config).name: row.prediction for row in made.rows}
    assert said[Path(own).name].loss == 4.0 and said["other.json"] is None
    assert yaml.safe_load(target.read_text())["output_dir"] == str(tmp_path / "here")
    with pytest.raises(SettingError, match="ends before the first step: .* take 30 s"):
        plan(small_recipe, tmp_path / "short.yaml", budget_minutes=0.4, **given)
    assert not (tmp_path / "short.yaml").exists()


def test_a_config_beside_the_recipes_that_cannot_take_it_is_left_out(small_recipe, tmp_path, monkeypatch):
    """Its own model and those that are named must; the table says who was left out."""
    wide = json.loads((tmp_path / "wide.json").read_text())
    (tmp_path / "short.json").write_text(json.dumps(wide | {"max_position_embeddings": ROW_LENGTH - 1}))
    monkeypatch.setattr("oneday.planning.measure_model", lambda *args: PROBE)
    monkeypatch.setattr("oneday.planning.measure_pace", lambda *args: Pace(1e-4, 0.0, 0.0))
    made = plan(small_recipe, tmp_path / "mine.yaml")
    assert made.unfit == ["short"] and [Path(row.model_config).stem for row in made.rows] == ["small", "wide"]
    assert "other rows or positions than the recipe's: short." in " ".join(format_plan(made).split())
    monkeypatch.chdir(tmp_path)
    respelt = {"models": tmp_path / "short.json", "model_config": "./short.json"}
    for settings in ({"models": tmp_path / "short.json"}, {"model_config": tmp_path / "short.json"}, respelt):
        with pytest.raises(SettingError, match="short.json has .* positions"):
            plan(small_recipe, tmp_path / "no.yaml", **settings)


def test_a_tokenizer_that_is_given_is_the_one_of_the_law_and_of_the_probes(
    small_recipe, tokenizers, tmp_path, monkeypatch
):
    tokenizers["encoder"].save_pretrained(tmp_path / "tokenizer")
    asked = []
    monkeypatch.setattr("oneday.planning.fit_family", lambda records, family, held_out: asked.append(family))
    monkeypatch.setattr("oneday.planning.measure_model", lambda *args: PROBE)
    monkeypatch.setattr("oneday.planning.measure_pace", lambda *args: Pace(1e-4, 0.0, 0.0))
    for given in ({}, {"tokenizer_name": tmp_path / "tokenizer"}):
        plan(small_recipe, tmp_path / "mine.yaml", vocab_size=120, **given)
    assert [family.vocab_size for family in asked] == [120, len(tokenizers["encoder"])]
    given = {"streaming": True, "dataset_name": "user/name", "tokenizer_name": str(tmp_path / "tokenizer")}
    settings = complete_settings(CLASSES, resolve_settings(CLASSES, [str(small_recipe)]) | given)
    stand_in = find_material(settings, tmp_path / "stand-in")
    assert stand_in.num_tokens is None and stand_in.tokenizer.get_vocab() == tokenizers["encoder"].get_vocab()


def test_text_on_disk_is_planned_as_such_whatever_streaming_says(small_recipe, tmp_path):
    settings = complete_settings(CLASSES, resolve_settings(CLASSES, [str(small_recipe), "--streaming", "true"]))
    assert find_material(settings, tmp_path).num_tokens > 0


def test_a_text_of_few_rows_can_be_planned(small_recipe, texts, tmp_path):
    """Of as many as a step of the recipe has; more are only counted where they are there."""
    for name, part in (("few", texts[:12]), ("held", texts[12:40])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    given = {
        "dataset_name": str(tmp_path / "few.jsonl"),
        "validation_name": str(tmp_path / "held.jsonl"),
        "vocab_size": 120,
    }
    settings = complete_settings(CLASSES, resolve_settings(CLASSES, [str(small_recipe)]) | given)
    material = find_material(settings, tmp_path)
    assert 2 <= len(material.train) < COUNTED_ROWS
    probe = measure_model(material, settings)
    assert probe.flops_per_token > 0 and probe.token_share == material.train.packing_efficiency > 0.5
    padded = settings | {"packing_strategy": "padded"}
    material = find_material(padded, tmp_path / "padded")
    assert measure_model(material, padded).token_share == material.train.packing_efficiency < probe.token_share


def test_a_plan_for_a_card_that_is_not_here(small_recipe, tmp_path):
    made = plan(
        small_recipe, tmp_path / "card.yaml", **{"for": "RTX 3090", "mfu": 0.5, "budget_hours": 1, "bf16": "null"}
    )
    rate = 0.5 * 6.1e18 / 86400
    assert made.rows[1].tokens == pytest.approx(3600 * rate / made.rows[1].probe.flops_per_token)
    assert made.rows[1].kwh == pytest.approx(0.35)
    table = format_plan(made)
    assert "estimate for RTX 3090" in table
    assert "50 % of 71 TFLOP/s" in " ".join(table.split())
    assert made.rows[0].epochs > 4
    assert "more text is worth more" in " ".join(table.split())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"for": "Voodoo 2"}, "none of the cards"),
        ({"for": "RTX 4090", "bf16": "false"}, "peaks known of cards are of bf16, and bf16 is false"),
        ({"mfu": 2}, "mfu is 2"),
        ({"probe_seconds": 0}, "probe_seconds is 0"),
        ({"gpu_memory_gb": 1e-4}, "No model fits"),
        ({"models": "nothing.json"}, "nothing.json does not exist"),
    ],
)
def test_a_plan_that_cannot_be_made_leaves_nothing(small_recipe, tmp_path, settings, message):
    target = tmp_path / "plans" / "none.yaml"
    with pytest.raises(SettingError, match=message):
        plan(small_recipe, target, **{"probe_seconds": 0.2, **settings})
    assert not target.exists()


@pytest.mark.parametrize("name", ["recipe.yaml", "base.yaml", "plans/../recipe.yaml", "link.yaml"])
def test_a_recipe_that_is_planned_with_is_not_overwritten(small_recipe, tmp_path, name):
    (tmp_path / "plans").mkdir()
    (tmp_path / "link.yaml").symlink_to(small_recipe)
    before = {path: path.read_text() for path in tmp_path.glob("*.yaml")}
    with pytest.raises(SettingError, match=f"plan_recipe is '.*{name}', which the plan is made from"):
        plan(small_recipe, tmp_path / name, probe_seconds=0.2)
    assert {path: path.read_text() for path in tmp_path.glob("*.yaml")} == before


def test_a_stream_that_breaks_off_gives_no_plan(small_recipe, tmp_path, monkeypatch):
    calls = []

    def next_step_fits(trainer):
        calls.append(1)
        if len(calls) == 5:
            raise SettingError("a file is damaged")
        return True

    monkeypatch.setattr("oneday.trainer.BudgetTrainer.next_step_fits", next_step_fits)
    with pytest.raises(SettingError, match="a file is damaged"):
        plan(small_recipe, tmp_path / "plan.yaml", probe_seconds=5, budget_minutes=2)
    assert not (tmp_path / "plan.yaml").exists()


def test_the_recipe_of_a_run_is_not_overwritten(small_recipe, tmp_path):
    """The run goes on with the same command, which names it."""
    target, run = tmp_path / "plan.yaml", tmp_path / "run"
    run.mkdir()
    target.write_text(f"output_dir: {run}\n")
    (run / "recipe.yaml").write_text("")
    with pytest.raises(SettingError, match="plan.yaml', the recipe of the run in .*run; name another"):
        plan(small_recipe, target, probe_seconds=0.2)
    assert target.read_text() == f"output_dir: {run}\n"
    (run / "recipe.yaml").unlink()
    plan(small_recipe, target, probe_seconds=0.2, budget_minutes=2)
    assert "extends: " in target.read_text()


def test_models_are_the_recipes_own_and_the_configs_beside_it(tmp_path, monkeypatch):
    """Under the recipe's own spelling, which the choice and the probes go by; no other JSON is taken for a model."""
    monkeypatch.chdir(tmp_path)
    shape = {"model_type": "bert"}
    contents = {"small": shape, "wide": shape, "baseline-bert": shape, "other": {"model_type": "gpt2"},
                "budget": {"status": "done"}, "generation_config": {"eos_token_id": 1}, "events": [1]}  # fmt: skip
    Path("run").mkdir()
    for name, content in contents.items():
        Path("run", f"{name}.json").write_text(json.dumps(content))
    Path("run/torn.json").write_text('{"model_type": "be')
    assert list_models(None, "./run/small.json") == ["./run/small.json", "run/wide.json"]
    assert list_models(None, "run/baseline-bert.json") == ["run/baseline-bert.json", "run/small.json", "run/wide.json"]
    assert list_models(["run/wide.json", f"{tmp_path}/run/small.json"], "./run/small.json") == [
        "./run/small.json", "run/wide.json",
    ]  # fmt: skip
    assert list_models(["run/wide.json"], "run/small.json") == ["run/wide.json"]
    Path("run/small.json").rename("run/config.json")
    assert list_models(None, "run") == ["run", "run/wide.json"]
    with pytest.raises(SettingError, match="torn.json is not valid JSON"):
        list_models(["run/torn.json"], "run")


def test_for_is_a_word_of_the_language():
    assert split_command_line(["--for", "RTX 4090"]) == (None, {"for_": "RTX 4090"})
