"""The error that a program answers with one sentence, and how others are put into one."""

from __future__ import annotations

import torch

# What an error says whose device has no memory left: CUDA's and Triton's "out of memory", cuBLAS's own handle.
MEMORY_SIGNS = ("out of memory", "cublas_status_alloc_failed")


class SettingError(ValueError):
    """A setting that cannot work. The message is one sentence: which setting, which value, what to do."""


def describe_error(error: BaseException) -> str:
    """The first line of a library's error, to stand in brackets in a sentence; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory ran out, also where others than torch's allocator wanted some (cuBLAS, Triton)."""
    words = str(error).lower()
    is_one = isinstance(error, RuntimeError) and any(sign in words for sign in MEMORY_SIGNS)
    return is_one or isinstance(error, torch.OutOfMemoryError)


def check_positive(name: str, value: float | None) -> None:
    """Raise SettingError for a setting that is given and not above zero."""
    if value is not None and not value > 0:
        raise SettingError(f"The setting {name} is {value}; it must be above zero.")
