"""Where text comes from: files of every format, splits, mixtures, streams, and what is said of bad input."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import json
import lzma
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oneday import hub_texts
from oneday.arguments import DataArguments, SettingError
from oneday.corpus import (
    Corpus,
    count_bytes,
    drop_held_out,
    hash_corpus,
    hash_documents,
    hold_out_of_stream,
    list_hub_ids,
    load_corpus,
    mix,
    name_corpus,
    name_path,
    resolve_cache_dir,
    sample_bytes,
    shuffle_together,
)
from oneday.hub_texts import load_hub
from oneday.stream_files import ParquetPart, StreamShard, TablePart
from oneday.text_streams import FileStream

TEXTS = [f"Document {i} tells of the number {i}, 'quoted', with a comma and an é." for i in range(40)]


@pytest.fixture(autouse=True)
def stay_in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONEDAY_CACHE", str(tmp_path / "cache"))


def load(name: str | list[str], **settings: object) -> Corpus:
    return load_corpus(DataArguments(dataset_name=name, **{"validation_fraction": 0.2, **settings}))


def list_texts(corpus: Corpus) -> list[str]:
    return [*corpus.train["text"], *corpus.validation["text"]]


def write_bytes(file: str, content: bytes) -> str:
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(Path(file).suffix, open)
    if file.endswith(".zst"):
        opener = lambda file, mode: pa.output_stream(file, compression="zstd")  # noqa: E731
    with opener(file, "wb") as stream:
        stream.write(content)
    return file


def write_texts(file: str, texts: list[str] = TEXTS, column: str = "text") -> str:
    if ".jsonl" in file:
        content = "\n".join(json.dumps({"id": i, column: text}) for i, text in enumerate(texts))
    elif ".csv" in file:
        content = f"id,{column}\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(texts))
    elif ".txt" in file:
        content = "\n\n".join(texts)
    else:
        pq.write_table(pa.table({"id": list(range(len(texts))), column: texts}), file)
        return file
    return write_bytes(file, content.encode())


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
    Path("books/large.txt").write_text("\n\n".join(f"{i} " + "x" * 100_000 for i in range(11)))
    texts = list_texts(load("books"))
    assert len(texts) == 4 + 11
    assert "Book 2.\n\nIt has two paragraphs." in texts


def test_a_long_txt_without_blank_lines_is_cut_at_line_ends(monkeypatch):
    monkeypatch.setattr("oneday.text_files.WHOLE_FILE_BYTES", 200)
    Path("lines.txt").write_text("".join(f"line {number:03}\n" for number in range(100)))
    texts = sorted(list_texts(load("lines.txt")))
    assert [len(text) for text in texts] == [207, 207, 207, 207, 72], "lines of 9 characters"
    assert "".join(texts) == Path("lines.txt").read_text()


@pytest.mark.parametrize("name", ["t", "t/*.txt"])
def test_a_file_that_is_held_out_is_not_trained_on(name, caplog):
    """However it is cut there: alone it is cut at blank lines, beside others it is one document."""
    os.mkdir("t")
    for part in "abc":
        Path(f"t/{part}.txt").write_text(f"{part} one.\n\n{part} two.\n")
    corpus = load(name, validation_name="t/a.txt")
    assert corpus.validation["text"][:] == ["a one.\n", "a two.\n"]
    assert corpus.train["text"][:] == ["b one.\n\nb two.\n", "c one.\n\nc two.\n"]
    assert f"1 files of {name} are held out" in caplog.text
    with pytest.raises(SettingError, match="has only files that validation_name names too"):
        load(name, validation_name="t/a.txt,t/b.txt,t/c.txt")


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


def test_a_part_that_is_held_out_whole_through_another_is_named():
    write_texts("many.jsonl")
    write_texts("few.jsonl", load("many.jsonl", validation_fraction=0.5).validation["text"][:])
    with pytest.raises(SettingError, match="'few.jsonl' has no document that is not held out"):
        load("few.jsonl,many.jsonl", validation_fraction=0.5)


def test_text_that_is_not_utf8_is_named():
    buffers = [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    broken = pa.Array.from_buffers(pa.string(), 1, buffers)
    pq.write_table(pa.table({"text": broken}), "a.parquet")
    with pytest.raises(SettingError, match="'a.parquet' holds text that is not UTF-8, in documents 0 to 0"):
        load("a.parquet")


def test_two_columns_of_one_name_are_refused():
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), "a.parquet")
    with pytest.raises(SettingError, match="several columns 'text'"):
        load("a.parquet")


def test_json_that_is_nested_too_deep_is_named():
    Path("a.jsonl").write_text('{"text": ' + "[" * 10**5 + "\n")
    with pytest.raises(SettingError, match="line 1 is not JSON"):
        load("a.jsonl")


def test_infinite_weights_are_refused():
    with pytest.raises(SettingError, match="must all be finite"):
        load([write_texts("a.jsonl"), write_texts("b.jsonl", ["x"])], dataset_weights=[math.inf, 1.0])


def test_blank_and_null_texts_are_dropped():
    texts = [*TEXTS, "", "  \n\t", None]
    assert sorted(list_texts(load(write_texts("a.parquet", texts)))) == sorted(TEXTS)
    assert sorted(list_texts(load(write_texts("a.jsonl", texts)))) == sorted(TEXTS)


def test_half_a_surrogate_pair_is_replaced():
    write_bytes("a.jsonl", b'{"text": "half \\ud83d of it"}\n{"text": "whole \\ud83d\\ude00"}\n')
    assert sorted(list_texts(load("a.jsonl"))) == ["half \ufffd of it", "whole \U0001f600"]


def test_glob_list_and_comma_mean_the_same_texts():
    write_texts("a-0.jsonl", TEXTS[:20])
    write_texts("a-1.jsonl", TEXTS[20:])
    corpora = [load("a-*.jsonl"), load("a-0.jsonl,a-1.jsonl"), load(["a-0.jsonl", "a-1.jsonl"])]
    assert all(sorted(list_texts(corpus)) == sorted(TEXTS) for corpus in corpora)
    assert corpora[1].corpus_hash == corpora[2].corpus_hash


def test_changed_file_is_read_again():
    before = load(write_texts("a.jsonl"))
    after = load(write_texts("a.jsonl", [*TEXTS, "One more."]))
    assert len(list_texts(after)) == len(list_texts(before)) + 1
    assert after.corpus_hash != before.corpus_hash


def test_split_is_by_content_and_keeps_copies_together():
    first = load(write_texts("a.jsonl", TEXTS * 3))
    second = load(write_texts("b.jsonl", [*reversed(TEXTS), "Another document."]))
    held_out = set(first.validation["text"])
    assert not held_out & set(first.train["text"])
    assert 1 <= len(held_out) <= 20
    assert held_out == set(second.validation["text"]) - {"Another document."}


@pytest.mark.parametrize("fraction", [1e-9, 0.999999999])
def test_both_sides_get_a_document(fraction):
    corpus = load(write_texts("a.jsonl", TEXTS[:3]), validation_fraction=fraction)
    assert min(len(corpus.train), len(corpus.validation)) == 1


def test_validation_name_is_held_out_whole():
    corpus = load(write_texts("a.jsonl"), validation_name=write_texts("b.jsonl", [TEXTS[3], "Something else."]))
    assert corpus.validation["text"][:] == [TEXTS[3], "Something else."]
    assert corpus.train["text"][:] == TEXTS[:3] + TEXTS[4:]


def test_held_out_text_is_not_trained_on_however_it_is_cut():
    """Whole files and paragraphs of them, other ends of lines and other white space."""
    os.makedirs("books")
    for i in range(4):
        Path(f"books/{i}.txt").write_text(f"Book {i}.\n\nIts second paragraph, {i}.\n")
    Path("books/2.txt").write_text("\n\n  Book 2.\n\nIts second paragraph, 2.\n")
    Path("copy.txt").write_bytes(b"Book 2.\r\n\r\n\r\nIts second  paragraph, 2.")
    corpus = load("books", validation_name="copy.txt")
    assert len(corpus.validation) == 2 and len(corpus.train) == 3
    assert not any("2." in text for text in corpus.train["text"])
    Path("cut.txt").write_text("\n\n".join(["Book 1.", "Its second paragraph, 1.", "Book 9.", "Another."]))
    corpus = load("cut.txt", validation_name="books")
    assert [text.strip() for text in corpus.train["text"]] == ["Book 9.", "Another."]
    half = stream_of(["Book 1.\n\nAnother.", "Book 1. \n\n Its second paragraph, 1."])
    book = datasets.Dataset.from_dict({"text": ["Book 1.\n\nIts second paragraph, 1."]})
    for validation_name in (None, "b"):
        kept = drop_held_out("a", half, book, DataArguments(validation_name=validation_name))
        assert [row["text"] for row in kept] == ["Book 1.\n\nAnother."]
    line = datasets.Dataset.from_dict({"text": ["Book 1.", "Book 9."]})
    assert len(drop_held_out("a", line, book, DataArguments())) == 2, "a line of a document that is cut as these are"
    assert drop_held_out("a", line, book, DataArguments(validation_name="b"))["text"][:] == ["Book 9."]


def test_documents_that_hold_held_out_paragraphs_beside_others_are_counted(caplog):
    Path("a.jsonl").write_text(json.dumps({"text": "One.\n\nTwo.\n\nThree."}) + "\n" + json.dumps({"text": "Four."}))
    corpus = load("a.jsonl", validation_name=write_texts("b.jsonl", ["Two."]))
    assert len(corpus.train) == 2
    assert "1 documents of a.jsonl hold held-out paragraphs beside others and are trained on" in caplog.text


def test_what_is_held_out_does_not_change_how_files_are_cut():
    os.makedirs("books")
    for i in range(2):
        Path(f"books/{i}.txt").write_text(f"Book {i}.\n\nIts second paragraph, {i}.")
    assert load("books", validation_name="books/0.txt").train["text"][:] == ["Book 1.\n\nIts second paragraph, 1."]
    Path("books/0.txt").unlink()
    write_texts("books/rows.parquet")
    assert load("books", validation_name="books/rows.parquet").train["text"][:] == [
        "Book 1.\n",
        "Its second paragraph, 1.",
    ], "the one of its kind"


def test_held_out_text_is_limited_in_whole_documents():
    write_texts("a.jsonl")
    whole, half, least = (
        load("a.jsonl", validation_fraction=0.5, max_validation_bytes=size) for size in (10**6, 500, 1)
    )
    assert set(half.validation["text"]) < set(whole.validation["text"])
    assert 300 < count_bytes(half.validation["text"]) <= 500
    assert len(least.validation) == 1
    for corpus in (whole, half, least):
        assert sorted(list_texts(corpus)) == sorted(TEXTS), "what is not held out is trained on"
    assert half.corpus_hash != whole.corpus_hash


def test_max_train_documents_and_hash():
    write_texts("a.jsonl")
    corpora = [load("a.jsonl", max_train_documents=count) for count in (5, 6, 5)]
    assert [len(corpus.train) for corpus in corpora] == [5, 6, 5]
    assert corpora[0].corpus_hash == corpora[2].corpus_hash != corpora[1].corpus_hash
    moved = load("a.jsonl", validation_fraction=0.5)
    assert moved.corpus_hash != load("a.jsonl").corpus_hash
    assert len(moved.corpus_hash) == 16


def test_mixture_uses_every_document_once_without_weights():
    write_texts("a.jsonl", TEXTS[:10])
    write_texts("b.jsonl", TEXTS[10:])
    corpus = load("a.jsonl,b.jsonl")
    assert sorted(list_texts(corpus)) == sorted(TEXTS)
    assert corpus.train["text"][:] == load("a.jsonl,b.jsonl").train["text"][:]
    texts = {"a": [f"a{i}" for i in range(300)], "b": [f"b{i}" for i in range(60)]}
    parts = [datasets.Dataset.from_dict({"text": part}) for part in texts.values()]
    mixed = shuffle_together(parts)["text"][:]
    for name, part in texts.items():
        assert [text for text in mixed if text.startswith(name)] == part
    assert 20 < sum(text.startswith("b") for text in mixed[:180]) < 40, "spread over the whole"


def test_a_tokenizer_is_trained_on_text_from_everywhere():
    """Of a corpus that is larger than what it takes; a smaller one it takes whole, in its order."""
    texts = datasets.Dataset.from_dict({"text": ["ö" * 50] * 500 + ["b" * 100] * 500})
    taken = list(sample_bytes(texts, 20_000))
    assert sum(map(count_bytes, [[text] for text in taken])) == 20_000
    assert 70 < sum(text[0] == "b" for text in taken) < 130
    assert list(sample_bytes(texts, 100_000)) == texts["text"][:]
    assert list(sample_bytes(stream_of(texts["text"][:]), 20_000)) == ["ö" * 50] * 200


def test_mixture_follows_its_weights_and_repeats_nothing():
    write_texts("a.jsonl", [f"a {i}" for i in range(2000)])
    write_texts("b.jsonl", [f"b {i}" for i in range(2000)])
    texts = load("a.jsonl,b.jsonl", dataset_weights=[3, 1], validation_fraction=0.01).train["text"][:]
    assert len(set(texts)) == len(texts)
    share = sum(text.startswith("a") for text in texts) / len(texts)
    assert abs(share - 0.75) < 0.03


def stream_of(texts: list[str], num_parts: int = 1) -> FileStream:
    stored = datasets.Dataset.from_dict({"text": texts})
    return FileStream([TablePart(stored, part, num_parts) for part in range(num_parts)], num_parts)


def test_stream_holds_first_documents_out_with_every_copy_of_them():
    texts = [f"{i}" for i in range(300)]
    stream = stream_of([*texts, *texts[:50]])
    validation = hold_out_of_stream(stream, 0.1, 1000, 10**6)
    assert validation["text"][:] == texts[:100]
    train = drop_held_out("a", stream, validation, DataArguments())
    assert sorted(row["text"] for row in train) == sorted(texts[100:])
    assert hold_out_of_stream(stream_of(texts, 3), 0.1, 200, 10**6)["text"][:4] == ["0", "100", "200", "1"]
    assert len(hold_out_of_stream(stream_of(texts), 0.1, 200, 10**6)) == 64
    assert hold_out_of_stream(stream_of(texts), 0.5, 10**9, 15)["text"][:] == texts[:13], "no more is read than needed"
    with pytest.raises(SettingError, match="streams only 300 documents, too few to hold 500 out"):
        hold_out_of_stream(stream_of(texts), 0.5, 1000, 10**6)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("ann/texts", ("ann/texts", None, None)),
        ("ann/texts@v1", ("ann/texts", None, "v1")),
        ("ann/texts:20231101.en", ("ann/texts", "20231101.en", None)),
        ("ann/texts:small@v1", ("ann/texts", "small", "v1")),
    ],
)
def test_a_name_on_the_hub_has_its_configuration_and_revision(name, parts):
    assert hub_texts.split_name(name) == parts
    assert list_hub_ids(f"{name},python-docs") == ["ann/texts"]
    assert name_corpus([name], DataArguments(dataset_config_name="all")) == name + " (all)" * (parts[1] is None)


def test_name_shows_no_folder_of_the_machine(tmp_path):
    write_texts("a.jsonl")
    assert load(str(tmp_path / "a.jsonl")).name == f"{tmp_path.name}/a.jsonl"


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/data/wikipedia/train-*.parquet", "wikipedia/train-*.parquet"),
        ("/home/alice.smith/*.txt", "*.txt"),
        ("/Users/alice/a.txt", "a.txt"),
        ("~/a.txt", "a.txt"),
        ("/home/alice/texts/a.txt", "texts/a.txt"),
        ("a.txt", "a.txt"),
    ],
)
def test_name_shows_nobodys_home(path, shown):
    assert name_path(Path(path)) == shown


def test_what_one_file_of_a_mixture_holds_out_no_other_is_trained_on():
    """The few documents of the one are all in the other, which alone would not hold them out."""
    texts = [f"text {number}" for number in range(800)]
    write_texts("few.jsonl", texts[:20])
    write_texts("many.jsonl", texts)
    corpus = load("few.jsonl,many.jsonl", validation_fraction=0.001)
    assert corpus.validation["text"] and not set(corpus.validation["text"]) & set(corpus.train["text"])


def test_a_stream_stays_at_the_commit_that_its_run_began_with(monkeypatch):
    commits = iter(["first", "second"])
    monkeypatch.setattr("oneday.hub_texts.REVISIONS", {})
    monkeypatch.setattr(
        "oneday.hub_texts.HfApi",
        lambda: SimpleNamespace(dataset_info=lambda repo, **options: SimpleNamespace(sha=next(commits))),
    )
    assert [hub_texts.find_revision("ann/texts") for _ in "ab"] == ["first", "first"]
    hub_texts.REVISIONS.clear()
    hub_texts.REVISIONS.update({"ann/texts": "first"})  # as a resumed process reads it from the run directory
    assert hub_texts.find_revision("ann/texts") == "first"
    monkeypatch.setattr("oneday.hub_texts.HfApi", None)  # as if the Hub did not answer
    assert hub_texts.find_revision("ann/more@v1", is_needed=False) == "v1" and "ann/more@v1" not in hub_texts.REVISIONS
    with pytest.raises(TypeError):
        hub_texts.find_revision("ann/more@v1")
    validation, args = datasets.Dataset.from_dict({"text": ["held out"]}), DataArguments(streaming=True)
    hub_texts.REVISIONS["ann/texts@first"] = "first"
    hashes = {hash_corpus(stream_of(["a"]), validation, [name], [], args) for name in ("ann/texts", "ann/texts@first")}
    assert len(hashes) == 1, "the same text under either name"


@pytest.mark.parametrize(("form", "loader"), [("parquet", "load_dataset"), ("txt", "Dataset.from_generator")])
def test_a_full_disk_is_not_called_a_damaged_file(form, loader, monkeypatch):
    def fail(*args, **kwargs):
        raise datasets.exceptions.DatasetGenerationError("while writing") from OSError(errno.ENOSPC, "No space left")

    write_texts(f"a.{form}")
    monkeypatch.setattr(f"datasets.{loader}", fail)
    with pytest.raises(SettingError, match="The disk of cache_dir .* is full: free some space"):
        load(f"a.{form}")


def test_count_bytes_counts_utf8():
    assert count_bytes(["abc", "é", "\U0001f600", ""]) == 3 + 2 + 4


def test_hash_documents_ignores_position():
    texts = datasets.Dataset.from_dict({"text": TEXTS})
    assert (hash_documents(texts.select([5, 3])) == hash_documents(texts)[[5, 3]]).all()


def test_cache_dir_comes_from_setting_then_environment_then_home(tmp_path, monkeypatch):
    assert resolve_cache_dir(str(tmp_path / "x")) == tmp_path / "x"
    assert resolve_cache_dir(None) == tmp_path / "cache"
    monkeypatch.delenv("ONEDAY_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_cache_dir(None) == tmp_path / ".cache/oneday"
    Path("file").write_text("")
    with pytest.raises(SettingError, match="cache_dir .*file/x.* cannot be written .*file is a file"):
        resolve_cache_dir("file/x")


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


def test_settings_that_cannot_work():
    write_texts("a.jsonl")
    write_texts("b.jsonl", TEXTS[:5])
    with pytest.raises(SettingError, match="dataset_weights has 3 numbers for 2 data sets"):
        load("a.jsonl,b.jsonl", dataset_weights=[1, 2, 3])
    with pytest.raises(SettingError, match=r"dataset_weights \[1, 0\] must all be finite and above zero"):
        load("a.jsonl,b.jsonl", dataset_weights=[1, 0])
    with pytest.raises(SettingError, match="max_train_documents 0 must be at least 1"):
        load("a.jsonl", max_train_documents=0)
    with pytest.raises(SettingError, match="validation_fraction 1.5 must lie between 0 and 1"):
        load("a.jsonl", validation_fraction=1.5)
    with pytest.raises(SettingError, match="dataset_name ' , ' names nothing"):
        load(" , ")
    with pytest.raises(SettingError, match="validation_name 'a.jsonl' is trained on too"):
        load("a.jsonl", validation_name="a.jsonl")
    with pytest.raises(SettingError, match="validation_name holds every document"):
        load("b.jsonl", validation_name="a.jsonl")
    with pytest.raises(SettingError, match="validation_name './none.txt' matches no file"):
        load("a.jsonl", validation_name="./none.txt")


def test_hub_out_of_reach_says_what_to_do():
    code = """
from oneday.arguments import DataArguments, SettingError
from oneday.corpus import load_corpus
for streaming in (False, True):
    try:
        load_corpus(DataArguments(dataset_name="someone/something", streaming=streaming))
    except SettingError as error:
        print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": os.path.abspath("hub")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    for line in lines:
        assert line.startswith("dataset_name 'someone/something' is no file here and could not be loaded from the Hub")
        assert "check the name" in line and "local files" in line


@pytest.mark.parametrize("form", [".parquet", ".jsonl", ".csv"])
@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_set_whole_and_as_a_stream(streaming, form, monkeypatch):
    """A folder stands for the Hub: the loader is the same, only asking for the newest commit needs the network."""
    monkeypatch.setattr("oneday.hub_texts.find_revision", lambda name, is_needed=True: None)
    os.mkdir("hub")
    for number in range(3):
        write_texts(f"hub/train-{number}{form}", [*TEXTS[number::3], " "], column="body")
    args = DataArguments(text_column="body", streaming=streaming, cache_dir="cache")
    texts = load_hub("hub", "train", args)
    assert isinstance(texts, FileStream) == streaming
    assert sorted(row["text"] for row in texts if row["text"].strip()) == sorted(TEXTS)
    assert len(list(texts)) == (40 if streaming else 43)
    write_texts(f"hub/validation-0{form}", TEXTS[:9], column="body")
    split = dataclasses.replace(
        args, dataset_name="hub", validation_name="hub", validation_fraction=0.1, max_validation_bytes=100
    )
    monkeypatch.setattr("oneday.corpus.is_local", lambda name: False)
    corpus = load_corpus(split)
    held_out, read = corpus.validation["text"][:], [row["text"] for row in corpus.train]
    assert set(held_out) <= set(TEXTS[:9]) and not set(held_out) & set(read)
    with pytest.raises(SettingError, match="trained on too"):
        load_corpus(dataclasses.replace(split, dataset_split="validation"))
    if streaming:
        assert {type(file) for file in texts.files} == {ParquetPart if form == ".parquet" else StreamShard}
    with pytest.raises(SettingError, match=r"text_column 'bodi' is not in 'hub'.*\(.*body.*\)"):
        load_hub("hub", "train", DataArguments(text_column="bodi", streaming=streaming))
    with pytest.raises(SettingError, match="text_column .*holds .*int"):
        next(iter(load_hub("hub", "train", DataArguments(text_column="id", streaming=streaming))))
    with pytest.raises(SettingError, match="'hub' is no file here and could not be loaded .*other.* dataset_split"):
        load_hub("hub", "other", args)


def test_text_of_either_width_makes_one_mixture(monkeypatch):
    """polars and newer pandas write large strings; what is a string already is not copied."""
    for folder, kind in (("wide", pa.large_string()), ("narrow", pa.string())):
        os.mkdir(folder)
        pq.write_table(pa.table({"text": pa.array(TEXTS[:5], kind)}), f"{folder}/train-0.parquet")
    args = DataArguments(cache_dir="cache")
    parts = [load_hub(folder, "train", args) for folder in ("wide", "narrow")]
    assert len(shuffle_together(parts)) == 10
    monkeypatch.setattr(datasets.Dataset, "cast", lambda *_, **__: pytest.fail("a copy"))
    load_hub("narrow", "train", args)


def test_stream_files_decides_the_order_and_the_hash(monkeypatch):
    monkeypatch.setattr("oneday.hub_texts.find_revision", lambda name, is_needed=True: None)
    monkeypatch.setattr("oneday.corpus.is_local", lambda name: False)
    os.mkdir("hub")
    for number in range(4):
        write_texts(f"hub/train-{number}.parquet", [f"{number} {i}" for i in range(100)])
    corpora = [load("hub", streaming=True, stream_files=count, validation_fraction=1e-9) for count in (1, 4, 4)]
    assert corpora[1].corpus_hash == corpora[2].corpus_hash != corpora[0].corpus_hash
    held_out = [{text[0] for text in corpus.validation["text"]} for corpus in corpora]
    assert held_out == [{"0"}, set("0123"), set("0123")]
    for corpus in corpora:
        texts = [row["text"] for row in corpus.train]
        assert len(set(texts)) == len(texts) == 400 - 64
        assert not set(texts) & set(corpus.validation["text"])
    with pytest.raises(SettingError, match="stream_files 0 must be at least 1"):
        load("hub", streaming=True, stream_files=0)


def test_mixture_with_a_stream_needs_weights():
    parts = [datasets.Dataset.from_dict({"text": [f"{name} {i}" for i in range(500)]}) for name in "ab"]
    parts[0] = stream_of(parts[0]["text"][:], 4)
    with pytest.raises(SettingError, match="dataset_weights must be given for a mixture with a stream"):
        mix(parts, DataArguments())
    texts = [row["text"] for row in mix(parts, DataArguments(dataset_weights=[0.8, 0.2]))]
    assert len(set(texts)) == 1000
    assert abs(sum(text.startswith("a") for text in texts) / len(texts) - 0.8) < 0.06


def test_what_one_stream_of_a_mixture_holds_out_no_other_is_trained_on(monkeypatch):
    """Two data sets with the same documents in opposite order."""
    monkeypatch.setattr("oneday.hub_texts.find_revision", lambda name, is_needed=True: None)
    monkeypatch.setattr("oneday.corpus.is_local", lambda name: False)
    texts = [f"text {number}" for number in range(300)]
    for name, part in (("one", texts), ("two", texts[::-1])):
        os.mkdir(name)
        write_texts(f"{name}/train.parquet", part)
    corpus = load("one,two", streaming=True, dataset_weights=[0.5, 0.5], validation_fraction=1e-9, stream_files=1)
    held_out = set(corpus.validation["text"])
    assert held_out == {*texts[:64], *texts[-64:]}
    assert {row["text"] for row in corpus.train} <= set(texts) - held_out


@pytest.mark.skipif("ONEDAY_DATA" not in os.environ, reason="ONEDAY_DATA names no directory of corpora")
def test_real_corpus():
    folder = Path(os.environ["ONEDAY_DATA"]) / "corpora/eltec_eng_novels"
    corpus = load(str(folder / "train.parquet"), validation_name=str(folder / "validation.parquet"))
    assert len(corpus.train) > 2900
    assert len(corpus.validation) == 261
