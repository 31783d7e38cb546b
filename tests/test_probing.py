"""What a model costs: predicted, against real ones."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from conftest import ROW_LENGTH
from torch import nn

from oneday.arguments import BudgetTrainingArguments
from oneday.assembly import CLASSES
from oneday.objectives import find_objective
from oneday.optimizers import build_optimizer, count_state_bytes, split_parameters
from oneday.packed_dataset import pack_corpus
from oneday.planning import find_material
from oneday.probing import (
    count_saved_bytes,
    make_stand_in,
    measure_fixed_seconds,
    measure_pace,
    probing,
    state_bytes_per_element,
    take_batch,
)
from oneday.recipe import complete_settings, resolve_settings


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


def test_a_probe_begins_without_the_memory_of_the_last(small_recipe, tmp_path):
    """Its user returns from within it, and the trainer is in cycles of references."""
    settings = complete_settings(CLASSES, resolve_settings(CLASSES, [str(small_recipe)]))
    gc.disable()
    try:
        material = make_stand_in(find_objective(settings["objective"]), settings, tmp_path)

        def measure():
            with probing(material, settings) as trainer:
                return weakref.ref(trainer)

        first = measure()
        with probing(material, settings):
            assert first() is None
    finally:
        gc.enable()


def test_what_the_forward_pass_keeps_is_counted():
    """Linear -> GELU -> Linear on 10 x 8 float32: both inputs of the products, and GELU's own."""
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    inputs = torch.randn(10, 8)
    with count_saved_bytes({p.untyped_storage().data_ptr() for p in model.parameters()}) as saved:
        model(inputs).sum().backward()
    assert sum(saved.values()) == 4 * (10 * 8 + 10 * 16 + 10 * 16)


def test_a_single_held_out_row_is_enough_to_measure(make_trainer, tokenizers, tmp_path):
    trainer, texts = make_trainer("bert", budget_steps=1), [["one short text"]]
    rows = pack_corpus(texts, tokenizers["encoder"], "encoder", ROW_LENGTH, "best_fit", tmp_path / "one")
    trainer.eval_dataset = rows
    assert len(rows) == 1 and take_batch(trainer, 2).inputs["input_ids"].numel() == 2 * ROW_LENGTH


def test_what_happens_once_is_measured_apart_from_the_steps(small_recipe, tmp_path, monkeypatch):
    def prepare(trainer, is_new):
        trainer.clock.ledger["initialization"] += 5.0
        trainer.clock.ledger["compilation"] += 20.0

    monkeypatch.setattr("oneday.probing.prepare_first_step", prepare)
    settings = complete_settings(CLASSES, resolve_settings(CLASSES, [str(small_recipe)]))
    pace = measure_pace(find_material(settings, tmp_path), settings, 0.05)
    assert pace.fixed_seconds == 25.0 == measure_fixed_seconds(find_material(settings, tmp_path), settings)
    assert 0 < pace.seconds_per_token < 1 and 0 < pace.seconds_per_step < 20


@pytest.mark.parametrize("embedding_init", ["random", "cooccurrence"])
def test_counting_words_takes_time_before_the_first_step(small_recipe, tmp_path, embedding_init):
    argv = [str(small_recipe), "--embedding_init", embedding_init]
    settings = complete_settings(CLASSES, resolve_settings(CLASSES, argv))
    seconds = measure_fixed_seconds(find_material(settings, tmp_path), settings)
    assert (0 < seconds < 20) if embedding_init == "cooccurrence" else seconds < 0.02
