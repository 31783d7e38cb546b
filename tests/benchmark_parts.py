"""What tests of the benchmarks share: a tiny recipe, a machine in words, jobs and records, runs without processes."""

from __future__ import annotations

import json

import pytest
import yaml

from oneday.benchmarks.ours import run_ours
from oneday.benchmarks.records import Job, hash_source
from oneday.processes import RunError, attempt

TINY_BERT = {"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2,
             "intermediate_size": 64, "max_position_embeddings": 64, "vocab_size": 192}  # fmt: skip
TINY_GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": 320}
ENVIRONMENT = {
    "device": "A processor", "device_type": "cpu", "cores": 2, "threads": 2, "num_processes": 1, "python": "3.11.9",
    "packages": {"oneday": "0.1.0", "torch": "2.13.0"}, "commit": "abc",
}  # fmt: skip


@pytest.fixture
def recipe(texts, tmp_path):
    """A recipe of a tiny encoder over the shared text, with 3 seconds of budget."""
    text = tmp_path / "texts.jsonl"
    text.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    ours = TINY_BERT | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    for name, config in (("ours", ours), ("rival", TINY_BERT), ("gpt2", TINY_GPT2)):
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    path = tmp_path / "mini" / "pretrain.yaml"
    path.parent.mkdir()
    settings = {
        "model_config": str(tmp_path / "ours.json"), "dataset_name": str(text), "validation_fraction": 0.1,
        "vocab_size": 150, "max_seq_length": 32, "batch_size_tokens": 512, "micro_batch_tokens": 512,
        "optim": "adamw", "learning_rate": 3e-3, "budget_minutes": 0.05,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs of a benchmark without a process for each, which takes ten seconds to start."""

    def run(function, job, name):
        outcome = attempt(function, job)
        if "error" in outcome:
            raise RunError(name, outcome["error"])
        return outcome["result"]

    monkeypatch.setattr("oneday.benchmarks.records.run_in_fresh_process", run)


def make_job(kind="ours", **settings):
    return Job(kind, "a-record", run_ours, {}, {}, {"budget_seconds": 60.0, "seed": 1, "rates": (1, 2)} | settings)


def write_record(folder, job, environment=ENVIRONMENT, source_hash=None, **facts):
    record = {"name": job.name, "settings": job.settings, "environment": environment, **facts}
    record["source_hash"] = source_hash or hash_source()
    (folder / f"{job.name}.json").write_text(json.dumps(record))
