"""A call that a thread repeats beside long work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def beating(beat: Callable[[], object], seconds: float) -> Iterator[None]:
    """Calls `beat` from a thread every so many seconds until the context is left; the first time after as many."""
    left = threading.Event()

    def repeat() -> None:
        while not left.wait(seconds):
            beat()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()
