"""How every program runs: what it logs, one sentence for what is wrong, its exit code."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

import datasets
from transformers.utils import logging as transformers_logging

from oneday.errors import SettingError, is_out_of_memory
from oneday.signals import end_undisturbed

# So long after process 0 has ended with an error, its launcher has ended the others.
ALONE_SECONDS = 5.0


def is_first_process() -> bool:
    """Whether this is process 0 of those that `accelerate launch` started, the one that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def start_logging() -> None:
    """Plain lines on stderr, without the chatter of the libraries."""
    level = logging.INFO if is_first_process() else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr, force=True)
    for noisy in ("httpx", "httpx2", "absl", "datasets", "filelock", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def run_program(main: Callable[[], int | None]) -> None:
    """Run a script's main: a SettingError becomes one sentence on stderr and exit code 1, Ctrl-C one word and 130."""
    start_logging()
    try:
        code = main()
    except SettingError as error:
        say_error(str(error))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        say_error("The memory does not hold the model; take a smaller one, a smaller batch or a lower max_seq_length.")
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        code = 130
    finally:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            end_undisturbed()
    raise SystemExit(code or 0)


def say_error(sentence: str) -> NoReturn:
    """One sentence on stderr, and exit code 1; process 0 speaks for all, unless it is another's error alone."""
    if not is_first_process():
        time.sleep(ALONE_SECONDS)
    sys.stderr.write(f"error: {sentence}\n")
    raise SystemExit(1) from None
