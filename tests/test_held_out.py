"""What is held out, and that nothing of it is trained on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import pytest
from corpus_parts import TEXTS, list_texts, load, stream_of, write_texts

from oneday.arguments import DataArguments
from oneday.corpus import count_bytes, drop_held_out, hold_out_of_stream, keep_bytes
from oneday.errors import SettingError
from oneday.held_out import HeldOut
from oneday.python_docs import hash_text

pytestmark = pytest.mark.usefixtures("stay_in_folder")


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


def test_a_part_that_is_held_out_whole_through_another_is_named():
    write_texts("many.jsonl")
    write_texts("few.jsonl", load("many.jsonl", validation_fraction=0.5).validation["text"][:])
    with pytest.raises(SettingError, match="'few.jsonl' has no document that is not held out"):
        load("few.jsonl,many.jsonl", validation_fraction=0.5)


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


def test_what_one_file_of_a_mixture_holds_out_no_other_is_trained_on():
    """The few documents of the one are all in the other, which alone would not hold them out."""
    texts = [f"text {number}" for number in range(800)]
    write_texts("few.jsonl", texts[:20])
    write_texts("many.jsonl", texts)
    corpus = load("few.jsonl,many.jsonl", validation_fraction=0.001)
    assert corpus.validation["text"] and not set(corpus.validation["text"]) & set(corpus.train["text"])


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


def test_one_large_document_does_not_end_what_is_held_out():
    """It is passed over, wherever it comes, as long as there is less than half of what may be held out."""
    small = [f"text number {number:04d}" for number in range(300)]
    book = min((f"book {number} " * 1000 for number in range(100)), key=hash_text)  # comes among the first
    texts = datasets.Dataset.from_dict({"text": [*small, book]})
    assert hash_text(book) < sorted(map(hash_text, small))[30]
    kept = keep_bytes(texts, 2000)["text"]
    assert book not in kept and 1900 < count_bytes(kept) <= 2000
    assert len(keep_bytes(datasets.Dataset.from_dict({"text": ["a" * 50, "b" * 60]}), 10)) == 1


def test_a_blank_text_is_not_held_out():
    for by_paragraph in (False, True):
        held_out = HeldOut(["one text\n\nof two parts"], by_paragraph)
        assert (
            "of two parts" not in HeldOut(["one text"], by_paragraph)
            and "" not in held_out
            and " \n\n" not in held_out
        )


def test_what_does_not_fit_ends_what_is_held_out():
    """Once there is half: a few bytes more to hold out let no document in that comes after one that stays out."""
    texts = datasets.Dataset.from_dict({"text": [f"{number} " * (1 + number % 17) for number in range(300)]})
    in_order = sorted(texts["text"], key=hash_text)
    for limit in range(2000, 2100, 10):
        kept = keep_bytes(texts, limit)["text"]
        assert sorted(kept, key=hash_text) == in_order[: len(kept)]
        assert count_bytes(in_order[: len(kept) + 1]) > limit >= count_bytes(kept)
