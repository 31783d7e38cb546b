"""Energy that the machine has used, in joules, from counters of the hardware where they can be read."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")
NVML_SUCCESS = 0


@dataclass
class RaplCounter:
    """One CPU package's counter in microjoules (Linux powercap), which wraps around.

    Attributes:
        folder: Its directory, with `energy_uj` and `max_energy_range_uj`.
    """

    folder: Path
    total: float = 0.0
    last: int = field(init=False)

    def __post_init__(self) -> None:
        self.last = self.read("energy_uj")

    def read(self, name: str) -> int:
        """A number in a file of the counter."""
        return int((self.folder / name).read_text())

    def joules(self) -> float:
        """Joules since the counter was opened; ask more often than it wraps around (minutes)."""
        now = self.read("energy_uj")
        passed = now - self.last
        self.total += (passed if passed >= 0 else passed + self.read("max_energy_range_uj")) / 1e6
        self.last = now
        return self.total


class NvmlCounter:
    """A GPU's own counter in millijoules, through the driver's library.

    Args:
        library: `libnvidia-ml.so.1`, loaded.
        uuid: Of the GPU, `GPU-...`.

    Raises:
        OSError: When the GPU has no such counter.
    """

    def __init__(self, library: ctypes.CDLL, uuid: str) -> None:
        self.library, self.handle = library, ctypes.c_void_p()
        self.check(library.nvmlInit_v2())
        self.check(library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(self.handle)))
        self.start = self.read()

    def check(self, code: int) -> None:
        """Raise OSError unless a call succeeded."""
        if code != NVML_SUCCESS:
            raise OSError(f"NVML answered {code}")

    def read(self) -> int:
        """Millijoules since the driver was loaded."""
        value = ctypes.c_ulonglong()
        self.check(self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle, ctypes.byref(value)))
        return value.value

    def joules(self) -> float:
        """Joules since the counter was opened."""
        return (self.read() - self.start) / 1e3


@dataclass
class EnergyMeter:
    """Energy since it was opened.

    Attributes:
        source: Where the figure comes from, in words.
        counters: What is added up; each has `joules()`.
        lock: The heartbeat reads too.
    """

    source: str
    counters: Sequence[RaplCounter | NvmlCounter]
    lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self) -> float:
        """Joules since the counters were opened; one thread at a time, or a counter's step would be added twice."""
        with self.lock:
            return sum(counter.joules() for counter in self.counters)


def open_energy_meter(device: torch.device) -> EnergyMeter | None:
    """What can be read of the energy that a run on this device takes; None: nothing, a power must be stated.

    On a GPU its own counter is needed, and the CPU's is added where it can be read.
    """
    gpu = open_gpu_counter(device) if device.type == "cuda" else None
    packages = open_cpu_counters()
    counters = [gpu] * (gpu is not None) + packages
    if not counters or (device.type == "cuda" and gpu is None):
        return None
    names = ["GPU counter (NVML)"] * (gpu is not None) + ["CPU package counters (RAPL)"] * bool(packages)
    return EnergyMeter(" and ".join(names), counters)


def open_cpu_counters(root: Path = POWERCAP) -> list[RaplCounter]:
    """A counter a CPU package, as far as they may be read (often by root only)."""
    counters = []
    for folder in sorted(root.glob("intel-rapl:*")):
        try:
            if (folder / "name").read_text().startswith("package"):
                counters.append(RaplCounter(folder))
        except (OSError, ValueError):
            continue
    return counters


def open_gpu_counter(device: torch.device) -> NvmlCounter | None:
    """The counter of a GPU; None where the driver or the GPU has none."""
    try:
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        library = ctypes.CDLL("libnvidia-ml.so.1")
        return NvmlCounter(library, uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    except (OSError, AttributeError, RuntimeError):
        return None
