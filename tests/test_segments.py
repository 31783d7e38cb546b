"""Words, sentences and runs, on rows that can be checked by hand."""

from __future__ import annotations

import doctest
import math
from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from oneday import segments
from oneday.errors import SettingError
from oneday.segments import (
    choose_cut,
    choose_words,
    draw_orders,
    find_continuations,
    find_sentence_ends,
    make_pairs,
    number_words,
    order_halves,
    shuffle_runs,
)
from oneday.tokenizer_training import train_tokenizer

CLS, SEP, DOT = 1, 2, 3
TEXTS = ["The cat sat. The dog ran away! Was it so? Yes, it was.", "cats and dogs. dogs and cats."] * 20


def test_the_examples():
    assert doctest.testmod(segments).failed == 0


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_tokens_know_their_words_and_sentences(kind):
    texts = TEXTS + ["# Heads\n## Parts\n### More"] * 20  # ## in a byte-level vocabulary is no WordPiece
    tokenizer = train_tokenizer(texts, kind, 60 if kind == "wordpiece" else 290, objective_kind="encoder")
    continues, ends = find_continuations(tokenizer), find_sentence_ends(tokenizer)
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    shown = {piece for piece, end in zip(pieces, ends) if end}
    assert {"."} <= shown <= {".", "!", "?", "##.", "##!", "##?"}
    assert not continues[tokenizer.all_special_ids].any()
    if kind == "wordpiece":
        assert {piece for piece, goes_on in zip(pieces, continues) if goes_on} == {p for p in pieces if p[:2] == "##"}
    else:
        goes_on = dict(zip(pieces, continues))
        assert not any(goes_on[piece] for piece in pieces if piece.startswith("\u0120"))
        assert not any(goes_on[piece] for piece in (".", "!", ",", "\u010a")) and goes_on["s"]


def test_whole_words_fit_into_the_count():
    words = number_words(
        np.array([[False, True, True, True, True, True, False, True]]),
        np.array([[False, False, True, True, False, True, False, False]]),
    )[0]
    assert words.tolist() == [-1, 0, 0, 0, 1, 1, -1, 2]
    draws = np.array([0, 0.3, 0.9, 0.9, 0.1, 0.9, 0, 0.2])
    assert np.flatnonzero(choose_words(words, draws, 3)).tolist() == [4, 5, 7]
    assert np.flatnonzero(choose_words(words, draws, 4)).tolist() == [4, 5, 7], "the longest no longer fits"
    assert np.flatnonzero(choose_words(words, draws, 1)).tolist() == [4, 5], "one word at least"
    assert not choose_words(words, draws, 0).any()


def test_long_words_are_hidden_as_often_as_short_ones():
    """Rows of words of 1, 3 and 5 tokens, 15 % of them asked for: 15 % of each kind, and of all."""
    generator = np.random.default_rng(0)
    for row_length in (30, 126):
        count, hidden, seen = round(0.15 * row_length), np.zeros(6), np.zeros(6)
        for _ in range(3000):
            sizes = generator.choice([1, 3, 5], row_length)
            words = np.repeat(np.arange(row_length), sizes)[:row_length]
            chosen, sizes = choose_words(words, generator.random(row_length), count), np.bincount(words)[words]
            for size in (1, 3, 5):
                hidden[size] += chosen[sizes == size].sum()
                seen[size] += (sizes == size).sum()
        assert hidden.sum() / seen.sum() == pytest.approx(0.15, abs=0.01 if row_length > 100 else 0.03)
        rates = hidden[[1, 3, 5]] / seen[[1, 3, 5]]
        assert rates.max() - rates.min() < (0.01 if row_length > 100 else 0.03), rates


def test_a_word_without_an_end_is_cut():
    """Twenty tokens that all go on: words of 8, 8 and 4, so that not all of them are hidden where 8 are asked for."""
    continues = np.ones((1, 20), dtype=bool)
    words = number_words(np.ones((1, 20), dtype=bool), continues)
    assert words.tolist() == [[0] * 8 + [1] * 8 + [2] * 4]
    assert choose_words(words[0], np.linspace(0, 0.9, 20), 8).sum() == 8


def test_runs_are_shuffled_in_their_place():
    generator = np.random.default_rng(0)
    tokens = np.arange(200).reshape(4, 50)
    free = generator.random((4, 50)) < 0.9
    shuffled, moved = shuffle_runs(tokens, free, generator.random((4, 50)), 0.2, 3)
    orders = set()
    assert np.array_equal(np.sort(shuffled), tokens), "nothing is lost"
    assert np.array_equal(shuffled[~moved], tokens[~moved]) and not (moved & ~free).any()
    assert (moved.sum(1) == [3 * round(0.2 * row.sum() / 3) for row in free]).all()
    for row in range(4):
        places = np.flatnonzero(moved[row]).reshape(-1, 3)
        assert (np.diff(places) == 1).all()
        for run in places:
            assert sorted(shuffled[row, run]) == tokens[row, run].tolist() != shuffled[row, run].tolist()
            orders.add(tuple(shuffled[row, run] - tokens[row, run[0]]))
    assert len(orders) >= 4, "all orders occur"
    for may_move, span in ((np.zeros_like(free), 3), (np.ones_like(free), 51), (np.ones_like(free), 200)):
        nothing, moved = shuffle_runs(tokens, may_move, generator.random((4, 50)), 0.2, span)
        assert np.array_equal(nothing, tokens) and not moved.any()


@pytest.mark.parametrize("span", [2, 3, 5])
def test_runs_are_those_of_a_loop_over_the_draws(span):
    """The smallest draws in turn, each where its places are free and none is taken yet, until there are enough."""
    generator = np.random.default_rng(span)
    tokens, free = np.arange(6 * 64).reshape(6, 64), generator.random((6, 64)) < 0.8
    draws = generator.random((6, 64))
    free[0], draws[1] = False, 0.5  # nothing to move, and draws that are equal
    shuffled, moved = shuffle_runs(tokens, free, draws, 0.3, span)
    expected, taken = tokens.copy(), np.zeros_like(free)
    for row in range(6):
        wanted = max(1, round(0.3 * int(free[row].sum()) / span))
        for start in sorted(range(64 - span + 1), key=lambda place: draws[row, place]):
            run = slice(start, start + span)
            if wanted and free[row, run].all() and not taken[row, run].any():
                order = draw_orders(draws[row, run][None])[0].tolist()
                expected[row, run], taken[row, run], wanted = tokens[row, run][order], True, wanted - 1
    assert taken[1:].any(1).all() and not taken[0].any()
    assert np.array_equal(moved, taken) and np.array_equal(shuffled, expected)


def test_both_halves_of_a_row_have_one_order_and_the_first_comes_before():
    order = order_halves(np.random.default_rng(0).random((6, 14)))
    assert (np.sort(order[:, :7]) == np.arange(7)).all() and (order[:, 7:] == order[:, :7] + 7).all()
    assert len({tuple(row) for row in order.tolist()}) == 6


def build_row(*documents):
    tokens = [token for document in documents for token in (CLS, *document, SEP)]
    return np.array([tokens]), [np.array([len(document) + 2 for document in documents])]


ENDS = np.arange(100) == DOT
FIRST, SECOND = [10, 11, 12, 13], [20, 21, 22, 23, 24]


@pytest.mark.parametrize("mark", [[], [DOT]])
def test_a_pair_in_its_place(mark):
    rows, lengths = build_row(FIRST + [DOT] + SECOND + mark)
    zero = np.zeros(rows.shape)
    together = make_pairs(rows, lengths, ENDS, CLS, SEP, zero, zero + 0.9, False)
    assert together.tokens[0].tolist() == [CLS, *FIRST, SEP, *SECOND, *mark, SEP]
    assert together.segments[0].tolist() == [0] * 6 + [1] * (6 + len(mark))
    assert together.labels.tolist() == [0] and together.starts.tolist() == [0]
    swapped = make_pairs(rows, lengths, ENDS, CLS, SEP, zero, zero + 0.1, False)
    assert swapped.tokens[0].tolist() == [CLS, *SECOND, SEP, *FIRST, *mark, SEP], "the mark at the end tells nothing"
    assert swapped.segments[0].tolist() == [0] * 7 + [1] * (5 + len(mark))
    assert swapped.labels.tolist() == [1]


def test_a_random_second_is_another_documents():
    rows, lengths = build_row(FIRST + [DOT] + SECOND, [30, 31, 32, DOT, 40, 41, 42, 43])
    draws = np.full(rows.shape, 0.9)
    draws[0, 0] = 0.1
    pairs = make_pairs(rows, lengths, ENDS, CLS, SEP, np.zeros(rows.shape), draws, True)
    assert pairs.tokens[0, :12].tolist() == [CLS, *FIRST, SEP, 40, 41, 42, 43, 40, SEP]
    assert pairs.tokens[0, 12:].tolist() == [CLS, 30, 31, 32, SEP, 40, 41, 42, 43, SEP]
    assert pairs.labels.tolist() == [1, 0] and pairs.starts.tolist() == [0, 12]


def test_random_seconds_come_from_all_documents_of_a_row():
    docs = [[10 * n, 10 * n + 1, 10 * n + 2, DOT, 10 * n + 3, 10 * n + 4, 10 * n + 5] for n in range(3, 9)]
    rows, lengths = build_row(*docs)
    pairs = make_pairs(rows, lengths, ENDS, CLS, SEP, np.zeros(rows.shape), np.zeros(rows.shape), True)
    seconds = pairs.tokens[0][pairs.segments[0] == 1].reshape(6, -1)
    assert (seconds[:, 0] // 10).tolist() == [4, 5, 6, 7, 8, 3], "each its neighbour's"


@pytest.mark.parametrize("span", [2, 3, 4])
def test_all_orders_but_the_one_it_has_are_alike_likely(span):
    orders = draw_orders(np.random.default_rng(0).random((48_000, span)))
    assert (np.sort(orders, axis=1) == np.arange(span)).all()
    counts = Counter(map(tuple, orders.tolist()))
    assert len(counts) == math.factorial(span) - 1 and tuple(range(span)) not in counts
    expected = 48_000 / len(counts)
    assert max(abs(count - expected) for count in counts.values()) < 5 * math.sqrt(expected)


def test_what_is_no_pair_stays_as_it_is():
    rows, lengths = build_row([10, 11, DOT, 12, 13, 14, 15], FIRST + SECOND, FIRST + [DOT, 20, 21])
    zero = np.zeros(rows.shape)
    pairs = make_pairs(rows, lengths, ENDS, CLS, SEP, zero, zero, False)
    assert np.array_equal(pairs.tokens, rows) and not pairs.segments.any() and not len(pairs.starts)
    piece = np.array([FIRST + [DOT] + SECOND])
    cut = make_pairs(piece, [np.array([10])], ENDS, CLS, SEP, np.zeros((1, 10)), np.zeros((1, 10)), False)
    assert np.array_equal(cut.tokens, piece), "a piece without [CLS] and [SEP]"


def test_every_cut_is_drawn():
    ends = np.isin(np.arange(30), [2, 6, 12, 20, 25, 28])
    cuts = {choose_cut(ends, draw) for draw in np.linspace(0, 0.999, 50)}
    assert cuts == {6, 12, 20}


def test_a_tokenizer_that_marks_where_words_end_is_refused():
    """What follows such a mark is known only of two tokens together."""
    backend = Tokenizer(models.BPE({"a": 0, "b</w>": 1}, [], end_of_word_suffix="</w>"))
    with pytest.raises(SettingError, match="whole_word_mask is true, and the tokenizer of tokenizer_name ends words"):
        find_continuations(PreTrainedTokenizerFast(tokenizer_object=backend))
