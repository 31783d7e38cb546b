"""Data sets of the Hub, whole and as a stream."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from types import SimpleNamespace

import datasets
import pytest
from corpus_parts import TEXTS, stream_of, write_texts

from oneday import hub_texts
from oneday.arguments import DataArguments
from oneday.corpus import hash_corpus, load_corpus
from oneday.corpus_names import list_hub_ids, name_corpus
from oneday.errors import SettingError
from oneday.hub_texts import load_hub
from oneday.stream_files import ParquetPart, StreamShard
from oneday.text_streams import FileStream

pytestmark = pytest.mark.usefixtures("stay_in_folder")


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


def test_hub_out_of_reach_says_what_to_do():
    code = """
from oneday.arguments import DataArguments
from oneday.corpus import load_corpus
from oneday.errors import SettingError

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
