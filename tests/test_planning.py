"""A plan of a budget: sizes against real ones, arithmetic by hand, the choice, and the recipe it writes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROW_LENGTH
from torch import nn

from oneday import throughput
from oneday.arguments import BudgetTrainingArguments, SettingError
from oneday.assembly import CLASSES
from oneday.budget import Budget
from oneday.ladder import FamilyLaw
from oneday.machines import CARDS, Machine, find_card
from oneday.optimizers import build_optimizer, count_state_bytes, split_parameters
from oneday.packed_dataset import pack_corpus
from oneday.plan_rows import (
    choose_row,
    count_tokens,
    largest_micro_batch,
    make_row,
    mean_batch_tokens,
    memory_bytes,
)
from oneday.plan_table import format_plan, make_notes
from oneday.planning import PlanArguments, find_material, list_models, plan_budget
from oneday.probing import (
    COUNTED_ROWS,
    Pace,
    Probe,
    count_saved_bytes,
    measure_model,
    measure_pace,
    state_bytes_per_element,
    take_batch,
)
from oneday.recipe import complete_settings, parse_recipe, resolve_settings, split_command_line
from oneday.scaling_law import Prediction
from oneday.schedules import interpolate

PROBE = Probe(4_000_000, 2_000_000, 1e7, 50_000_000, 10_000.0, {"muon": 30_000_000, "muon_8bit": 20_000_000})
MACHINE = Machine("machine", 100e6, 1e12, 200.0, None)
SETTINGS = {
    "batch_size_tokens": 4096, "batch_size_tokens_start": None, "batch_ramp_fraction": 0.6, "micro_batch_tokens": 4096,
    "max_seq_length": 128, "optim": "muon",
}  # fmt: skip


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "muon", "muon_8bit", "lion_8bit", "ademamix_8bit"])
def test_state_bytes_are_those_of_a_real_optimizer(make_model, tmp_path, optim):
    """What a plan reckons for a model is what its optimizer holds after a step."""
    args = BudgetTrainingArguments(output_dir=str(tmp_path), optim=optim, budget_steps=1, use_cpu=True)
    layers = [nn.Embedding(300, 256), *(nn.Linear(256, 512, bias=False) for _ in range(8)), nn.LayerNorm(512)]
    model = nn.ModuleList(layers)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = build_optimizer(model, args)
    optimizer.step()
    real = count_state_bytes(optimizer.optimizers)
    hidden, tables, vectors = (sum(p.numel() for p in group) for group in split_parameters(model))
    reckoned = hidden * state_bytes_per_element(optim, args) + 8 * (tables + vectors)
    assert reckoned == pytest.approx(real, rel=0.02)


def test_what_the_forward_pass_keeps_is_counted():
    """Linear -> GELU -> Linear on 10 x 8 float32: both inputs of the products, and GELU's own."""
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    inputs = torch.randn(10, 8)
    with count_saved_bytes({p.untyped_storage().data_ptr() for p in model.parameters()}) as saved:
        model(inputs).sum().backward()
    assert sum(saved.values()) == 4 * (10 * 8 + 10 * 16 + 10 * 16)


def test_tokens_of_a_budget_by_hand():
    """4,096 tokens take 4,096 x 1e-4 + 0.1 s; of 60 s ten go to compiling."""
    pace = Pace(1e-4, 0.1, fixed_seconds=10.0)
    per_second = 4096 / (0.4096 + 0.1)
    assert count_tokens(PROBE, pace, Budget(seconds=60.0), None, 4096, 3000) == pytest.approx(50 * per_second)
    assert count_tokens(PROBE, pace, Budget(seconds=60.0, tokens=1000.0), None, 4096, 3000) == 1000
    assert count_tokens(PROBE, pace, Budget(flops=1e12), None, 4096, 3000) == pytest.approx(1e5)
    assert count_tokens(PROBE, pace, Budget(steps=3), None, 4096, 3000) == 3 * 3000
    usd = Budget(usd=1.0, usd_per_hour=60.0)
    assert count_tokens(PROBE, pace, usd, None, 4096, 3000) == pytest.approx(50 * per_second)
    assert count_tokens(PROBE, pace, Budget(kwh=0.01), 600.0, 4096, 3000) == pytest.approx(50 * per_second)
    with pytest.raises(SettingError, match="stated_watts"):
        count_tokens(PROBE, pace, Budget(kwh=0.01), None, 4096, 3000)
    with pytest.raises(SettingError, match="stated_watts"):
        count_tokens(PROBE, pace, Budget(kwh=0.01, seconds=60.0), None, 4096, 3000)


@pytest.mark.parametrize("start", [None, 1024])
def test_tokens_of_a_step_on_average_are_those_of_the_run(start):
    settings = {"batch_size_tokens_start": start, "batch_size_tokens": 4096, "batch_ramp_fraction": 0.6}
    run = [interpolate(start, 4096, step / 10_000, 0.6) for step in range(10_000)]
    assert mean_batch_tokens(settings) == pytest.approx(np.mean(run), rel=1e-3)


def test_a_single_held_out_row_is_enough_to_measure(make_trainer, tokenizers, tmp_path):
    trainer, texts = make_trainer("bert", budget_steps=1), [["one short text"]]
    rows = pack_corpus(texts, tokenizers["encoder"], "encoder", ROW_LENGTH, "best_fit", tmp_path / "one")
    trainer.eval_dataset = rows
    assert len(rows) == 1 and take_batch(trainer, 2).inputs["input_ids"].numel() == 2 * ROW_LENGTH


def test_memory_of_a_container_is_what_it_may_take(monkeypatch):
    """Of 400 MB in use, 300 are pages of files that the kernel takes back; 50 more of files are in use."""
    stat = f"anon {5 * 10**7}\nactive_file {5 * 10**7}\ninactive_file {3 * 10**8}\n"
    files = {"memory.max": "max\n", "memory.current": f"{4 * 10**8}\n", "memory.stat": stat}
    monkeypatch.setattr(throughput.Path, "read_text", lambda path: files[path.name])
    whole = throughput.total_memory_bytes()
    files["memory.max"] = f"{10**9}\n"
    assert (whole > 10**9, throughput.total_memory_bytes()) == (True, 10**9)
    assert throughput.available_memory_bytes() == 9 * 10**8


def test_the_largest_micro_batch_that_fits():
    """80 MB of 100 may be used: 50 of the model, 20 of the state in 8 bit, so 10 MB at 10 kB per token: 1,000."""
    assert largest_micro_batch(PROBE, "muon_8bit", MACHINE, SETTINGS) == 512, "divides the batch"
    assert largest_micro_batch(PROBE, "muon", MACHINE, SETTINGS) == 0
    assert memory_bytes(PROBE, "muon", 512) == 50e6 + 30e6 + 5.12e6
    roomy = dataclasses.replace(MACHINE, memory_bytes=1e9)
    assert largest_micro_batch(PROBE, "muon", roomy, {**SETTINGS, "batch_size_tokens": 8192}) == 4096
    card = dataclasses.replace(roomy, card=CARDS[0])
    assert largest_micro_batch(PROBE, "muon", card, {**SETTINGS, "batch_size_tokens": 8192}) == 8192


def test_what_a_row_says_by_hand():
    budget = Budget(seconds=3600.0, usd_per_hour=0.5)
    row = make_row("m.json", PROBE, Pace(1e-4, 0.0), budget, MACHINE, SETTINGS, 9_000_000, None)
    assert (row.tokens, row.epochs, row.hours, row.usd, row.kwh) == pytest.approx((3.6e7, 4.0, 1.0, 0.5, 0.2))
    assert (row.optim, row.micro_batch_tokens, row.prediction) == ("muon_8bit", 512, None), "only 8 bit fits"


def test_the_choice():
    def row(size, tokens, loss=None, micro=128, low=None, name="m.json"):
        said = None if loss is None else Prediction(loss, low or loss, loss)
        probe = dataclasses.replace(PROBE, num_parameters=size, flops_per_token=6.0 * size)
        facts = {"probe": probe, "tokens": tokens, "prediction": said, "micro_batch_tokens": micro}
        return dataclasses.replace(base, **facts, model_config=name)

    def choose(*rows):
        return choose_row(rows, "own.json")

    base = make_row("m.json", PROBE, Pace(1e-4, 0.0), Budget(seconds=1.0), MACHINE, SETTINGS, None, None)
    assert choose(row(1e6, 3e7, 4.0), row(2e6, 2e7, 3.5), row(4e6, 1e7, 3.8)) == 1
    assert choose(row(1e6, 3e7, 4.0), row(2e6, 2e7, 3.5, micro=0), row(4e6, 1e7, 3.8)) == 2
    assert choose(row(1e6, 3e7, 3.5), row(2e6, 2e7, 3.6, low=3.4, name="own.json")) == 1, "not told apart"
    assert choose(row(1e6, 3e7, 3.5), row(2e6, 2e7, 3.6, low=3.55, name="own.json")) == 0
    assert choose(row(1e6, 9e7), row(2e6, 4e7), row(4e6, 1e7)) == 1, "the largest with 20 tokens per parameter"
    assert choose(row(1e6, 1e7), row(2e6, 1e7)) == 0
    assert choose(row(1e6, 1e7), row(2e6, 1e7, name="own.json")) == 1, "none sees its share"
    with pytest.raises(SettingError, match="No model fits"):
        choose(row(1e6, 1e7, micro=0))


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


def test_cards_are_found_by_words():
    assert find_card("rtx4090").name == "RTX 4090"
    assert find_card("2080").peak_flops == pytest.approx(13.4e12, rel=0.01), "it has no bfloat16: float32"
    assert find_card("h100").name == "H100"
    assert find_card("3090").peak_flops == pytest.approx(71e12, rel=0.01)
    assert find_card("a100-80gb").memory_gb == 80
    with pytest.raises(SettingError, match="RTX 5000.*RTX 2080 Ti"):
        find_card("RTX 5000")


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
        is_whole = settings["torch_compile"] or settings["embedding_init"] != "random"
        asked.append((name, is_whole, seconds))
        return Pace(1e-4 if settings["torch_compile"] else 4e-4, 0.3, 30.0) if is_whole else plain[name]

    monkeypatch.setattr("oneday.planning.measure_pace", measure)
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
    whole = [("small", True, seconds)] if fixed_seconds else []
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


def test_what_happens_once_is_measured_apart_from_the_steps(small_recipe, tmp_path, monkeypatch):
    def prepare(trainer, is_new):
        trainer.clock.ledger["initialization"] += 5.0
        trainer.clock.ledger["compilation"] += 20.0

    monkeypatch.setattr("oneday.probing.prepare_first_step", prepare)
    settings = complete_settings(CLASSES, resolve_settings(CLASSES, [str(small_recipe)]))
    pace = measure_pace(find_material(settings, tmp_path), settings, 0.05)
    assert pace.fixed_seconds == 25.0
    assert 0 < pace.seconds_per_token < 1 and 0 < pace.seconds_per_step < 20


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


def test_padding_is_no_token_of_a_plan():
    """Of rows that are a quarter full, a step of 4,096 places shows 1,024 tokens."""
    pace, budget = Pace(1e-4, 0.1), Budget(steps=10)
    roomy = dataclasses.replace(MACHINE, memory_bytes=1e9)
    full = make_row("a.json", PROBE, pace, budget, roomy, SETTINGS, 10_000, None)
    quarter = make_row(
        "a.json", dataclasses.replace(PROBE, token_share=0.25), pace, budget, roomy, SETTINGS, 10_000, None
    )
    assert (full.tokens, full.epochs, quarter.tokens, quarter.epochs) == (40_960, 4.096, 10_240, 1.024)
    assert quarter.hours == pytest.approx(10 * (1024e-4 + 0.1) / 3600)


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
