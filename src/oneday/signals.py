"""Signals that ask a program to end: Ctrl-C, SIGTERM and SIGUSR1, which Slurm sends ahead of a time limit."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# The exit code that means "run me again".
INTERRUPTED = 75
# Of Linux's prctl(2): which signal the end of the parent is.
PR_SET_PDEATHSIG = 1


@contextmanager
def handle_signals(numbers: Iterable[int], handler: Callable[[int, object], None]) -> Iterator[None]:
    """Handle some signals for a while, where this is the main thread; elsewhere they do not arrive."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """The first signal is a KeyboardInterrupt, whichever it is; after it only Ctrl-C is one."""
    heard: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        heard.append(number)
        if len(heard) == 1 or number == signal.SIGINT:
            raise KeyboardInterrupt

    with handle_signals(STOP_SIGNALS, interrupt):
        yield


@contextmanager
def noted_signals(tell: Callable[[str], None] = lambda name: None) -> Iterator[list[int]]:
    """A first signal is noted, to be acted on where nothing is half done; Ctrl-C after it ends at once.

    Args:
        tell: Called with the name of the first.
    """
    noted: list[int] = []

    def note(number: int, frame: object) -> None:
        if noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        noted.append(number)
        if len(noted) == 1:
            tell(signal.Signals(number).name)

    with handle_signals(STOP_SIGNALS, note):
        yield noted


def say_ending(name: str) -> None:
    """What a run answers to the first signal that means "save and go away"."""
    logger.info("%s: ending after what is in hand, with a checkpoint; Ctrl-C again ends at once.", name)


@contextmanager
def leave_on_signals(code: int) -> Iterator[None]:
    """Where nothing is lost, before the first step and after the last, the same signals but Ctrl-C end at once."""

    def leave(number: int, frame: object) -> None:
        name = signal.Signals(number).name
        logger.info("%s came while nothing was being trained; run the same command again.", name)
        raise SystemExit(code)

    with handle_signals([number for number in STOP_SIGNALS if number != signal.SIGINT], leave):
        yield


def end_undisturbed() -> None:
    """Where only the process's end is left: what ends it because another has ended must not change its exit code.

    Slurm, for one, takes a task that died of its SIGTERM for worse than one that asked to be run again.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_with_launcher() -> None:
    """Where `accelerate launch` has started this process, its end is a SIGTERM here: it passes no signal on."""
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:  # no Linux
        return
    words = [Path(word).name for word in command.decode(errors="replace").split("\0")]
    if {"accelerate", "accelerate-launch", "accelerate.commands.launch"} & set(words[:3]):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def unheard_by_children() -> Iterator[None]:
    """Processes started here hear none of the signals; to this one they come at the end."""
    resource_tracker.ensure_running()  # starting it lets some of them through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def resumable() -> Iterator[None]:
    """For a program that keeps what is finished: a signal ends it with code 75, "run me again".

    Raises:
        SystemExit: When one came.
    """
    try:
        with interrupted_by_signals():
            yield
    except KeyboardInterrupt:
        logger.info("Interrupted; what is finished is kept, and the same command goes on from there.")
        raise SystemExit(INTERRUPTED) from None
