"""Word vectors from co-occurrence counts: what a corpus says about its words before the first training step.

Counting which tokens stand near each other reads ten million tokens in the time that a small model trains on ten
thousand. The positive pointwise mutual information of those counts, factorised, is a matrix of word vectors as good as
skip-gram's (Levy & Goldberg 2014, "Neural Word Embedding as Implicit Matrix Factorization"); a model whose embeddings
start there begins where one with random embeddings arrives after minutes. The architecture and the checkpoint stay
stock: only the values of the token table differ. The time it takes is spent inside the budget.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from oneday.errors import SettingError
from oneday.packed_dataset import PackedDataset
from oneday.row_sources import RowSource

logger = logging.getLogger(__name__)

EMBEDDING_INITS = ("random", "cooccurrence")
# A pair of tokens d apart counts 1 / d, up to this distance (GloVe's weighting, Pennington et al. 2014).
WINDOW = 2
# Counts read at most this many tokens: more changes the vectors less than it costs.
MAX_TOKENS = 12_000_000
# Cells of the table of counts. A larger vocabulary keeps all its rows and only the most frequent columns.
MAX_CELLS = 2**26
POWER_ITERATIONS = 1
# Standard deviation of the vectors' elements.
EMBEDDING_STD = 0.1


def check_embedding_init(name: str, dataset: PackedDataset | RowSource) -> None:
    """Refuse a name that does not exist, or counting on a stream.

    Raises:
        SettingError: Says what to set instead.
    """
    if name not in EMBEDDING_INITS:
        raise SettingError(f"The setting embedding_init is {name!r}; it must be one of {', '.join(EMBEDDING_INITS)}.")
    if name == "cooccurrence" and not isinstance(dataset, PackedDataset):
        raise SettingError(
            "embedding_init is cooccurrence, which needs a corpus on disk; with streaming set it to random."
        )


def expected_embedding_std(name: str, model: PreTrainedModel) -> float:
    """Standard deviation of the token embeddings' elements at the first step of a new run."""
    return EMBEDDING_STD if name == "cooccurrence" else float(model.get_input_embeddings().weight.detach().std())


class WordVectors(NamedTuple):
    """Vectors of a vocabulary.

    Attributes:
        vectors: (vocab_size, width) float32; their elements have the standard deviation EMBEDDING_STD.
        seen: (vocab_size,) which words have one.
    """

    vectors: Tensor
    seen: Tensor


def count_vectors(
    shape: Sequence[int], device: torch.device, dataset: PackedDataset, special_ids: Sequence[int], seed: int
) -> WordVectors:
    """The word vectors of a corpus.

    Args:
        shape: (vocab_size, width).
        device: Where to factorise, and where they are needed.
        dataset: Packed training rows.
        special_ids: Tokens without meaning of their own ([CLS], [SEP], [MASK], padding).
        seed: Of the random sketch and rotation.
    """
    generator = torch.Generator(device).manual_seed(seed)
    counts = count_cooccurrences(dataset, shape[0], special_ids)
    information = positive_pmi(counts.to(device))
    seen = information.any(1)
    vectors = factorize(information, shape[1], generator)
    # What all vectors share says nothing of a word and drowns the rest when a classifier reads the model (Mu &
    # Viswanath 2018, arXiv 1702.01417).
    vectors -= vectors[seen].mean(0)
    return WordVectors(vectors * (EMBEDDING_STD / vectors[seen].std()), seen)


@torch.no_grad()
def set_embeddings(table: Tensor, words: WordVectors) -> None:
    """Give a model's token embeddings their vectors; special tokens and words never seen keep random ones.

    Args:
        table: (vocab_size, width) random embeddings, changed in place; a tied output projection changes with them.
        words: Of the same vocabulary.
    """
    table.mul_(EMBEDDING_STD / table.std())
    table[words.seen] = words.vectors[words.seen]


def count_cooccurrences(dataset: PackedDataset, vocab_size: int, special_ids: Sequence[int]) -> Tensor:
    """Count tokens near each other in the same document, a pair d apart as 1 / d.

    Returns:
        (vocab_size, num_columns) float32, zero for special tokens. The columns are all tokens of a small vocabulary,
        else the most frequent ones.
    """
    num_rows = min(len(dataset), max(1, MAX_TOKENS // dataset.row_length))
    rows, doc_lengths = dataset.get_rows(np.linspace(0, len(dataset) - 1, num_rows).astype(np.int64))
    tokens, documents = flatten_documents(rows, doc_lengths)
    ordinary = ~np.isin(tokens, np.asarray(special_ids))
    tokens, documents = tokens[ordinary], documents[ordinary]
    frequency = np.bincount(tokens, minlength=vocab_size)
    num_columns = min(vocab_size, MAX_CELLS // vocab_size)
    columns = np.sort(np.argsort(-frequency, kind="stable")[:num_columns])
    column_of = np.full(vocab_size, -1, dtype=np.int64)
    column_of[columns] = np.arange(num_columns)
    # One pass of additions in place: counting into a new table for each distance took ten times as long.
    counts = torch.zeros(vocab_size * num_columns)
    for distance in range(1, WINDOW + 1):
        same = documents[distance:] == documents[:-distance]
        left, right = tokens[:-distance][same], tokens[distance:][same]
        pairs = [(left, column_of[right])]
        if num_columns < vocab_size:  # else the other order is the transpose
            pairs.append((right, column_of[left]))
        for word, context in pairs:
            keys = torch.from_numpy((word * num_columns + context)[context >= 0])
            counts.index_add_(0, keys, torch.full((), 1 / distance).expand(len(keys)))
    counts = counts.view(vocab_size, num_columns)
    return counts if num_columns < vocab_size else counts + counts.T


def flatten_documents(rows: np.ndarray, doc_lengths: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, documents), both (num_tokens,) int64: the rows without their padding, and which document each is of."""
    used = np.array([int(lengths.sum()) for lengths in doc_lengths])
    tokens = rows[np.arange(rows.shape[1]) < used[:, None]].astype(np.int64)
    lengths = np.concatenate(doc_lengths).astype(np.int64)
    return tokens, np.repeat(np.arange(len(lengths)), lengths)


def positive_pmi(counts: Tensor, smoothing: float = 0.75) -> Tensor:
    """max(0, log(P(w, c) / (P(w) P(c)))) with P(c) from counts to the power of `smoothing`; zero where unseen.

    Args:
        counts: (vocabulary, num_columns) float32, overwritten.
        smoothing: Levy, Goldberg & Dagan 2015 (TACL 3, section 3.1): rare contexts weigh less.
    """
    words, contexts = counts.sum(1), counts.sum(0) ** smoothing
    scale = contexts.sum() / (words.clamp(min=1e-9)[:, None] * contexts.clamp(min=1e-9))
    return counts.mul_(scale).clamp_(min=1.0).log_()


def factorize(matrix: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """(vocabulary, width) vectors U sqrt(S) of the leading singular triples, in randomly rotated coordinates.

    A randomised range finder with power iterations (Halko, Martinsson & Tropp 2011, algorithm 5.1).
    """
    rank = min(width, *matrix.shape)
    sketch = torch.randn(matrix.shape[1], rank, device=matrix.device, generator=generator)
    basis = torch.linalg.qr(matrix @ sketch).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, singular, _ = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    vectors = (basis @ left) * singular.sqrt()
    rotation = torch.linalg.qr(torch.randn(width, width, device=matrix.device, generator=generator)).Q
    return vectors @ rotation[:rank]
