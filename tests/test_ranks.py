"""Several processes under `accelerate launch`: the same run as with one, ended together, and whole after a loss."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from hub_server import HubServer
from safetensors.numpy import load_file
from shared_rows import BLOCK

from oneday.checkpoints import find_fault, list_checkpoints, read_state
from oneday.durable_files import read_json
from oneday.errors import SettingError
from oneday.ranks import check_strategy
from oneday.run_directory import read_metrics

STEPS, LEARNING_RATE, MUON_RATE = 20, 1e-3, 5e-3
SETTINGS = {
    "model_config": "model_configs/modernbert-mini.json", "vocab_size": 150, "max_seq_length": 32,
    "batch_size_tokens_start": "null", "batch_size_tokens": 512, "micro_batch_tokens": 128, "bf16": "false",
    "embedding_init": "random", "optim": "adamw", "learning_rate": LEARNING_RATE, "muon_learning_rate": MUON_RATE,
    "budget_minutes": "null", "num_evaluations": 1, "validation_fraction": 0.1,
}  # fmt: skip
# Whole models and shares of one.
CONFIGS = ["cpu_processes", "fsdp"]
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
# torch's Muon and ours orthogonalise in bfloat16: a gradient that differs in its last bits moves an update by up to
# two hundredths of its length (measured with torch 2.13: bfloat16 has 8 bits, and the iteration several products).
MUON_RELATIVE_UPDATE = 0.02


@pytest.fixture(scope="module")
def launch(texts, tmp_path_factory):
    """Starts scripts/pretrain.py on so many processes; returns (launcher, run directory)."""
    folder = tmp_path_factory.mktemp("ranks")
    text = folder / "texts.jsonl"
    text.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def start(processes, name, fault=None, config="cpu_processes", **settings):
        program, read = ROOT / "scripts/pretrain.py", folder / f"{name}-read"
        if fault:
            program = ROOT / "tests/pretrain_with_faults.py"
            read.mkdir()
        given = {**SETTINGS, "dataset_name": text, "output_dir": folder / name, **settings}
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "accelerate.commands.launch", "--config_file"]
            command += [ROOT / f"recipes/accelerate_configs/{config}.yaml"]
            command += ["--num_processes", processes, "--main_process_port", 0]
        command += [program, ROOT / "recipes/quickstart/bert.yaml"]
        command += [word for key, value in given.items() for word in (f"--{key}", value)]
        environment = {**os.environ, "ONEDAY_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        environment |= {"FAULT": fault or "", "READ": str(read), "CUDA_VISIBLE_DEVICES": ""}
        with open(folder / f"{name}-{processes}.log", "w") as log:
            process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stdout=log, stderr=log)
        return process, folder / name

    return start


@pytest.fixture(scope="module")
def run(launch):
    """The same to the end; returns the run directory."""

    def run_to_end(processes, name, fault=None, config="cpu_processes", **settings):
        process, folder = launch(processes, name, fault, config, **settings)
        code = process.wait(timeout=240)
        assert code == 0, (folder.parent / f"{name}-{processes}.log").read_text()[-2000:]
        return folder

    return run_to_end


@pytest.fixture(scope="module")
def alone(run):
    """One process, never interrupted."""
    return run(1, "alone", budget_steps=STEPS)


def steps_of(folder):
    """The steps that led to the weights in a run directory."""
    return [event for event in read_metrics(folder) if event["event"] == "step"]


def column(folder, name):
    return np.array([step[name] for step in steps_of(folder)])


def rank_process(launcher, rank):
    """The process of a rank, once it is there."""
    while launcher.poll() is None:
        for child in psutil.Process(launcher.pid).children(recursive=True):
            try:
                if child.environ().get("RANK") == str(rank):
                    return child
            except psutil.Error:
                continue
        time.sleep(0.05)
    raise AssertionError(f"the launcher ended with {launcher.returncode} before rank {rank} was there")


def wait_for_checkpoint(launcher, folder, number=1):
    while len(list_checkpoints(folder)) < number:
        assert launcher.poll() is None, "the run ended before its checkpoint"
        time.sleep(0.05)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_as_many_processes_as_one_likes(run, alone, processes):
    """Losses and summed gradients of twenty AdamW steps in float32, to a millionth; one directory, one card."""
    together = run(processes, f"together-{processes}", fault="none:0:-1", budget_steps=STEPS)
    assert len(steps_of(together)) == STEPS
    assert np.array_equal(column(together, "batch_tokens"), column(alone, "batch_tokens"))
    np.testing.assert_allclose(column(together, "loss"), column(alone, "loss"), rtol=1e-6)
    np.testing.assert_allclose(column(together, "grad_norm"), column(alone, "grad_norm"), rtol=1e-5)
    held_out = [read_json(folder / "results.json")["eval_loss"] for folder in (together, alone)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-6)
    assert sorted(path.name for path in together.iterdir()) == sorted(path.name for path in alone.iterdir())
    check_samples_are_shared_out(together.with_name(f"{together.name}-read"), processes, [4] * STEPS)


def check_samples_are_shared_out(folder, processes, sizes):
    """Each sample of a step is read by one process; `sizes` are the rows of a micro-batch at each step."""
    lines = [(folder / f"rank-{rank}.jsonl").read_text().splitlines() for rank in range(processes)]
    read = [{line["first"]: line["read"] for line in map(json.loads, own)} for own in lines]
    rows_a_step = SETTINGS["batch_size_tokens"] // SETTINGS["max_seq_length"]
    for first, size in zip(range(0, len(sizes) * rows_a_step, rows_a_step), sizes):
        parts = [part for lines in read for part in lines[first]]
        assert {len(part) for part in parts} == {size}
        assert sorted(sample for part in parts for sample in part) == list(range(first, first + rows_a_step))


@pytest.mark.slow
def test_memory_that_runs_out_on_one_process(run, alone):
    """Every process goes on in smaller micro-batches with the same losses, and each sample is read by one of them."""
    together = run(2, "oom", fault="oom:1:5", budget_steps=STEPS)
    folder = together.with_name("oom-read")
    np.testing.assert_allclose(column(together, "loss"), column(alone, "loss"), rtol=1e-6)
    events = [event for event in read_metrics(together) if event["event"] == "oom"]
    assert [(event["taken"], event["micro_batch_tokens"]) for event in events] == [(5, 64)]
    check_samples_are_shared_out(folder, 2, [4] * 5 + [2] * (STEPS - 5))


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_a_number_that_is_not_finite_on_one_process(run, config):
    """No process takes the step, and both end with the weights that one process has after the same."""
    folders = [run(n, f"nan-{config}-{n}", f"nan:{n - 1}:5", config, budget_steps=STEPS) for n in (1, 2)]
    for folder in folders:
        assert [event["taken"] for event in read_metrics(folder) if event["event"] == "skip"] == [6]
        assert len(steps_of(folder)) == STEPS
    np.testing.assert_allclose(column(folders[0], "loss"), column(folders[1], "loss"), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_a_replay_on_another_number_of_processes(run, alone, config):
    """The same progress at every step, the same losses."""
    again = run(2, f"again-{config}", config=config, replay=alone)
    for name in ("progress", "batch_tokens", "lr"):
        assert np.array_equal(column(again, name), column(alone, name)), name
    np.testing.assert_allclose(column(again, "loss"), column(alone, "loss"), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "environment", "said"),
    [
        ({"fsdp": True}, {}, "The setting fsdp is True; leave it out"),
        ({"deepspeed": "zero2.json"}, {}, "The distributed_type is DEEPSPEED"),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "The distributed_type is DEEPSPEED"),
        ({"kind": "MEGATRON_LM"}, {}, "The distributed_type is MEGATRON_LM"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "The fsdp_version of the accelerate config is 1; set it to 2"),
        ({}, {**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, "The fsdp_offload_params of the accelerate config is true"),
        ({"gradient_checkpointing": True}, FSDP2, "The setting activation_checkpointing .* which sharded processes"),
        ({"gradient_checkpointing": True}, {}, None),
        ({}, FSDP2, None),
    ],
)
def test_other_strategies_are_refused(monkeypatch, changes, environment, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    kind = SimpleNamespace(distributed_type=SimpleNamespace(value=changes.pop("kind", "MULTI_GPU")))
    args = {"n_gpu": 1, "distributed_state": kind, "fsdp": None, "deepspeed": None, "gradient_checkpointing": False}
    with nullcontext() if said is None else pytest.raises(SettingError, match=said):
        check_strategy(SimpleNamespace(**args | changes))


@pytest.mark.slow
def test_memory_that_runs_out_on_a_sharded_process_ends_all_and_smaller_micro_batches_go_on(launch, run, alone):
    launcher, folder = launch(2, "sharded-oom", "oom:1:7", "fsdp", budget_steps=STEPS, save_steps=5)
    assert launcher.wait(timeout=200) == 1
    said = (folder.parent / "sharded-oom-2.log").read_text()
    assert said.count("error: The memory does not hold a micro-batch of 128 tokens (process 1), and sharded") == 1
    run(2, "sharded-oom", config="fsdp", budget_steps=STEPS, save_steps=5, micro_batch_tokens=64)
    np.testing.assert_allclose(column(folder, "loss"), column(alone, "loss"), rtol=1e-6)


@pytest.mark.slow
def test_muon_stays_within_what_its_bfloat16_allows(run):
    """Its updates have a root mean square of at most 0.2 times the rate; so far apart may two runs be, at most."""
    weights = [load_file(run(n, f"muon-{n}", optim="muon", budget_steps=STEPS) / "model.safetensors") for n in (1, 2)]
    path = 0.2 * MUON_RATE * STEPS
    for name, value in weights[0].items():
        apart = np.sqrt(np.mean((value - weights[1][name]) ** 2))
        assert apart <= MUON_RELATIVE_UPDATE * path, name


@pytest.mark.parametrize("config", ["cpu_processes", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_losing_one_process_ends_all_and_any_number_goes_on(launch, run, alone, config):
    """SIGKILL for rank 1; the checkpoint is whole, and one process alone ends as one that never stopped."""
    name = f"killed-{config}"
    launcher, folder = launch(2, name, config=config, budget_steps=STEPS, save_steps=5)
    wait_for_checkpoint(launcher, folder)
    rank_process(launcher, 1).send_signal(signal.SIGKILL)
    begun = time.monotonic()
    assert launcher.wait(timeout=60) != 0
    assert time.monotonic() - begun < 60
    assert list_checkpoints(folder) and not any(find_fault(checkpoint) for checkpoint in list_checkpoints(folder))
    run(1, name, budget_steps=STEPS, save_steps=5)
    assert len(steps_of(folder)) == STEPS
    np.testing.assert_allclose(column(folder, "loss"), column(alone, "loss"), rtol=1e-6)


@pytest.mark.slow
def test_one_clock_and_one_signal_for_all(launch, run):
    """SIGTERM to rank 1 alone stops both after the same step; then the wall-clock budget ends both inside it."""
    settings = {"budget_minutes": 0.5, "learning_rate": 1e-4, "save_steps": 1000}
    launcher, folder = launch(2, "clock", **settings)
    while not (folder / "metrics.jsonl").exists() or len(steps_of(folder)) < 5:
        assert launcher.poll() is None
        time.sleep(0.1)
    rank_process(launcher, 1).send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=60) != 0
    assert len(list_checkpoints(folder)) == 1
    run(2, "clock", **settings)
    report = read_json(folder / "budget.json")
    assert report["status"] == "finished"
    assert 0.9 <= report["used_fraction"] <= 1.0
    assert list(column(folder, "step")) == list(range(1, len(steps_of(folder)) + 1))


@pytest.mark.slow
def test_more_processes_than_rows_are_refused(launch):
    launcher, folder = launch(2, "few", budget_steps=2, batch_size_tokens=32)
    assert launcher.wait(timeout=120) == 1
    said = (folder.parent / "few-2.log").read_text()
    assert said.count("error: A step of 1 rows cannot be shared by 2 processes") == 1
    assert not folder.exists()


ALONE = """
import sys, time
from pathlib import Path
import torch.distributed as dist
from oneday.ranks import Ranks
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
ranks = Ranks(rank, 2, timeout_seconds=2)
with ranks.first_alone():
    if rank == 0:
        time.sleep(5)
        (folder / "prepared").touch()
    assert (folder / "prepared").exists()
assert ranks.all_gather(rank) == [0, 1]
ranks.close()
"""


@pytest.mark.slow
def test_the_others_wait_for_process_0_longer_than_the_timeout(tmp_path):
    """As they do while it tokenises a large text, which takes longer than a lost process is waited for."""
    command = [sys.executable, "-c", ALONE, str(tmp_path)]
    started = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]


@pytest.fixture
def take_shared(texts, tokenizers, tmp_path):
    """Takes the same samples of a stream with so many processes; what each found."""
    for number in range(7):
        pq.write_table(pa.table({"text": texts[number::7]}), tmp_path / f"{number}.parquet", 9)
    tokenizers["encoder"].save_pretrained(tmp_path / "tokenizer")

    def take(processes):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes)}
        command = [sys.executable, str(ROOT / "tests/shared_rows.py"), str(tmp_path)]
        started = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in range(processes)]
        assert [process.wait(timeout=120) for process in started] == [0] * processes
        return [read_json(tmp_path / f"{rank}-of-{processes}.json") for rank in range(processes)]

    return take


@pytest.mark.slow
def test_processes_share_out_the_tokenising_of_a_stream(take_shared):
    """Equal rows and states as with one; block b is tokenised by process b modulo their number, and by no other."""
    (alone,), shared = take_shared(1), take_shared(2)
    for process in shared:
        assert process["rows"] == alone["rows"]
        assert process["states"] == alone["states"]
        assert process["blocks"] == alone["blocks"] > 15
    whole = alone["tokenised"]  # the first pass, and on
    blocks = [whole[first : first + BLOCK] for first in range(0, 300 - BLOCK, BLOCK)]
    for rank, process in enumerate(shared):
        own = [text for block in blocks[rank::2] for text in block]
        assert process["tokenised"][: len(own)] == own


@pytest.mark.slow
def test_a_file_of_a_stream_that_is_damaged_is_left_out_by_all(take_shared, tmp_path):
    """The rows are those of one process, without a text of that file."""
    damaged = tmp_path / "3.parquet"
    lost = set(pq.read_table(damaged)["text"].to_pylist())
    damaged.write_bytes(damaged.read_bytes()[:50])
    (alone,), shared = take_shared(1), take_shared(2)
    for process in (alone, *shared):
        assert process["error"] is None and not lost & set(process["tokenised"])
        assert process["rows"] == alone["rows"] and process["states"] == alone["states"]
    assert len(alone["rows"]) > 10


@pytest.fixture
def streamed(texts, tmp_path, monkeypatch):
    """Settings of a run that streams five files of a Hub's data set, with several blocks to a pass."""
    server = HubServer()
    short = [f"{number} {' '.join(text.split()[:12])}" for number in range(24) for text in texts]
    server.branches["ann/texts"]["main"] = {
        f"train-{part}.parquet": pd.DataFrame({"text": short[part::5]}).to_parquet() for part in range(5)
    }
    for name, value in {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": tmp_path / "hf"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    (tmp_path / "held_out.txt").write_text("\n\n".join(texts[:30]))
    yield {
        "dataset_name": "ann/texts", "streaming": "true", "validation_name": tmp_path / "held_out.txt",
        "budget_steps": STEPS, "batch_size_tokens": 4096, "micro_batch_tokens": 1024,
    }  # fmt: skip
    server.shutdown()


@pytest.mark.slow
def test_a_streamed_run_is_that_of_one_process_and_goes_on_with_another_number(launch, run, streamed):
    """Over a block's end; killed with two processes, it ends with one as if nothing had been."""
    alone, together = (run(processes, f"stream-{processes}", **streamed) for processes in (1, 2))
    np.testing.assert_allclose(column(together, "loss"), column(alone, "loss"), rtol=1e-6)
    kept = {"save_steps": 5, "save_total_limit": 9}
    launcher, folder = launch(2, "stream-killed", **streamed, **kept)
    wait_for_checkpoint(launcher, folder, 3)
    assert read_state(list_checkpoints(folder)[-1])["loader"]["source"]["block"] > 0
    rank_process(launcher, 1).send_signal(signal.SIGKILL)
    assert launcher.wait(timeout=60) != 0
    run(1, "stream-killed", **streamed, **kept)
    assert len(steps_of(folder)) == STEPS
    np.testing.assert_allclose(column(folder, "loss"), column(alone, "loss"), rtol=1e-6)
