"""Text that is read on the way: several files at once, in an order shuffled for each pass, exactly resumable.

A position is a few numbers: which files are open, how many rows of each were read, whose turn it is. So going on needs
no buffer of documents, and in a parquet file the row groups before the position are not read again. A file of another
format is read up to it.

    stream (what there is)    FileStream, MixedStream of several, FirstTexts of one
    reader (where one is)     of one pass, given by a stream's `open_pass`
"""

from __future__ import annotations

import gzip
import logging
import lzma
import threading
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from oneday.errors import SettingError
from oneday.held_out import HeldOut
from oneday.stream_files import TextFile

logger = logging.getLogger(__name__)

# Waits, in seconds, before a read that failed is tried again: five minutes together.
RETRY_SECONDS = (1, 2, 4, 8, 15, 30, 60, 60, 60, 60)
# After so many of them a file is taken to be damaged: 15 seconds together.
DAMAGED_RETRIES = 4
# A mixture's choices are drawn this many at a time.
CHOICES_AT_ONCE = 1024
END = object()


class StreamInterrupted(SettingError):
    """The network did not come back; a run that had begun may go on later."""


class PassKey(NamedTuple):
    """What the order of a pass follows from."""

    seed: int
    number: int


class TextReader(Protocol):
    """A position in one pass of a stream."""

    def read(self) -> str | None:
        """The next text; None at the end of the pass. After an error the same text may be asked for again."""

    def state_dict(self) -> dict[str, Any]:
        """The position, for `open_pass`."""

    def next_state(self) -> dict[str, Any] | None:
        """Once the pass is through: where the next one begins; None: at the stream's beginning."""


def read_patiently(reader: TextReader, is_closed: threading.Event | None = None) -> str | None:
    """The next text; a network that fails is tried again for some minutes.

    Args:
        reader: Where to read.
        is_closed: Once it is set nothing is read or waited for, and there is no text.

    Raises:
        SettingError: The network did not come back, or the file is gone.
    """
    is_closed = is_closed or threading.Event()
    failures, place = 0, None
    while not is_closed.is_set():
        try:
            return reader.read()
        except SettingError:
            raise
        except Exception as error:  # the libraries raise a dozen kinds here
            failed_at, reason = reader.state_dict(), describe_read_error(error)
            failures, place = (failures if failed_at == place else 0), failed_at  # a damaged file may follow another
            if isinstance(error, FileNotFoundError) and failures >= DAMAGED_RETRIES:
                raise SettingError(
                    f"The stream of dataset_name cannot be read on: a file is not there any more ({reason})."
                ) from error
            if failures >= len(RETRY_SECONDS):
                raise StreamInterrupted(
                    f"The stream of dataset_name cannot be read on ({reason}); check the network, and run the same "
                    "command again."
                ) from error
            seconds = RETRY_SECONDS[failures]
            failures += 1
            logger.warning("Reading the stream failed and is tried again in %g s (%s).", seconds, reason)
            is_closed.wait(seconds)
    return None


def is_damage(error: Exception) -> bool:
    """Whether a read failed as of a damaged file, or of one whose bytes did not all arrive."""
    if isinstance(error, SettingError):
        return False
    damages = (ValueError, KeyError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
    # Arrow's of a compressed page is a plain OSError without a number.
    return isinstance(error, damages) or (type(error) is OSError and error.errno is None)


def describe_read_error(error: Exception) -> str:
    """What a read failed with, in brackets in a sentence."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class TextStream:
    """Texts to read pass after pass; iterating gives one pass as rows with the column `text`.

    Attributes:
        num_parts: Streams that it is drawn from; so many passes may be empty one after the other, and no more.
    """

    num_parts = 1

    def open_pass(self, key: PassKey, state: dict[str, Any] | None = None) -> TextReader:
        """A reader of a pass, from a position or its beginning; nothing is read yet."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[dict[str, str]]:
        reader = self.open_pass(PassKey(0, 0))
        while (text := read_patiently(reader)) is not None:
            yield {"text": text}


class OpenFile:
    """A file and how many of its rows were read."""

    def __init__(self, file: TextFile, number: int, row: int = 0) -> None:
        self.file, self.number, self.row = file, number, row
        self.failures = 0
        self._rows: Iterator[str | None] | None = None

    def read(self) -> Any:
        """The next row's text or None; END after the last, and where the rest turns out to be damaged.

        After an error the file is opened again at that row.
        """
        try:
            if self._rows is None:
                self._rows = self.file.read(self.row)
            text = next(self._rows, END)
        except Exception as error:
            self._rows = None
            self.failures += 1
            if not is_damage(error) or self.failures <= DAMAGED_RETRIES:
                raise
            name = getattr(self.file, "url", f"File {self.number} of a data set")
            logger.warning(
                "%s is damaged and left out from row %d on (%s).", name, self.row, describe_read_error(error)
            )
            return END
        self.failures = 0
        self.row += text is not END
        return text


class FileStream(TextStream):
    """Files of which several are open at once, each giving a document in turn; blank documents are left out.

    Args:
        files: In the publisher's order; a pass takes them in an order that follows from its key.
        files_at_once: How many are open; fewer where there are fewer.
        held_out: Documents that are left out.
    """

    def __init__(self, files: Sequence[TextFile], files_at_once: int, held_out: HeldOut | None = None) -> None:
        self.files, self.files_at_once, self.held_out = files, files_at_once, held_out

    def without(self, held_out: HeldOut) -> FileStream:
        """The same stream without some documents."""
        return FileStream(self.files, self.files_at_once, held_out)

    def open_pass(self, key: PassKey, state: dict[str, Any] | None = None) -> FileReader:
        """See TextStream."""
        return FileReader(self, np.random.default_rng(key).permutation(len(self.files)).tolist(), state)

    def take_spread(self, count: int) -> Iterator[str]:
        """The first documents of files that lie evenly over the publisher's order, `count` together if there are."""
        number = min(self.files_at_once, len(self.files))
        spread = [place * len(self.files) // number for place in range(number)]
        reader = FileReader(self, spread + sorted(set(range(len(self.files))) - set(spread)))
        for _ in range(count):
            if (text := read_patiently(reader)) is None:
                return
            yield text


class FileReader:
    """See TextReader; `order` says which file comes when."""

    def __init__(self, stream: FileStream, order: list[int], state: dict[str, Any] | None = None) -> None:
        self.stream, self.order = stream, order
        state = state or {"opened": 0, "turn": 0, "rows": []}
        self.opened, self.turn = state["opened"], state["turn"]
        self.open_files = [OpenFile(stream.files[number], number, row) for number, row in state["rows"]]

    def read(self) -> str | None:
        """See TextReader."""
        while len(self.open_files) < self.stream.files_at_once and self.opened < len(self.order):
            self.open_files.append(self.open_next())
        while self.open_files:
            text = self.open_files[self.turn].read()
            if text is END:
                self.replace()
                continue
            self.turn = (self.turn + 1) % len(self.open_files)
            if is_text(text) and not (self.stream.held_out and text in self.stream.held_out):
                return text
        return None

    def open_next(self) -> OpenFile:
        """The next file of the order."""
        number = self.order[self.opened]
        self.opened += 1
        return OpenFile(self.stream.files[number], number)

    def replace(self) -> None:
        """Another file for the one that is through, while there are any."""
        if self.opened < len(self.order):
            self.open_files[self.turn] = self.open_next()
        else:
            del self.open_files[self.turn]
            self.turn %= max(1, len(self.open_files))

    def state_dict(self) -> dict[str, Any]:
        """See TextReader."""
        rows = [[file.number, file.row] for file in self.open_files]
        return {"opened": self.opened, "turn": self.turn, "rows": rows}

    def next_state(self) -> None:
        """See TextReader."""


def is_text(text: object) -> bool:
    """Whether a row has text in it.

    Raises:
        SettingError: It holds something else.
    """
    if text is not None and not isinstance(text, str):
        raise SettingError(f"text_column holds {type(text).__name__}, not text: name another column.")
    return bool(text and text.strip())


# ---- Several streams, part of one ----


class MixedStream(TextStream):
    """Streams drawn from by chance; a pass ends once each of them has been through.

    One that is through before the others goes on with its own next pass.

    Args:
        parts: The streams.
        shares: Of the documents; they sum to 1.
    """

    def __init__(self, parts: Sequence[TextStream], shares: Sequence[float]) -> None:
        self.parts, self.shares, self.num_parts = parts, shares, len(parts)

    def open_pass(self, key: PassKey, state: dict[str, Any] | None = None) -> MixedReader:
        """See TextStream."""
        start = {"drawn": 0, "parts": [{"pass": 0, "reader": None}] * len(self.parts), "through": []}
        return MixedReader(self, key, state or start)


class MixedReader:
    """See TextReader."""

    def __init__(self, stream: MixedStream, key: PassKey, state: dict[str, Any]) -> None:
        self.stream, self.key, self.drawn = stream, key, state["drawn"]
        self.through = set(state.get("through", ()))
        self.passes = [at["pass"] for at in state["parts"]]
        self.readers = [
            part.open_pass(PassKey(key.seed, at["pass"]), at["reader"])
            for part, at in zip(stream.parts, state["parts"])
        ]
        # Whether a part has given a text since its pass began here; of one that went on it is not known.
        self._is_empty = [at["reader"] is None for at in state["parts"]]
        self._choices: tuple[int, np.ndarray] | None = None

    def read(self) -> str | None:
        """See TextReader."""
        while len(self.through) < len(self.readers):
            part = self.choose()
            text = self.readers[part].read()
            self.drawn += 1
            if text is not None:
                self._is_empty[part] = False
                return text
            self.through.add(part)
            if not self._is_empty[part]:  # else it has nothing, in whatever order
                self.begin_again(part)
        return None

    def choose(self) -> int:
        """The part whose turn it is."""
        number, place = divmod(self.drawn, CHOICES_AT_ONCE)
        if self._choices is None or self._choices[0] != number:
            generator = np.random.default_rng([*self.key, number])
            self._choices = number, generator.choice(len(self.readers), CHOICES_AT_ONCE, p=self.stream.shares)
        return int(self._choices[1][place])

    def begin_again(self, part: int) -> None:
        """The next pass of a part that is through."""
        self.passes[part] += 1
        key, state = PassKey(self.key.seed, self.passes[part]), self.readers[part].next_state()
        self.readers[part] = self.stream.parts[part].open_pass(key, state)
        self._is_empty[part] = True

    def state_dict(self) -> dict[str, Any]:
        """See TextReader."""
        parts = [{"pass": number, "reader": at.state_dict()} for number, at in zip(self.passes, self.readers)]
        return {"drawn": self.drawn, "parts": parts, "through": sorted(self.through)}

    def next_state(self) -> dict[str, Any]:
        """See TextReader."""
        return {"drawn": 0, "parts": self.state_dict()["parts"], "through": []}


class FirstTexts(TextStream):
    """The first documents of a stream, the same in every pass and whatever the seed."""

    def __init__(self, stream: TextStream, count: int) -> None:
        self.stream, self.count, self.num_parts = stream, count, stream.num_parts

    def open_pass(self, key: PassKey, state: dict[str, Any] | None = None) -> FirstReader:
        """See TextStream."""
        return FirstReader(self, state or {"given": 0, "stream": None})


class FirstReader:
    """See TextReader."""

    def __init__(self, stream: FirstTexts, state: dict[str, Any]) -> None:
        self.count, self.given = stream.count, state["given"]
        self.reader = stream.stream.open_pass(PassKey(0, 0), state["stream"])

    def read(self) -> str | None:
        """See TextReader."""
        text = self.reader.read() if self.given < self.count else None
        self.given += text is not None
        return text

    def state_dict(self) -> dict[str, Any]:
        """See TextReader."""
        return {"given": self.given, "stream": self.reader.state_dict()}

    def next_state(self) -> None:
        """See TextReader."""
