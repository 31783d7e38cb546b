"""What a process does to its machine."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from oneday.glue_protocol import FinetuneArguments, choose_bf16
from oneday.throughput import has_fast_bf16

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
