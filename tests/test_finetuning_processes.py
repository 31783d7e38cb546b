"""Runs in processes of their own: the scores of one process, and nothing left running whatever happens."""

from __future__ import annotations

import doctest
import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from classifiers import make_args
from conftest import ROOT

from oneday import finetuning_processes, processes
from oneday.classification import load_checkpoint
from oneday.errors import SettingError
from oneday.finetuning import prepare_task, run_protocol
from oneday.finetuning_processes import choose_num_processes
from oneday.finetuning_run import plan_run
from oneday.glue_protocol import complete_arguments
from oneday.processes import share_out


def read_lines(folder):
    return [json.loads(line) for line in (folder / "glue_runs.jsonl").read_text().splitlines()]


TUNED = {"protocol": "tuned", "tuned_learning_rates": [1e-3, 3e-3], "tuned_epochs": [1.0]}


@pytest.mark.parametrize("changes", [{}, pytest.param(TUNED, marks=pytest.mark.slow)], ids=["plain", "tuned"])
def test_scores_are_those_of_one_process(bert, data_dir, tmp_path, changes):
    """With dropout and with answers kept; resumed in either way without a further run."""
    shared = {"task_names": ["sst2", "stsb"], "num_seeds": 2, "num_train_epochs": 1, "dropout": 0.1, **changes}
    num_runs = 4 + 20 * bool(changes)  # tuned: two tasks at two rates on five parts first
    ways = {"one": {"num_threads": 1, "num_processes": 1}, "two": {"num_threads": 2, "num_processes": 2}}
    results = {}
    for name, way in ways.items():
        args = make_args(bert, data_dir, tmp_path, output_dir=str(tmp_path / name), **shared, **way)
        results[name] = run_protocol(args)
        assert not multiprocessing.active_children()
        assert run_protocol(args) == results[name]
    one, two = ({line["key"]: line for line in read_lines(tmp_path / name)} for name in ways)
    assert one.keys() == two.keys() and len(one) == num_runs == len(read_lines(tmp_path / "two"))
    assert all(two[key]["scores"] == line["scores"] and two[key]["threads"] == 1 for key, line in one.items())
    ignored = ("seconds", "peak_memory_bytes")
    for number, entry in results["one"]["tasks"].items():
        assert {k: v for k, v in entry.items() if k not in ignored} == {
            k: v for k, v in results["two"]["tasks"][number].items() if k not in ignored
        }
    files = [{path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*.parquet")} for name in ways]
    assert files[0] == files[1] and len(files[0]) == num_runs


@pytest.mark.parametrize("seed", range(30))
def test_every_run_is_shared_out_once_and_no_worse_than_dearest_first(seed):
    generator = np.random.default_rng(seed)
    costs = generator.integers(1, 100, generator.integers(1, 30)).tolist()
    num_processes = int(generator.integers(1, 6))
    loads = [0] * num_processes
    for cost in sorted(costs, reverse=True):
        loads[loads.index(min(loads))] += cost
    parts = share_out(costs, num_processes)
    assert sorted(run for part in parts for run in part) == list(range(len(costs)))
    assert max(sum(costs[run] for run in part) for part in parts) <= max(loads)
    assert doctest.testmod(processes) == (0, 1)


@pytest.mark.slow
def test_a_failed_run_is_one_sentence_and_ends_the_others(bert, data_dir, tmp_path):
    args = make_args(bert, data_dir, tmp_path, num_seeds=3, num_processes=2, num_train_epochs=1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "runs").write_text("in the way of the answers")
    with pytest.raises(SettingError) as caught:
        run_protocol(args)
    assert "The run sst2-pretrained-seed" in str(caught.value) and "Error: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


SLOW_VICTIMS = [pytest.param(*case, marks=pytest.mark.slow) for case in (
    ("group", signal.SIGTERM), ("program", signal.SIGTERM), ("program", signal.SIGUSR1), ("worker", signal.SIGKILL),
)]  # fmt: skip


@pytest.mark.parametrize(("victim", "number"), [("group", signal.SIGINT), *SLOW_VICTIMS])
def test_an_interrupt_or_a_lost_process_leaves_nothing_running(bert, data_dir, tmp_path, victim, number):
    """Ctrl-C, heard by the whole group as at a terminal; the signals of a batch system, heard by all or by the program
    alone; or one worker killed as for its memory."""
    argv = {"model_name_or_path": bert, "task_names": "sst2", "task_data_dir": data_dir, "output_dir": tmp_path,
            "num_seeds": 50, "num_train_epochs": 3, "num_processes": 2, "use_cpu": "true"}  # fmt: skip
    command = [sys.executable, str(ROOT / "scripts" / "finetune.py")]
    command += [word for name, value in argv.items() for word in (f"--{name}", str(value))]
    program = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        runs, deadline = tmp_path / "glue_runs.jsonl", time.monotonic() + 240
        while not (runs.exists() and runs.read_text().count("\n") >= 2):
            assert program.poll() is None and time.monotonic() < deadline, program.stderr.read()
            time.sleep(0.1)
        children = psutil.Process(program.pid).children(recursive=True)
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        assert len(workers) == 2
        if victim == "group":
            os.killpg(program.pid, number)
        else:
            (program if victim == "program" else workers[0]).send_signal(number)
        _, stderr = program.communicate(timeout=60)
        assert not psutil.wait_procs(children, timeout=20)[1]
    finally:
        program.kill()
    assert program.returncode == (1 if victim == "worker" else 75) and "Traceback" not in stderr, stderr
    said = (
        "its process was killed, which is often a lack of memory; set num_processes"
        if victim == "worker"
        else "the same command goes on from there"
    )
    assert said in stderr.splitlines()[-1]
    lines = read_lines(tmp_path)
    assert 2 <= len(lines) < 50 and len({line["key"] for line in lines}) == len(lines)


def test_how_many_at_a_time(bert, data_dir, tmp_path, monkeypatch):
    args = complete_arguments(make_args(bert, data_dir, tmp_path, num_threads=4))
    checkpoint = load_checkpoint(bert)
    task = prepare_task("sst2", args, checkpoint)
    runs = [plan_run(checkpoint, task, args, seed, False) for seed in range(3)]
    choose = functools.partial(choose_num_processes, args, checkpoint, may_start_processes=True)
    assert choose(runs) == 1, "not worth a start"
    monkeypatch.setattr(finetuning_processes, "MIN_FLOPS", 1.0)
    assert choose(runs) == 3, "never more than runs"
    args.num_threads = 2
    assert choose(runs) == 2, "nor than cores"
    assert choose([]) == 1
    assert choose_num_processes(args, checkpoint, runs, may_start_processes=False) == 1, "called from a library"
    args.num_processes = 8
    assert choose(runs) == 3
    args.num_processes = None
    monkeypatch.setattr(finetuning_processes, "MAX_PARAMETERS", 10)
    assert choose(runs) == 1, "a large model fills the cores"


def test_threads_of_a_run_do_not_depend_on_what_is_finished_or_on_memory(bert, data_dir, tmp_path, monkeypatch):
    """Two cores and three runs: one thread each, also where only one is missing and memory holds one process."""
    monkeypatch.setattr(finetuning_processes, "MIN_FLOPS", 1.0)
    monkeypatch.setattr(finetuning_processes, "available_memory_bytes", lambda: 1)
    args = make_args(bert, data_dir, tmp_path, num_seeds=3, num_threads=2, num_train_epochs=1)
    results = run_protocol(args, may_start_processes=True)
    assert results["threads"] == [1]
    path = Path(args.output_dir) / "glue_runs.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    assert run_protocol(args, may_start_processes=True)["threads"] == [1]
    assert [line["threads"] for line in read_lines(Path(args.output_dir))] == [1, 1, 1]


def test_an_answer_counts_though_its_process_dies_after_it(monkeypatch):
    """And the run that it was to take next is the one that is named."""
    taken = []

    def take_run(*args):
        run = processes_take_run(*args)
        if taken:
            for process in multiprocessing.active_children():
                process.kill()
                process.join()
        taken.append(run)
        return run

    processes_take_run = processes.take_run
    monkeypatch.setattr(processes, "take_run", take_run)
    results = processes.map_in_processes(square, 3, ["first", "second"], [1.0, 1.0], 1)
    assert next(results) == {"value": 0}
    with pytest.raises(processes.RunError, match="The run second failed: its process was killed"):
        next(results)


def square(shared, index):
    return {"value": shared * index**2}
