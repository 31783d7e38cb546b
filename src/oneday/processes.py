"""Work in processes of their own: one fresh process a run, or several that take one run after the other.

Each starts without this one's thread pools, memory and compiled code, and none outlives it.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from oneday.errors import SettingError, is_out_of_memory
from oneday.program import start_logging
from oneday.signals import interrupted_by_signals, noted_signals, unheard_by_children

logger = logging.getLogger(__name__)

# How often a signal is looked for.
POLL_SECONDS = 0.3
# The longest share of the work over the mean one, below which nothing is moved any more.
NEARLY_EVEN = 1.01
# Where torch.compile looks for what it has compiled before.
COMPILER_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


class RunError(SettingError):
    """A run in a process of its own failed; `reason` says why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"The run {name} failed: {reason}")
        self.reason = reason


def run_in_fresh_process(function: Callable[[Any], dict[str, Any]], argument: Any, name: str) -> dict[str, Any]:
    """`function(argument)`, computed in a process started for it.

    Args:
        function: One that can be imported by name.
        argument: What can be pickled.
        name: Of the run, for messages.

    Raises:
        RunError: When it raised an error, or the process died.
        KeyboardInterrupt: When this process was interrupted; the other one has ended then.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(function, argument, sender), name=name)
    try:
        process.start()
        sender.close()
        outcome = receiver.recv()
    except EOFError:
        process.join()
        outcome = {"error": describe_death(process, "take a smaller model or batch")}
    except KeyboardInterrupt:
        if process.pid is not None:
            process.terminate()  # Ctrl-C it has heard at the terminal, another signal perhaps not
            process.join()
        raise
    process.join()
    if "error" in outcome:
        raise RunError(name, outcome["error"])
    return outcome["result"]


def share_out(costs: Sequence[float], num_processes: int) -> list[list[int]]:
    """The runs of each process, so that they end at about the same time; of each the dearest first.

    Dearest first to whoever has least to do. Then, while it shortens the longest share, one of its runs moves to
    another or changes places with a cheaper one. Nine runs of 62, 50 and 48 seconds, three each, end after 244 seconds
    on two processes, and would after 258 without the second part.

    >>> share_out([62, 62, 62, 50, 50, 50, 48, 48, 48], 2)
    [[0, 1, 2, 5], [3, 4, 6, 7, 8]]
    """
    parts: list[list[int]] = [[] for _ in range(num_processes)]
    loads = [0.0] * num_processes
    for run in sorted(range(len(costs)), key=lambda run: -costs[run]):
        least = loads.index(min(loads))
        parts[least].append(run)
        loads[least] += costs[run]
    while max(loads) > NEARLY_EVEN * sum(loads) / num_processes:
        most = loads.index(max(loads))
        changes = [
            (max(loads[most] - moved, loads[other] + moved), other, ours, theirs)
            for other in range(num_processes)
            for ours in parts[most]
            for theirs in (None, *parts[other])
            if other != most and (moved := costs[ours] - (0.0 if theirs is None else costs[theirs])) > 0
        ]
        longest, other, ours, theirs = min(changes, key=lambda change: change[0], default=(loads[most], 0, 0, 0))
        if longest >= loads[most]:
            break
        for source, target, run in ((most, other, ours), (other, most, theirs)):
            if run is not None:
                parts[source].remove(run)
                parts[target].append(run)
                loads[source], loads[target] = loads[source] - costs[run], loads[target] + costs[run]
    return [sorted(part, key=lambda run: (-costs[run], run)) for part in parts]


def take_run(own: list[int], parts: Sequence[list[int]], costs: Sequence[float]) -> int:
    """The next run of a process, taken out: its own dearest, or the cheapest of whoever has most left."""
    return own.pop(0) if own else max(parts, key=lambda part: sum(costs[run] for run in part)).pop()


def map_in_processes(
    function: Callable[[Any, int], dict[str, Any]],
    shared: Any,
    names: Sequence[str],
    costs: Sequence[float],
    num_processes: int,
) -> Iterator[dict[str, Any]]:
    """`function(shared, i)` for each i in `range(len(names))`, in the order in which they are finished.

    Each process has its share of the runs, and when that is done takes from the others'. Where one fails no other is
    begun, and those that are under way come to their end first.

    Args:
        function: One that can be imported by name.
        shared: What all of them need; each process gets it once, pickled.
        names: Of the runs, for messages.
        costs: How long each takes, in any unit.
        num_processes: How many work at a time. None is left when the iteration ends, however it ends.

    Raises:
        RunError: When one raised an error, or its process died.
    """
    parts, working, failure = share_out(costs, min(num_processes, len(names))), {}, None
    with started_workers(function, len(parts)) as workers:
        shares = dict(zip(workers, parts))
        content = pickle.dumps(shared, protocol=pickle.HIGHEST_PROTOCOL)
        for worker in workers:
            working[worker] = take_run(shares[worker], parts, costs)
            with refused_to_the_dead(names[working[worker]], workers[worker]):
                worker.send_bytes(content)
                worker.send(working[worker])
        del content
        with noted_signals() as signals:
            while working:
                if signals:
                    raise KeyboardInterrupt
                for worker in wait(list(working), POLL_SECONDS):
                    name = names[working.pop(worker)]
                    try:
                        with refused_to_the_dead(name, workers[worker]):
                            outcome = worker.recv()
                        if "error" in outcome:
                            raise RunError(name, outcome["error"])
                    except RunError as error:
                        failure = failure or error
                        continue
                    if failure is None and any(parts):
                        run = take_run(shares[worker], parts, costs)
                        try:
                            with refused_to_the_dead(names[run], workers[worker]):
                                worker.send(run)
                            working[worker] = run
                        except RunError as error:  # it died after its answer, which counts
                            failure = error
                    yield outcome["result"]
        if failure is not None:
            raise failure


@contextmanager
def started_workers(
    function: Callable[[Any, int], dict[str, Any]], num_workers: int
) -> Iterator[dict[Connection, BaseProcess]]:
    """Processes by our ends of their pipes; none is left at the end."""
    workers: dict[Connection, BaseProcess] = {}
    try:
        with noted_signals() as signals, unheard_by_children():  # this process stops them
            for _ in range(num_workers):
                ours, process = start_worker(function)
                workers[ours] = process
        if signals:
            raise KeyboardInterrupt
        yield workers
    finally:
        for process in workers.values():
            process.kill()
        for process in workers.values():
            process.join()


def start_worker(function: Callable[[Any, int], dict[str, Any]]) -> tuple[Connection, BaseProcess]:
    """A process that waits for what is shared, then for the numbers of runs; with our end of its pipe."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(function, theirs), daemon=True)
    process.start()
    theirs.close()
    return ours, process


def serve(function: Callable[[Any, int], dict[str, Any]], connection: Connection) -> None:
    """The process: answers each number with `{"result": ...}` or `{"error": ...}`."""
    start_logging()
    threading.Thread(target=leave_with_parent, daemon=True).start()
    measure = functools.partial(function, pickle.loads(connection.recv_bytes()))
    while True:
        connection.send(attempt(measure, connection.recv()))


@contextmanager
def refused_to_the_dead(name: str, process: BaseProcess) -> Iterator[None]:
    """A broken pipe becomes a RunError that says how the process ended."""
    try:
        yield
    except (EOFError, OSError):
        process.join()
        raise RunError(name, describe_death(process, "set num_processes lower")) from None


def describe_death(process: BaseProcess, remedy: str) -> str:
    """How a process ended that should not have, and what helps against a lack of memory."""
    if process.exitcode == -signal.SIGKILL:
        return f"its process was killed, which is often a lack of memory; {remedy}"
    return f"its process ended with code {process.exitcode}"


def work(function: Callable[[Any], dict[str, Any]], argument: Any, sender: Connection) -> None:
    """The process: sends `{"result": ...}` or `{"error": ...}`; does not outlive its parent."""
    start_logging()
    threading.Thread(target=leave_with_parent, daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="oneday-compiled-") as folder:
        for name in COMPILER_CACHES:
            os.environ[name] = str(Path(folder) / name.lower())
        outcome = attempt(function, argument)
    sender.send(outcome)


def attempt(function: Callable[[Any], dict[str, Any]], argument: Any) -> dict[str, Any]:
    """`{"result": ...}` or `{"error": ...}`."""
    try:
        with interrupted_by_signals():
            return {"result": function(argument)}
    except SettingError as error:
        return {"error": str(error)}
    except KeyboardInterrupt:
        return {"error": "a signal ended it; run the same command again to go on with the others."}
    except Exception as error:
        if is_out_of_memory(error):
            return {"error": "the GPU's memory does not hold it; take a smaller batch, or fewer processes."}
        logger.exception("A run failed.")
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def leave_with_parent() -> None:
    """End this process as soon as the one that started it is gone."""
    multiprocessing.parent_process().join()
    os._exit(1)
