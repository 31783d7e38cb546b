"""Rows of a stream, which is read, tokenised and packed ahead in a thread while training goes on.

A block is the next documents of the stream, packed and shuffled together. Block b is tokenised by process b modulo
their number and told to the others, so that the rows are the same whatever the number of processes and the timing.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from oneday.errors import SettingError
from oneday.packed_dataset import pack_documents
from oneday.packing import PackedRows
from oneday.ranks import Ranks
from oneday.text_streams import PassKey, StreamInterrupted, TextStream, read_patiently
from oneday.tokenization import encode_documents

# Documents of a stream that are packed and shuffled together.
STREAM_BLOCK_DOCUMENTS = 2_000
# Blocks that each process holds ready beyond those in use.
BLOCKS_AHEAD = 2
# The thread looks this often, in documents tokenised, whether it is to end.
DOCUMENTS_AT_ONCE = 50
# And the training this often, where it has to wait for the thread.
LOOK_SECONDS = 0.5


@dataclass
class ReadBlock:
    """The next documents of a stream.

    Attributes:
        before: Where the stream stood before them.
        after: And after them.
        rows: The documents packed; None when another process packs them.
    """

    before: dict[str, Any]
    after: dict[str, Any]
    rows: PackedRows | None


@dataclass
class Block:
    """Packed rows of some documents of a stream, and where the stream stood before them."""

    number: int
    first_sample: int
    stream_state: dict[str, Any]
    rows: PackedRows
    order: np.ndarray

    @property
    def end(self) -> int:
        """The first sample after it."""
        return self.first_sample + len(self.order)


class StreamedRows:
    """A stream of documents, tokenised, packed and shuffled block by block; ends never: pass follows pass.

    Args:
        stream: The documents.
        tokenizer: A fast tokenizer.
        kind: `encoder` or `decoder`.
        row_length: Tokens of a row.
        strategy: `best_fit` or `padded`.
        seed: Seed of the order of the stream's files and of the shuffle of each block's rows.
    """

    num_rows = None

    def __init__(
        self,
        stream: TextStream,
        tokenizer: PreTrainedTokenizerBase,
        kind: str,
        row_length: int,
        strategy: str,
        seed: int,
    ) -> None:
        # The thread has a tokenizer of its own: using one changes its settings for that time.
        self.stream, self.tokenizer, self.kind, self.row_length = stream, copy.deepcopy(tokenizer), kind, row_length
        self.strategy, self.seed = strategy, seed
        self.ranks = Ranks()
        self.must_end: Callable[[], bool] = lambda: False
        self.blocks: deque[Block] = deque()
        self._reader: BlockReader | None = None
        self._next: dict[str, Any] = {"block": 0, "first_sample": 0, "stream": {"pass": 0, "reader": None}}

    def share_among(self, ranks: Ranks, must_end: Callable[[], bool]) -> None:
        """Tokenise only this process's share from now on; every process must take the same samples.

        Args:
            ranks: The processes.
            must_end: Asked while a block is waited for, whether to give it up.
        """
        self.close()
        self.ranks, self.must_end = ranks, must_end

    def take(self, samples: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """See RowSource.

        Raises:
            SettingError: The stream cannot be read, has no text, or stands still when the run must end; on every
                process, whichever found it.
        """
        while self.blocks and self.blocks[0].end <= samples[0]:
            self.blocks.popleft()
        while not self.blocks or samples[-1] >= self.blocks[-1].end:
            self.blocks.append(self.next_block())
        tokens = np.empty((len(samples), self.row_length), dtype=np.int64)
        lengths: list[np.ndarray] = [np.empty(0)] * len(samples)
        for place, sample in enumerate(samples.tolist()):
            block = next(block for block in self.blocks if sample < block.end)
            row = int(block.order[sample - block.first_sample])
            tokens[place] = block.rows.input_ids[row]
            lengths[place] = block.rows.doc_lengths[block.rows.offsets[row] : block.rows.offsets[row + 1]]
        return tokens, lengths

    def next_block(self) -> Block:
        """The block after the last one, from the thread or the process that has it."""
        number, first_sample = self._next["block"], self._next["first_sample"]
        if self._reader is None:
            self._reader = BlockReader(self, number, self._next["stream"])
        read, error = self._reader.next_block()
        found = self.ranks.all_gather((error, read and read.after))
        errors = [other for other, _ in found if other is not None]
        if not errors and any(after != read.after for _, after in found):
            errors = [StreamInterrupted("The processes have not read the same text; run the same command again.")]
        if errors:
            self.close(waits=not isinstance(errors[0], StreamInterrupted))
            raise errors[0]
        rows = self.ranks.broadcast(number % self.ranks.size, read.rows)
        order = np.random.Generator(np.random.Philox(key=[self.seed, number])).permutation(len(rows.input_ids))
        self._next = {"block": number + 1, "first_sample": first_sample + len(order), "stream": read.after}
        return Block(number, first_sample, read.before, rows, order)

    def pack(self, texts: list[str], is_closed: threading.Event) -> PackedRows | None:
        """Tokenise and pack documents; None when the thread is to end."""
        tokens, lengths = [], []
        for first in range(0, len(texts), DOCUMENTS_AT_ONCE):
            if is_closed.is_set():
                return None
            encoded = encode_documents(self.tokenizer, texts[first : first + DOCUMENTS_AT_ONCE])
            tokens.append(encoded[0])
            lengths.append(encoded[1])
        packing = (self.tokenizer, self.kind, self.row_length, self.strategy)
        return pack_documents(np.concatenate(tokens), np.concatenate(lengths), *packing)

    @property
    def packing_efficiency(self) -> float | None:
        """Share of the packed tokens that are not padding, of the blocks at hand; None: there are none."""
        read = sum(len(block.order) for block in self.blocks)
        held = sum(int(block.rows.doc_lengths.sum()) for block in self.blocks)
        return held / (read * self.row_length) if read else None

    def state_dict(self, sample: int) -> dict[str, Any]:
        """Where the stream stood before the block that holds `sample`; what was read ahead does not count."""
        for block in self.blocks:
            if sample < block.end:
                return {"block": block.number, "first_sample": block.first_sample, "stream": block.stream_state}
        return dict(self._next)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Read on from a block's beginning."""
        self.close()
        self.blocks.clear()
        self._next = dict(state)

    def close(self, waits: bool = True) -> None:
        """End the thread; `take` starts another where the last block ended.

        Args:
            waits: Until it has ended, which a read that stands still delays by its time-out.
        """
        if self._reader is not None:
            self._reader.close(waits)
            self._reader = None


class BlockReader:
    """Reads a stream on in a thread, some blocks ahead, and packs this process's share of them.

    Args:
        rows: Whose stream, tokenizer and processes.
        number: The first block to read.
        state: Where the stream stands before it.
    """

    def __init__(self, rows: StreamedRows, number: int, state: dict[str, Any]) -> None:
        self.rows, self.number, self.pass_number = rows, number, state["pass"]
        self.reader = self.open_pass(state["reader"])
        self.is_closed = threading.Event()
        self.executor = ThreadPoolExecutor(1, "read-ahead")
        self.ahead: deque[Future[ReadBlock]] = deque()

    def next_block(self) -> tuple[ReadBlock | None, SettingError | None]:
        """(the next block, None), or (None, why there is none); the thread reads on meanwhile."""
        # One more than is held ready: the one that is asked for.
        while len(self.ahead) <= BLOCKS_AHEAD * self.rows.ranks.size:
            self.ahead.append(self.executor.submit(self.read_block, self.number))
            self.number += 1
        future = self.ahead.popleft()
        while not wait([future], LOOK_SECONDS).done:
            if self.rows.must_end():
                return None, StreamInterrupted("The stream of dataset_name stood still when the run was to end.")
        try:
            return future.result(), None
        except SettingError as error:
            return None, type(error)(str(error))  # without its causes, which may not travel

    def read_block(self, number: int) -> ReadBlock:
        """Read a block, and pack it when it is this process's."""
        before, texts = self.state_dict(), self.read_texts()
        for _ in range(self.rows.stream.num_parts):
            if texts or self.is_closed.is_set():
                break
            self.pass_number += 1
            self.reader = self.open_pass(self.reader.next_state())
            before, texts = self.state_dict(), self.read_texts()
        if not texts and not self.is_closed.is_set():
            raise SettingError("The stream of dataset_name gives no document with text; choose another data set.")
        is_own = number % self.rows.ranks.size == self.rows.ranks.rank and bool(texts)
        return ReadBlock(before, self.state_dict(), self.rows.pack(texts, self.is_closed) if is_own else None)

    def read_texts(self) -> list[str]:
        """Up to a block of documents; fewer at the end of a pass."""
        texts: list[str] = []
        while len(texts) < STREAM_BLOCK_DOCUMENTS:
            text = read_patiently(self.reader, self.is_closed)
            if text is None:
                break
            texts.append(text)
        return texts

    def open_pass(self, state: dict[str, Any] | None) -> Any:
        """A reader of the present pass."""
        return self.rows.stream.open_pass(PassKey(self.rows.seed, self.pass_number), state)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands."""
        return {"pass": self.pass_number, "reader": self.reader.state_dict()}

    def close(self, waits: bool) -> None:
        """Give up what was read ahead and end the thread, which may be in the middle of a read."""
        self.is_closed.set()
        self.executor.shutdown(wait=waits, cancel_futures=True)
