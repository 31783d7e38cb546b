"""Sharded processes (FSDP2): the run of one process, with a share of the model on each."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import DECODERS, ROW_LENGTH, build_trainer
from safetensors.numpy import load_file
from test_programs import ROOT

from oneday.optimizers import HIDDEN_OPTIMIZERS, SHARED_BY
from oneday.run_directory import read_json, read_metrics

STEPS = 4
LIMITS = {"budget_steps": STEPS, "save_steps": 2, "save_total_limit": 9, "learning_rate": 1e-3}
# Nine rows cannot be shared out evenly: the last pass of some processes counts nowhere.
UNEVEN = {"batch_size_tokens": 9 * ROW_LENGTH, "micro_batch_tokens": 3 * ROW_LENGTH}


@pytest.fixture
def folder(texts, tokenizers, packed, tmp_path):
    """What the runs read."""
    for kind, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(tmp_path / kind)
        for part, rows in zip(("train", "validation"), packed[kind]):
            shutil.copytree(rows.path, tmp_path / f"{kind}-{part}")
    return tmp_path


@pytest.fixture
def run_sharded(folder):
    """Does some runs with so many processes; returns what each process held."""

    def start(processes, runs):
        (folder / "runs.json").write_text(json.dumps(runs))
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        shared |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "OMP_NUM_THREADS": 1}
        command = [sys.executable, str(ROOT / "tests/sharded_runs.py"), str(folder)]
        started = []
        for rank in range(processes):
            own = {"RANK": rank, "LOCAL_RANK": rank, **shared}
            started.append(subprocess.Popen(command, env={**os.environ, **{k: str(v) for k, v in own.items()}}))
        assert [process.wait(timeout=300) for process in started] == [0] * processes
        return [read_json(folder / f"held-{rank}.json") for rank in range(processes)]

    return start


@pytest.fixture
def run_alone(folder, tokenizers, packed):
    """The same with one process, which holds everything."""

    def start(name, model, resume=False, **settings):
        rows = packed["decoder" if model in DECODERS else "encoder"]
        build_trainer(folder / name, model, tokenizers, rows, **settings).run(resume)
        return folder / name

    return start


def column(folder, name):
    return np.array([event[name] for event in read_metrics(folder) if event["event"] == "step"])


def check_same(one, other, loss=1e-6, norm=1e-5):
    """Losses to a millionth, as processes with whole models are held to."""
    assert len(column(one, "loss")) == STEPS
    np.testing.assert_allclose(column(one, "loss"), column(other, "loss"), rtol=loss)
    np.testing.assert_allclose(column(one, "grad_norm"), column(other, "grad_norm"), rtol=norm)
