"""A program that is asked to end: what is finished is kept, and nothing that it started goes on."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

from oneday.processes import attempt, run_in_fresh_process
from oneday.signals import STOP_SIGNALS, interrupted_by_signals, noted_signals, say_ending, unheard_by_children


@pytest.fixture(autouse=True)
def survive():
    """A signal that nobody handles does not end the tests."""
    before = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


PROGRAMS = {
    "finetune": ("oneday.finetuning.run_protocol", []),
    "benchmark": ("oneday.benchmarks.finetuning.make_finetuning_plan", ["finetuning"]),
    "plan_budget": ("oneday.ladder.run_ladder", ["ladder"]),
}


@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_keep_what_is_finished_say_run_me_again(run_script, monkeypatch, name, number):
    place, argv = PROGRAMS[name]

    def work(*args, **kwargs):
        signal.raise_signal(number)
        pytest.fail("It went on.")

    monkeypatch.setattr(place, work)
    code, _, stderr = run_script(name, *argv)
    assert code == 75
    assert stderr == "Interrupted; what is finished is kept, and the same command goes on from there.\n"


def test_one_signal_interrupts_and_after_it_ctrl_c_alone():
    """Slurm and a terminal may send several: cleaning up after the first is not interrupted by the others."""
    with interrupted_by_signals():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with noted_signals() as noted:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert noted == [signal.SIGUSR1, signal.SIGTERM]


def test_a_run_that_is_asked_twice_says_once_that_it_ends(caplog):
    caplog.set_level("INFO", "oneday.callbacks")
    with noted_signals(say_ending) as noted:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.raise_signal(number)
    assert noted == [signal.SIGUSR1, signal.SIGTERM]
    assert caplog.text.count("ending after what is in hand") == caplog.text.count("SIGUSR1: ending") == 1


def test_children_hear_nothing_and_their_parent_later():
    code = "import json, signal; print(json.dumps(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, []))))"
    with noted_signals() as noted:
        with unheard_by_children():
            signal.raise_signal(signal.SIGTERM)
            assert not noted
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert noted == [signal.SIGTERM]
    assert set(STOP_SIGNALS) <= set(json.loads(done.stdout))
    assert not set(STOP_SIGNALS) & signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_process_of_its_own_ends_with_the_one_that_started_it():
    """A signal to this process alone, as `kill` and `timeout` send it."""
    begun = time.monotonic()
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with pytest.raises(KeyboardInterrupt), interrupted_by_signals():
        run_in_fresh_process(time.sleep, 30, "mine")
    assert time.monotonic() - begun < 20 and not multiprocessing.active_children()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_to_a_run_is_said(number):
    assert "a signal ended it" in attempt(signal.raise_signal, number)["error"]


def test_a_process_that_has_only_its_end_left_is_not_ended_otherwise():
    """By Slurm, which ends the others once the first has asked to be run again."""
    code = "import os, signal; from oneday.signals import end_undisturbed as end; {}; os.kill(os.getpid(), 15)"
    ends = [subprocess.run([sys.executable, "-c", code.format(first)]).returncode for first in ("end()", "pass")]
    assert ends == [0, -signal.SIGTERM]


@pytest.mark.parametrize(("processes", "end"), [("2", 75), ("1", -signal.SIGTERM)])
def test_a_program_of_several_processes_ends_as_it_meant_to(processes, end):
    """Also where it leaves by an exit of its own, as on a signal while the text is prepared."""
    code = (
        "import atexit, os\nfrom oneday.program import run_program\natexit.register(os.kill, os.getpid(), 15)\n"
        "def main():\n    raise SystemExit(75)\nrun_program(main)"
    )
    environment = os.environ | {"WORLD_SIZE": processes}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == end


LAUNCHED = """
import os, signal, sys, time
from oneday.signals import end_with_launcher
signal.signal(signal.SIGTERM, lambda number, frame: (open(sys.argv[1], "w").write("saved"), os._exit(75)))
end_with_launcher()
print("ready", flush=True)
time.sleep(60)
"""


def test_the_end_of_the_launcher_is_a_signal_to_what_it_launched(tmp_path):
    """`accelerate launch` dies of a SIGTERM and passes none on."""
    (tmp_path / "launched.py").write_text(LAUNCHED)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [ROOT / "recipes/accelerate_configs/cpu.yaml", tmp_path / "launched.py", tmp_path / "out"]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout.readline() == "ready\n"
    launcher.terminate()
    launcher.wait()
    until = time.monotonic() + 20
    while not (tmp_path / "out").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert (tmp_path / "out").read_text() == "saved"
