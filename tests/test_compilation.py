"""Compiled layers compute what eager layers do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROW_LENGTH
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters

from oneday.compilation import compile_layers, decide_compiling, find_layers
from oneday.cross_entropy import differentiate, differentiate_at_once
from oneday.errors import SettingError
from oneday.pretraining import prepare_first_step
from oneday.sharding import ShardedRanks
from oneday.steps import plan_step


@pytest.mark.parametrize("name", ["bert", "modernbert", "gpt2", "qwen3"])
def test_the_layers_are_found(make_model, name):
    assert len(find_layers(make_model(name))) == 2


@pytest.mark.parametrize(
    ("settings", "compiles"),
    [
        ({"torch_compile": None, "bf16": True}, True),
        ({"torch_compile": None, "bf16": False}, False),
        ({"torch_compile": None, "bf16": True, "max_seq_length_start": ROW_LENGTH // 2}, False),
        ({"torch_compile": True, "bf16": False}, True),
        ({"torch_compile": False, "bf16": True}, False),
        ({"bf16": True}, False),
    ],
)
def test_layers_are_compiled_where_it_pays_or_as_asked(make_trainer, settings, compiles):
    trainer = make_trainer("bert", budget_steps=1, **settings)
    assert trainer.args.use_compile is compiles
    assert all(bool(layer._compiled_call_impl) is compiles for layer in find_layers(trainer.model))


def test_what_is_not_packed_is_not_compiled_unasked(make_trainer):
    trainer = make_trainer("xlnet", objective="plm", budget_steps=1, torch_compile=None, bf16=True)
    assert trainer.args.use_compile is False


@pytest.mark.parametrize(("device", "compiles"), [("cuda", True), ("mps", False), ("cpu", False)])
def test_float32_is_compiled_for_a_gpu_alone(device, compiles):
    args = SimpleNamespace(
        use_compile=None, device=torch.device(device), computes_in_bf16=False, max_seq_length_start=None
    )
    assert decide_compiling(args, is_packed=True) is compiles


def test_where_compiling_fails_it_says_so_and_runs_uncompiled(make_trainer, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("No working C++ compiler found in ['g++']")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fail)
    trainer = make_trainer("bert", budget_steps=1, torch_compile=True)
    trainer.model.selected_positions.differentiate = torch.compile(differentiate_at_once)  # as on a GPU
    assert trainer.run()["eval_loss"] > 0
    assert "No working C++ compiler found" in caplog.text and "running uncompiled" in caplog.text
    assert trainer.clock.ledger["compilation"] > 0
    assert not any(layer._compiled_call_impl for layer in find_layers(trainer.model))
    assert trainer.model.selected_positions.differentiate is differentiate


def test_where_compiling_fails_sharded_processes_do_not_go_on(make_trainer, monkeypatch):
    """Layers whose weights were gathered when the pass broke off, and others that may have compiled."""

    def fail(*args, **kwargs):
        raise RuntimeError("No working C++ compiler found in ['g++']")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fail)
    trainer = make_trainer("bert", budget_steps=1, torch_compile=True)
    trainer.ranks.refuse_to_repeat = ShardedRanks().refuse_to_repeat
    with pytest.raises(SettingError, match=r"No working C\+\+ compiler.*\(process 0\), and sharded processes cannot"):
        trainer.run()


def test_where_compiling_fails_on_another_process_this_one_runs_uncompiled_too(make_trainer, monkeypatch):
    trainer = make_trainer("bert", budget_steps=1, torch_compile=True)
    monkeypatch.setattr("oneday.trainer.try_compiled", lambda model, run, refuse: True)
    assert trainer.rehearse_step() and all(layer._compiled_call_impl for layer in find_layers(trainer.model))
    trainer.ranks.all_reduce = lambda *numbers: [
        number + (len(numbers) == 1) for number in numbers
    ]  # the other one's failure
    assert not trainer.rehearse_step()
    assert not any(layer._compiled_call_impl for layer in find_layers(trainer.model))


def test_nothing_is_compiled_where_no_step_is_left(make_trainer, monkeypatch):
    """The last checkpoint of a run becomes its model then, whatever its stream gives."""
    trainer, rehearsed = make_trainer("bert", budget_steps=1, torch_compile=True), []
    monkeypatch.setattr(trainer, "rehearse_step", lambda: rehearsed.append(1) or True)
    prepare_first_step(trainer, is_new=False)
    assert len(rehearsed) == 1
    trainer.clock.steps = 1
    prepare_first_step(trainer, is_new=False)
    assert len(rehearsed) == 1 and trainer.must_end()


def test_a_model_without_repeated_layers_says_so(caplog):
    assert compile_layers(nn.Linear(2, 2)) == 0
    assert "no repeated layers" in caplog.text


def test_micro_batches_have_one_size_while_the_batch_grows(make_trainer):
    sizes = {}
    for compiled in (False, True):
        tokens = {"batch_size_tokens_start": 4 * ROW_LENGTH, "batch_size_tokens": 9 * ROW_LENGTH}
        settings = {**tokens, "micro_batch_tokens": 9 * ROW_LENGTH, "torch_compile": compiled}
        trainer = make_trainer("bert", budget_steps=1, output=f"run-{compiled}", **settings)
        plans = []
        for progress in (0.0, 0.2, 0.4, 0.6, 1.0):
            trainer.clock._progress = progress
            plans.append(plan_step(trainer, trainer.args, ROW_LENGTH))
        sizes[compiled] = [plan.micro_rows for plan in plans]
        assert plans[0].num_rows == 4 and plans[-1].num_rows >= 8
    assert len(set(sizes[False])) > 1 and set(sizes[True]) == {4}


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


@pytest.mark.slow
def test_one_graph_serves_all_layers_and_any_number_of_documents(make_trainer):
    torch._dynamo.reset()  # of what other tests compiled
    counters.clear()
    trainer = make_trainer("bert", budget_steps=3, torch_compile=True)
    trainer.run()
    assert counters["stats"]["unique_graphs"] == 1
    assert not any("_orig_mod" in name for name in load_file(Path(trainer.args.output_dir) / "model.safetensors"))
