"""From documentation as programmers write it (reStructuredText, Markdown, HTML, doctests) to paragraphs of English."""

from __future__ import annotations

import inspect
import re
import string
from collections.abc import Iterator

# (what must be in the text for the pattern to be worth trying, pattern, replacement), in the order of application
MARKUP: tuple[tuple[str, re.Pattern[str], str], ...] = tuple(
    (trigger, re.compile(pattern, re.MULTILINE), replacement)
    for trigger, pattern, replacement in (
        ("<!--", r"<!--(?s:.*?)-->", ""),
        ("```", r"^[ \t]*```+(?s:.*?)(?:^[ \t]*```+[ \t]*$|\Z)", ""),
        ("~~~", r"^[ \t]*~~~+(?s:.*?)(?:^[ \t]*~~~+[ \t]*$|\Z)", ""),
        ("\\", r"\\([*_`|<>])", r"\1"),
        ("](", r"!\[[^\]]*\]\([^)]*\)", ""),  # images and badges
        ("[[", r"\[\[[^\]]*\]\]", ""),
        ("](", r"\[`?([^\]`]+)`?\]\([^)\s]*\)", r"\1"),  # [text](target)
        ("[`", r"\[`~?([^\]`]+)`\]", r"\1"),  # [`Name`]
        (":`", r":(?:[a-z]+:)?[a-z]+:`[~!]?([^`<]+?)(?:\s*<[^`]*>)?`", r"\1"),  # :role:`name`
        (">`", r"`([^`<>]+?)\s*<[^`<>]+>`_{0,2}", r"\1"),  # `text <target>`_
        ("]_", r"(?:\s*\b(?:[Ss]ee|in|from|of|by|to|and|[Rr]ef\.))*[\s,]*\[[\w#*-]{1,20}\]_\b", ""),  # see [1]_
        ("<", r"</?[a-zA-Z][^<>\n]*>", ""),
        ("`", r"`+([^`\n]+?)`+_{0,2}", r"\1"),
        ("`", r"`+", ""),
        ("*", r"(?<![\w*])\*{1,3}(?=[^\s*])([^*\n]+?)\*{1,3}(?![\w*])", r"\1"),
        ("|", r"(?<![\w|])\|([^|\n]{1,30})\|(?![\w|])", r"\1"),
        ("(", r"\s*\(\s*(?:[Ss]ee)?[\s.,;]*\)(?=[\s.,;])", ""),  # what a link in parentheses leaves
    )
)
UNDERLINE = re.compile(r"\s*([=\-~^\"'`#*+.])\1{2,}\s*$")
DIRECTIVE = re.compile(r"\.\.(?:\s+([\w:-]+?)::|\s|$)\s*(.*)")
KEPT_DIRECTIVES = {"note", "warning", "tip", "important", "caution", "hint", "attention", "admonition", "topic"}
DROPPED_SECTIONS = {"references", "see also", "methods", "authors", "literature", "bibliography", "attributes summary"}
BULLET = re.compile(r"(?:[-*+•]|\(?(?:\d{1,2}|[a-z]|#)[.)])\s+(?=\S)")
FIELD = re.compile(r"[:@](\w+)[^:\n]*:\s*")
TYPED_NAME = re.compile(r"\*{0,2}[\w.]+(?:, ?\*{0,2}[\w.]+)* : ")  # numpy's `name : type`
MAX_TYPE_WORDS = 3
NAMED_TEXT = re.compile(r"\*{0,2}\w[\w.]*(?:\s*\(.*?\))?\s*:(?:\s+|$)")  # Google's `name (type): text`
SKIPPED_LINE = re.compile(r"\||\+[-=]|#{1,6} |@|\$ |%|={3,}|-{3,}")


def strip_markup(text: str) -> str:
    """Takes the reStructuredText, Markdown and HTML markup off `text`, and the fenced code with it."""
    for trigger, pattern, replacement in MARKUP:
        if trigger in text:
            text = pattern.sub(replacement, text)
    return text


class ParagraphReader:
    """Reads the lines of one docstring and gathers its paragraphs; code, tables, headings and types are left out."""

    def __init__(self) -> None:
        self.paragraphs: list[str] = []
        self._lines: list[str] = []
        self._indent = 0
        self._hanging = False  # the next deeper line still belongs to the paragraph
        self._skip_indent: int | None = None  # everything deeper than this is code
        self._skipping_block = False  # until the next blank line (doctests)
        self._skipping_section = False  # until the next heading

    def read(self, text: str) -> list[str]:
        """Returns the paragraphs of `text` (already through `inspect.cleandoc`), each on one line."""
        lines = text.split("\n")
        for number, line in enumerate(lines):
            following = lines[number + 1] if number + 1 < len(lines) else ""
            self._read_line(line, following)
        self._flush()
        return self.paragraphs

    def _read_line(self, line: str, following: str) -> None:
        content = line.strip()
        indent = len(line) - len(line.lstrip())
        if not content:
            self._flush()
            self._skipping_block = False
        elif self._is_skipped(content, indent):
            self._flush()
        elif content[0] not in "-=" and UNDERLINE.match(following) and len(content) < 80 and not UNDERLINE.match(line):
            self._flush()
            self._skipping_section = content.lower().rstrip(":") in DROPPED_SECTIONS
        elif not self._skipping_section and not UNDERLINE.match(line):
            self._read_content(content, indent)

    def _is_skipped(self, content: str, indent: int) -> bool:
        if self._skip_indent is not None:
            if indent > self._skip_indent:
                return True
            self._skip_indent = None
        if content.startswith(">>>"):
            self._skipping_block = True
        return self._skipping_block or SKIPPED_LINE.match(content) is not None

    def _read_content(self, content: str, indent: int) -> None:
        directive = DIRECTIVE.match(content)
        if directive:
            self._flush()
            if directive[1] not in KEPT_DIRECTIVES:
                self._skip_indent = indent
            elif directive[2]:
                self._start(directive[2], indent, hanging=True)
            return
        if content.lower() in ("references:", "see also:", "reference:"):
            self._flush()
            self._skip_indent = indent
            return
        start = self._find_start(content)
        if start is not None:
            self._flush()
            self._start(content[start:], indent, hanging=True)
        elif self._lines and (indent == self._indent or self._hanging and indent > self._indent):
            self._indent, self._hanging = indent, False
            self._lines.append(content)
        else:
            self._flush()
            self._start(content, indent, hanging=False)

    @staticmethod
    def _find_start(content: str) -> int | None:
        """Where the text begins in a line that opens a list item, a field or a parameter; None for any other line."""
        field = FIELD.match(content) if content[0] in ":@" else None
        if field:
            return len(content) if field[1] in ("type", "rtype") else field.end()
        if TYPED_NAME.match(content):
            return len(content)
        bullet = BULLET.match(content)
        start = bullet.end() if bullet else 0
        named = NAMED_TEXT.match(content, start)
        if named is None:
            return start or None
        rest = content[named.end() :]
        is_type = len(rest.split()) <= MAX_TYPE_WORDS and not rest.endswith(".")
        return len(content) if is_type else named.end()

    def _start(self, content: str, indent: int, hanging: bool) -> None:
        self._lines, self._indent, self._hanging = [content] if content else [], indent, hanging
        if not content:
            self._hanging = False

    def _flush(self) -> None:
        if not self._lines:
            return
        if self._lines[-1].endswith("::"):
            self._skip_indent = self._indent
            self._lines[-1] = self._lines[-1][:-1]
        self.paragraphs.append(" ".join(" ".join(self._lines).split()))
        self._lines = []


# ---------------------------------------------------------------------------------------------------------------------
# Which paragraphs are prose.

ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|cf|vs|al|[Ff]igs?|[Ee]qs?|[Rr]efs?|resp|approx|[Nn]o|pp?|[Dd]r|[A-Z])\.)$"
)
SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+(?=[\"'(]?[A-Z])")
# Every alternative starts with a literal, which lets the regex engine skip ahead.
CODE = re.compile(
    r"\\|\{|\}|\$|\||=>|->|==|::|__|>>>|%\(|%s|http:|https:|www\.|\((?<=\w\()\w*=|\[(?<=[\w)\]]\[)"
    r"|\.\w+[./]\w+[./]\w+[./]|/\w+[./]\w+[./]\w+[./]"
    r"|Copyright|copyright|LICENSE|Licensed|SPDX|TODO|FIXME|XXX|noqa|pylint"
)
LETTERS = string.ascii_letters.encode()
STOP_WORDS = frozenset(
    """
    a about after all also an and any are as at be been but by can do does each for from has have how if in into is it
    its may more most must no not of on one only or other over same should so some such than that the their then there
    these they this those to two up used using was we what when where which while will with would you your
    """.split()  # noqa: SIM905
)
MIN_CHARACTERS = 40
MIN_WORDS = 8
MIN_STOP_WORDS = 2
MIN_LETTER_FRACTION = 0.82  # of the characters that are not spaces


def split_sentences(paragraph: str) -> list[str]:
    """Splits a paragraph after `.`, `!` or `?` before a capital, but not after an abbreviation such as "e.g."."""
    sentences, start = [], 0
    for match in SENTENCE_END.finditer(paragraph):
        end = match.end()
        if not ABBREVIATION.search(paragraph, start, match.start() + 1):
            sentences.append(paragraph[start:end].rstrip())
            start = end
    return [*sentences, paragraph[start:]] if paragraph[start:] else sentences


def is_prose(text: str) -> bool:
    """Whether `text` reads as English sentences: letters, length and stop words."""
    if len(text) < MIN_CHARACTERS:
        return False
    encoded = text.replace(" ", "").encode()
    num_others = len(encoded.translate(None, LETTERS))
    if num_others > (1 - MIN_LETTER_FRACTION) * len(encoded):
        return False
    words = text.lower().split()
    return len(words) >= MIN_WORDS and sum(word in STOP_WORDS for word in words) >= MIN_STOP_WORDS


def keep_prose(paragraph: str) -> Iterator[str]:
    """Yields the runs of sentences of `paragraph` that are prose; a sentence with code or a link breaks a run."""
    if len(paragraph) < MIN_CHARACTERS:
        return
    if not CODE.search(paragraph):
        if is_prose(paragraph):
            yield paragraph
        return
    run: list[str] = []
    for sentence in [*split_sentences(paragraph), ""]:
        if sentence and not CODE.search(sentence):
            run.append(sentence)
            continue
        joined = " ".join(run)
        run = []
        if is_prose(joined):
            yield joined


def clean_docstring(text: str) -> list[str]:
    """Returns the paragraphs of English prose in one docstring or package description, each on one line."""
    if len(text) < MIN_CHARACTERS:
        return []
    paragraphs = ParagraphReader().read(strip_markup(inspect.cleandoc(text)))
    return [kept for paragraph in paragraphs for kept in keep_prose(paragraph)]
