"""Tokenising as tasks of datatrove's executors: on this machine, under Slurm or under Ray.

A task writes one of the parts of `tokenized_parts.py`; what is done is what has its file. All machines see one
`cache_dir`, and for text of the Hub one HF_HOME: tasks get the text as the files in there.
"""

from __future__ import annotations

import io
import math
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from oneday.arguments import DataArguments, ExecutorArguments
from oneday.errors import SettingError, check_positive
from oneday.packed_dataset import INDEX_FILE
from oneday.preparation import TrainSplit, load_split, prepare_rows
from oneday.tokenized_parts import locate_part, write_part

try:
    from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
    from datatrove.executor.base import PipelineExecutor
    from datatrove.pipeline.base import PipelineStep
    from datatrove.utils.logging import logger as log
    from datatrove.utils.logging import setup_default_logger
    from datatrove.utils.stats import PipelineStats
except ImportError as error:
    raise SettingError(
        f"The setting executor needs a package that is not here ({error}): pip install datatrove, or leave it out."
    ) from error

EXECUTORS = ("local", "slurm", "ray")


class TokenizePart(PipelineStep):
    """Task `rank` of `world_size` writes part `rank` of `world_size` of the training text."""

    type = "TOKENIZER"
    name = "oneday part"

    def __init__(self, split: TrainSplit) -> None:
        super().__init__()
        self.split = split

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:
        """Takes no documents and gives none.

        Raises:
            SettingError: The part cannot be written.
        """
        with exit_on_sigterm(), self.track_time("part"):
            write_part(self.split.texts, self.split.tokenizer, self.split.parts, rank, world_size)


class PackRows(PipelineStep):
    """One task packs the training rows from all parts, into the cache."""

    type = "PACKER"
    name = "oneday rows"

    def __init__(self, split: TrainSplit, args: DataArguments, kind: str, tasks: int) -> None:
        super().__init__()
        self.split, self.args, self.kind, self.tasks = split, args, kind, tasks

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:
        """Takes no documents and gives none.

        Raises:
            SettingError: A part is missing or damaged, or the rows cannot be written.
        """
        split = self.split
        # Slurm knows of the last array of tasks alone, and an array has at most a thousand of them.
        check_parts(split, self.tasks, "the logs of the other job", None)
        with exit_on_sigterm(), self.track_time("corpus"):
            prepare_rows(self.args, split.texts, split.name, split.tokenizer, self.kind, split.cache)


class QuietTasks:
    """Tasks that speak to their log files alone; datatrove's speak to the terminal too, tracebacks and all."""

    def _run_for_rank(self, *args: object, **kwargs: object) -> PipelineStats:
        try:
            with redirect_stderr(io.StringIO()):
                return super()._run_for_rank(*args, **kwargs)
        finally:
            setup_default_logger()


class LocalExecutor(QuietTasks, LocalPipelineExecutor):
    """Tasks in processes of this machine."""


class RayExecutor(QuietTasks, RayPipelineExecutor):
    """Tasks in the actors of a Ray cluster."""


def run_tasks(args: DataArguments, kind: str, settings: ExecutorArguments) -> list[str]:
    """Tokenise the training text where `prepare_data` finds it; under Slurm pack it too.

    Args:
        args: Which text, tokenizer and packing.
        kind: `encoder` or `decoder`.
        settings: Which executor, how many tasks.

    Returns:
        Ids of the Slurm jobs that now tokenise and pack; none when the text is tokenised.

    Raises:
        SettingError: A setting cannot be, or a task failed; parts that are done stay and are not done again.
    """
    check_executor(settings)
    split = load_split(args, kind, "executor")
    if (split.rows / INDEX_FILE).exists():
        return []
    logging_dir = f"{settings.logging_dir or split.cache / 'datatrove'}/{split.parts.name}-of-{settings.tasks:05d}"
    tokenize = build_executor(settings, TokenizePart(split), settings.tasks, f"{logging_dir}/tokenize")
    forget_lost_parts(tokenize, split)
    if isinstance(tokenize, SlurmPipelineExecutor):
        pack = build_executor(
            settings, PackRows(split, args, kind, settings.tasks), 1, f"{logging_dir}/{split.rows.name}"
        )
        return submit_jobs(tokenize, pack)
    log.remove()
    log.add(sys.stderr, level="INFO")  # below it are tracebacks of what Ray's tasks raised
    failure = None
    try:
        tokenize.run()
    except Exception as error:
        failure = error
    check_parts(split, settings.tasks, f"{logging_dir}/tokenize/logs", failure)
    return []


def check_executor(settings: ExecutorArguments) -> None:
    """Raise SettingError for settings that cannot be."""
    if settings.executor not in EXECUTORS:
        raise SettingError(f"The setting executor is {settings.executor!r}; it must be one of {', '.join(EXECUTORS)}.")
    if settings.tasks < 1:
        raise SettingError(f"The setting tasks is {settings.tasks}; it must be at least 1.")
    if settings.workers != -1 and settings.workers < 1:
        raise SettingError(f"The setting workers is {settings.workers}; it must be at least 1, or -1 for all tasks.")
    for name in ("time_hours", "cpus_per_task", "mem_per_cpu_gb"):
        check_positive(name, getattr(settings, name))
    if not isinstance(settings.sbatch_args, dict):
        raise SettingError(
            f"The setting sbatch_args is {settings.sbatch_args!r}; it must be names with values, say '{{qos: high}}'."
        )
    if settings.executor == "slurm" and not settings.partition:
        raise SettingError("The setting partition is empty and executor is slurm; name one of those `sinfo` lists.")
    if settings.executor == "slurm" and not shutil.which("sbatch"):
        raise SettingError("The setting executor is slurm, but there is no sbatch here; run this where jobs are sent.")
    if settings.executor == "ray":
        try:
            import ray  # noqa: F401
        except ImportError as error:
            raise SettingError("The setting executor is ray, which is not here: pip install ray.") from error


def build_executor(settings: ExecutorArguments, step: PipelineStep, tasks: int, logging_dir: str) -> PipelineExecutor:
    """The executor that runs a step as so many tasks, under datatrove's own names."""
    common = {"pipeline": [step], "tasks": tasks, "workers": settings.workers, "logging_dir": logging_dir}
    if settings.executor == "local":
        return LocalExecutor(**common)
    common |= {"cpus_per_task": settings.cpus_per_task, "mem_per_cpu_gb": settings.mem_per_cpu_gb}
    if settings.executor == "ray":
        return RayExecutor(**common, time=round(3600 * settings.time_hours))
    return SlurmPipelineExecutor(
        **common,
        time=str(math.ceil(60 * settings.time_hours)),  # a plain number is minutes to sbatch
        partition=settings.partition,
        job_name=f"oneday-{step.type.lower()}",
        qos=None,
        # The interpreter and the packages of this process; sbatch hands its environment on.
        env_command=f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
        # A job that waits for one that failed ends instead of waiting for ever.
        sbatch_args={"kill-on-invalid-dep": "yes", **settings.sbatch_args},
    )


def forget_lost_parts(executor: PipelineExecutor, split: TrainSplit) -> None:
    """Have tasks run again that datatrove calls completed and whose part is gone."""
    for rank in range(executor.world_size):
        marker = f"completions/{rank:05d}"
        if not locate_part(split.parts, rank, executor.world_size).exists() and executor.logging_dir.isfile(marker):
            executor.logging_dir.rm(marker)


def check_parts(split: TrainSplit, tasks: int, logs: str, failure: Exception | None) -> None:
    """Raise SettingError where a part is not there, whatever the executor said of its task."""
    missing = [rank for rank in range(tasks) if not locate_part(split.parts, rank, tasks).exists()]
    if missing:
        said = str(failure).rstrip(".") if isinstance(failure, SettingError) else repr(failure)
        reason = f" ({' '.join(said.split())})" if failure else ""
        raise SettingError(
            f"{len(missing)} of {tasks} tasks are not done{reason}; read {logs}, mend it, and the same command again "
            "does what is missing."
        )


def submit_jobs(tokenize: SlurmPipelineExecutor, pack: SlurmPipelineExecutor) -> list[str]:
    """Send both to Slurm, the second to start when the first has ended well; returns the ids of their jobs.

    Raises:
        SettingError: sbatch refuses them.
    """
    pack.depends, pack.skip_completed = tokenize, False  # whether there are rows to pack has been looked at
    try:
        pack.run()
    except subprocess.CalledProcessError as error:
        raise SettingError(
            "The setting executor is slurm, and sbatch refused the job for the reason above; "
            "mend partition, time_hours, mem_per_cpu_gb or sbatch_args."
        ) from error
    return [job for job in (tokenize.job_id, pack.job_id) if job != -1]


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """A task that is told to end, as another has failed or its time is over, removes the file it was writing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
