"""Packed rows -> model inputs: one collator an objective.

Every random choice is a hash of (seed, sample index, position), not the next number of a generator: what a sample
looks like depends neither on the number of processes nor on where a run was interrupted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from oneday.attention import PackedLayout, build_layout
from oneday.segments import (
    choose_spans,
    choose_words,
    find_continuations,
    find_sentence_ends,
    make_pairs,
    number_words,
    order_halves,
    shuffle_runs,
)


@dataclass
class Batch:
    """One micro-batch.

    Attributes:
        inputs: Keyword arguments of the model; `input_ids` is (rows, row_length).
        positions: (num_predicted,) int64, places in the flattened (rows * row_length) tokens that are predicted.
        labels: (num_predicted,) int64, what stands there.
        doc_lengths: (num_docs,) int64, tokens of each document, special ones included; padding is in none.
        extras: What one objective needs beside these; the model does not see it.
    """

    inputs: dict[str, torch.Tensor | int]
    positions: torch.Tensor
    labels: torch.Tensor
    doc_lengths: np.ndarray
    extras: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def attended_lengths(self) -> np.ndarray:
        """(num_pieces,) int64, tokens of what the model attends within: documents and padded tails, or whole rows."""
        if "cu_seq_lens" in self.inputs:
            return np.diff(self.inputs["cu_seq_lens"].numpy()).astype(np.int64)
        num_rows, row_length = self.inputs["input_ids"].shape
        return np.full(num_rows, row_length, dtype=np.int64)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device; to a GPU from pinned memory, which does not wait for what it computes."""
        if device.type == "cpu":
            return self

        def move(value: torch.Tensor | int) -> torch.Tensor | int:
            if not torch.is_tensor(value):
                return value
            return (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)

        return Batch(
            {key: move(value) for key, value in self.inputs.items()},
            move(self.positions),
            move(self.labels),
            self.doc_lengths,
            {key: move(value) for key, value in self.extras.items()},
        )


class Collator(Protocol):
    """Turns packed rows into a batch."""

    def __call__(
        self, rows: np.ndarray, doc_lengths: list[np.ndarray], sample_indices: np.ndarray, progress: float = 0.0
    ) -> Batch:
        """Collate.

        Args:
            rows: (rows, row_length) token ids.
            doc_lengths: Lengths of each row's documents; they need not fill the row.
            sample_indices: (rows,) index of each sample in the run, the key of its random choices.
            progress: Fraction of the budget spent.
        """


def hash_uniform(seed: int, sample_indices: np.ndarray, row_length: int, stream: int) -> np.ndarray:
    """(rows, row_length) float64 uniform on [0, 1), a function of its arguments alone (SplitMix64 finaliser).

    Args:
        seed: Seed of the run.
        sample_indices: (rows,) sample indices.
        row_length: Numbers a row.
        stream: Which of several independent draws for the same sample.
    """
    with np.errstate(over="ignore"):
        key = np.uint64(seed) * np.uint64(0xD1342543DE82EF95) + np.uint64(stream) * np.uint64(0x2545F4914F6CDD1D)
        rows = mix(sample_indices.astype(np.uint64) + mix(np.atleast_1d(key)))
        return (mix(rows[:, None] + np.arange(row_length, dtype=np.uint64)) >> np.uint64(11)) * 2.0**-53


def mix(value: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea & Flood 2014): a bijection of 64 bits that looks random."""
    with np.errstate(over="ignore"):
        value = value * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


def mark_documents(doc_lengths: list[np.ndarray], row_length: int) -> np.ndarray:
    """(rows, row_length) bool: which tokens are in a document; the rest is a row's padded tail."""
    used = np.array([int(lengths.sum()) for lengths in doc_lengths])
    return np.arange(row_length) < used[:, None]


def find_ends(doc_lengths: list[np.ndarray], row_length: int) -> np.ndarray:
    """Flat positions of the last tokens of documents that end before their row does."""
    ends = [row * row_length + np.cumsum(lengths) - 1 for row, lengths in enumerate(doc_lengths)]
    ends = np.concatenate(ends).astype(np.int64)
    return ends[(ends + 1) % row_length != 0]


def choose_lowest(draw: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(rows, row_length) bool: the `counts[i]` lowest draws of row i, of equal ones the earlier.

    >>> choose_lowest(np.array([[0.3, 0.1, 0.2, 0.1]]), np.array([3]))
    array([[False,  True,  True,  True]])
    """
    # A bound from a sort costs a seventh of a sort of places, and does unless draws are equal.
    bounds = np.take_along_axis(np.sort(draw, axis=1), np.maximum(counts, 1)[:, None] - 1, axis=1)
    chosen = (draw <= bounds) & (counts > 0)[:, None]
    if (chosen.sum(1) != counts).any():
        order = np.argsort(draw, axis=1, kind="stable")
        np.put_along_axis(chosen, order, np.arange(draw.shape[1]) < counts[:, None], axis=1)
    return chosen


@dataclass
class PackedCollator:
    """What every objective's collator shares: documents, positions and the attention's layout."""

    tokenizer: PreTrainedTokenizerBase
    seed: int = 0
    position_offset: int = 0

    def __post_init__(self) -> None:
        """Special ids and the range of random replacements come from the tokenizer."""
        self.special_ids = np.array(sorted(set(self.tokenizer.all_special_ids)), dtype=np.int64)
        self.ordinary_ids = np.setdiff1d(np.arange(len(self.tokenizer)), self.special_ids)
        self.is_special = np.isin(np.arange(len(self.tokenizer)), self.special_ids)

    def finish(
        self,
        tokens: np.ndarray,
        doc_lengths: list[np.ndarray],
        layout: PackedLayout,
        predicted: np.ndarray,
        labels: np.ndarray,
    ) -> Batch:
        """Assemble a batch from arrays."""
        lengths = np.concatenate(doc_lengths).astype(np.int64)
        inputs = {"input_ids": torch.from_numpy(tokens), **layout._asdict()}
        return Batch(inputs, torch.from_numpy(predicted), torch.from_numpy(labels), lengths)

    def lay_out(self, doc_lengths: list[np.ndarray], row_length: int) -> PackedLayout:
        """Positions and bounds of the documents."""
        return build_layout(doc_lengths, row_length, self.position_offset)

    def find_text(self, tokens: np.ndarray, doc_lengths: list[np.ndarray]) -> np.ndarray:
        """(rows, row_length) bool: what is neither padding nor a special token, which are never predicted."""
        return mark_documents(doc_lengths, tokens.shape[1]) & ~self.is_special[tokens]


@dataclass
class MaskedCollator(PackedCollator):
    """Masked language modelling: a fixed number of tokens a row is hidden and predicted.

    Attributes:
        probability: Fraction of a row's tokens that are predicted.
        probability_end: The same at the end of the budget; None keeps it.
        replacement: `mask`: always the mask token; `bert`: 80 % mask, 10 % a random token, 10 % itself.
        whole_words: All tokens of a word are hidden, or none; a row may then predict a few tokens more or less.
    """

    probability: float = 0.15
    probability_end: float | None = None
    replacement: str = "mask"
    whole_words: bool = False

    def __post_init__(self) -> None:
        """Also which tokens go on with the word before them."""
        super().__post_init__()
        self.continues_word = find_continuations(self.tokenizer) if self.whole_words else None

    def __call__(
        self, rows: np.ndarray, doc_lengths: list[np.ndarray], sample_indices: np.ndarray, progress: float = 0.0
    ) -> Batch:
        """See Collator. Special tokens and padding are never predicted."""
        tokens = rows.astype(np.int64)
        eligible = self.find_text(tokens, doc_lengths)
        chosen = self.choose(tokens, eligible, sample_indices, progress)
        predicted = np.flatnonzero(chosen)
        labels = tokens.ravel()[predicted]
        tokens.ravel()[predicted] = self.replace(labels, predicted, sample_indices, tokens.shape[1])
        return self.finish(tokens, doc_lengths, self.lay_out(doc_lengths, tokens.shape[1]), predicted, labels)

    def choose(
        self, tokens: np.ndarray, eligible: np.ndarray, sample_indices: np.ndarray, progress: float
    ) -> np.ndarray:
        """(rows, row_length) bool: in each row, the same share of its eligible tokens, at least one."""
        end = self.probability if self.probability_end is None else self.probability_end
        rate = self.probability + (end - self.probability) * progress
        draw = np.where(eligible, hash_uniform(self.seed, sample_indices, eligible.shape[1], 0), 2.0)
        counts = np.maximum(np.round(rate * eligible.sum(1)), eligible.any(1)).astype(np.int64)
        if self.whole_words:
            words = number_words(eligible, self.continues_word[tokens])
            return np.stack([choose_words(*row) for row in zip(words, draw, counts)])
        return choose_lowest(draw, counts)

    def replace(self, labels: np.ndarray, predicted: np.ndarray, samples: np.ndarray, row_length: int) -> np.ndarray:
        """What stands at the predicted places in the input."""
        masked = np.full_like(labels, self.tokenizer.mask_token_id)
        if self.replacement == "mask":
            return masked
        kind = hash_uniform(self.seed, samples, row_length, 1).ravel()[predicted]
        pick = hash_uniform(self.seed, samples, row_length, 2).ravel()[predicted]
        random_tokens = self.ordinary_ids[(pick * len(self.ordinary_ids)).astype(np.int64)]
        return np.where(kind < 0.8, masked, np.where(kind < 0.9, random_tokens, labels))


@dataclass
class WordOrderCollator(MaskedCollator):
    """Masked tokens, and runs of tokens that are not masked, shuffled; both are predicted.

    Attributes:
        order_probability: Fraction of a row's tokens that are in shuffled runs.
        span: Tokens of a run.
    """

    order_probability: float = 0.05
    span: int = 3

    def __call__(
        self, rows: np.ndarray, doc_lengths: list[np.ndarray], sample_indices: np.ndarray, progress: float = 0.0
    ) -> Batch:
        """See Collator. A run never holds a special or masked token."""
        original = rows.astype(np.int64)
        batch = super().__call__(rows, doc_lengths, sample_indices, progress)
        hidden = np.zeros(original.size, dtype=bool)
        hidden[batch.positions.numpy()] = True
        free = self.find_text(original, doc_lengths) & ~hidden.reshape(original.shape)
        draws = hash_uniform(self.seed, sample_indices, original.shape[1], 3)
        shuffled, moved = shuffle_runs(original, free, draws, self.order_probability, self.span)
        places = np.sort(np.concatenate([batch.positions.numpy(), np.flatnonzero(moved)]))
        ids = np.where(moved, shuffled, batch.inputs["input_ids"].numpy())
        batch.inputs["input_ids"] = torch.from_numpy(ids)
        batch.positions, batch.labels = torch.from_numpy(places), torch.from_numpy(original.ravel()[places])
        return batch


@dataclass
class PairedCollator(MaskedCollator):
    """Masked tokens in documents that are made pairs of segments; see `segments.make_pairs`.

    Attributes:
        negatives: `swapped`: the second segment comes first; `random`: it is another document's.
    """

    negatives: str = "swapped"

    def __post_init__(self) -> None:
        """Also which tokens end a sentence."""
        super().__post_init__()
        self.ends_sentence = find_sentence_ends(self.tokenizer)

    def __call__(
        self, rows: np.ndarray, doc_lengths: list[np.ndarray], sample_indices: np.ndarray, progress: float = 0.0
    ) -> Batch:
        """See Collator. `extras` has `pair_starts` (num_pairs,), places of [CLS], and `pair_labels`, 1: NotNext."""
        length = rows.shape[1]
        draws = [hash_uniform(self.seed, sample_indices, length, stream) for stream in (4, 5)]
        bounds = (self.tokenizer.cls_token_id, self.tokenizer.sep_token_id)
        pairs = make_pairs(rows, doc_lengths, self.ends_sentence, *bounds, *draws, self.negatives == "random")
        batch = super().__call__(pairs.tokens, doc_lengths, sample_indices, progress)
        batch.inputs["token_type_ids"] = torch.from_numpy(pairs.segments)
        # Also where there is none: all processes of a run count the same terms and gather the head's weights.
        batch.extras = {"pair_starts": torch.from_numpy(pairs.starts), "pair_labels": torch.from_numpy(pairs.labels)}
        return batch


@dataclass
class ReplacedTokenCollator(MaskedCollator):
    """Masked tokens that a generator fills: a uniform number for each, to draw by, and which places hold a token."""

    def __call__(
        self, rows: np.ndarray, doc_lengths: list[np.ndarray], sample_indices: np.ndarray, progress: float = 0.0
    ) -> Batch:
        """See Collator. `extras` has `draws` (num_predicted,) float32 and `is_token` (rows, row_length)."""
        batch = super().__call__(rows, doc_lengths, sample_indices, progress)
        draws = hash_uniform(self.seed, sample_indices, rows.shape[1], 6).ravel()[batch.positions.numpy()]
        batch.extras = {
            "draws": torch.from_numpy(draws.astype(np.float32)),
            "is_token": torch.from_numpy(mark_documents(doc_lengths, rows.shape[1])),
        }
        return batch


@dataclass
class PermutationCollator:
    """XLNet's spans and orders, as transformers' `DataCollatorForPermutationLanguageModeling` draws them.

    That collator masks the targets in the input, so that none learns from those before it, and lets special tokens see
    them. Here targets stand as they are, as in the paper, and who is no target sees none. It draws row by row, most of
    a millisecond each, which a GPU would wait for; all rows at once take a ninth of the time.

    Attributes:
        tokenizer: Its special tokens are no targets.
        seed: Seed of the run.
    """

    tokenizer: PreTrainedTokenizerBase
    seed: int = 0

    def __call__(
        self, rows: np.ndarray, doc_lengths: list[np.ndarray], sample_indices: np.ndarray, progress: float = 0.0
    ) -> Batch:
        """See Collator. Rows are one document each, of even length; targets (rows, most targets of a row, L)."""
        tokens = rows.astype(np.int64)
        length = tokens.shape[1]
        is_text = mark_documents(doc_lengths, length)
        is_target = is_text & ~np.isin(tokens, self.tokenizer.all_special_ids)
        lengths, starts, orders = (hash_uniform(self.seed, sample_indices, length, stream) for stream in (7, 8, 9))
        is_target &= choose_spans(lengths, starts)
        order = order_halves(orders)
        sees = order[:, :, None] > order[:, None, :]
        hidden = is_target[:, None, :] & ~(is_target[:, :, None] & sees)
        row, column = np.nonzero(is_target)
        counts = is_target.sum(1)
        most = max(1, int(counts.max()))
        number = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        targets = torch.zeros(len(tokens), most, length)
        targets[row, number, column] = 1.0
        inputs = {
            "input_ids": torch.from_numpy(tokens),
            "perm_mask": torch.from_numpy(hidden).float(),
            "target_mapping": targets,
            "attention_mask": torch.from_numpy(is_text.astype(np.float32)),
            "use_mems": False,
        }
        places, labels = torch.from_numpy(row * most + number), torch.from_numpy(tokens[is_target])
        return Batch(inputs, places, labels, np.concatenate(doc_lengths).astype(np.int64))


@dataclass
class CausalCollator(PackedCollator):
    """Next-token prediction: every token is predicted from those before it in its document, special ones never.

    Attributes:
        end_id: Predicted after the last token of a document, so that a model learns to stop; None: nothing is. Not at
            the end of a row, where a longer document may have been cut.
    """

    end_id: int | None = None

    def __call__(
        self, rows: np.ndarray, doc_lengths: list[np.ndarray], sample_indices: np.ndarray, progress: float = 0.0
    ) -> Batch:
        """See Collator. The first token of a document (`bos`) has nothing before it and is not predicted."""
        tokens = rows.astype(np.int64)
        layout = self.lay_out(doc_lengths, tokens.shape[1])
        follows = layout.position_ids.numpy() > self.position_offset
        places = np.flatnonzero(follows & self.find_text(tokens, doc_lengths))
        positions, labels = places - 1, tokens.ravel()[places]
        if self.end_id is not None:
            ends = find_ends(doc_lengths, tokens.shape[1])
            positions = np.concatenate([positions, ends])
            labels = np.concatenate([labels, np.full(len(ends), self.end_id)])
            order = np.argsort(positions)
            positions, labels = positions[order], labels[order]
        batch = self.finish(tokens, doc_lengths, layout, positions, labels)
        batch.inputs["use_cache"] = False
        return batch
