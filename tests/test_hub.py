"""Pushing to the Hub and coming back, with the official client against a server on the loopback interface."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT
from hub_server import RETRY_AFTER_SECONDS, commit_of
from huggingface_hub import HfApi
from program_parts import SMALL
from transformers import AutoModelForMaskedLM, AutoTokenizer

from oneday import run_directory
from oneday.checkpoints import find_fault, list_checkpoints, seal_checkpoint
from oneday.durable_files import read_json
from oneday.errors import SettingError
from oneday.hub import (
    COPIES,
    HubPusher,
    describe_command,
    describe_failure,
    fetch_run,
    fetch_sources,
    find_newest,
    push_checkpoint,
)
from oneday.run_directory import inspect_run, read_metrics

SECRET = "hf_good"


@pytest.fixture
def program(hub, texts, tmp_path):
    """Runs a script in a process of its own, on another machine's empty cache; returns (code, what it said)."""
    text = tmp_path / "secret place" / "words" / "texts.jsonl"
    text.parent.mkdir(parents=True)
    text.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def run(script, home="home", token=SECRET, **settings):
        folder = tmp_path / home
        environment = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "hf"),
            "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "ONEDAY_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        given = {**SMALL, "dataset_name": text} if script == "pretrain" else {}
        words = [word for name, value in {**given, **settings}.items() for word in (f"--{name}", str(value))]
        done = subprocess.run(
            [sys.executable, ROOT / "scripts" / f"{script}.py", *words],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    run.texts = text
    return run


def load_elsewhere(hub, tmp_path, repo, texts):
    """Logits of a model taken from the Hub by a process that has only transformers, and an empty cache."""
    code = (
        "import sys, json, torch; from transformers import AutoModelForMaskedLM as M, AutoTokenizer as T;"
        f"m, t = M.from_pretrained({repo!r}), T.from_pretrained({repo!r});"
        f"print(json.dumps(m(**t({texts!r}, return_tensors='pt')).logits.tolist()))"
    )
    environment = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "empty"), "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_a_run_pushed_while_it_trains_goes_on_elsewhere(hub, program, texts, tmp_path):
    """Taken up from a pushed checkpoint in an empty directory, ended there alike, and loaded by anyone."""
    here, there = tmp_path / "deep" / "run", tmp_path / "other" / "run"
    settings = {"budget_steps": 6, "save_steps": 2, "push_to_hub": "true", "hub_model_id": "ann/tiny"}
    code, said = program("pretrain", output_dir=here, **settings, hub_strategy="all_checkpoints")
    assert code == 0, said
    assert "The model is on the Hub: " in said
    branches = hub.branches["ann/tiny"]
    assert {"model.safetensors", "README.md", "recipe.yaml", "metrics.jsonl", "training_curve.png"} <= set(
        branches["main"]
    )
    assert not any(name.startswith("checkpoint") for name in branches["main"])
    # Another machine finds what was pushed first, as if this one had been taken away then; which checkpoint that is
    # depends on how long the others took to send, and it may be the last.
    sent = {name.split("/")[0] for name in branches["checkpoints"] if name.startswith("checkpoint-")}
    first = min(sent, key=lambda name: int(name.rpartition("-")[2]))
    later = {name for name in branches["checkpoints"] if "/" in name and not name.startswith(first)}
    branches["checkpoints"] = {name: data for name, data in branches["checkpoints"].items() if name not in later}
    code, said = program(
        "pretrain", "elsewhere", output_dir=there, resume_from_hub="ann/tiny", **(settings | {"push_to_hub": "false"})
    )
    assert code == 0, said
    assert f"Resuming from step {first.rpartition('-')[2]}," in said, said
    assert [event["step"] for event in read_metrics(there) if event["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert not any(find_fault(checkpoint) for checkpoint in list_checkpoints(there))
    assert (
        read_json(there / "budget.json")["spent"]["seconds"]
        > read_json(here / "budget.json")["ledger_seconds"]["steps"] / 3
    )
    ours, elsewhere = (AutoModelForMaskedLM.from_pretrained(folder) for folder in (here, there))
    tokenizer = AutoTokenizer.from_pretrained(here)
    inputs = tokenizer(texts[:1], return_tensors="pt")
    logits = ours(**inputs).logits
    assert logits.equal(elsewhere(**inputs).logits), "the run that moved ended with other weights"
    assert load_elsewhere(hub, tmp_path, "ann/tiny", texts[:1]) == logits.tolist()
    for path, body, _ in hub.received:
        for secret in (str(tmp_path), "secret place", SECRET, str(ROOT), os.path.expanduser("~") + "/"):
            assert secret.encode() not in body, f"{secret} was sent to {path}"
    card = branches["main"]["README.md"].decode()
    assert 'from_pretrained("ann/tiny")' in card and "license: apache-2.0" in card
    del branches["main"]["model.safetensors"]  # as if the last push had been cut off
    code, said = program("pretrain", output_dir=here, **settings, hub_license="cc-by-sa-3.0")
    assert code == 0 and "is finished" in said and "The model is on the Hub: " in said, said
    assert "model.safetensors" in branches["main"] and b"license: cc-by-sa-3.0" in branches["main"]["README.md"]
    assert "push_to_hub: false" in (here / "recipe.yaml").read_text()
    code, said = program("push_to_hub", run_dir=here, hub_model_id="ann/tiny", hub_license="mit")
    assert code == 0 and b"license: mit" in branches["main"]["README.md"], said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "reason"), [(401, "the Hub does not know the token"), (403, "the token may not write there")]
)
def test_what_the_hub_refuses_ends_nothing(hub, program, tmp_path, status, reason):
    """The run is finished all the same; the command to push it is said, and works. What passes is tried again."""
    passing = [429, 500]
    hub.errors[("POST", "/commit/")] = [*passing, *[status] * 9]
    run = tmp_path / "run"
    settings = {"push_to_hub": "true", "hub_model_id": "ann/tiny", "hub_strategy": "end", "hub_private_repo": "true"}
    code, said = program("pretrain", output_dir=run, **settings)
    assert code == 0, said
    assert read_json(run / "results.json")
    assert f"The model was not pushed to ann/tiny ({reason}" in said
    assert f"python scripts/push_to_hub.py --run_dir {run} --hub_model_id ann/tiny" in said
    tried = [when for path, _, when in hub.received if "/commit/" in path]
    assert len(tried) == 3, "a refusal is final"
    assert tried[1] - tried[0] >= RETRY_AFTER_SECONDS, "tried again before the Hub allowed it"
    hub.errors[("POST", "/commit/")] = list(passing)
    hub.received.clear()
    code, said = program("push_to_hub", run_dir=run, hub_model_id="ann/tiny")
    assert code == 0 and "/commit/" in said, said
    assert sum("/commit/" in path for path, _, _ in hub.received) == 3, "what passes is tried again"
    assert "model.safetensors" in hub.branches["ann/tiny"]["main"]
    created = [json.loads(body) for path, body, _ in hub.received if path.endswith("/repos/create")]
    assert created and all(asked.get("visibility") == "private" or asked.get("private") for asked in created)


@pytest.mark.parametrize("file", ["model.safetensors", "metrics.jsonl", "recipe.yaml"])
def test_a_run_that_did_not_fit_on_the_disk_is_fetched_again(tmp_path, monkeypatch, file):
    """Wherever the disk is full, nothing is left that a run is not; the same command brings everything."""
    run, folder = tmp_path / "pushed", tmp_path / "here"
    (run / "last-checkpoint").mkdir(parents=True)
    for name in ("model.safetensors", "oneday_state.json"):
        (run / "last-checkpoint" / name).write_text("{}")
    (run / "last-checkpoint" / "trainer_state.json").write_text('{"global_step": 4}')
    seal_checkpoint(run / "last-checkpoint")
    for name in ("recipe.yaml", "budget.json", "metrics.jsonl", "wandb_run.json"):
        (run / name).write_text("{}")
    monkeypatch.setattr("oneday.hub.list_remote_checkpoints", lambda api, repo: set())
    monkeypatch.setattr(
        "oneday.hub.snapshot_download",
        lambda repo, revision, local_dir, allow_patterns: shutil.copytree(run, local_dir, dirs_exist_ok=True),
    )
    copy, write = shutil.copyfile, run_directory.write_recipe

    def fill_disk(source, *arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    def copy_all_but_one(source, target, **options):
        return (fill_disk if Path(source).name == file and "here" in str(target) else copy)(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", copy_all_but_one)
        patch.setattr(shutil, "copy2", copy_all_but_one)
        if file == "recipe.yaml":
            patch.setattr(run_directory, "write_recipe", fill_disk)
        with pytest.raises(SettingError, match="is full"):
            fetch_run("ann/tiny", folder, {}, "text", "model")
    assert not folder.exists() or not [path for path in folder.rglob("*") if path.is_file()]
    assert write is run_directory.write_recipe and inspect_run(folder, {}) == "new"
    folder.mkdir(exist_ok=True)
    fetch_run("ann/tiny", folder, {}, "text", "model")
    brought = {"recipe.yaml", "budget.json", "metrics.jsonl", "wandb_run.json"}
    assert {path.name for path in folder.iterdir()} == {"checkpoint-4", *brought}
    assert find_fault(folder / "checkpoint-4") is None


@pytest.mark.slow
def test_the_last_checkpoint_is_pushed_afterwards(hub, program, tmp_path):
    """Of a run that has ended: elsewhere nothing is left to train, and the model is the same."""
    here, there = tmp_path / "run", tmp_path / "there"
    settings = {"budget_steps": 4, "save_steps": 4}
    for output_dir, extra in ((here, {}), (there, {"resume_from_hub": "ann/tiny"})):
        code, said = program("pretrain", output_dir=output_dir, **settings, **extra)
        assert code == 0, said
        if output_dir == here:
            code, said = program("push_to_hub", run_dir=here, hub_model_id="ann/tiny", last_checkpoint="true")
            assert (code, "/commit/" in said) == (0, True), said
            assert "last-checkpoint/model.safetensors" in hub.branches["ann/tiny"]["checkpoints"]
    assert (here / "model.safetensors").read_bytes() == (there / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "full"), "a file could not be read or copied here: No space left on device"),
        (FileNotFoundError(errno.ENOENT, "gone", "x"), "a file could not be read or copied here: No such file"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "no"), "the Hub cannot be reached (ConnectionRefusedError)"),
        (TimeoutError(errno.ETIMEDOUT, "late"), "the Hub cannot be reached (TimeoutError)"),
        (ValueError("Invalid metadata in README.md.\n- bad licence"), "Invalid metadata in README.md. - bad licence"),
    ],
)
def test_why_a_push_failed(error, words):
    assert describe_failure(error).startswith(words)


def test_the_newest_checkpoint_follows_the_one_on_its_way(tmp_path, monkeypatch, caplog):
    """While one is sent others come: only the newest of them is sent after it, and none is forgotten."""
    (tmp_path / f"{COPIES}left-by-a-killed-process").mkdir()
    sent, may_go_on = [], threading.Semaphore(0)
    pusher = HubPusher(tmp_path, "ann/tiny", "checkpoint")
    assert not list(tmp_path.glob(f"{COPIES}*"))

    def send(api, checkpoint, *args):
        may_go_on.acquire()
        sent.append(checkpoint.name)
        return "there"

    monkeypatch.setattr("oneday.hub.push_checkpoint", send)
    pusher.leave(60)
    for step in range(1, 5):
        (tmp_path / f"checkpoint-{step}").mkdir()
        pusher.push_newest()
        while step == 1 and pusher.waiting is not None:
            time.sleep(0.001)
    assert not caplog.messages
    pusher.leave(0.01)
    assert caplog.messages[0].startswith("The last checkpoint is not on the Hub yet. To push it: python scripts/")
    assert caplog.messages[0].endswith("--hub_model_id ann/tiny --last_checkpoint")
    may_go_on.release(2)
    assert pusher.wait(60)
    assert sent == ["checkpoint-1", "checkpoint-4"]
    (tmp_path / "checkpoint-5").mkdir()
    may_go_on.release()
    pusher.push_newest()
    pusher.wait(60)
    assert sent[2:] == ["checkpoint-5"]


def test_of_two_kinds_of_checkpoints_the_one_of_most_steps_comes_back(tmp_path):
    for name, step in (("last-checkpoint", 4), ("checkpoint-6", 6), ("checkpoint-10", 10)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (tmp_path / "checkpoint-12").mkdir()
    assert find_newest(tmp_path).name == "checkpoint-10", "checkpoint-12 is damaged"
    (tmp_path / "last-checkpoint" / "trainer_state.json").write_text(json.dumps({"global_step": 14}))
    assert find_newest(tmp_path).name == "last-checkpoint"
    (tmp_path / "none").mkdir()
    assert find_newest(tmp_path / "none") is None
    assert "--run_dir '/a b/run'" in describe_command("/a b/run", "ann/tiny")


def test_a_run_of_another_text_is_not_fetched(tmp_path, monkeypatch):
    """Nothing of it is left, so that the command with the right text starts in an empty directory."""
    run, folder = tmp_path / "pushed", tmp_path / "here"
    (run / "last-checkpoint").mkdir(parents=True)
    (run / "last-checkpoint" / "oneday_state.json").write_text('{"data": "text", "model": "config"}')
    (run / "last-checkpoint" / "trainer_state.json").write_text('{"global_step": 4}')
    seal_checkpoint(run / "last-checkpoint")
    (run / "recipe.yaml").write_text("dataset_name: /there/a.parquet\n")
    monkeypatch.setattr("oneday.hub.list_remote_checkpoints", lambda api, repo: set())
    monkeypatch.setattr(
        "oneday.hub.snapshot_download",
        lambda repo, revision, local_dir, allow_patterns: shutil.copytree(run, local_dir, dirs_exist_ok=True),
    )
    settings = {"dataset_name": "here/b.parquet"}
    for data, model, words in (("other", "config", "text or tokenizer"), ("text", "other", "file of model_config")):
        with pytest.raises(SettingError, match=f"The {words} .* the run in ann/tiny .* leave resume_from_hub out"):
            fetch_run("ann/tiny", folder, settings, data, model)
        assert not folder.exists()
    fetch_run("ann/tiny", folder, settings, "text", "config")
    assert (folder / "checkpoint-4").is_dir()


def test_checkpoints_that_an_extension_threw_away_are_removed_from_the_hub(hub, monkeypatch, tmp_path):
    """Else another machine would take the one of most steps, whose learning rate had fallen; others stay."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    api = HfApi(hub.url, token="hf_good")

    def push(step, strategy="all_checkpoints"):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir(exist_ok=True)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        seal_checkpoint(folder)
        push_checkpoint(api, folder, "ann/tiny", strategy)

    for step in (4, 12, 16):
        push(step)
    push(13, "checkpoint")
    push(13)
    names = {name.split("/")[0] for name in hub.branches["ann/tiny"]["checkpoints"] if "/" in name}
    assert names == {"checkpoint-4", "checkpoint-12", "checkpoint-13", "last-checkpoint"}


def test_what_cannot_be_brought_back(hub, program, tmp_path):
    code, said = program("pretrain", output_dir=tmp_path / "new", resume_from_hub="ann/nothing")
    assert code == 1
    assert "error: The setting resume_from_hub is 'ann/nothing', whose branch checkpoints cannot be had" in said
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_pushed(run_script, tmp_path):
    push = ("push_to_hub", tmp_path, "--hub_model_id", "ann/tiny")
    for argv, words in (
        (push, f"run_dir {tmp_path} holds no finished run"),
        ((*push, "--last_checkpoint"), "holds no whole checkpoint"),
        ((*push, "--last_checkpoint", "--hub_license", "mit"), "hub_license is for a model's card"),
        (("pretrain", "--output_dir", tmp_path / "new", "--push_to_hub"), "hub_model_id is empty"),
    ):
        code, _, said = run_script(*argv)
        assert (code, said.count(words)) == (1, 1), said


@pytest.mark.parametrize("streaming", [pytest.param("false", marks=pytest.mark.slow), "true"])
def test_a_data_set_of_the_hub(hub, program, texts, tmp_path, streaming):
    """Read whole and as a stream, by its id."""
    held_out = tmp_path / "held_out.txt"
    hub.branches["ann/texts"]["main"] = {
        f"data/train-0000{part}-of-00002.parquet": pd.DataFrame({"text": texts[part:250:2]}).to_parquet()
        for part in range(2)
    }
    held_out.write_text("\n\n".join(texts[250:]))
    run = tmp_path / "run"
    name = "ann/texts@main" if streaming == "true" else "ann/texts"
    given = {"dataset_name": name, "streaming": streaming, "validation_name": held_out, "output_dir": run}
    given["embedding_init"] = "random"  # counting needs the text on disk
    code, said = program("pretrain", **given)
    assert code == 0, said
    assert read_json(run / "results.json")["corpus"].startswith("ann/texts")
    # The publisher commits something else; the run is extended on what it began with.
    began = hub.branches["ann/texts"]["main"]
    hub.branches["ann/texts"] |= {
        "old": began,
        "main": {name: data for name, data in began.items() if "0-of" in name},
    }
    assert read_json(run / "sources.json") == {name: commit_of(began)}
    code, said = program("pretrain", **given, budget_steps=6, extend="true")
    assert code == 0 and read_json(run / "results.json")["steps"] == 6, said
    again = {**given, "output_dir": tmp_path / "again", "replay": run}
    code, said = program("pretrain", **again, budget_steps=6)
    assert code == 0 and read_json(tmp_path / "again/sources.json") == {name: commit_of(began)}, said


def test_the_sources_of_a_pushed_run(tmp_path, monkeypatch):
    (tmp_path / "sources.json").write_text(json.dumps({"ann/texts": "c0ffee"}))
    monkeypatch.setattr("oneday.hub.hf_hub_download", lambda repo, name, revision: tmp_path / name)
    assert fetch_sources("ann/tiny") == {"ann/texts": "c0ffee"}

    def refuse(*args, **kwargs):
        raise ConnectionError

    monkeypatch.setattr("oneday.hub.hf_hub_download", refuse)
    assert fetch_sources("ann/tiny") == {}
