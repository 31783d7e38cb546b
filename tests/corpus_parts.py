"""What tests of the corpus share: texts, files of them in every format, and corpora read from those."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oneday.arguments import DataArguments
from oneday.corpus import Corpus, load_corpus
from oneday.stream_files import TablePart
from oneday.text_streams import FileStream

TEXTS = [f"Document {i} tells of the number {i}, 'quoted', with a comma and an é." for i in range(40)]


@pytest.fixture
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


def stream_of(texts: list[str], num_parts: int = 1) -> FileStream:
    stored = datasets.Dataset.from_dict({"text": texts})
    return FileStream([TablePart(stored, part, num_parts) for part in range(num_parts)], num_parts)
