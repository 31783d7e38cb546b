"""Half-precision weights are lent for a step and leave a float32 model behind."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import DECODERS, ENCODERS, ROW_LENGTH
from torch import nn

from oneday.mixed_precision import HalfWeights


def test_weights_come_back_bit_for_bit_with_float32_gradients(make_model):
    model = make_model("modernbert")
    before = copy.deepcopy(model.state_dict())
    half = HalfWeights(model)
    frequencies = [(name, buffer.clone()) for name, buffer in model.named_buffers()]
    ids = torch.arange(12).view(1, 12)
    lent = {id(p) for p in half.parameters}
    kept = {name for name, p in model.named_parameters() if id(p) not in lent}
    assert kept == {"model.embeddings.tok_embeddings.weight", "decoder.bias"}, "the table and what shares it"
    with half.lent():
        for parameter in model.parameters():
            assert parameter.dtype == (torch.bfloat16 if id(parameter) in lent else torch.float32)
        for name, buffer in frequencies:
            assert buffer.dtype == model.get_buffer(name).dtype, "buffers are not cast"
        for _ in range(2):
            model(input_ids=ids).logits.float().square().sum().backward()
            half.collect()
            assert all(p.grad is None for p in half.parameters)
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_gradients_of_many_micro_batches_are_summed_in_float32():
    """In bfloat16 256 + 1 is 256: 300 gradients of one would stop at 256."""
    model = nn.Linear(1, 1, bias=False)
    half = HalfWeights(model)
    with half.lent():
        for _ in range(300):
            model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
            half.collect()
    assert model.weight.grad.item() == 300.0


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_gradient_of_a_token_that_stands_everywhere_is_whole(make_model, name):
    """Added up in bfloat16, 2,000 equal rows make 256: the gradient of [MASK] and of a token type would be lost."""
    gradients = []
    for enabled in (False, True):
        model = make_model(name)
        half = HalfWeights(model, enabled)
        with half.lent():
            states = model.get_input_embeddings()(torch.full((20, 100), 7))
            states.float().sum().backward()
            half.collect()
        gradients.append(model.get_input_embeddings().weight.grad[7])
    assert torch.equal(gradients[0], torch.full_like(gradients[0], 2000.0))
    assert torch.equal(gradients[1], gradients[0])


def test_a_tied_projection_that_is_not_fused_computes_in_float32():
    model = nn.Module()
    model.table, model.projection = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    model.projection.weight = model.table.weight
    with HalfWeights(model).lent():
        states = model.table(torch.arange(5))
        logits = model.projection(states)
    assert states.dtype == torch.bfloat16 and logits.dtype == torch.float32


def test_an_error_inside_gives_the_float32_weights_back():
    model = nn.Linear(3, 3)
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError), HalfWeights(model).lent():
        raise RuntimeError
    assert torch.equal(model.weight, before)


def test_disabled_it_leaves_the_model_alone():
    model = nn.Linear(2, 2)
    half = HalfWeights(model, enabled=False)
    with half.lent():
        assert model.weight.dtype == torch.float32
        model(torch.ones(1, 2)).sum().backward()
        half.collect()
    assert model.weight.grad is not None


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_a_bfloat16_step_is_near_the_float32_step(make_trainer, name):
    losses, gradients = [], []
    for bf16 in (False, True):
        trainer = make_trainer(name, budget_steps=1, bf16=bf16, batch_size_tokens=8 * ROW_LENGTH)
        trainer.create_optimizer_and_scheduler(1)
        losses.append(trainer.training_step(trainer.model, trainer.loader.peek()).item())
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99
