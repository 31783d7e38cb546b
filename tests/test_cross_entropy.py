"""The loss fused with the output projection, against logits and a softmax written out."""

from __future__ import annotations

import pytest
import torch
from conftest import DECODERS, ENCODERS
from torch.nn import functional as F

from oneday import cross_entropy
from oneday.cross_entropy import (
    differentiate,
    differentiate_at_once,
    find_fusable_projection,
    summed_cross_entropy,
    summed_linear_cross_entropy,
)


def make_case(num_rows=37, width=16, vocab=101, dtype=torch.float32):
    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape).to(dtype).requires_grad_() for shape in ((num_rows, width), (vocab, width), (vocab,))
    )
    return hidden, weight, bias, torch.randint(vocab, (num_rows,))


@pytest.mark.parametrize("rows", [1, 5, 37, 1000])
@pytest.mark.parametrize("with_bias", [True, False])
def test_loss_and_gradients_equal_the_formula_in_float64(monkeypatch, rows, with_bias):
    hidden, weight, bias, labels = make_case()
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", rows * 101)
    monkeypatch.setitem(cross_entropy.BLOCK_ELEMENTS, "cpu", 4 * 101)
    leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
    loss = summed_linear_cross_entropy(hidden, weight, bias if with_bias else None, labels) * 0.25
    gradients = torch.autograd.grad(loss, leaves)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = doubles[0] @ doubles[1].T + (doubles[2] if with_bias else 0.0)
    exact = -(logits - logits.exp().sum(-1, keepdim=True).log())[torch.arange(37), labels].sum() * 0.25
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    for ours, plain in zip(gradients, torch.autograd.grad(exact, doubles)):
        assert ours.dtype == torch.float32
        assert (ours - plain).abs().max() < 1e-5


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_what_a_compiler_fuses_is_the_plain_gradient(dtype, tolerance):
    logits = 5 * torch.randn(7, 33, dtype=dtype, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(33, (7, 1), generator=torch.Generator().manual_seed(1))
    loss, gradient = differentiate_at_once(logits.clone(), labels)
    plain_loss, plain_gradient = differentiate(logits.clone(), labels)
    assert gradient.dtype == plain_gradient.dtype == dtype
    torch.testing.assert_close(loss, plain_loss, rtol=1e-6, atol=0)
    exact = logits.double().softmax(-1) - F.one_hot(labels[:, 0], 33)
    for found in (gradient, plain_gradient):
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("way", [differentiate, differentiate_at_once])
@pytest.mark.parametrize("label_logit", [-300.0, -90.0, 0.0, 30.0, 300.0])
def test_certain_and_impossible_words_have_a_finite_loss_and_the_formulas_gradient(way, label_logit):
    """Where the label's probability is 0 in float32, where it is 1, and where the logits are far from 0."""
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) + 200
    labels = torch.tensor([[0], [7], [39]])
    logits.scatter_(1, labels, 200 + label_logit)
    exact = logits.double().requires_grad_()
    exact_loss = F.cross_entropy(exact, labels[:, 0], reduction="sum")
    loss, gradient = way(logits.clone(), labels)
    assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-6, abs=1e-4)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(exact_loss, exact)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_fused_loss_is_the_same_with_either_gradient(monkeypatch, dtype, tolerance):
    """Over several chunks, the last one smaller, with a bias."""
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", 10 * 101)
    *leaves, labels = make_case(dtype=dtype)
    ours, plain = (summed_linear_cross_entropy(*leaves, labels, way) for way in (differentiate_at_once, differentiate))
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)
    for one, other in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves)):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_no_gradient_gives_the_same_loss_and_none_at_all_gives_zero():
    hidden, weight, bias, labels = make_case()
    loss = summed_linear_cross_entropy(hidden, weight, bias, labels)
    with torch.no_grad():
        assert summed_linear_cross_entropy(hidden, weight, bias, labels).item() == pytest.approx(loss.item(), rel=1e-6)
    empty = summed_linear_cross_entropy(hidden[:0], weight, bias, labels[:0])
    assert empty.item() == 0.0
    empty.backward()
    assert not hidden.grad.any()


def test_bfloat16_is_near_float32_and_far_logits_stay_finite():
    hidden, weight, bias, labels = make_case()
    exact = torch.autograd.grad(summed_linear_cross_entropy(hidden, weight, bias, labels), (hidden, weight, bias))
    halves = [leaf.detach().bfloat16().requires_grad_() for leaf in (hidden, weight, bias)]
    for ours, plain in zip(torch.autograd.grad(summed_linear_cross_entropy(*halves, labels), halves), exact):
        assert ours.dtype == torch.bfloat16
        assert (ours - plain).norm() / plain.norm() < 0.02
    far = summed_linear_cross_entropy((1e4 * hidden.detach()).requires_grad_(), weight, bias, labels)
    assert torch.isfinite(far)


@pytest.mark.parametrize("count", [3000, 3685])
def test_the_mean_over_a_count_is_not_rounded_to_bfloat16(count):
    """1 / 3,685 is 0.2 % less there, and the whole gradient with it."""
    hidden, weight, bias, labels = make_case(dtype=torch.bfloat16)
    summed, mean = (
        torch.autograd.grad(summed_linear_cross_entropy(hidden, weight, bias, labels) * scale, (hidden, weight))
        for scale in (1.0, 1 / count)
    )
    for whole, part in zip(summed, mean):
        assert part.dtype == torch.bfloat16
        assert part.double().norm() / whole.double().norm() == pytest.approx(1 / count, rel=4e-4)


def test_under_autocast_the_gradients_come_back_in_float32():
    hidden, weight, bias, labels = make_case()
    with torch.autocast("cpu", torch.bfloat16):
        loss = summed_linear_cross_entropy(hidden, weight, bias, labels)
    gradients = torch.autograd.grad(loss, (hidden, weight, bias))
    assert loss.dtype == torch.float32 and all(g.dtype == torch.float32 for g in gradients)


def test_plain_sum_is_torchs():
    hidden, weight, bias, labels = make_case()
    logits = hidden @ weight.T + bias
    assert summed_cross_entropy(logits, labels).item() == pytest.approx(
        F.cross_entropy(logits, labels, reduction="sum").item(), rel=1e-6
    )


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_only_a_projection_that_gives_the_logits_is_fused(make_model, name):
    """nanochat caps its logits after the projection, so its loss must see them."""
    projection = find_fusable_projection(make_model(name))
    assert (projection is None) == (name == "nanochat")
