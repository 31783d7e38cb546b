"""Local files of text: .txt, .jsonl, .csv and .parquet, the first three also as .gz, .xz or .zst.

Read here and not by the loaders of `datasets`, which replace bytes that are not UTF-8 without a word and name neither
the file nor the line of an error; parquet is theirs.
"""

from __future__ import annotations

import csv
import difflib
import glob
import gzip
import io
import itertools
import json
import logging
import lzma
import os
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from oneday.errors import SettingError
from oneday.run_directory import is_disk_full
from oneday.tokenization import replace_surrogates

logger = logging.getLogger(__name__)

FORMATS = (".txt", ".jsonl", ".csv", ".parquet")
COMPRESSIONS = ("", ".gz", ".xz", ".zst")
SUFFIXES = (*(form + packed for form in FORMATS[:3] for packed in COMPRESSIONS), ".parquet")
READ_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error, pa.ArrowException)
# Several small .txt files are a document each; a larger file, or one alone, is cut at blank lines.
WHOLE_FILE_BYTES = 1_000_000
# A part without one is cut at the first line end past so many (a line of more at a space), some 4,000 tokens: few rows
# are longer, and of a book or a list of sentences enough pieces come to hold some out.
PIECE_CHARACTERS = 16_000
# Of parquet files.
TEXT_KINDS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
ROWS_AT_ONCE = 1000
# Part of the cache key: raise it when the same files would give other documents.
SCHEMA_VERSION = 3


class NoText(SettingError):
    """Every one of some files is blank."""


def is_local(name: str) -> bool:
    """Whether `name` means files here: it exists, is a glob or an obvious path, or ends in a known suffix."""
    if name.startswith(("/", "./", "../", "~")) or any(mark in name for mark in "*?["):
        return True
    return name.endswith(SUFFIXES) or os.path.exists(name)


def list_files(name: str) -> list[str]:
    """Returns the files that a path, a directory (searched with its folders) or a glob means, sorted.

    Of a directory hidden files, hidden folders and files of other kinds are left out.

    Raises:
        SettingError: there are none, or one of them has a suffix that is not read.
    """
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        seen = [file for file in sorted(Path(path).rglob("*")) if file.is_file() and not is_hidden(file, path)]
        found = sorted(str(file) for file in seen if file.name.endswith(SUFFIXES))
        if not found:
            raise SettingError(f"dataset_name {name!r} is a directory with no {', '.join(FORMATS)} file in it.")
        others = [file for file in seen if not file.name.endswith(SUFFIXES)]
        if others:
            logger.warning("%d files of other kinds in %s are not read, such as %s.", len(others), name, others[0])
        return found
    files = [path] if os.path.exists(path) else sorted(file for file in glob.glob(path, recursive=True))
    files = [file for file in files if os.path.isfile(file)]
    if not files:
        raise SettingError(f"dataset_name {name!r} matches no file: check the path (from {os.getcwd()!r}).")
    unknown = [file for file in files if not file.endswith(SUFFIXES)]
    if unknown:
        known = ", ".join(FORMATS)
        raise SettingError(f"dataset_name has {unknown[0]!r}, which is none of {known}: rename or leave it out.")
    return files


def is_hidden(file: Path, folder: str) -> bool:
    """Whether a file, or a folder that it is in below `folder`, is called by a dot."""
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def load_files(name: str, column: str, cache_dir: Path, without: Collection[str] = ()) -> datasets.Dataset:
    """Loads the files that `name` means as documents, in the order of the files.

    Args:
        name: path, directory or glob.
        column: column (parquet, csv) or key (jsonl) that holds the text.
        cache_dir: where the Arrow copy is kept, under a key of the files' paths, sizes and times.
        without: real paths of files that are left out.

    Returns:
        A data set with the one column `text`; blank documents may still be in it if they come from parquet.

    Raises:
        SettingError: no such file or column, a file that is corrupt or not UTF-8, a text that is not a string.
    """
    found = list_files(name)
    files = [file for file in found if os.path.realpath(file) not in without]
    if not files:
        raise SettingError(
            f"dataset_name {name!r} has only files that validation_name names too; leave at least one to train on."
        )
    if len(files) < len(found):
        logger.warning("%d files of %s are held out and not trained on.", len(found) - len(files), name)
    parquet = [file for file in files if file.endswith(".parquet")]
    lines = [file for file in files if file not in parquet]
    parts = [_load_parquet(parquet, column, str(cache_dir))] if parquet else []
    if lines:
        try:
            alone = sum(not file.endswith(".parquet") for file in found) == 1
            parts.append(_load_lines(lines, column, alone, str(cache_dir)))
        except NoText:
            if not parts:
                raise
    return datasets.concatenate_datasets(parts)


def _load_parquet(files: list[str], column: str, cache_dir: str) -> datasets.Dataset:
    for file in files:
        try:
            schema = pq.read_schema(file)
        except READ_ERRORS as error:
            raise SettingError(describe_unreadable(file, error)) from error
        if column not in schema.names:
            raise SettingError(describe_missing_column(column, schema.names, file))
        if schema.names.count(column) > 1:
            raise SettingError(f"dataset_name has {file!r} with several columns {column!r}: rename all but one.")
        kind = schema.field(column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind  # of a category of pandas
        # A file without a row may not say its type.
        if not any(is_text(kind) for is_text in TEXT_KINDS):
            raise SettingError(f"text_column {column!r} of {file!r} holds {kind}, not text: name another column.")
    try:
        texts = datasets.load_dataset(
            "parquet",
            data_files=[glob.escape(os.path.abspath(file)) for file in files],  # taken for patterns
            columns=[column],
            features=datasets.Features({column: datasets.Value("string")}),
            batch_size=ROWS_AT_ONCE,  # by default the first row group's, which may have none
            split="train",
            cache_dir=cache_dir,
        )
    except (*READ_ERRORS, datasets.exceptions.DatasetGenerationError) as error:
        refuse_full_cache(error, cache_dir)
        raise SettingError(find_unreadable(files, column, error.__cause__ or error)) from error
    return texts if column == "text" else texts.rename_column(column, "text")


def _load_lines(files: list[str], column: str, alone: bool, cache_dir: str) -> datasets.Dataset:
    stamps = [(file, os.path.getsize(file), os.stat(file).st_mtime_ns) for file in map(os.path.abspath, files)]
    try:
        return datasets.Dataset.from_generator(
            generate_documents,
            features=datasets.Features({"text": datasets.Value("string")}),
            cache_dir=cache_dir,
            gen_kwargs={"files": tuple(stamps), "column": column, "alone": alone, "schema": SCHEMA_VERSION},
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, SettingError):
            raise error.__cause__ from None
        refuse_full_cache(error, cache_dir)
        raise


def find_unreadable(files: list[str], column: str, error: BaseException) -> str:
    """The sentence for the first of some parquet files that cannot be read through; of the first file if all can."""
    for file in files:
        try:
            for _ in pq.ParquetFile(file).iter_batches(ROWS_AT_ONCE, columns=[column]):
                pass
        except READ_ERRORS as own:
            return describe_unreadable(file, own)
    return describe_unreadable(files[0], error)


def refuse_full_cache(error: BaseException, cache_dir: str) -> None:
    """Raise SettingError where reading failed because what was read could not be kept."""
    if is_disk_full(error.__cause__ or error, cache_dir):
        raise SettingError(f"The disk of cache_dir {cache_dir} is full: free some space, or name another.") from None


def generate_documents(
    files: tuple[tuple[str, int, int], ...], column: str, alone: bool, schema: int
) -> Iterator[dict[str, str]]:
    """Yields the documents of (path, size, time) `files` that are not blank; size, time, schema only key the cache."""
    is_empty = True
    for file, _, _ in files:
        try:
            for text in read_documents(file, column, alone):
                if text.strip():
                    is_empty = False
                    yield {"text": text}
        except READ_ERRORS as error:
            raise SettingError(describe_unreadable(file, error)) from error
    if is_empty:
        raise NoText(f"dataset_name holds no text: {files[0][0]!r} is blank, as is every file with it.")


def read_documents(file: str, column: str, alone: bool) -> Iterator[str]:
    """Yields the texts of one .txt, .jsonl or .csv file; `alone`: the same path or glob named no other of these."""
    form = next(form for form in FORMATS if file.endswith(tuple(form + packed for packed in COMPRESSIONS)))
    if form == ".txt":
        with open_binary(file) as stream:
            is_whole = not alone and len(stream.read(WHOLE_FILE_BYTES + 1)) <= WHOLE_FILE_BYTES
    with open_binary(file) as stream:
        lines = decode_lines(stream, file)
        if form == ".jsonl":
            yield from read_jsonl(lines, column, file)
        elif form == ".csv":
            yield from read_csv(lines, column, file)
        elif is_whole:
            yield "".join(lines)
        else:
            yield from cut_at_blank_lines(lines)


def open_binary(file: str) -> BinaryIO:
    """Opens a file for reading bytes, unpacked."""
    if file.endswith(".gz"):
        return gzip.open(file, "rb")
    if file.endswith(".xz"):
        return lzma.open(file, "rb")
    if file.endswith(".zst"):
        return io.BufferedReader(pa.input_stream(file, compression="zstd"))
    return open(file, "rb")


def decode_lines(stream: BinaryIO, file: str) -> Iterator[str]:
    """Yields the lines of `stream`, with their ends; raises `SettingError` at the first byte that is not UTF-8."""
    offset = 0
    for line in stream:
        try:
            yield line.decode("utf-8-sig" if offset == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise SettingError(
                f"dataset_name has {file!r}, which is not UTF-8 at byte {offset + error.start}: convert it first."
            ) from error
        offset += len(line)


def read_jsonl(lines: Iterable[str], column: str, file: str) -> Iterator[str]:
    """Yields the text of each line's object; null counts as empty."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SettingError(f"dataset_name has {file!r}, whose line {number} is not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise SettingError(f"dataset_name has {file!r}, whose line {number} is not a JSON object: one a line.")
        if column not in row:
            raise SettingError(describe_missing_column(column, row, f"{file}, line {number}"))
        text = row[column] if row[column] is not None else ""
        if "\\u" in line and isinstance(text, str):
            text = replace_surrogates(text)
        if not isinstance(text, str):
            kind = type(text).__name__
            raise SettingError(
                f"text_column {column!r} of {file!r} holds {kind} in line {number}, not text; name another."
            )
        yield text


def read_json_line(line: str) -> Any:
    """What a line holds; half a surrogate pair, which escapes can spell and which is no text, becomes U+FFFD."""
    row = json.loads(line)
    return json.loads(replace_surrogates(json.dumps(row, ensure_ascii=False))) if "\\u" in line else row


def read_csv(lines: Iterable[str], column: str, file: str) -> Iterator[str]:
    """Yields the cells of one column; the first line names the columns."""
    csv.field_size_limit(2**31 - 1)  # the default refuses texts over 128 kB
    rows = csv.DictReader(lines, strict=True)
    try:
        if rows.fieldnames is not None and column not in rows.fieldnames:
            raise SettingError(describe_missing_column(column, rows.fieldnames, file))
        if rows.fieldnames is not None and list(rows.fieldnames).count(column) > 1:
            raise SettingError(f"dataset_name has {file!r} with several columns {column!r}: rename all but one.")
        for row in rows:
            if None in row or None in row.values():  # of too many cells, or too few
                raise SettingError(
                    f"dataset_name has {file!r}, whose line {rows.line_num} has another number of cells than the "
                    f"first ({len(rows.fieldnames or ())}): mend the row (a cell with a comma needs double quotes)."
                )
            yield row[column]
    except csv.Error as error:
        raise SettingError(f"dataset_name has {file!r}, whose line {rows.line_num} is not CSV ({error}).") from error


def cut_at_blank_lines(lines: Iterable[str]) -> Iterator[str]:
    """Yields the runs of lines between blank ones, as one document each; a long one in pieces."""
    block, length = [], 0
    for line in itertools.chain.from_iterable(map(cut_line, lines)):
        is_blank = not line.strip()
        if not is_blank:
            block.append(line)
            length += len(line)
        if block and (is_blank or length > PIECE_CHARACTERS):
            yield "".join(block)
            block, length = [], 0
    yield "".join(block)


def cut_line(line: str) -> Iterator[str]:
    """A long line in parts, each ending at the first space past a piece, or soon after where there is none."""
    start = 0
    while len(line) - start > 2 * PIECE_CHARACTERS:
        past = start + PIECE_CHARACTERS
        end = line.find(" ", past, past + PIECE_CHARACTERS) + 1 or past + 1
        yield line[start:end]
        start = end
    yield line[start:]


def describe_missing_column(column: str, columns: Iterable[str], source: str) -> str:
    """The sentence for a column that is not there: the names that are, the most alike first."""
    columns = list(columns)
    near = difflib.get_close_matches(column, columns, n=3, cutoff=0.3)
    names = ", ".join([*near, *(name for name in columns if name not in near)]) or "none"
    return f"text_column {column!r} is not in {source!r}: set it to one of the columns there ({names})."


def describe_unreadable(file: str, error: BaseException) -> str:
    """The sentence for a file that is damaged or not what its suffix says."""
    reason = " ".join(str(error).split())[:160]
    return f"dataset_name has {file!r}, which cannot be read ({reason}): mend the file or leave it out."
