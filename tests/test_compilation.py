"""Compiled layers compute what eager layers do."""

from __future__ import annotations

import pytest
from conftest import ROW_LENGTH

from oneday import compilation
from oneday.compilation import find_layers


@pytest.mark.parametrize("name", ["bert", "modernbert", "gpt2", "qwen3"])
def test_the_layers_are_found(make_model, name):
    assert len(find_layers(make_model(name))) == 2


def test_without_a_compiler_it_says_so_and_runs_uncompiled(make_trainer, monkeypatch, caplog):
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None)
    trainer = make_trainer("bert", budget_steps=1, torch_compile=True)
    assert "no C++ compiler is there" in caplog.text
    assert trainer.run()["eval_loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "modernbert", "gpt2", "qwen3", "llama"])
def test_loss_and_gradient_equal_the_eager_path(make_trainer, name):
    results = []
    for compiled in (False, True):
        trainer = make_trainer(
            name, budget_steps=1, torch_compile=compiled, micro_batch_tokens=4 * ROW_LENGTH, output=f"run-{compiled}"
        )
        trainer.create_optimizer_and_scheduler(1)
        losses = [trainer.training_step(trainer.model, next(iter(trainer.loader))).item() for _ in range(2)]
        gradients = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
        results.append((losses, gradients, trainer.evaluate()))
    (eager_losses, eager, eager_eval), (losses, gradients, held_out) = results
    assert losses == pytest.approx(eager_losses, abs=1e-5)
    for ours, plain in zip(gradients, eager):
        assert (ours - plain).abs().max() < 1e-5 + 1e-4 * plain.abs().max()
    assert held_out == pytest.approx(eager_eval, abs=1e-5)


def test_a_compiled_run_keeps_the_checkpoints_names(make_trainer):
    trainer = make_trainer("modernbert", budget_steps=1, torch_compile=True)
    assert not any("_orig_mod" in name for name in trainer.model.state_dict())
