"""What only a GPU can show: its kernels, compiled layers, 8-bit states, full memory, its energy counter.

Skipped without one. Run with `pytest tests/test_gpu.py`, in about a minute.
"""

from __future__ import annotations

import copy
import time

import pytest
import torch
from conftest import ROW_LENGTH, StopAt, steps_of, weights
from test_equivalence import plain_loss
from torch._dynamo.utils import counters

from oneday import cross_entropy
from oneday.attention import attend_packed, can_attend_flattened
from oneday.cross_entropy import summed_linear_cross_entropy
from oneday.energy import open_energy_meter
from oneday.optimizers import HIDDEN_OPTIMIZERS, count_state_bytes
from oneday.throughput import has_fast_bf16

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

STEPS = {"budget_steps": 3, "micro_batch_tokens": 3 * ROW_LENGTH, "batch_size_tokens": 9 * ROW_LENGTH}


def gradients_of(trainer):
    """(loss, gradients by name) of one step of three micro-batches, and the same step in float32 on the plain path."""
    reference = copy.deepcopy(trainer.model).float()
    reference.base_model._forward_hooks.clear()
    for module in reference.modules():
        module._compiled_call_impl = None
        if module is not reference.base_model:
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
    reference.set_attn_implementation("eager")
    step = trainer.loader.peek()
    trainer.create_optimizer_and_scheduler(1)
    loss = trainer.training_step(trainer.model, step)
    expected = plain_loss(reference, [batch.to(trainer.args.device) for batch in step], trainer.objective.kind)
    expected.backward()
    ours = {name: value.grad for name, value in trainer.model.named_parameters()}
    plain = {name: value.grad for name, value in reference.named_parameters() if value.grad is not None}
    return loss, ours, expected, plain


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["bert", "modernbert", "gpt2", "qwen3"])
def test_a_step_in_bfloat16_is_near_the_plain_path_in_float32(make_trainer, name, compiled):
    trainer = make_trainer(name, **STEPS, bf16=True, torch_compile=compiled)
    assert trainer.args.device.type == "cuda" and has_fast_bf16(trainer.args.device)
    counters.clear()
    loss, ours, expected, plain = gradients_of(trainer)
    assert not counters["graph_break"], "each layer is one graph"
    assert trainer.loader._waiting is not None, "the next step was made meanwhile"
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    for label, gradient in plain.items():
        if gradient.norm() > 1e-6:  # a key's bias has none but rounding
            assert (ours[label] - gradient).norm() / gradient.norm() < 0.1, label


@pytest.mark.parametrize("name", ["modernbert", "qwen3"])
def test_a_step_in_float32_is_the_plain_path(make_trainer, name):
    loss, ours, expected, plain = gradients_of(make_trainer(name, **STEPS, bf16=False))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for label, gradient in plain.items():
        assert (ours[label] - gradient).abs().max() < 1e-5 + 1e-4 * gradient.abs().max(), label


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("length", [256, 64])
def test_the_flash_kernel_in_long_rows(causal, window, length):
    """Near the formula in float64, and no gradient crosses documents."""
    q, k, v = (torch.randn(2, 4, length, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in "qkv")
    if not can_attend_flattened(q, v):
        pytest.skip("needs sm80")
    cu = torch.tensor([0, 40, length, 2 * length], device="cuda", dtype=torch.int32)
    out = attend_packed(q, k, v, cu, causal, 0.125, window, 0.0)
    places = torch.arange(length, device="cuda")
    distance = places[:, None] - places
    seen = torch.ones_like(distance, dtype=torch.bool) if window is None else distance.abs() < window
    seen = seen & (distance >= 0) if causal else seen
    alike = (places[:, None] < 40) == (places < 40)
    seen = torch.stack([seen & alike, seen])[:, None]
    scores = 0.125 * q.double() @ k.double().mT
    expected = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v.double()
    assert (out - expected).norm() / expected.norm() < 1e-2
    upstream = torch.randn_like(out)
    ours, plain = (torch.autograd.grad(y, (q, k, v), upstream.to(y), retain_graph=True) for y in (out, expected))
    assert all((a.double() - b.double()).norm() / b.double().norm() < 2e-2 for a, b in zip(ours, plain))
    across = torch.autograd.grad((out[0, :, :40].float() ** 2).sum(), (q, k, v))
    assert all((x[0, :, 40:] == 0).all() and (x[1:] == 0).all() and x[0, :, :40].any() for x in across)


def test_the_compiled_gradient_of_the_logits_is_the_formulas(make_trainer):
    """Also where the last chunk is smaller than the others."""
    trainer = make_trainer("qwen3", **STEPS, torch_compile=True)
    differentiate = trainer.model.selected_positions.differentiate
    assert differentiate is not cross_entropy.differentiate
    hidden, weight = (torch.randn(n, 64, device="cuda").requires_grad_() for n in (700, 2**18))
    labels = torch.randint(2**18, (700,), device="cuda")
    loss = summed_linear_cross_entropy(hidden, weight, None, labels, differentiate)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    doubles = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    exact = torch.nn.functional.cross_entropy(doubles[0] @ doubles[1].T, labels, reduction="sum")
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    for ours, plain in zip(gradients, torch.autograd.grad(exact, doubles)):
        assert (ours - plain).norm() / plain.norm() < 1e-4


@pytest.mark.parametrize("optim", HIDDEN_OPTIMIZERS)
def test_every_optimizer_trains(make_trainer, optim):
    trainer = make_trainer("modernbert", optim=optim, budget_steps=30, learning_rate=3e-3, bf16=True)
    trainer.run()
    losses = [event["loss"] for event in steps_of(trainer)]
    assert len(losses) == 30 and losses[-1] < losses[0] - 0.3
    hidden = trainer.composite.optimizers[0]
    num_hidden = sum(p.numel() for group in hidden.param_groups for p in group["params"])
    plain = {"adamw": 8, "adamw_8bit": 8, "lion_8bit": 4, "ademamix_8bit": 12, "muon": 4, "muon_8bit": 4}[optim]
    share = count_state_bytes([hidden]) / num_hidden / plain
    # Some matrices of the tiny model are below the size from which states are in 8 bits.
    assert share < 0.9 if optim.endswith("8bit") else share == pytest.approx(1.0, rel=0.01)


def test_full_memory_halves_the_micro_batches(make_trainer):
    trainer = make_trainer("bert", budget_steps=2, batch_size_tokens=128 * ROW_LENGTH,
                           micro_batch_tokens=128 * ROW_LENGTH, bf16=True)  # fmt: skip
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    held = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((held + 24 * 2**20) / total)
    try:
        trainer.run()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert trainer.clock.steps == 2
    assert trainer.micro_batch_limit is not None and trainer.micro_batch_limit < 128 * ROW_LENGTH


def test_a_killed_run_ends_as_one_that_was_not(make_trainer):
    whole = make_trainer("modernbert", output="whole", budget_steps=6, bf16=True)
    whole.run()
    settings = {"output": "killed", "budget_steps": 6, "save_steps": 2, "bf16": True}
    killed = make_trainer("modernbert", **settings)
    killed.add_callback(StopAt(5))
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    resumed = make_trainer("modernbert", **settings)
    resumed.run(resume=True)
    for name, value in weights(whole).items():  # atomic additions come in any order
        assert (weights(resumed)[name].float() - value.float()).abs().max() < 1e-3, name


def test_the_energy_counter_runs():
    meter = open_energy_meter(torch.device("cuda"))
    if meter is None:
        pytest.skip("this GPU has no energy counter")
    before, until = meter.read(), time.monotonic() + 1.0
    square = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    while time.monotonic() < until:
        square @ square
        torch.cuda.synchronize()
    assert meter.read() - before > 10  # joules
