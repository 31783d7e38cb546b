"""Packed rows on disk: what goes in comes out, complete or not at all."""

from __future__ import annotations

import errno
import functools
import json
import os
import pickle
import subprocess
import sys
import time

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from test_tokenization import CHINESE, TEXTS

import oneday.packed_dataset
from oneday.errors import SettingError
from oneday.packed_dataset import PackedDataset, PackedWriter, pack_corpus, packing_key
from oneday.packing import PackedRows
from oneday.tokenization import encode_documents
from oneday.tokenizer_training import train_tokenizer


@functools.cache
def train(tokenizer_type="wordpiece", vocab_size=1000):
    return train_tokenizer(TEXTS, tokenizer_type, vocab_size)


def make_rows(num_rows, row_length, seed=0):
    """Rows of random ids, each cut into two pieces, the last tenth padding."""
    row_tokens = row_length - row_length // 10
    ids = np.random.default_rng(seed).integers(1, 60_000, (num_rows, row_length)).astype(np.uint16)
    lengths = np.tile([row_tokens - 3, 3], num_rows)
    return PackedRows(ids, lengths, np.arange(num_rows + 1) * 2)


def batches(texts, size=50):
    return [texts[i : i + size] for i in range(0, len(texts), size)]


def pack(out_dir, texts=TEXTS, kind="encoder", row_length=64, strategy="best_fit", tokenizer=None, **more):
    return pack_corpus(batches(texts), tokenizer or train(), kind, row_length, strategy, out_dir, **more)


def read_pieces(dataset, num_prefix, num_suffix):
    """Every piece without its special tokens, as a sorted list."""
    input_ids, doc_lengths = dataset.get_rows(np.arange(len(dataset)))
    pieces = []
    for row, lengths in zip(input_ids.tolist(), doc_lengths):
        ends = np.cumsum(lengths.astype(int)).tolist()
        starts = [0, *ends[:-1]]
        pieces += [row[start + num_prefix : end - num_suffix] for start, end in zip(starts, ends)]
    return sorted(pieces)


def cut(tokenizer, texts, capacity):
    tokens, lengths = encode_documents(tokenizer, texts)
    documents = np.split(tokens, np.cumsum(lengths)[:-1])
    return sorted(d[i : i + capacity].tolist() for d in documents for i in range(0, len(d), capacity))


@pytest.mark.parametrize(("tokenizer_type", "kind"), [("wordpiece", "encoder"), ("bpe", "decoder")])
@pytest.mark.parametrize("strategy", ["best_fit", "padded"])
@pytest.mark.parametrize("block_tokens", [5_000, 10**9])
def test_corpus_comes_back(tokenizer_type, kind, strategy, block_tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(oneday.packed_dataset, "BLOCK_TOKENS", block_tokens)
    tokenizer = train(tokenizer_type)
    num_special = 2 if kind == "encoder" else 1
    dataset = pack(tmp_path / "rows", kind=kind, strategy=strategy, tokenizer=tokenizer)
    assert read_pieces(dataset, 1, num_special - 1) == cut(tokenizer, TEXTS, 64 - num_special)
    assert (len(dataset.index.shards) > 5) == (block_tokens == 5_000)
    assert dataset.index.num_documents == len(TEXTS)
    assert dataset.num_bytes_text == sum(len(text.encode()) for text in TEXTS)
    assert dataset.num_tokens == sum(len(p) + num_special for p in cut(tokenizer, TEXTS, 64 - num_special))
    assert dataset.index.packing_efficiency == dataset.num_tokens / (len(dataset) * 64)
    assert (dataset.index.packing_efficiency > 0.98) == (strategy == "best_fit")


@pytest.mark.parametrize(
    ("tokenizer_type", "kind", "vocab_size"), [("wordpiece", "encoder", 115), ("bpe", "decoder", 400)]
)
def test_chinese_corpus(tokenizer_type, kind, vocab_size, tmp_path):
    tokenizer = train_tokenizer(CHINESE, tokenizer_type, vocab_size)
    dataset = pack(tmp_path / "rows", CHINESE, kind, row_length=32, tokenizer=tokenizer)
    num_special = 2 if kind == "encoder" else 1
    assert read_pieces(dataset, 1, num_special - 1) == cut(tokenizer, CHINESE, 32 - num_special)


def test_vocabulary_above_16_bits_and_long_rows(tmp_path):
    with PackedWriter(tmp_path / "rows", 70_000, vocab_size=100_000) as writer:
        writer.write_shard(
            PackedRows(np.full((2, 70_000), 99_999, np.uint32), np.array([69_000, 5]), np.array([0, 1, 2]))
        )
    input_ids, doc_lengths = PackedDataset(tmp_path / "rows").get_rows([1, 0])
    assert input_ids.dtype == np.uint32 and (input_ids == 99_999).all()
    assert [lengths.tolist() for lengths in doc_lengths] == [[5], [69_000]]


def test_rows_of_many_shards_in_any_order(tmp_path):
    parts = [make_rows(n, 32, seed) for seed, n in enumerate([5, 1, 9])]
    with PackedWriter(tmp_path / "rows", 32, vocab_size=1 << 16) as writer:
        for part in parts:
            writer.write_shard(part)
    dataset = PackedDataset(tmp_path / "rows")
    expected = np.concatenate([part.input_ids for part in parts])
    order = np.random.default_rng(0).integers(0, 15, 40)
    input_ids, doc_lengths = dataset.get_rows(order)
    assert input_ids.dtype == np.uint16 and np.array_equal(input_ids, expected[order])
    assert all(lengths.tolist() == [26, 3] for lengths in doc_lengths)
    again = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(again.get_rows(order)[0], input_ids) and len(pickle.dumps(dataset)) < 1000
    with pytest.raises(AssertionError):
        dataset.get_rows(np.array([15]))


def test_datasets_opens_a_shard(tmp_path):
    dataset = pack(tmp_path / "rows", row_length=64)
    plain = datasets.Dataset.from_file(str(tmp_path / "rows" / "shard-00000.arrow"))
    input_ids, doc_lengths = dataset.get_rows([3])
    assert len(plain) == len(dataset)
    assert plain[3] == {"input_ids": input_ids[0].tolist(), "doc_lengths": doc_lengths[0].tolist()}
    assert plain.features["input_ids"].length == 64 and plain.features["input_ids"].feature.dtype == "uint16"


def test_reading_rows_is_fast(tmp_path):
    with PackedWriter(tmp_path / "rows", 128, vocab_size=8192) as writer:
        for seed in range(4):
            writer.write_shard(make_rows(5_000, 128, seed))
    dataset = PackedDataset(tmp_path / "rows")
    generator = np.random.default_rng(0)
    seconds = []
    for _ in range(50):
        indices = generator.integers(0, len(dataset), 128)
        started = time.perf_counter()
        dataset.get_rows(indices)
        seconds.append(time.perf_counter() - started)
    assert np.median(seconds) < 2e-3  # about 0.1 ms


def test_a_complete_directory_is_used_again(tmp_path):
    pack(tmp_path / "rows", key="k1")
    stamp = (tmp_path / "rows" / "index.json").stat().st_mtime_ns

    def fail():
        raise AssertionError("the corpus was read")
        yield

    again = pack_corpus(fail(), train(), "encoder", 64, "best_fit", tmp_path / "rows", key="k1")
    assert len(again) and (tmp_path / "rows" / "index.json").stat().st_mtime_ns == stamp
    with pytest.raises(SettingError, match="not empty"):
        pack(tmp_path / "rows", key="k2")
    with pytest.raises(SettingError, match="not empty"):
        pack(tmp_path / "rows")


def test_nothing_of_the_users_is_overwritten(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "thesis.txt").write_text("mine")
    with pytest.raises(SettingError, match="not empty"):
        pack(tmp_path / "rows", key="k")
    assert [p.name for p in tmp_path.rglob("*")] == ["rows", "thesis.txt"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_by_its_error(number, tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SettingError, match="rows could not be written .*free some space"):
        pack(tmp_path / "rows")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_while_arrow_writes(tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(SettingError, match="could not be written"):
            pack(tmp_path / "rows")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_corpus_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(oneday.packed_dataset, "BLOCK_TOKENS", 1_000)

    def interrupt():
        yield TEXTS[:100]
        assert list(tmp_path.glob(".rows.partial-*/shard-00000.arrow"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_corpus(interrupt(), train(), "encoder", 64, "best_fit", tmp_path / "rows")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_swept(tmp_path):
    kill = (
        "import os, signal, sys; from oneday.packed_dataset import PackedWriter;"
        "PackedWriter(sys.argv[1], 8, 100); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", kill, str(tmp_path / "rows")], check=False)
    assert [p.name.startswith(".rows.partial-") for p in tmp_path.iterdir()] == [True]
    pack(tmp_path / "rows")
    assert [p.name for p in tmp_path.iterdir()] == ["rows"]


def test_another_process_that_was_faster_wins(tmp_path):
    late = PackedWriter(tmp_path / "rows", 64, 1000)
    late.write_shard(make_rows(3, 64))
    # The other process has another number, so the names of the two do not meet.
    late._partial = late._partial.rename(late._partial.with_name(".rows.partial-other-1"))
    first = pack(tmp_path / "rows", key="k")
    late.close()
    assert len(PackedDataset(tmp_path / "rows")) == len(first)
    assert [p.name for p in tmp_path.iterdir()] == ["rows"]


@pytest.mark.parametrize("texts", [[], [""], ["\x00", " "]])
def test_corpus_without_a_token(texts, tmp_path):
    with pytest.raises(SettingError, match="no token"):
        pack(tmp_path / "rows", texts)
    assert list(tmp_path.iterdir()) == []


def test_bad_settings(tmp_path):
    with pytest.raises(SettingError, match="packing_strategy='wild'"):
        pack(tmp_path / "rows", strategy="wild")
    with pytest.raises(SettingError, match="max_seq_length=2 "):
        pack(tmp_path / "rows", row_length=2)
    with pytest.raises(SettingError, match="no packed rows"):
        PackedDataset(tmp_path / "rows")


def test_damage_is_noticed(tmp_path):
    pack(tmp_path / "rows")
    shard = tmp_path / "rows" / "shard-00000.arrow"
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(SettingError, match="shard-00000.arrow is damaged"):
        PackedDataset(tmp_path / "rows")
    index = json.loads((tmp_path / "rows" / "index.json").read_text())
    (tmp_path / "rows" / "index.json").write_text(json.dumps({**index, "format_version": 0}))
    with pytest.raises(SettingError, match="another version"):
        PackedDataset(tmp_path / "rows")


def test_packing_key_follows_what_decides_rows():
    settings = {"row_length": 128, "kind": "encoder"}
    key = packing_key("c", train(), settings)
    assert key == packing_key("c", train(), dict(reversed(settings.items())))
    train()("left behind", padding="max_length", truncation=True, max_length=4)
    assert key == packing_key("c", train(), settings)
    others = [("d", train(), settings), ("c", train("bpe"), settings), ("c", train(), {**settings, "row_length": 64})]
    assert len({key, *(packing_key(*other) for other in others)}) == 4


@pytest.mark.skipif("ONEDAY_DATA" not in os.environ, reason="needs real articles in $ONEDAY_DATA")
@pytest.mark.parametrize("row_length", [128, 512, 1024])
def test_efficiency_on_wikipedia(row_length, tmp_path):
    path = os.path.join(os.environ["ONEDAY_DATA"], "corpora", "wikipedia_en_2015_core", "validation.parquet")
    texts = pyarrow.parquet.read_table(path).column("text").to_pylist()
    tokenizer = train_tokenizer(texts, "wordpiece", 8192)
    assert pack(tmp_path / "rows", texts, row_length=row_length, tokenizer=tokenizer).index.packing_efficiency > 0.99
