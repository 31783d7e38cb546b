"""What the collators mask and predict, on rows made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oneday.collators import CausalCollator, MaskedCollator, choose_lowest, hash_uniform, mark_documents
from oneday.tokenizer_training import train_tokenizer

WORDS = [f"word{number}" for number in range(200)]
TEXTS = [" ".join(np.random.default_rng(seed).choice(WORDS, 30)) for seed in range(200)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, "wordpiece", 200)


@pytest.fixture(scope="module")
def rows(tokenizer):
    """64 rows of 32: two documents with their special tokens, then padding."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(5, len(tokenizer), (64, 32)).astype(np.uint16)
    first = generator.integers(8, 16, 64)
    lengths = [np.array([length, 28 - length]) for length in first]
    for row, length in enumerate(first):
        tokens[row, [0, length]] = tokenizer.cls_token_id
        tokens[row, [length - 1, 27]] = tokenizer.sep_token_id
    tokens[:, 28:] = tokenizer.pad_token_id
    return tokens, lengths


def test_hash_is_uniform_and_a_function_of_its_arguments():
    draw = hash_uniform(1, np.arange(2000), 100, 0)
    assert draw.shape == (2000, 100)
    assert (draw >= 0).all()
    assert (draw < 1).all()
    assert abs(draw.mean() - 0.5) < 0.003
    assert abs(np.corrcoef(draw[:, 0], draw[:, 1])[0, 1]) < 0.08
    assert abs(np.corrcoef(draw[:-1, 0], draw[1:, 0])[0, 1]) < 0.08
    histogram = np.histogram(draw, 20, (0, 1))[0] / draw.size
    assert np.abs(histogram - 0.05).max() < 0.002
    assert np.array_equal(draw[700:800], hash_uniform(1, np.arange(700, 800), 100, 0))
    for other in (hash_uniform(2, np.arange(2000), 100, 0), hash_uniform(1, np.arange(2000), 100, 1)):
        assert abs(np.corrcoef(draw.ravel(), other.ravel())[0, 1]) < 0.01


def test_mark_documents():
    assert mark_documents([np.array([3, 2])], 7).tolist() == [[True] * 5 + [False] * 2]


def test_positions_restart_at_each_document_and_in_the_tail(tokenizer):
    rows = np.full((1, 7), 10)
    batch = MaskedCollator(tokenizer)(rows, [np.array([3, 2])], np.arange(1))
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert batch.inputs["cu_seq_lens"].tolist() == [0, 3, 5, 7]


def test_masks_a_fixed_share_and_never_a_special_token(tokenizer, rows):
    tokens, lengths = rows
    batch = MaskedCollator(tokenizer, 0, 0, 0.25)(tokens, lengths, np.arange(64))
    masked = batch.inputs["input_ids"] == tokenizer.mask_token_id
    assert masked.sum(1).tolist() == [6] * 64, "a quarter of 24 ordinary tokens in each row"
    assert torch.equal(masked.flatten().nonzero()[:, 0], batch.positions)
    assert np.array_equal(tokens.ravel()[batch.positions.numpy()], batch.labels.numpy())
    assert not np.isin(batch.labels.numpy(), tokenizer.all_special_ids).any()
    untouched = ~masked.numpy()
    assert np.array_equal(batch.inputs["input_ids"].numpy()[untouched], tokens[untouched])
    assert batch.doc_lengths.tolist() == np.concatenate(lengths).tolist()


def test_masks_do_not_depend_on_the_batch(tokenizer, rows):
    tokens, lengths = rows
    collator = MaskedCollator(tokenizer, 3, 0, 0.25)
    whole = collator(tokens, lengths, np.arange(64)).inputs["input_ids"]
    part = collator(tokens[40:50], lengths[40:50], np.arange(40, 50)).inputs["input_ids"]
    assert torch.equal(whole[40:50], part)
    later = collator(tokens, lengths, np.arange(64, 128)).inputs["input_ids"]
    assert not torch.equal(whole, later), "another pass over the data has other masks"


def test_bert_replacement_is_80_10_10_from_the_tokenizers_range(tokenizer, rows):
    tokens, lengths = (np.tile(rows[0], (20, 1)), rows[1] * 20)
    batch = MaskedCollator(tokenizer, 0, 0, 0.5, None, "bert")(tokens, lengths, np.arange(len(tokens)))
    shown = batch.inputs["input_ids"].flatten()[batch.positions]
    num = len(shown)
    assert (shown == tokenizer.mask_token_id).sum().item() / num == pytest.approx(0.8, abs=0.02)
    assert (shown == batch.labels).sum().item() / num == pytest.approx(0.1 + 0.1 / 195, abs=0.015)
    replaced = shown[(shown != tokenizer.mask_token_id) & (shown != batch.labels)]
    assert not np.isin(replaced.numpy(), tokenizer.all_special_ids).any()
    assert replaced.max() < len(tokenizer)


def test_mask_rate_follows_progress(tokenizer, rows):
    tokens, lengths = rows
    collator = MaskedCollator(tokenizer, 0, 0, 0.5, 0.25)
    counts = [len(collator(tokens, lengths, np.arange(64), progress).labels) / 64 for progress in (0.0, 0.5, 1.0)]
    assert counts == [12, 9, 6]


def test_causal_predicts_every_ordinary_token_from_the_one_before(tokenizer, rows):
    tokens, lengths = rows
    batch = CausalCollator(tokenizer)(tokens, lengths, np.arange(64))
    flat = tokens.ravel()
    assert np.array_equal(flat[batch.positions.numpy() + 1], batch.labels.numpy())
    assert len(batch.labels) == 64 * 24
    assert np.array_equal(batch.inputs["input_ids"].numpy(), tokens)


def test_a_document_ends_where_no_longer_one_may_have_been_cut(tokenizer):
    """Rows of 10: two whole documents and a tail; one document that goes on in the next row; one that ends with it."""
    rows, lengths = np.arange(100, 130).reshape(3, 10), [np.array([3, 4]), np.array([10]), np.array([4, 6])]
    whole = CausalCollator(tokenizer)(rows, lengths, np.arange(3))
    batch = CausalCollator(tokenizer, end_id=7)(rows, lengths, np.arange(3))
    is_end = np.isin(batch.positions.numpy(), [2, 6, 23])
    assert batch.labels.numpy()[is_end].tolist() == [7, 7, 7]
    assert np.array_equal(batch.labels.numpy()[~is_end], whole.labels.numpy())
    assert np.array_equal(batch.positions.numpy()[~is_end], whole.positions.numpy())
    assert (np.diff(batch.positions.numpy()) > 0).all()


def test_position_offset(tokenizer, rows):
    tokens, lengths = rows
    batch = CausalCollator(tokenizer, 0, 2)(tokens, lengths, np.arange(64))
    assert batch.inputs["position_ids"].min() == 2


@pytest.mark.parametrize("num_values", [3, 10**6])
def test_lowest_draws_are_those_of_a_stable_sort(num_values):
    """Also where many draws are equal, or none is to be chosen."""
    generator = np.random.default_rng(num_values)
    draw = generator.integers(0, num_values, (40, 24)) / num_values
    counts = generator.integers(0, 25, 40)
    chosen = choose_lowest(draw, counts)
    for row, count, places in zip(draw, counts, chosen):
        assert np.flatnonzero(places).tolist() == sorted(np.argsort(row, kind="stable")[:count].tolist())
