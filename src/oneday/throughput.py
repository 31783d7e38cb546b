"""What the machine gives: threads, bf16, the measured peak of its matrix products, memory."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

# Names of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
# Names of torch.cpu.get_capabilities: x86, and ARM.
CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16")
PACKAGES = (
    "oneday", "torch", "transformers", "datasets", "accelerate", "tokenizers", "evaluate", "bitsandbytes", "peft",
)  # fmt: skip
# A product of this size says how long a large one would take.
PROBE_SIZE = 256
PEAK_SECONDS = 0.4  # how long the peak is looked for


def usable_cores() -> int:
    """Cores this process may use: its affinity and its cgroup quota, whichever is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))


def total_memory_bytes() -> int:
    """Memory of the machine, or what its cgroup allows, whichever is less."""
    return read_memory(psutil.virtual_memory().total, lambda limit, _: limit)


def read_memory(without: int, within: Callable[[int, int], int]) -> int:
    """`without` a cgroup's limit, or `within` it, given limit and use in bytes, whichever is less.

    Pages of files that nobody has read lately (`inactive_file`) are no use: the kernel gives them up when memory is
    asked for, and a pretraining leaves its data behind in them.
    """
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = (folder / "memory.max").read_text().strip(), int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return without
    used = max(0, used - int(stat.get("inactive_file", 0)))
    return without if limit == "max" else max(0, min(without, within(int(limit), used)))


def available_memory_bytes() -> int:
    """Memory that this process may still take: the machine's, or what its cgroup has left, whichever is less."""
    return read_memory(psutil.virtual_memory().available, lambda limit, used: limit - used)


def set_threads(num_threads: int | None = None) -> int:
    """Give this process its share of the cores: `accelerate launch` without a config would leave it one.

    Args:
        num_threads: Threads to use; None: usable cores over the processes on this machine.
    """
    share = usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, num_threads or share))
    os.environ.setdefault("RAYON_NUM_THREADS", str(torch.get_num_threads()))  # of the tokenizers
    return torch.get_num_threads()


def keep_freed_memory() -> bool:
    """Have glibc keep freed blocks for the next step instead of giving their pages back; False where it does not.

    Every activation above 128 KiB is otherwise mapped, zeroed page by page, and unmapped again: a fifth of a CPU step.
    Before glibc 2.35 blocks above 32 MiB still are.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    kept = [mallopt(M_TRIM_THRESHOLD, 2**31 - 1), mallopt(M_TOP_PAD, 2**26)]
    kept.append(mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25))
    return all(kept)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 faster than float32; on a CPU that takes instructions of its own."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in CPU_BF16)


@functools.cache
def measure_peak_flops(device: torch.device, bf16: bool) -> float:
    """FLOPs per second of a square matrix product: 2048^3 on a CPU, 8192^3 on a GPU; the best of many.

    Smaller where one would take longer than a second: a CPU without bfloat16 units takes a minute for 2048^3.
    Measured once per process, see `measure_peak_again`.

    Args:
        device: Where to measure.
        bf16: bfloat16 instead of float32.
    """
    size = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if bf16 else torch.float32
    while device.type == "cpu" and size > PROBE_SIZE:
        if time_products(PROBE_SIZE, device, dtype) * (size / PROBE_SIZE) ** 3 <= 1.0:
            break
        size //= 2
    return 2 * size**3 / time_products(size, device, dtype, PEAK_SECONDS)


def measure_peak_again(before: float, device: torch.device, bf16: bool) -> float:
    """The better of an earlier measurement and one now: what else ran may have slowed either."""
    return max(before, measure_peak_flops.__wrapped__(device, bf16))


def time_products(size: int, device: torch.device, dtype: torch.dtype, seconds: float = 0.0) -> float:
    """Seconds of a product of two square matrices: the least of three, or of as many as `seconds` hold."""
    generator = torch.Generator(device).manual_seed(0)  # that of the run is left alone
    left, right = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in "ab")
    left @ right
    synchronize(device)
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        begun = time.perf_counter()
        left @ right
        synchronize(device)
        times.append(time.perf_counter() - begun)
    return min(times)


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def process_age_seconds() -> float:
    """Seconds since this process began, by the kernel's own clock where it can be read."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # proc(5): starttime
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return time.time() - psutil.Process().create_time()


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: of the GPU's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        # On Linux this would be no less than what the process that started this one had.
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak_memory(device: torch.device) -> None:
    """Have `peak_memory_bytes` of a GPU begin anew; a process on a CPU cannot."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def name_device(device: torch.device) -> str:
    """What the GPU, or the processor, calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit: what a number needs beside it. Names no host, user or path."""
    return {
        "device": name_device(device),
        "device_type": device.type,
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "num_processes": int(os.environ.get("WORLD_SIZE", "1")),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: installed_version(name) for name in PACKAGES},
        "commit": commit_of_source(),
    }


def processor_name() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def installed_version(name: str) -> str | None:
    """Version of an installed package; None when it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit_of_source() -> str | None:
    """Commit of the checkout this file is in, with `+changes` when the tree differs from it; None outside one."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty=+changes", "--abbrev=10", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
