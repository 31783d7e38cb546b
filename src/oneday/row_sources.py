"""Where the loader's rows come from: a shuffled pass over packed rows on disk, or a stream packed on the way.

Both answer for sample indices: sample s of a run is always the same row, so that a position in the data is one number.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from oneday.arguments import SettingError
from oneday.packed_dataset import PackedDataset, pack_documents
from oneday.packing import PackedRows
from oneday.tokenization import encode_documents

# Documents of a stream that are packed and shuffled together.
STREAM_BLOCK_DOCUMENTS = 2_000


class RowSource(Protocol):
    """Gives rows for sample indices that never decrease between calls."""

    row_length: int
    num_rows: int | None

    def take(self, samples: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Rows (n, row_length) and the document lengths of each."""

    def state_dict(self, sample: int) -> dict[str, Any]:
        """What `load_state_dict` needs to give the rows from `sample` on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""


class ShuffledRows:
    """Every pass over the packed rows is a new permutation of them, by (seed, pass).

    Args:
        dataset: Packed rows.
        seed: Seed of the shuffle.
    """

    def __init__(self, dataset: PackedDataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.row_length, self.num_rows = dataset.row_length, len(dataset)
        self._order: tuple[int, np.ndarray] | None = None

    def take(self, samples: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """See RowSource; any order of samples will do here."""
        passes, places = np.divmod(samples, self.num_rows)
        rows = np.empty_like(samples)
        for number in np.unique(passes):
            rows[passes == number] = self.order(int(number))[places[passes == number]]
        return self.dataset.get_rows(rows)

    def order(self, number: int) -> np.ndarray:
        """The permutation of one pass."""
        if self._order is None or self._order[0] != number:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, number]))
            self._order = number, generator.permutation(self.num_rows)
        return self._order[1]

    def state_dict(self, sample: int) -> dict[str, Any]:
        """Nothing: a row follows from its sample index."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


@dataclass
class Block:
    """Packed rows of some documents of a stream, and where the stream stood before them."""

    number: int
    first_sample: int
    stream_state: dict[str, Any]
    rows: PackedRows
    order: np.ndarray


class StreamedRows:
    """A stream of documents, tokenised, packed and shuffled block by block; ends never: it starts over.

    The stream itself is read in order, because a shuffled one cannot resume exactly (its buffer is lost). The shuffle
    is of the rows of a block, by (seed, block number); resuming makes a block again from where the stream stood.

    Args:
        stream: Documents in column `text`.
        tokenizer: A fast tokenizer.
        kind: `encoder` or `decoder`.
        row_length: Tokens of a row.
        strategy: `best_fit` or `padded`.
        seed: Seed of the shuffle.
        start_state: The stream's state at its beginning, taken before anything read from it; None: as it is now.
    """

    num_rows = None

    def __init__(
        self,
        stream: datasets.IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        kind: str,
        row_length: int,
        strategy: str,
        seed: int,
        start_state: dict[str, Any] | None = None,
    ) -> None:
        self.stream, self.tokenizer, self.kind, self.row_length = stream, tokenizer, kind, row_length
        self.strategy, self.seed = strategy, seed
        self.start_state = copy.deepcopy(start_state if start_state is not None else stream.state_dict())
        stream.load_state_dict(copy.deepcopy(self.start_state))
        self.blocks: deque[Block] = deque()
        self._next = (0, 0)
        self._documents: Iterator[dict[str, str]] | None = None

    def take(self, samples: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """See RowSource."""
        while self.blocks and self.end(self.blocks[0]) <= samples[0]:
            self.blocks.popleft()
        while not self.blocks or samples[-1] >= self.end(self.blocks[-1]):
            self.blocks.append(self.read_block())
        tokens = np.empty((len(samples), self.row_length), dtype=np.int64)
        lengths: list[np.ndarray] = [np.empty(0)] * len(samples)
        for place, sample in enumerate(samples.tolist()):
            block = next(block for block in self.blocks if sample < self.end(block))
            row = int(block.order[sample - block.first_sample])
            tokens[place] = block.rows.input_ids[row]
            lengths[place] = block.rows.doc_lengths[block.rows.offsets[row] : block.rows.offsets[row + 1]]
        return tokens, lengths

    def end(self, block: Block) -> int:
        """The first sample after a block."""
        return block.first_sample + len(block.order)

    def read_block(self) -> Block:
        """Pack the next documents of the stream."""
        number, first_sample = self._next
        state = copy.deepcopy(self.stream.state_dict())
        texts = self.read_texts()
        if not texts:  # the stream is through: start over
            self.stream.load_state_dict(copy.deepcopy(self.start_state))
            self._documents = None
            state, texts = copy.deepcopy(self.start_state), self.read_texts()
        if not texts:
            raise SettingError("The stream of dataset_name gives no document with text; choose another data set.")
        tokens, lengths = encode_documents(self.tokenizer, texts)
        rows = pack_documents(tokens, lengths, self.tokenizer, self.kind, self.row_length, self.strategy)
        order = np.random.Generator(np.random.Philox(key=[self.seed, number])).permutation(len(rows.input_ids))
        self._next = number + 1, first_sample + len(order)
        return Block(number, first_sample, state, rows, order)

    @property
    def packing_efficiency(self) -> float:
        """Share of the packed tokens that are not padding, of the blocks at hand."""
        read = sum(len(block.order) for block in self.blocks)
        held = sum(int(block.rows.doc_lengths.sum()) for block in self.blocks)
        return held / (read * self.row_length) if read else 0.0

    def read_texts(self) -> list[str]:
        """Up to a block of documents."""
        if self._documents is None:
            self._documents = iter(self.stream)
        texts = []
        for document in self._documents:
            texts.append(document["text"])
            if len(texts) == STREAM_BLOCK_DOCUMENTS:
                break
        return texts

    def state_dict(self, sample: int) -> dict[str, Any]:
        """Where the stream stood before the block that holds `sample`."""
        for block in self.blocks:
            if sample < self.end(block):
                return {"block": block.number, "first_sample": block.first_sample, "stream": block.stream_state}
        return {"block": self._next[0], "first_sample": self._next[1], "stream": self.stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Read on from a block's beginning."""
        self.blocks.clear()
        self._documents = None
        self._next = state["block"], state["first_sample"]
        self.stream.load_state_dict(copy.deepcopy(state["stream"]))
