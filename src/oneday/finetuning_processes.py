"""Which fine-tuning runs are still to be done, and how many of them at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import psutil
from tqdm.auto import tqdm

from oneday.classification import Checkpoint
from oneday.finetuning_run import PlannedRun, describe_run, measure_run
from oneday.glue_protocol import FinetuneArguments, choose_device, find_output_dir
from oneday.glue_results import RUNS_FILE, append_run, read_runs
from oneday.processes import map_in_processes
from oneday.throughput import keep_freed_memory, set_threads, usable_cores

logger = logging.getLogger(__name__)

# Larger models fill the cores in one run.
MAX_PARAMETERS = 50_000_000
# A process takes 13 seconds of a slow core to start; FLOPs a core that are worth it, about a minute.
MIN_FLOPS = 3e12
# Libraries, rows and activations of one process; weights, gradients and two moments come on top.
PROCESS_BYTES = 2**30


def obtain_runs(
    checkpoint: Checkpoint, args: FinetuneArguments, runs: list[PlannedRun], title: str = "fine-tuning"
) -> list[dict]:
    """The line of each run: the finished one, or a new one, which is written to `glue_runs.jsonl` at once.

    Raises:
        SettingError: When a run in a process of its own failed.
    """
    path = find_output_dir(args) / RUNS_FILE
    lines = read_runs(path)
    missing = list({run.key: run for run in runs if run.key not in lines or not run.is_kept}.values())
    with tqdm(total=len(runs), initial=len(runs) - len(missing), desc=title, unit="run", disable=None) as bar:
        for line in perform_runs(checkpoint, args, missing):
            lines[line["key"]] = line
            append_run(path, line)
            bar.set_postfix_str(describe_run(line), refresh=False)
            bar.update()
            if bar.disable:
                logger.info("%s: %s", title, describe_run(line))
    return [lines[run.key] for run in runs]


def perform_runs(checkpoint: Checkpoint, args: FinetuneArguments, runs: list[PlannedRun]) -> Iterator[dict]:
    """The line of each run as soon as it is finished: one after the other here, or several at a time in processes."""
    num_processes = choose_num_processes(args, checkpoint, runs)
    num_threads = max(1, (args.num_threads or usable_cores()) // num_processes)
    if num_processes == 1:
        set_threads(num_threads)
        for run in runs:
            yield measure_run(checkpoint, run)
        return
    logger.info("%d runs at a time, %d thread%s each", num_processes, num_threads, "s" * (num_threads > 1))
    runs = sorted(runs, key=count_flops, reverse=True)  # a long one that begins last would go on alone
    names = [run.name for run in runs]
    yield from map_in_processes(measure_shared, (checkpoint, runs, num_threads), names, num_processes)


def measure_shared(shared: tuple[Checkpoint, list[PlannedRun], int], index: int) -> dict:
    """The line of one of the runs that all processes know."""
    checkpoint, runs, num_threads = shared
    set_threads(num_threads)
    keep_freed_memory()
    return measure_run(checkpoint, runs[index])


def choose_num_processes(args: FinetuneArguments, checkpoint: Checkpoint, runs: list[PlannedRun]) -> int:
    """`num_processes`, or for a small model on a CPU one a core, as far as there are runs and memory for them."""
    if args.num_processes is not None:
        return max(1, min(args.num_processes, len(runs)))
    num_parameters = sum(tensor.numel() for tensor in checkpoint.weights.values())
    cores = args.num_threads or usable_cores()
    work = sum(map(count_flops, runs)) * num_parameters
    if choose_device(args).type != "cpu" or num_parameters > MAX_PARAMETERS or work < MIN_FLOPS * cores:
        return 1
    room = psutil.virtual_memory().available // (PROCESS_BYTES + 16 * num_parameters)
    return max(1, min(cores, len(runs), room))


def count_flops(run: PlannedRun) -> float:
    """FLOPs of a run's training, a parameter: 6 a token."""
    return 6 * run.args.num_train_epochs * sum(run.task.splits["train"]["length"])
