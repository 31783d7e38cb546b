"""The loss from CUDA graphs is the model's own: losses, gradients, dropout, and models that cannot be captured."""

import logging

import pytest
import torch
from conftest import ENCODERS
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from oneday.graphed_loss import GraphedLoss, ModelLoss

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def build(dropout=0.0, device="cuda"):
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = AutoConfig.for_model("bert", **ENCODERS["bert"] | rates, vocab_size=320, num_labels=2)
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).to(device).train()


def make_batch(length, device="cuda", seed=0):
    torch.manual_seed(seed)
    ids = torch.randint(5, 100, (4, length), device=device)
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, 2, (4,), device=device)}


def test_the_function_of_tensors_is_the_models_loss():
    model, batch = build(device="cpu"), make_batch(8, "cpu")
    assert ModelLoss(model, tuple(batch))(*batch.values()) == model(**batch).loss


def test_a_graph_is_captured_only_where_memory_is_left(monkeypatch):
    """Its gradients stay on the card; as much again must be left for passes without a graph."""
    loss_of = GraphedLoss(build(device="cpu"))
    gradients = 4 * sum(value.numel() for value in loss_of.model.parameters())
    for name, value in (("memory_reserved", 10 * gradients), ("memory_allocated", 9 * gradients)):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda value=value: value)
    for free, expected in ((gradients, False), (3 * gradients, True)):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda free=free: (free, 99 * gradients))
        assert loss_of.has_room() == expected
        captured = []
        loss_of.capture = lambda shapes, inputs, captured=captured: captured.append(shapes)
        for _ in range(2):
            loss_of(make_batch(8, "cpu"))
        assert bool(captured) == expected


@needs_gpu
def test_training_from_graphs_is_training():
    plain, graphed = build(), build()
    loss_of = GraphedLoss(graphed)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (plain, graphed)]
    for step in range(9):  # two shapes in turn, each seen first plainly
        batch = make_batch(16 + 16 * (step % 2), seed=step)
        losses = []
        for model, find_loss, optimizer in zip((plain, graphed), (None, loss_of), optimizers):
            loss = find_loss(dict(batch)) if find_loss else model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(loss_of.graphs) == 2 and loss_of.is_possible
    for a, b in zip(plain.parameters(), graphed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_gpu
def test_each_replay_drops_other_units():
    loss_of, batch = GraphedLoss(build(dropout=0.5)), make_batch(16)
    losses = [float(loss_of(dict(batch)).detach()) for _ in range(6)]
    assert len(loss_of.graphs) == 1 and len(set(losses)) == 6


class Looking(nn.Module):
    """Reads its loss on the host in the middle of the step."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        outputs = self.model(**inputs)
        float(outputs["loss"].detach())
        return outputs


@needs_gpu
def test_a_model_that_cannot_be_captured_runs_as_it_is(caplog):
    model, batch = build(dropout=0.5), make_batch(16)
    loss_of = GraphedLoss(Looking(model))
    with caplog.at_level(logging.WARNING):
        losses = [float(loss_of(dict(batch)).detach()) for _ in range(6)]
    assert not loss_of.is_possible and not loss_of.graphs and len(set(losses)) == 6
    (message,) = caplog.messages
    assert "CUDA graphs are off: Looking cannot be captured" in message
    again = GraphedLoss(model)  # the generator is as it was
    for _ in range(3):
        again(dict(batch)).backward()
    assert len(again.graphs) == 1
