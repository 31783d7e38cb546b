"""Which fine-tuning runs are still to be done, and how many of them at a time."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterator

from tqdm.auto import tqdm

from oneday.classification import Checkpoint
from oneday.durable_files import append_line
from oneday.finetuning_run import PlannedRun, describe_run, measure_run
from oneday.glue_protocol import FinetuneArguments, choose_device, find_output_dir
from oneday.glue_results import RUNS_FILE, read_runs
from oneday.processes import map_in_processes
from oneday.throughput import (
    available_memory_bytes,
    describe_environment,
    keep_freed_memory,
    set_threads,
    usable_cores,
)

logger = logging.getLogger(__name__)

# Larger models fill the cores in one run.
MAX_PARAMETERS = 50_000_000
# A process takes 13 seconds of a slow core to start; FLOPs a core that are worth it, about a minute.
MIN_FLOPS = 3e12
# Libraries and rows of one process; weights (two copies), gradients, two moments and activations come on top.
PROCESS_BYTES = 2**30


def obtain_runs(
    checkpoint: Checkpoint,
    args: FinetuneArguments,
    runs: list[PlannedRun],
    may_start_processes: bool,
    title: str = "fine-tuning",
) -> list[dict]:
    """The line of each run: the finished one, or a new one, which is written to `glue_runs.jsonl` at once.

    Args:
        checkpoint: What is fine-tuned.
        args: The settings of all runs.
        runs: All that are wanted, finished or not.
        may_start_processes: See `run_protocol`.
        title: Of the bar.

    Raises:
        SettingError: When a run in a process of its own failed.
    """
    path = find_output_dir(args) / RUNS_FILE
    lines = read_runs(path)
    missing = list({run.key: run for run in runs if run.key not in lines or not run.is_kept}.values())
    num_processes = choose_num_processes(args, checkpoint, runs, may_start_processes)
    # Scores may follow from the threads of a run: these do not depend on what is finished, or on memory.
    num_threads = max(1, (args.num_threads or usable_cores()) // num_processes)
    num_processes = min(num_processes, max(1, len(missing)))
    if num_processes > 1 and args.num_processes is None:
        num_processes = max(1, min(num_processes, available_memory_bytes() // process_bytes(checkpoint, missing)))
    if num_processes > 1:
        logger.info("%d runs at a time, %d thread%s each", num_processes, num_threads, "s" * (num_threads > 1))
    environment = {k: v for k, v in describe_environment(choose_device(args)).items() if k != "threads"}  # a run's own
    with tqdm(total=len(runs), initial=len(runs) - len(missing), desc=title, unit="run", disable=None) as bar:
        for line in perform_runs(checkpoint, missing, num_processes, num_threads):
            line["environment"] = environment
            lines[line["key"]] = line
            append_line(path, line)
            bar.set_postfix_str(describe_run(line), refresh=False)
            bar.update()
            if bar.disable:
                logger.info("%s: %s", title, describe_run(line))
    return [lines[run.key] for run in runs]


def perform_runs(
    checkpoint: Checkpoint, runs: list[PlannedRun], num_processes: int, num_threads: int
) -> Iterator[dict]:
    """The line of each run as soon as it is finished: one after the other here, or several at a time in processes."""
    if num_processes == 1:
        set_threads(num_threads)
        for run in runs:
            yield measure_run(checkpoint, run)
        return
    names, costs = [run.name for run in runs], [flops_per_parameter(run) for run in runs]
    yield from map_in_processes(measure_shared, (checkpoint, runs, num_threads), names, costs, num_processes)


def measure_shared(shared: tuple[Checkpoint, list[PlannedRun], int], index: int) -> dict:
    """The line of one of the runs that all processes know."""
    checkpoint, runs, num_threads = shared
    set_threads(num_threads)
    keep_freed_memory()
    return measure_run(checkpoint, runs[index])


def choose_num_processes(
    args: FinetuneArguments, checkpoint: Checkpoint, runs: list[PlannedRun], may_start_processes: bool
) -> int:
    """`num_processes`, or for a small model on a CPU one a core, as far as there are runs."""
    if args.num_processes is not None:
        return max(1, min(args.num_processes, len(runs)))
    is_worker = multiprocessing.current_process().daemon  # it may have none of its own
    num_parameters = sum(tensor.numel() for tensor in checkpoint.weights.values())
    if not may_start_processes or is_worker or choose_device(args).type != "cpu" or num_parameters > MAX_PARAMETERS:
        return 1
    cores = args.num_threads or usable_cores()
    if sum(map(flops_per_parameter, runs)) * num_parameters < MIN_FLOPS * cores:
        return 1
    return max(1, min(cores, len(runs)))


def process_bytes(checkpoint: Checkpoint, runs: list[PlannedRun]) -> int:
    """Memory that one process takes, roughly: float32, and every layer's scores of eager attention kept."""
    config, longest = checkpoint.config, max(max(run.task.train_lengths) for run in runs)
    heads, width, layers = (
        getattr(config, name, None) or 1 for name in ("num_attention_heads", "hidden_size", "num_hidden_layers")
    )
    tokens = longest * max(run.args.per_device_train_batch_size for run in runs)
    activations = 4 * layers * tokens * (3 * heads * longest + 20 * width)
    weights = sum(tensor.numel() for tensor in checkpoint.weights.values())
    return PROCESS_BYTES + 20 * weights + activations


def flops_per_parameter(run: PlannedRun) -> float:
    """FLOPs of a run's training, a parameter: 6 a token."""
    return 6 * run.args.num_train_epochs * sum(run.task.train_lengths)
