"""Dropout from sixteen bits: its rate in every lane, its mean, its gradient, and when it is torch's own."""

import pytest
import torch
from conftest import ENCODERS
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from oneday.dropout import SixteenBitDropout, hasten_dropout


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_lane_of_a_word_drops_at_the_rate_and_keeps_the_mean(rate, dtype):
    torch.manual_seed(0)
    inputs = torch.ones(100_000, 4, dtype=dtype)  # an integer of 64 bits is drawn for each row
    outputs = SixteenBitDropout(rate)(inputs)
    assert outputs.dtype == dtype
    values = outputs.unique()
    assert len(values) == 2 and values[0] == 0
    assert float(values[1]) == pytest.approx(1 / (1 - rate), rel=1e-2 if dtype == torch.bfloat16 else 1e-3)
    dropped = (outputs == 0).double()
    error = (rate * (1 - rate) / len(inputs)) ** 0.5
    assert (dropped.mean(0) - rate).abs().max() < 4 * error + 2**-17
    # Lanes and neighbouring words are drawn apart.
    flat = dropped.flatten() - dropped.mean()
    for lag in (1, 2, 3, 4):
        assert abs(float((flat[lag:] * flat[:-lag]).mean())) < 4 * rate * (1 - rate) / flat.numel() ** 0.5


def test_the_expectation_is_exact_for_the_rounded_rate():
    rate = 1 / 3  # no multiple of 2^-16
    outputs = SixteenBitDropout(rate)(torch.ones(8, dtype=torch.float64))
    dropped = round(rate * 65536) / 65536
    assert float(outputs.max()) * (1 - dropped) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("shape", [(), (1,), (3, 5, 7), (0, 4)])
def test_any_shape_and_its_gradient_is_the_mask(shape):
    torch.manual_seed(1)
    inputs = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    outputs = SixteenBitDropout(0.5)(inputs)
    outputs.sum().backward()
    assert outputs.shape == inputs.shape
    torch.testing.assert_close(outputs, inputs * inputs.grad, rtol=0, atol=0)
    assert set(inputs.grad.flatten().tolist()) <= {0.0, 2.0}


def test_not_contiguous_inputs():
    torch.manual_seed(1)
    outputs = SixteenBitDropout(0.5)(torch.ones(6, 4).t())
    assert set(outputs.flatten().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("rate", [0.0, 1e-9, 1.0])
def test_rates_that_sixteen_bits_cannot_tell_from_0_or_1_are_torchs(rate):
    inputs = torch.randn(100)
    assert torch.equal(SixteenBitDropout(rate)(inputs), nn.functional.dropout(inputs, round(rate, 3)))


def test_it_follows_the_seed_and_draws_anew():
    dropout, inputs = SixteenBitDropout(0.5), torch.ones(1000)
    torch.manual_seed(3)
    first, second = dropout(inputs), dropout(inputs)
    torch.manual_seed(3)
    assert torch.equal(dropout(inputs), first) and not torch.equal(first, second)


def test_a_model_has_it_everywhere_and_answers_as_before():
    rates = {"hidden_dropout_prob": 0.25, "attention_probs_dropout_prob": 0.0}
    config = AutoConfig.for_model("bert", **ENCODERS["bert"] | rates, vocab_size=320, num_labels=2)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    ids = torch.randint(5, 100, (4, 9))
    before, keys = model(input_ids=ids).logits, list(model.state_dict())
    hasten_dropout(model)
    own = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert own and all(type(module) is SixteenBitDropout for module in own)
    assert {module.p for module in own} == {0.0, 0.25} and list(model.state_dict()) == keys
    assert torch.equal(model(input_ids=ids).logits, before)
    model.train()
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
