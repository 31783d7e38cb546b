"""What of a run is sent: no local path, and nothing that is not its own."""

from __future__ import annotations

import json

import pytest

from oneday.checkpoints import find_fault
from oneday.durable_files import read_json
from oneday.public_copies import hide_paths, stage_checkpoint, stage_model, stage_saved_model


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("/home/ann/my texts/*.parquet", "*.parquet"),
        ("/x/y,/z/w.txt", "y,w.txt"),
        ("/home/ann/my texts/a.txt,/data/b c.txt", "a.txt,b c.txt"),
        ("../ann private/x.txt", "x.txt"),
        ("../../ann/private/x.txt", "x.txt"),
        ("~/my keys/x.txt", "x.txt"),
        ("corpus:/home/ann/x.txt", "corpus:x.txt"),
        ("file:///home/ann/x.txt", "x.txt"),
        (r"C:\Users\ann\x.txt", "x.txt"),
        ("see /home/ann/run/model.bin, or ~/keys", "see model.bin, or keys"),
        ("of `/home/ann/my texts/x.txt`\nand '/home/ann b/y.txt'", "of `x.txt`\nand 'y.txt'"),
        ("the path ../ann/x.txt is cut", "the path x.txt is cut"),
    ],
)
def test_paths_are_cut_down_to_their_names(text, sent):
    assert hide_paths(text) == sent
    assert hide_paths({"a": [text, 7, None]}) == {"a": [sent, 7, None]}


def test_a_path_that_exists_is_one_name_whatever_is_in_it(tmp_path):
    folder = tmp_path / "a,b" / "secret"
    folder.mkdir(parents=True)
    assert hide_paths(str(folder)) == "secret"
    assert hide_paths("/tmp") == "tmp"


@pytest.mark.parametrize(
    "text",
    [
        "/", "/think", "and/or", "https://huggingface.co/a/b", "model_configs/bert-mini.json", "3/4", "ann/model",
        "hf://datasets/ann/x/*.parquet", "a sentence, and/or two: 'a/b/c' or 1/2/3", "", "lines\nof `a/b` text",
    ],
)  # fmt: skip
def test_what_is_no_local_path_stays(text):
    assert hide_paths(text) == text


def test_a_generator_is_not_sent_with_its_model(tmp_path):
    for name in ("model.safetensors", "companion.safetensors", "config.json", "optimizer.pt"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "sent").mkdir()
    stage_saved_model(tmp_path, tmp_path / "sent")
    assert sorted(path.name for path in (tmp_path / "sent").iterdir()) == ["config.json", "model.safetensors"]


def test_only_a_runs_own_files_are_sent(tmp_path, caplog):
    caplog.set_level("INFO")
    run, sent = tmp_path / "run", tmp_path / "sent"
    (run / "glue").mkdir(parents=True)
    sent.mkdir()
    ours = ["README.md", "config.json", "model-00001-of-00002.safetensors", "recipe.yaml", "tokenizer.json"]
    unsent = [".lock", "training_args.bin", "wandb_run.json"]
    for name in [*ours, "nohup.out", "train.log", "keys.json", *unsent, "glue/glue_results.json"]:
        (run / name).write_text("{}")
    stage_model(run, sent)
    assert sorted(str(path.relative_to(sent)) for path in sent.rglob("*") if path.is_file()) == sorted(
        [*ours, "glue/glue_results.json"]
    )
    assert caplog.messages == ["Not sent, as they are not a run's files: keys.json, nohup.out, train.log"]


def test_a_checkpoint_goes_out_as_one_of_a_run_that_goes_on(tmp_path):
    """The run may have ended before it was sent; what comes back has no final model."""
    (tmp_path / "run" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-4" / "oneday_state.json").write_text("{}")
    (tmp_path / "run" / "budget.json").write_text(json.dumps({"status": "finished", "spent": {"seconds": 3.0}}))
    (tmp_path / "sent").mkdir()
    stage_checkpoint(tmp_path / "run" / "checkpoint-4", tmp_path / "sent", "last-checkpoint")
    assert read_json(tmp_path / "sent" / "budget.json") == {"status": "interrupted", "spent": {"seconds": 3.0}}
    assert find_fault(tmp_path / "sent" / "last-checkpoint") is None
