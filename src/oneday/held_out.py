"""Held-out documents, found again in the training text however that is spaced, and cut at blank lines or in pieces."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from oneday.python_docs import hash_text
from oneday.text_files import PIECE_CHARACTERS, cut_at_blank_lines

# One blank line, or more.
PARAGRAPH_END = re.compile(r"\n\s*\n")
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
        return self.knows(text) or all(map(self.knows, cut_paragraphs(text)))

    def holds_some(self, text: str) -> bool:
        """Whether a paragraph of a document is held out."""
        return any(map(self.knows, cut_paragraphs(text)))

    def knows(self, part: str) -> bool:
        """Whether a document or a paragraph is one of these."""
        return read_start(part) in self.starts and hash_words(part) in self.hashes


def cut_paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a text, long ones in the pieces of a .txt file, each when it is asked for."""
    text, start = text.strip(), 0
    for end in PARAGRAPH_END.finditer(text):
        yield from cut_into_pieces(text[start : end.start()])
        start = end.end()
    yield from cut_into_pieces(text[start:])


def cut_into_pieces(paragraph: str) -> Iterator[str]:
    """A paragraph, cut as one of a .txt file that has no blank line."""
    if len(paragraph) <= PIECE_CHARACTERS:
        yield paragraph
        return
    yield from filter(None, cut_at_blank_lines(paragraph.splitlines(keepends=True)))


def read_start(text: str) -> tuple[str, ...]:
    """Its first words."""
    return tuple(text.split(None, START_WORDS)[:START_WORDS])


def hash_words(text: str) -> int:
    """A hash of its words, whatever white space is between them."""
    return hash_text(" ".join(text.split()))
