"""Token embeddings from co-occurrence counts, against counts and formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oneday import initialization
from oneday.errors import SettingError
from oneday.initialization import (
    EMBEDDING_STD,
    check_embedding_init,
    count_cooccurrences,
    count_vectors,
    factorize,
    positive_pmi,
    set_embeddings,
)


def count_by_hand(dataset, vocab_size, special_ids, window):
    counts = np.zeros((vocab_size, vocab_size))
    rows, doc_lengths = dataset.get_rows(np.arange(len(dataset)))
    for row, lengths in zip(rows.astype(int), doc_lengths):
        start = 0
        for length in lengths.tolist():
            document = [token for token in row[start : start + length] if token not in special_ids]
            start += length
            for i, token in enumerate(document):
                for j in range(i + 1, min(i + window + 1, len(document))):
                    counts[token, document[j]] += 1 / (j - i)
                    counts[document[j], token] += 1 / (j - i)
    return counts


@pytest.mark.parametrize("max_cells", [10**9, 150 * 20])
def test_pairs_are_counted_within_documents_and_by_distance(packed, tokenizers, monkeypatch, max_cells):
    monkeypatch.setattr(initialization, "MAX_CELLS", max_cells)
    train, tokenizer = packed["encoder"][0], tokenizers["encoder"]
    vocab_size, special = len(tokenizer), tokenizer.all_special_ids
    counts = count_cooccurrences(train, vocab_size, special)
    expected = count_by_hand(train, vocab_size, special, initialization.WINDOW)
    if max_cells < vocab_size**2:
        rows, lengths = train.get_rows(np.arange(len(train)))
        tokens, _ = initialization.flatten_documents(rows, lengths)
        frequency = np.bincount(tokens[~np.isin(tokens, special)], minlength=vocab_size)
        columns = np.sort(np.argsort(-frequency, kind="stable")[: max_cells // vocab_size])
        expected = expected[:, columns]
    assert counts.shape == expected.shape
    np.testing.assert_allclose(counts.numpy(), expected, rtol=1e-5)
    assert not counts[special].any()


def test_information_is_the_formula():
    generator = np.random.default_rng(0)
    counts = generator.poisson(1.0, (12, 9)).astype(np.float32)
    counts[3] = 0
    joint = counts.astype(np.float64)
    contexts = joint.sum(0) ** 0.75
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log((joint / joint.sum()) / (joint.sum(1, keepdims=True) / joint.sum() * contexts / contexts.sum()))
    expected = np.where(joint > 0, np.maximum(ratio, 0), 0)
    np.testing.assert_allclose(positive_pmi(torch.from_numpy(counts)).numpy(), expected, atol=1e-5)


def test_a_matrix_of_low_rank_is_recovered():
    factors = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    matrix = factors @ factors.T
    vectors = factorize(matrix, 8, torch.Generator().manual_seed(1))
    assert vectors.shape == (40, 8)
    assert torch.allclose(vectors @ vectors.T, matrix, atol=1e-3)


@pytest.mark.parametrize("name", ["modernbert", "qwen3", "bert", "gpt2"])
def test_words_that_share_contexts_come_near_and_special_tokens_stay_random(make_model, packed, tokenizers, name):
    kind = "encoder" if name in ("modernbert", "bert") else "decoder"
    tokenizer, train = tokenizers[kind], packed[kind][0]
    models = [make_model(name) for _ in range(2)]
    before = models[0].get_input_embeddings().weight.detach().clone()
    for model in models:
        table = model.get_input_embeddings().weight
        set_embeddings(table, count_vectors(table.shape, table.device, train, tokenizer.all_special_ids, 3))
    table = models[0].get_input_embeddings().weight.detach()
    assert torch.equal(table, models[1].get_input_embeddings().weight), "the same seed gives the same vectors"
    special = tokenizer.all_special_ids
    scale = EMBEDDING_STD / before.std()
    assert torch.allclose(table[special], before[special] * scale, rtol=1e-4)
    assert table.isfinite().all() and 0.5 < table.std() / EMBEDDING_STD < 1.5
    counts = count_cooccurrences(train, table.shape[0], special)
    information = positive_pmi(counts)
    seen = information.sum(1) > 0
    assert table[seen].mean(0).abs().max() < 1e-5, "what all words share is taken away"
    kernel = information[seen] @ information[seen].T
    products = table[seen] @ table[seen].T
    rank = torch.corrcoef(torch.stack([kernel.flatten(), products.flatten()]))[0, 1]
    assert rank > 0.5, "vectors of words with like contexts point the same way"


def test_a_run_starts_there_inside_its_budget_and_learns_faster(make_trainer, tmp_path):
    losses = {}
    for init in initialization.EMBEDDING_INITS:
        trainer = make_trainer("modernbert", output=init, budget_steps=30, embedding_init=init)
        losses[init] = trainer.run()["eval_mlm_loss"]
        assert (trainer.clock.ledger["initialization"] > 0) == (init == "cooccurrence")
    assert losses["cooccurrence"] < losses["random"]


def test_unknown_names_and_streams_are_refused(packed):
    with pytest.raises(SettingError, match="embedding_init is 'glove'; it must be one of random, cooccurrence"):
        check_embedding_init("glove", packed["encoder"][0])
    with pytest.raises(SettingError, match="with streaming set it to random"):
        check_embedding_init("cooccurrence", object())
    check_embedding_init("random", object())
