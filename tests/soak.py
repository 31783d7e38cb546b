"""Kill a run with SIGKILL at random moments, mid-checkpoint among them, and see that nothing of it is lost.

    python tests/soak.py [--kills 50] [--clock_kills 8] [--seed 0]

First a run with a budget of steps: killed again and again it must end with the weights, bit for bit, of one that never
was, and with every step exactly once. Then a run with a wall-clock budget: what all its processes took together must
stay inside it. Ends with code 1 at the first thing that is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from oneday.checkpoints import find_fault, list_checkpoints
from oneday.durable_files import read_json
from oneday.run_directory import STAGING, read_metrics

ROOT = Path(__file__).parent.parent
MODEL = "model.json"
STEPS_A_KILL, CLOCK_MINUTES = 40, 4.0
# Lines of metrics that a process writes before it is killed, at most: in steps, so that a slow machine comes on too.
LIFE_LINES, MOMENT_SECONDS = 60, 0.05
# How long a checkpoint is waited for; when a heartbeat is due.
SAVING_SECONDS, HEARTBEAT_SECONDS = 10.0, 2.0
SETTINGS = {
    "vocab_size": 300, "max_seq_length": 64,
    "batch_size_tokens_start": 256, "batch_size_tokens": 1024, "micro_batch_tokens": 256, "optim": "muon_8bit",
    "mlm_probability_end": 0.15, "max_seq_length_start": 16, "save_steps": 5, "num_evaluations": 4,
    "budget_minutes": "null",
}  # fmt: skip


def write_text(folder: Path, generator: random.Random) -> Path:
    """A corpus of 2,000 short documents."""
    words = ["".join(generator.choices("aeioulnrstkm", k=generator.randint(2, 7))) for _ in range(400)]
    path = folder / "texts.jsonl"
    with open(path, "w", encoding="utf-8") as handle:
        for _ in range(2000):
            text = " ".join(generator.choices(words, k=generator.randint(5, 120)))
            handle.write(json.dumps({"text": text}) + "\n")
    return path


def write_model(folder: Path) -> None:
    """The config of an encoder whose steps are short on any machine."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = json.loads((ROOT / "model_configs/modernbert-mini.json").read_text()) | sizes
    config["layer_types"] = ["sliding_attention", "full_attention"]
    (folder / MODEL).write_text(json.dumps(config))


def start(text: Path, output: Path, **settings: object) -> subprocess.Popen:
    """A pretraining process, its output in a file beside the run."""
    given = {**SETTINGS, "dataset_name": text, "model_config": text.parent / MODEL, "output_dir": output, **settings}
    command = [sys.executable, "scripts/pretrain.py"]
    command += [word for name, value in given.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "ONEDAY_CACHE": str(text.parent / "cache"), "HF_HUB_OFFLINE": "1"}
    with open(output.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def count_lines(output: Path) -> int:
    """Lines of the run's metrics."""
    path = output / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_at_random(process: subprocess.Popen, output: Path, generator: random.Random) -> str:
    """Wait for a random number of steps and a moment more, every third time for a checkpoint being written."""
    lives_to, what = count_lines(output) + 1 + generator.randrange(LIFE_LINES), "between"
    while count_lines(output) < lives_to and process.poll() is None:
        time.sleep(0.005)
    if generator.random() < 1 / 3:
        ends_at = time.monotonic() + SAVING_SECONDS
        while process.poll() is None and time.monotonic() < ends_at:
            if (output / STAGING / "checkpoint").exists():
                time.sleep(generator.uniform(0.0, 0.03))
                what = "while saving"
                break
    else:
        time.sleep(generator.uniform(0.0, MOMENT_SECONDS))
    process.send_signal(signal.SIGKILL)
    process.wait()
    return what


def check(condition: bool, words: str) -> None:
    """End with the words unless the condition holds."""
    if not condition:
        raise SystemExit(f"FAILED: {words}")


def finish(process: subprocess.Popen, output: Path) -> None:
    """Wait for a process that must end well."""
    code = process.wait()
    check(code == 0, f"the last process ended with {code}: {output.with_suffix('.log').read_text()[-1500:]}")


def soak_steps(folder: Path, text: Path, kills: int, generator: random.Random) -> None:
    """Kills a run of a fixed number of steps; compares it with one that is left alone."""
    whole, killed, steps = folder / "whole", folder / "killed", STEPS_A_KILL * kills
    finish(start(text, whole, budget_steps=steps), whole)
    print(f"reference: {steps} steps", flush=True)
    for number in range(kills):
        what = kill_at_random(start(text, killed, budget_steps=steps), killed, generator)
        check(not (killed / "results.json").exists(), "the run ended before all kills; give it more steps")
        faults = [find_fault(checkpoint) for checkpoint in list_checkpoints(killed)]
        check(not any(faults), f"a checkpoint is not whole: {faults}")
        reached = read_metrics(killed)[-1]["step"]
        print(f"kill {number + 1:3} of {kills}, {what:12}, step {reached:5}", flush=True)
    finish(start(text, killed, budget_steps=steps), killed)
    taken = [event["step"] for event in read_metrics(killed) if event["event"] == "step"]
    check(taken == list(range(1, steps + 1)), "a step is missing or was counted twice")
    tokens = [[e["batch_tokens"] for e in read_metrics(run) if e["event"] == "step"] for run in (whole, killed)]
    check(tokens[0] == tokens[1], "the steps saw other text")
    expected, got = (load_file(run / "model.safetensors") for run in (whole, killed))
    differing = [name for name in expected if not np.array_equal(expected[name], got[name])]
    check(not differing, f"weights differ: {differing[:3]}")
    check(not (killed / STAGING).exists(), "something half-written is left")
    print(f"killed {kills} times: the same weights, bit for bit, every step once", flush=True)


def soak_clock(folder: Path, text: Path, kills: int, generator: random.Random) -> None:
    """Kills a wall-clock run; what its processes took, less the first start-up, must be what the budget says."""
    output, limit, lived = folder / "clock", CLOCK_MINUTES * 60, 0.0
    settings = {"budget_minutes": CLOCK_MINUTES, "save_steps": 20}
    for number in range(kills + 1):
        begun = time.monotonic()
        process = start(text, output, **settings)
        if number == 0:
            while count_lines(output) == 0:
                time.sleep(0.01)
            begun = time.monotonic()
        if number < kills:
            kill_at_random(process, output, generator)
        else:
            finish(process, output)
        lived += time.monotonic() - begun
        time.sleep(1.0)  # nothing runs: does not count
    report = read_json(output / "budget.json")
    spent = report["spent"]["seconds"]
    print(f"clock: {spent:.1f} s of {limit:g} s spent, its processes lived {lived:.1f} s", flush=True)
    check(spent <= limit, "the budget was overrun")
    check(report["used_fraction"] >= 0.95, "less than 95 % of the budget was used")
    uncharged = lived - spent
    bound = (HEARTBEAT_SECONDS + 1.0) * kills + 3.0  # a heartbeat a kill, and the program's end after the last
    check(uncharged <= bound, f"{uncharged:.1f} s were not charged, {bound:.1f} s at most may be")


def main() -> None:
    """Both parts, in a directory that is removed at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--clock_kills", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    generator, folder = random.Random(args.seed), Path(tempfile.mkdtemp(prefix="oneday-soak-"))
    text = write_text(folder, generator)
    write_model(folder)
    soak_steps(folder, text, args.kills, generator)
    soak_clock(folder, text, args.clock_kills, generator)
    shutil.rmtree(folder)
    print("passed")


if __name__ == "__main__":
    main()
