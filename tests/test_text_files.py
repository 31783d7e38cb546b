"""Files of every format as documents, and what is said of bad ones."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_parts import TEXTS, list_texts, load, write_bytes, write_texts

from oneday.errors import SettingError
from oneday.text_files import PIECE_CHARACTERS

pytestmark = pytest.mark.usefixtures("stay_in_folder")


@pytest.mark.parametrize("packing", ["", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize("form", [".txt", ".jsonl", ".csv"])
def test_every_format_gives_the_same_texts(form, packing):
    corpus = load(write_texts("a" + form + packing))
    assert sorted(text.strip() for text in list_texts(corpus)) == sorted(TEXTS)
    assert corpus.train.column_names == corpus.validation.column_names == ["text"]


def test_parquet_with_another_column():
    corpus = load(write_texts("a.parquet", column="body"), text_column="body")
    assert sorted(list_texts(corpus)) == sorted(TEXTS)
    assert corpus.train.column_names == ["text"]


def test_small_txt_files_of_a_directory_are_documents_and_a_large_one_is_cut():
    os.makedirs("books/more")
    for i in range(4):
        Path(f"books/more/{i}.txt").write_text(f"Book {i}.\n\nIt has two paragraphs.")
    Path("books/large.txt").write_text("\n\n".join(f"{i} " + "x" * 10_000 for i in range(110)))
    texts = list_texts(load("books"))
    assert len(texts) == 4 + 110
    assert "Book 2.\n\nIt has two paragraphs." in texts


def test_a_long_txt_without_blank_lines_is_cut_at_line_ends(monkeypatch):
    monkeypatch.setattr("oneday.text_files.PIECE_CHARACTERS", 200)
    Path("lines.txt").write_text("".join(f"line {number:03}\n" for number in range(100)))
    texts = sorted(list_texts(load("lines.txt")))
    assert [len(text) for text in texts] == [207, 207, 207, 207, 72], "lines of 9 characters"
    assert "".join(texts) == Path("lines.txt").read_text()


def test_a_txt_of_one_sentence_a_line_holds_out_no_more_than_was_asked_for(caplog):
    """Without a blank line, as plain-text corpora often are."""
    Path("lines.txt").write_text("".join(f"The sentence number {number:06}.\n" for number in range(100_000)))
    corpus = load("lines.txt", validation_fraction=0.02)
    sizes = [sum(map(len, part["text"])) for part in (corpus.train, corpus.validation)]
    assert sum(sizes) == Path("lines.txt").stat().st_size > 2e6
    assert 0.002 < sizes[1] / sum(sizes) < 0.06 and "is held out" not in caplog.text


@pytest.mark.parametrize(
    "line", ["A sentence of number {:04}. ", "A sentence of number {:04}.\n", "  A\fsentence\u2028of number {:04}.\n"]
)
def test_long_paragraphs_that_are_held_out_are_not_trained_on_however_they_lie(line):
    """In a file that is cut, in one that is not, and as a row; also without any line end."""
    held = "".join(line.format(number) for number in range(2000)).rstrip() + "\n"
    Path("held.txt").write_text(held)
    os.mkdir("d")
    for name, text in (("a", held), ("b", "Another text.")):
        Path(f"d/{name}.txt").write_text(text)
    Path("rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (held, "Another text.")))
    assert len(load("held.txt", validation_fraction=0.3).train) >= 2, "it is cut"
    for name in ("d", "rows.jsonl"):
        assert load(name, validation_name="held.txt").train["text"][:] == ["Another text."]
    Path("whole").mkdir()
    Path("whole/one.txt").write_text(held)
    Path("whole/two.txt").write_text("x")
    Path("train.txt").write_text(held + "\n\nAnother text.")
    assert load("train.txt", validation_name="whole").train["text"][:] == ["Another text."]


def test_a_line_without_end_is_cut_at_spaces():
    text = "word " * 10_000 + "x" * 40_000
    Path("line.txt").write_text(text)
    parts = list_texts(load("line.txt"))
    assert sum(map(len, parts)) == len(text) and max(map(len, parts)) <= 2 * PIECE_CHARACTERS
    assert sum(part.startswith("word ") and part.endswith("word ") for part in parts) >= 3


def test_much_that_is_held_out_is_said(caplog):
    Path("two.txt").write_text("a b c " * 2500 + "\n\n" + "d e f " * 2500)
    load("two.txt", validation_fraction=0.02)
    assert "50 % of the text is held out (1 of 2 documents, 15 kB); set validation_name" in caplog.text


def test_a_directory_gives_what_is_not_hidden_and_says_what_it_leaves_out(caplog):
    os.makedirs("d/.ipynb_checkpoints")
    for path in ("d/a.csv", "d/.ipynb_checkpoints/a-checkpoint.csv", "d/._a.csv", "d/c4.json.gz"):
        Path(path).write_bytes(b"\xff" if "._" in path else b"text\nfirst\nsecond\n")
    for name in ("d", "d/", "./d", os.path.abspath("d")):
        assert sorted(list_texts(load(name))) == ["first", "second"]
    os.mkdir(".hidden")
    os.rename("d", ".hidden/d")
    assert sorted(list_texts(load(".hidden/d"))) == ["first", "second"], "of the folder itself the name does not count"
    os.chdir(".hidden/d")
    assert sorted(list_texts(load("."))) == ["first", "second"]
    assert "1 files of other kinds in d are not read, such as d/c4.json.gz." in caplog.text


def test_names_of_parquet_files_are_no_patterns():
    os.makedirs("p[en]")
    for name, texts in (("a1", TEXTS[:20]), ("a[1]", TEXTS[20:])):
        write_texts(f"p[en]/{name}.parquet", texts)
    assert sorted(list_texts(load(os.path.abspath("p[en]")))) == sorted(TEXTS)


def test_a_parquet_file_without_rows_is_no_trouble_and_a_damaged_one_is_named():
    os.mkdir("p")
    for name, texts in (("a", TEXTS[:20]), ("b", TEXTS[20:]), ("d", [])):
        write_texts(f"p/{name}.parquet", texts)
    assert sorted(list_texts(load("p"))) == sorted(TEXTS)
    damaged = Path("p/b.parquet")
    content = damaged.read_bytes()
    place = content.index(b"Document") - 20
    damaged.write_bytes(content[:place] + b"\xff" * 60 + content[place + 60 :])
    with pytest.raises(SettingError, match="'p/b.parquet', which cannot be read"):
        load("p")


def test_a_blank_file_beside_text_is_no_trouble():
    os.mkdir("p")
    write_texts("p/a.parquet", TEXTS)
    Path("p/blank.txt").write_text(" \n")
    assert sorted(list_texts(load("p"))) == sorted(TEXTS)


@pytest.mark.parametrize("row", ["1,Hello, dear world", "1"])
def test_a_row_of_csv_with_other_cells_than_the_first_is_refused(row):
    Path("a.csv").write_text(f"id,text\n0,first\n{row}\n")
    with pytest.raises(SettingError, match="line 3 has another number of cells than the first \\(2\\): mend the row"):
        load("a.csv")


def test_text_that_is_not_utf8_is_named():
    buffers = [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    broken = pa.Array.from_buffers(pa.string(), 1, buffers)
    pq.write_table(pa.table({"text": broken}), "a.parquet")
    with pytest.raises(SettingError, match="'a.parquet' holds text that is not UTF-8, in documents 0 to 0"):
        load("a.parquet")


def test_two_columns_of_one_name_are_refused():
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), "a.parquet")
    Path("a.csv").write_text("text,text\na,b\n")
    for name in ("a.parquet", "a.csv"):
        with pytest.raises(SettingError, match=f"{name}' with several columns 'text'"):
            load(name)


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_strings_of_every_kind_are_text(kind):
    """As polars writes them, and pandas its categories."""
    pq.write_table(pa.table({"text": pa.array(["first", "second", "first"]).cast(kind)}), "a.parquet")
    assert pq.read_schema("a.parquet").field("text").type == kind
    assert sorted(list_texts(load("a.parquet"))) == ["first", "first", "second"]


def test_json_that_is_nested_too_deep_is_named():
    Path("a.jsonl").write_text('{"text": ' + "[" * 10**5 + "\n")
    with pytest.raises(SettingError, match="line 1 is not JSON"):
        load("a.jsonl")


def test_half_a_surrogate_pair_is_replaced():
    write_bytes("a.jsonl", b'{"text": "half \\ud83d of it"}\n{"text": "whole \\ud83d\\ude00"}\n')
    assert sorted(list_texts(load("a.jsonl"))) == ["half \ufffd of it", "whole \U0001f600"]


def test_changed_file_is_read_again():
    before = load(write_texts("a.jsonl"))
    after = load(write_texts("a.jsonl", [*TEXTS, "One more."]))
    assert len(list_texts(after)) == len(list_texts(before)) + 1
    assert after.corpus_hash != before.corpus_hash


@pytest.mark.parametrize(("form", "loader"), [("parquet", "load_dataset"), ("txt", "Dataset.from_generator")])
def test_a_full_disk_is_not_called_a_damaged_file(form, loader, monkeypatch):
    def fail(*args, **kwargs):
        raise datasets.exceptions.DatasetGenerationError("while writing") from OSError(errno.ENOSPC, "No space left")

    write_texts(f"a.{form}")
    monkeypatch.setattr(f"datasets.{loader}", fail)
    with pytest.raises(SettingError, match="The disk of cache_dir .* is full: free some space"):
        load(f"a.{form}")


def test_bad_files_are_named():
    with pytest.raises(SettingError, match="'./none.txt' matches no file"):
        load("./none.txt")
    with pytest.raises(SettingError, match=r"'none-\*.parquet' matches no file"):
        load("none-*.parquet")
    os.mkdir("empty")
    with pytest.raises(SettingError, match="'empty' is a directory with no .txt"):
        load("empty")
    with pytest.raises(SettingError, match="'a.doc', which is none of .txt"):
        load(write_bytes("a.doc", b"x"))
    with pytest.raises(SettingError, match="holds no text: .*a.txt' is blank"):
        load(write_bytes("a.txt", b" \n\n \n"))
    with pytest.raises(SettingError, match="'a.parquet' holds no text"):
        load(write_texts("a.parquet", ["", " "]))
    with pytest.raises(SettingError, match="1 different document.*too few to hold one out"):
        load(write_bytes("one.txt", b"Only one document."))


@pytest.mark.parametrize("file", ["a.txt", "a.jsonl.gz", "a.csv.zst"])
def test_text_that_is_not_utf8_is_named_with_its_place(file):
    start = {"a.txt": b"Fine.\n\ncaf", "a.jsonl.gz": b'{"text": "caf', "a.csv.zst": b"text\ncaf"}[file]
    with pytest.raises(SettingError, match=f"{file}', which is not UTF-8 at byte {len(start)}:"):
        load(write_bytes(file, start + b'\xe9 au lait"}\n'))


@pytest.mark.parametrize("form", [".jsonl", ".csv", ".parquet"])
def test_missing_column_names_the_columns_that_are_there(form):
    with pytest.raises(SettingError, match=r"text_column 'texts' is not in .*\(text, id\)"):
        load(write_texts("a" + form), text_column="texts")


def test_column_that_holds_no_text():
    with pytest.raises(SettingError, match="text_column 'id' of 'a.parquet' holds int64"):
        load(write_texts("a.parquet"), text_column="id")
    with pytest.raises(SettingError, match="text_column 'id' .* holds int in line 1"):
        load(write_texts("a.jsonl"), text_column="id")


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("a.parquet", b"PAR1 no", "cannot be read"),
        ("b.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("c.jsonl", b'["a"]\n', "line 1 is not a JSON object"),
        ("d.csv", b'text\n"never closed', "line 1 is not CSV"),
    ],
)
def test_damaged_files_are_named(file, content, reason):
    with pytest.raises(SettingError, match=f"{file}.*{reason}"):
        load(write_bytes(file, content))


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
def test_damaged_archives_are_named(packing):
    file = write_texts("a.jsonl" + packing, TEXTS * 50)
    content = Path(file).read_bytes()
    for damaged in (b"junk" + content, content[: len(content) // 2]):
        Path(file).write_bytes(damaged)
        with pytest.raises(SettingError, match=f"{file}', which cannot be read"):
            load(file)
