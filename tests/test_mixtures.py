"""Several texts as one."""

from __future__ import annotations

import math
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_parts import TEXTS, list_texts, load, stream_of, write_texts

from oneday.arguments import DataArguments
from oneday.errors import SettingError
from oneday.hub_texts import load_hub
from oneday.mixtures import mix, shuffle_together

pytestmark = pytest.mark.usefixtures("stay_in_folder")


def test_infinite_weights_are_refused():
    with pytest.raises(SettingError, match="must all be finite"):
        load([write_texts("a.jsonl"), write_texts("b.jsonl", ["x"])], dataset_weights=[math.inf, 1.0])


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


def test_mixture_follows_its_weights_and_repeats_nothing():
    write_texts("a.jsonl", [f"a {i}" for i in range(2000)])
    write_texts("b.jsonl", [f"b {i}" for i in range(2000)])
    texts = load("a.jsonl,b.jsonl", dataset_weights=[3, 1], validation_fraction=0.01).train["text"][:]
    assert len(set(texts)) == len(texts)
    share = sum(text.startswith("a") for text in texts) / len(texts)
    assert abs(share - 0.75) < 0.03


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
