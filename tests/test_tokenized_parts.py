"""Text tokenised in parts: rows packed from them are, byte for byte, those of one machine."""

from __future__ import annotations

import datasets
import pyarrow as pa
import pytest

from oneday import packed_dataset, tokenized_parts
from oneday.arguments import DataArguments, ShardArguments
from oneday.errors import SettingError
from oneday.packed_dataset import INDEX_FILE, pack_corpus
from oneday.preparation import prepare_data, tokenize_shard
from oneday.tokenized_parts import find_parts, read_parts, write_part

BATCH = 16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(tokenized_parts, "TEXTS_AT_ONCE", BATCH)
    monkeypatch.setattr("oneday.preparation.TEXTS_AT_ONCE", BATCH)
    monkeypatch.setattr(packed_dataset, "BLOCK_TOKENS", 1500)


def shards_of(folder):
    """The bytes of the rows, shard by shard."""
    return [path.read_bytes() for path in sorted(folder.glob("shard-*.arrow"))]


@pytest.mark.parametrize("num_shards", [1, 3, 7, 40])
def test_parts_give_the_rows_of_one_machine(texts, tokenizers, tmp_path, num_shards):
    """Also with more parts than batches, some of them empty; whichever part is written first."""
    tokenizer, corpus = tokenizers["encoder"], datasets.Dataset.from_dict({"text": [*texts[:150], "", "a \ufffd"]})
    packing = (tokenizer, "encoder", 32, "best_fit")
    here = pack_corpus((batch["text"] for batch in corpus.iter(BATCH)), *packing, tmp_path / "here")
    for shard in reversed(range(num_shards)):
        assert find_parts(tmp_path / "parts", len(corpus)) == []
        write_part(corpus, tokenizer, tmp_path / "parts", shard, num_shards)
    merged = pack_corpus(read_parts(find_parts(tmp_path / "parts", len(corpus))), *packing, tmp_path / "merged")
    assert len(shards_of(tmp_path / "here")) > 2
    assert shards_of(tmp_path / "merged") == shards_of(tmp_path / "here")
    for name in ("num_rows", "num_tokens", "num_documents", "num_bytes_text"):
        assert getattr(merged.index, name) == getattr(here.index, name)


def test_prepare_data_takes_the_parts_and_tokenises_nothing_of_them(texts, tmp_path, monkeypatch):
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(texts))
    settings = {"dataset_name": str(path), "vocab_size": 150, "max_seq_length": 32, "validation_fraction": 0.1}
    alone = prepare_data(DataArguments(**settings, cache_dir=str(tmp_path / "alone")), "encoder", 0)
    args = DataArguments(**settings, cache_dir=str(tmp_path / "shared"))
    for shard in range(2):
        tokenize_shard(args, "encoder", ShardArguments(shard, 2))
    encoded, ordinary = [], packed_dataset.encode_batch
    monkeypatch.setattr(
        packed_dataset, "encode_batch", lambda tokenizer, batch: encoded.extend(batch) or ordinary(tokenizer, batch)
    )
    shared = prepare_data(args, "encoder", 0)
    assert encoded == shared.corpus.validation["text"][:]
    assert shards_of(shared.train.path) == shards_of(alone.train.path)
    assert shared.train.path.name == alone.train.path.name
    assert (shared.train.path / INDEX_FILE).exists()


def test_a_missing_part_is_said(texts, tokenizers, tmp_path, caplog):
    corpus = datasets.Dataset.from_dict({"text": texts})
    write_part(corpus, tokenizers["encoder"], tmp_path, 1, 3)
    write_part(corpus, tokenizers["encoder"], tmp_path, 0, 3)
    assert find_parts(tmp_path, len(corpus)) == []
    assert "2 of 3 parts of the text lie in" in caplog.text


@pytest.mark.parametrize("bytes_left", [0.0, 0.5, "a batch"])
def test_a_part_cut_off_on_its_way_is_named(texts, tokenizers, tmp_path, bytes_left):
    """Anywhere, and between two batches, where Arrow reads it without an error."""
    corpus = datasets.Dataset.from_dict({"text": texts})
    for shard in range(2):
        path = write_part(corpus, tokenizers["encoder"], tmp_path, shard, 2)
    assert len(find_parts(tmp_path, len(corpus))) == 2
    whole = path.read_bytes()
    if bytes_left == "a batch":
        reader = pa.ipc.open_stream(whole)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, reader.schema) as writer:
            writer.write_batch(reader.read_next_batch())
    else:
        path.write_bytes(whole[: int(bytes_left * len(whole))])
    with pytest.raises(SettingError, match="part-00001-of-00002.arrow is not whole"):
        find_parts(tmp_path, len(corpus))


def test_an_interrupted_part_leaves_nothing(texts, tokenizers, tmp_path, monkeypatch):
    def fail(tokenizer, batch):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenized_parts, "encode_batch", fail)
    with pytest.raises(SettingError, match="No space left on device.: free some space"):
        write_part(datasets.Dataset.from_dict({"text": texts}), tokenizers["encoder"], tmp_path, 0, 1)
    assert list(tmp_path.iterdir()) == []


def test_parts_that_cannot_be(texts, tmp_path, monkeypatch):
    args = DataArguments(dataset_name="python-docs", cache_dir=str(tmp_path))
    for shard in (-1, 2):
        with pytest.raises(SettingError, match=f"shard is {shard}; it must be from 0 to num_shards - 1, 1"):
            tokenize_shard(args, "encoder", ShardArguments(shard, 2))
    with pytest.raises(SettingError, match="num_shards is 4, but shard is empty"):
        ShardArguments(num_shards=4)
