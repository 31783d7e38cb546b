"""What is kept of a text, its names and hashes, the cache, and settings that cannot work."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
import pytest
from corpus_parts import TEXTS, list_texts, load, stream_of, write_texts

from oneday.corpus import count_bytes, hash_documents, resolve_cache_dir, sample_bytes
from oneday.corpus_names import name_path
from oneday.errors import SettingError

pytestmark = pytest.mark.usefixtures("stay_in_folder")


def test_blank_and_null_texts_are_dropped():
    texts = [*TEXTS, "", "  \n\t", None]
    assert sorted(list_texts(load(write_texts("a.parquet", texts)))) == sorted(TEXTS)
    assert sorted(list_texts(load(write_texts("a.jsonl", texts)))) == sorted(TEXTS)


def test_glob_list_and_comma_mean_the_same_texts():
    write_texts("a-0.jsonl", TEXTS[:20])
    write_texts("a-1.jsonl", TEXTS[20:])
    corpora = [load("a-*.jsonl"), load("a-0.jsonl,a-1.jsonl"), load(["a-0.jsonl", "a-1.jsonl"])]
    assert all(sorted(list_texts(corpus)) == sorted(TEXTS) for corpus in corpora)
    assert corpora[1].corpus_hash == corpora[2].corpus_hash


def test_max_train_documents_and_hash():
    write_texts("a.jsonl")
    corpora = [load("a.jsonl", max_train_documents=count) for count in (5, 6, 5)]
    assert [len(corpus.train) for corpus in corpora] == [5, 6, 5]
    assert corpora[0].corpus_hash == corpora[2].corpus_hash != corpora[1].corpus_hash
    moved = load("a.jsonl", validation_fraction=0.5)
    assert moved.corpus_hash != load("a.jsonl").corpus_hash
    assert len(moved.corpus_hash) == 16


def test_a_tokenizer_is_trained_on_text_from_everywhere():
    """Of a corpus that is larger than what it takes; a smaller one it takes whole, in its order."""
    texts = datasets.Dataset.from_dict({"text": ["ö" * 50] * 500 + ["b" * 100] * 500})
    taken = list(sample_bytes(texts, 20_000))
    assert sum(map(count_bytes, [[text] for text in taken])) == 20_000
    assert 70 < sum(text[0] == "b" for text in taken) < 130
    assert list(sample_bytes(texts, 100_000)) == texts["text"][:]
    assert list(sample_bytes(stream_of(texts["text"][:]), 20_000)) == ["ö" * 50] * 200


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


@pytest.mark.skipif("ONEDAY_DATA" not in os.environ, reason="ONEDAY_DATA names no directory of corpora")
def test_real_corpus():
    folder = Path(os.environ["ONEDAY_DATA"]) / "corpora/eltec_eng_novels"
    corpus = load(str(folder / "train.parquet"), validation_name=str(folder / "validation.parquet"))
    assert len(corpus.train) > 2900
    assert len(corpus.validation) == 261
