"""What a process does to its machine."""

from __future__ import annotations

import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl

from oneday import throughput
from oneday.benchmarks.throughput import StepTimer, measure_compile_seconds
from oneday.glue_protocol import FinetuneArguments, choose_bf16
from oneday.throughput import has_fast_bf16, measure_peak_flops, time_products

# Resident memory in MiB that is left after 8 blocks of 24 MiB came and went.
PROGRAM = """
import sys, torch
from oneday.throughput import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
before = resident()
blocks = [torch.ones(6 * 2**20) for _ in range(8)]
del blocks
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept():
    left = {
        mode: float(subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, check=True).stdout)
        for mode in ("keep", "give")
    }
    assert left["keep"] > 150 and left["give"] < 50, left


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16", "avx2"])
def test_pretraining_and_fine_tuning_decide_alike_on_bfloat16(monkeypatch, name):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: True})
    fast = has_fast_bf16(torch.device("cpu"))
    assert fast == (name != "avx2") == choose_bf16(FinetuneArguments(use_cpu=True))
    assert choose_bf16(FinetuneArguments(use_cpu=True, bf16=not fast)) != fast


def test_the_peak_of_memory_is_the_processes_own():
    """`ru_maxrss` goes from a process to the one it becomes: a small child of a large parent would have it."""
    report = (
        "import torch; from oneday.throughput import peak_memory_bytes; print(peak_memory_bytes(torch.device('cpu')))"
    )
    plain = int(subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True).stdout)
    large = f"import subprocess, sys; b = b'1' * 2**30; subprocess.run([sys.executable, '-c', {report!r}], check=True)"
    child = int(subprocess.run([sys.executable, "-c", large], capture_output=True, text=True, check=True).stdout)
    assert plain > 2**26 and child < 1.2 * plain


@pytest.mark.parametrize(("rate", "size"), [(1e12, 2048), (1e10, 1024), (1e6, 256)])
def test_the_peak_is_of_a_product_that_takes_no_longer_than_a_second(monkeypatch, rate, size):
    """Two operations for each of n^3; a side of 2048 where the machine is fast enough, else half of it, and so on."""
    seen = []

    def take(side, device, dtype, seconds=0.0):
        seen.append(side)
        return 2 * side**3 / rate

    monkeypatch.setattr("oneday.throughput.time_products", take)
    assert measure_peak_flops.__wrapped__(torch.device("cpu"), False) == pytest.approx(rate)
    assert seen[-1] == size and (size == 256 or 2 * size**3 / rate <= 2.0)


def test_steps_are_timed_after_the_warm_up():
    """Three steps of 5 s warm up; then two of 2 s, each 0.25 s of data and 1.5 s to the gradients, fill 4 s."""
    clock = SimpleNamespace(time=0.0, ledger={"data": 0.0}, now=lambda: clock.time)
    trainer = SimpleNamespace(clock=clock, step_record=None)
    timer, args, control = StepTimer(trainer, 4.0), SimpleNamespace(device=torch.device("cpu")), TrainerControl()
    for step, seconds in enumerate([5.0, 5.0, 5.0, 2.0, 2.0]):
        assert not control.should_training_stop
        begun = clock.time
        clock.ledger["data"] += 0.25
        timer.on_step_begin(args, None, control)
        trainer.step_record = SimpleNamespace(begun=begun + 0.25, tokens=100 + step, flops=1e6)
        clock.time = begun + 1.75
        timer.on_pre_optimizer_step(args, None, control)
        clock.time = begun + seconds
        timer.on_step_end(args, None, control)
    assert control.should_training_stop
    assert timer.warmup == [5.0, 5.0, 5.0] and (timer.tokens, timer.flops) == (103 + 104, 2e6)
    assert timer.steps == [{"step": 2.0, "data": 0.25, "forward_backward": 1.5, "optimizer": 0.25}] * 2
    assert measure_compile_seconds(timer) == 15.0 - 3 * 2.0


def test_measuring_takes_no_random_numbers_of_the_run():
    """How many matrices it draws depends on the machine's speed."""
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert time_products(16, torch.device("cpu"), torch.float32) > 0
    assert torch.equal(torch.rand(4), expected)


def test_memory_of_a_container_is_what_it_may_take(monkeypatch):
    """Of 400 MB in use, 300 are pages of files that the kernel takes back; 50 more of files are in use."""
    stat = f"anon {5 * 10**7}\nactive_file {5 * 10**7}\ninactive_file {3 * 10**8}\n"
    files = {"memory.max": "max\n", "memory.current": f"{4 * 10**8}\n", "memory.stat": stat}
    monkeypatch.setattr(throughput.Path, "read_text", lambda path: files[path.name])
    whole = throughput.total_memory_bytes()
    files["memory.max"] = f"{10**9}\n"
    assert (whole > 10**9, throughput.total_memory_bytes()) == (True, 10**9)
    assert throughput.available_memory_bytes() == 9 * 10**8
