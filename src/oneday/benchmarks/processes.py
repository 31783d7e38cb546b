"""One run at a time, each in a process of its own: no thread pool, memory or compiled code is handed on."""

from __future__ import annotations

import logging
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from oneday.arguments import SettingError
from oneday.recipe import start_logging

logger = logging.getLogger(__name__)

INTERRUPTED = 130
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
        SystemExit: When the user interrupted it.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(function, argument, sender), name=name)
    process.start()
    sender.close()
    try:
        outcome = receiver.recv()
    except EOFError:
        process.join()
        outcome = {"error": f"its process ended with code {process.exitcode}, which is often a lack of memory"}
    except KeyboardInterrupt:
        process.join()
        logger.info("Interrupted; what is finished is kept, and the same command goes on from there.")
        raise SystemExit(INTERRUPTED) from None
    process.join()
    if "error" in outcome:
        raise RunError(name, outcome["error"])
    return outcome["result"]


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
        return {"result": function(argument)}
    except SettingError as error:
        return {"error": str(error)}
    except torch.OutOfMemoryError:
        return {"error": "the GPU's memory does not hold it; lower micro_batch_tokens."}
    except KeyboardInterrupt:
        return {"error": "a signal ended it; run the same command again to go on with the others."}
    except Exception as error:
        logger.exception("A run failed.")
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def leave_with_parent() -> None:
    """End this process as soon as the one that started it is gone."""
    multiprocessing.parent_process().join()
    os._exit(1)
