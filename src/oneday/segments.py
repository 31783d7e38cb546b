"""Words, sentences and runs inside packed rows: pure functions on numpy arrays."""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from oneday.errors import SettingError

# Tokens of a word that is masked whole.
LONGEST_WORD = 8
SENTENCE_ENDS = frozenset(".!?\u3002\uff01\uff1f\u2026")
# XLNet's spans have up to five tokens; of a stretch of text a sixth is predicted.
LONGEST_SPAN, SPAN_STRETCH = 5, 6
# An order that turns out to be none is drawn again from other digits.
RESHUFFLES = (1009.0, 10007.0, 100003.0)
# Each segment of a pair has at least this many tokens.
LEAST_SEGMENT = 3


class Pairs(NamedTuple):
    """Rows whose documents are pairs of segments.

    Attributes:
        tokens: (rows, row_length) int64.
        segments: (rows, row_length) int64: 0 in [CLS] A [SEP], 1 in B [SEP], 0 where a document is no pair.
        starts: (num_pairs,) int64, places of their [CLS] in the flattened tokens.
        labels: (num_pairs,) int64, 0: B follows A, 1: it does not.
    """

    tokens: np.ndarray
    segments: np.ndarray
    starts: np.ndarray
    labels: np.ndarray


def find_continuations(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """(vocabulary,) bool: tokens that go on with the word before them.

    WordPiece marks these with ##; byte-level tokenizers mark the others, by a space before them. There a mark or a
    line's end goes on with no word.

    Raises:
        SettingError: The tokenizer marks where a word ends, which says nothing of the token that follows.
    """
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model.get("end_of_word_suffix"):
        raise SettingError(
            f"whole_word_mask is true, and the tokenizer of tokenizer_name ends words with "
            f"{model['end_of_word_suffix']!r} instead of marking how they go on; leave whole_word_mask out."
        )
    if model["type"] == "WordPiece":
        return np.array([piece.startswith("##") for piece in pieces])
    special, spaces = set(tokenizer.all_special_tokens), ("\u0120", "\u2581")
    starts = [tokenizer.convert_tokens_to_string([piece])[:1] for piece in pieces]
    inside = [start.isalnum() or start == "\ufffd" for start in starts]  # bytes inside a letter, too
    return np.array([i and not p.startswith(spaces) and p not in special for i, p in zip(inside, pieces)])


def find_sentence_ends(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """(vocabulary,) bool: tokens that are a full stop, an exclamation or a question mark."""
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    texts = [tokenizer.convert_tokens_to_string([piece]).strip().removeprefix("##") for piece in pieces]
    return np.array([text in SENTENCE_ENDS for text in texts])


def number_words(eligible: np.ndarray, continues: np.ndarray) -> np.ndarray:
    """(rows, row_length) int64: the word that each eligible token is of, counted in its row; -1 for the others.

    A run of more than `LONGEST_WORD` tokens is cut into such words: byte-level tokens of a script without spaces go on
    to the next mark.

    >>> number_words(np.array([[False, True, True, True, False]]), np.array([[False, False, True, False, False]]))
    array([[-1,  0,  0,  1, -1]])
    """
    before = np.pad(eligible, ((0, 0), (1, 0)))[:, :-1]
    begins = eligible & ~(continues & before)
    places = np.arange(eligible.shape[1])
    inside = places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    begins |= eligible & (inside > 0) & (inside % LONGEST_WORD == 0)
    return np.where(eligible, np.cumsum(begins, axis=1) - 1, -1)


def choose_words(words: np.ndarray, draws: np.ndarray, count: int) -> np.ndarray:
    """(row_length,) bool: whole words, by the draw of their first token, until there are about `count` tokens.

    The last word, where it does not fit, is taken as often as the share of it that would: long words are chosen no
    more rarely than short ones, and the tokens are `count` on average. There is one word at least.

    Args:
        words: (row_length,) from `number_words`.
        draws: (row_length,) uniform on [0, 1).
        count: Tokens to choose.
    """
    chosen = np.zeros(len(words), dtype=bool)
    inside = words >= 0
    if not inside.any() or count == 0:
        return chosen
    _, first, sizes = np.unique(words[inside], return_index=True, return_counts=True)
    draws = draws[inside][first]
    taken, picked = 0, []
    for word in np.argsort(draws, kind="stable").tolist():
        # The low bits of the draw: the high ones have brought the word here.
        if not picked or (draws[word] * 2**20) % 1.0 * sizes[word] < count - taken:
            picked.append(word)
        taken += sizes[word]
        if taken >= count:
            break
    chosen[inside] = np.isin(words[inside], picked)
    return chosen


def shuffle_runs(
    tokens: np.ndarray, free: np.ndarray, draws: np.ndarray, fraction: float, span: int
) -> tuple[np.ndarray, np.ndarray]:
    """Shuffles runs of `span` neighbouring free tokens.

    Args:
        tokens: (rows, row_length) ids.
        free: (rows, row_length) bool: may be moved.
        draws: (rows, row_length) uniform on [0, 1): runs with the smallest are taken, and their order is by it.
        fraction: Share of a row's free tokens that runs hold, rounded to whole runs, one at least.
        span: Tokens of a run; in rows of fewer tokens nothing moves.

    Returns:
        The tokens with runs in another order, and (rows, row_length) bool: in which places runs lie.
    """
    shuffled, moved = tokens.copy(), np.zeros_like(free)
    if span > tokens.shape[1]:
        return shuffled, moved
    inside, rows = np.arange(span), np.arange(len(tokens))
    wanted = np.maximum(1, np.round(fraction * free.sum(1) / span))
    for number in range(int(wanted.max())):
        # The run of the smallest draw in each row, of those whose places are free and not yet taken.
        fits = np.lib.stride_tricks.sliding_window_view(free & ~moved, span, axis=1).all(-1)
        starts = np.where(fits, draws[:, : fits.shape[1]], 2.0).argmin(1)
        taking = np.flatnonzero(fits[rows, starts] & (number < wanted))
        if not len(taking):
            break
        row, run = taking[:, None], starts[taking][:, None] + inside
        order = draw_orders(draws[row, run])
        shuffled[row, run] = np.take_along_axis(tokens[row, run], order, axis=1)
        moved[row, run] = True
    return shuffled, moved


def draw_orders(draws: np.ndarray) -> np.ndarray:
    """(runs, span) int64: for each run an order, any but the one that it has, all alike likely.

    Args:
        draws: (runs, span) uniform on [0, 1), of which the low bits are used: the high ones have chosen the run.
    """
    inside, low = np.arange(draws.shape[1]), draws * 2.0**24 % 1.0
    order = np.argsort(low, axis=1, kind="stable")
    for factor in RESHUFFLES:
        same = (order == inside).all(1)
        order[same] = np.argsort(low[same] * factor % 1.0, axis=1, kind="stable")
    order[(order == inside).all(1)] = np.roll(inside, 1)
    return order


def choose_spans(lengths: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """(rows, row_length) bool: XLNet's spans, one to five tokens each somewhere in a stretch of six times its length.

    Args:
        lengths: (rows, row_length) uniform on [0, 1): the spans' lengths, in their order.
        starts: The same: where in their stretches they begin.
    """
    row_length = lengths.shape[1]
    most = -(-row_length // SPAN_STRETCH)  # spans of a row, all of one token
    sizes = 1 + (lengths[:, :most] * LONGEST_SPAN).astype(np.int64)
    first = np.cumsum(sizes * SPAN_STRETCH, axis=1) - sizes * SPAN_STRETCH
    first += (starts[:, :most] * (sizes * (SPAN_STRETCH - 1) + 1)).astype(np.int64)
    row, span, offset = np.nonzero(np.arange(LONGEST_SPAN) < sizes[:, :, None])
    place = first[row, span] + offset
    chosen = np.zeros(lengths.shape, dtype=bool)
    chosen[row[place < row_length], place[place < row_length]] = True
    return chosen


def order_halves(draws: np.ndarray) -> np.ndarray:
    """(rows, row_length) int64: each token's place in a random order, the first half of the row before the second.

    Both halves have the same order, as in XLNet, whose rows may be read in two parts.

    Args:
        draws: (rows, row_length) uniform on [0, 1), of even length; the first half is used.
    """
    half = draws.shape[1] // 2
    order = np.argsort(draws[:, :half], axis=1, kind="stable")
    return np.concatenate([order, order + half], axis=1)


def make_pairs(
    rows: np.ndarray,
    doc_lengths: list[np.ndarray],
    ends_sentence: np.ndarray,
    cls_id: int,
    sep_id: int,
    cut_draws: np.ndarray,
    label_draws: np.ndarray,
    is_random: bool,
) -> Pairs:
    """Makes `[CLS] A . B . [SEP]` the pair `[CLS] A [SEP] B . [SEP]`, in its place, half of them no neighbours.

    The end of one of its sentences becomes the separator, so that nothing moves. A mark at the very end stays there,
    whichever segment comes last: it tells nothing of the order. Documents of one sentence stay as they are.

    Args:
        rows: (rows, row_length) token ids.
        doc_lengths: Lengths of each row's documents.
        ends_sentence: (vocabulary,) bool.
        cls_id: What a document begins with; a piece without it stays as it is.
        sep_id: The separator, and what it ends with.
        cut_draws: (rows, row_length) uniform on [0, 1); that at a document's start chooses its cut.
        label_draws: The same, for whether it is a neighbour.
        is_random: B of a negative is text of other documents in its row, cut or repeated to B's length; where there is
            none, and without this, A and B change places.
    """
    tokens, segments = rows.astype(np.int64), np.zeros(rows.shape, dtype=np.int64)
    found = []
    for row, lengths in enumerate(doc_lengths):
        ends = np.cumsum(lengths)
        for start, end in zip((ends - lengths).tolist(), ends.tolist()):
            is_whole = tokens[row, start] == cls_id and tokens[row, end - 1] == sep_id
            cut = choose_cut(ends_sentence[tokens[row, start:end]], cut_draws[row, start])
            if is_whole and cut is not None:
                found.append((row, start, start + cut, end))
    seconds = [read_second(tokens[row], cut, end, ends_sentence) for row, _, cut, end in found]
    labels = np.array([label_draws[row, start] < 0.5 for row, start, _, _ in found], dtype=np.int64)
    for number, (row, start, cut, end) in enumerate(found):
        first, second = tokens[row, start + 1 : cut].copy(), seconds[number]
        if labels[number] and is_random and (others := find_others(found, number)):
            second = np.resize(np.concatenate([seconds[place] for place in others]), len(second))
        elif labels[number]:
            first, second = second, first
        middle = start + 1 + len(first)
        tokens[row, start + 1 : middle], tokens[row, middle] = first, sep_id
        tokens[row, middle + 1 : middle + 1 + len(second)] = second
        segments[row, middle + 1 : end] = 1
    starts = np.array([row * rows.shape[1] + start for row, start, _, _ in found], dtype=np.int64)
    return Pairs(tokens, segments, starts, labels)


def find_others(found: list[tuple[int, int, int, int]], number: int) -> list[int]:
    """The other pairs of a pair's row, from the next one on and round: not all take their text from the same one."""
    row = found[number][0]
    mine = [place for place in range(len(found)) if found[place][0] == row]
    at = mine.index(number)
    return mine[at + 1 :] + mine[:at]


def choose_cut(ends: np.ndarray, draw: float) -> int | None:
    """Place in a document, [CLS] at 0 and [SEP] last, of a sentence's end with enough text on both sides."""
    last = len(ends) - 1 - ends[-2:-1].sum()
    places = np.flatnonzero(ends[: max(0, last - LEAST_SEGMENT)])
    places = places[places > LEAST_SEGMENT]
    return int(places[int(draw * len(places))]) if len(places) else None


def read_second(row: np.ndarray, cut: int, end: int, ends_sentence: np.ndarray) -> np.ndarray:
    """The text after the cut, without the separator at the end and a mark before it."""
    return row[cut + 1 : end - 1 - int(ends_sentence[row[end - 2]])].copy()
