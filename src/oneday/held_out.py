"""Held-out documents, found again in the training text however that is spaced, and cut at blank lines or in pieces."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

from oneday.python_docs import hash_text
from oneday.text_files import cut_at_blank_lines

# Words that a text must begin with before it is read through.
START_WORDS = 8


class HeldOut:
    """What is not to be trained on: `text in held_out`.

    Args:
        texts: The documents.
        by_paragraph: Know their paragraphs too, where the training text may be cut otherwise than these were.
    """

    def __init__(self, texts: Iterable[str], by_paragraph: bool) -> None:
        self.starts: set[tuple[str, ...]] = set()
        self.hashes: set[int] = set()
        for text in texts:
            for part in (text, *(cut_paragraphs(text) if by_paragraph else ())):
                self.starts.add(read_start(part))
                self.hashes.add(hash_words(part))

    def __contains__(self, text: str) -> bool:
        """Whether all of a document is held out: as one, or paragraph by paragraph."""
        return self.knows(text) or (bool(text.strip()) and all(map(self.knows, cut_paragraphs(text))))

    def holds_some(self, text: str) -> bool:
        """Whether a paragraph of a document is held out."""
        return any(map(self.knows, cut_paragraphs(text)))

    def knows(self, part: str) -> bool:
        """Whether a document or a paragraph is one of these."""
        return read_start(part) in self.starts and hash_words(part) in self.hashes


def cut_paragraphs(text: str) -> Iterator[str]:
    """The documents that a .txt file of this text would be cut into, each when it is asked for."""
    return filter(None, cut_at_blank_lines(io.StringIO(text)))


def read_start(text: str) -> tuple[str, ...]:
    """Its first words."""
    return tuple(text.split(None, START_WORDS)[:START_WORDS])


def hash_words(text: str) -> int:
    """A hash of its words, whatever white space is between them."""
    return hash_text(" ".join(text.split()))
