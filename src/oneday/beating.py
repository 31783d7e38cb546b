"""A call that a thread repeats beside long work."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 2.0


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


@contextmanager
def heartbeat(write: Callable[[], None]) -> Iterator[None]:
    """Calls `write` at once, every two seconds from a thread, and at the end: a killed process pays for its time."""

    def beat() -> None:
        try:
            write()
        except OSError as error:  # a network disk may stumble; the next beat may reach it again
            logger.warning("budget.json was not written: %s.", error)

    beat()
    try:
        with beating(beat, HEARTBEAT_SECONDS):
            yield
    finally:
        beat()
