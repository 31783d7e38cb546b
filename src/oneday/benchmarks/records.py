"""Records: one JSON file a finished run, used again while settings, text, machine and code are what they were."""

from __future__ import annotations

import ast
import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from oneday.durable_files import make_folder, write_json
from oneday.processes import RunError, run_in_fresh_process

logger = logging.getLogger(__name__)

Record = dict[str, Any]
PACKAGE = Path(__file__).parent.parent
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# Of the environment, what decides a measurement; of the packages, all but this project.
SAME_ENVIRONMENT = ("device", "device_type", "cores", "threads", "num_processes", "python")
# Relative difference of the measured peak up to which a machine counts as the same; virtual ones drift by a tenth.
SAME_SPEED = 0.25


@dataclass(frozen=True)
class Job:
    """One run: a side, a seed.

    Attributes:
        kind: `ours`, `stock`, `ablation`, `throughput` or `ladder`.
        name: Of the record's file, without `.json`.
        run: Called with this job in a fresh process; returns what the record holds beside the job's own facts.
        recipe: Every setting of the recipe, for `run`; may hold paths and goes into no record.
        details: Facts for `run` that the record repeats (budget_seconds, seed, learning_rate ...).
        settings: Everything that decides the result beside machine and code; a record counts only where it is equal.
        machine: What of this machine its own settings change: parts of the environment, and `peak_flops`.
    """

    kind: str
    name: str
    run: Callable[[Job], Record]
    recipe: dict[str, Any]
    details: dict[str, Any]
    settings: dict[str, Any]
    machine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RecordStore:
    """The records in a directory.

    Attributes:
        folder: Where they lie.
        environment: This machine, from `throughput.describe_environment`.
        reuse_ours: Take records of our side whatever code they are of.
        peak_flops: FLOP/s of this machine now; None: records stand whatever theirs was. Processors of one name differ.
    """

    folder: Path
    environment: dict[str, Any]
    reuse_ours: bool = False
    peak_flops: float | None = None

    def find(self, job: Job) -> Record | None:
        """The record of this job if there is one that stands; says why one does not."""
        path = self.folder / f"{job.name}.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            difference = find_difference(record, job, self.environment | job.machine, self.reuse_ours)
            # What a budget of tokens or steps comes to does not follow from how fast the machine is.
            if job.details.get("budget_seconds", True) is not None:
                difference = difference or find_speed_difference(
                    record, job.machine.get("peak_flops", self.peak_flops)
                )
        except OSError:
            return None
        except (ValueError, KeyError, TypeError):
            difference = "it is damaged"
        if difference is None:
            return record
        logger.info("The record %s is not used: %s.", path.name, difference)
        return None

    def obtain(self, jobs: Iterable[Job], failures: dict[str, str] | None = None) -> dict[str, Record]:
        """The record of each job by its name, those that are missing run one after the other in the order given.

        Args:
            jobs: Runs of different names.
            failures: Takes the reason of each run that fails, by its name, and the others go on; None: raise.

        Raises:
            SettingError: When a run fails or the directory cannot be written; finished runs keep their records.
        """
        jobs = list(jobs)
        records = {job.name: self.find(job) for job in jobs}
        missing = [job for job in jobs if records[job.name] is None]
        if missing:
            self.check_folder()
        seconds = [job.details.get("budget_seconds") or job.details.get("measure_seconds") or 0.0 for job in missing]
        if len(missing) < len(jobs):
            logger.info("%d of %d runs have records that stand.", len(jobs) - len(missing), len(jobs))
        for place, job in enumerate(missing):
            left = f"; {sum(seconds[place:]) / 60:.1f} minutes of budgets left" if any(seconds) else ""
            logger.info("Run %d of %d: %s%s.", place + 1, len(missing), job.name, left)
            try:
                records[job.name] = self.run(job)
            except RunError as error:
                if failures is None:
                    raise
                failures[job.name] = error.reason
        return {name: record for name, record in records.items() if record is not None}

    def check_folder(self) -> None:
        """Raise SettingError, before anything is run, when records cannot be written."""
        make_folder(self.folder, "records_dir")

    def run(self, job: Job) -> Record:
        """Run a job and write its record whole."""
        source_hash = hash_source()  # of what the process is about to import
        result = run_in_fresh_process(job.run, job, job.name)
        record = {
            "kind": job.kind,
            "name": job.name,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **job.details,
            **result,
            "settings": job.settings,
            "source_hash": source_hash,
        }
        set_aside(self.folder / f"{job.name}.json")
        write_json(self.folder / f"{job.name}.json", record)
        return record


def set_aside(path: Path) -> None:
    """Rename a record that no longer stands to `NAME.2026-11-28T101500.123456.replaced`: it may have cost hours."""
    if path.exists():
        moment = datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%dT%H%M%S.%f")
        path.replace(path.with_suffix(f".{moment}.replaced"))


def find_difference(record: Record, job: Job, environment: dict[str, Any], reuse_ours: bool) -> str | None:
    """Why a record does not stand for a job, in words; None when it does."""
    then = record["environment"]
    for name in SAME_ENVIRONMENT:
        if then[name] != environment[name]:
            return f"{name} was {then[name]}, now {environment[name]}"
    for name in sorted((then["packages"].keys() | environment["packages"].keys()) - {"oneday"}):
        old, new = then["packages"].get(name), environment["packages"].get(name)
        if old != new:
            return f"{name} was {old}, now {new}"
    before, now = record["settings"], normalise(job.settings)
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            return f"{name} was {before.get(name)}, now {now.get(name)}"
    if job.kind != "stock" and not reuse_ours and record["source_hash"] != hash_source():
        return "this project's code has changed since (reuse_ours takes it all the same)"
    return None


def find_speed_difference(record: Record, peak_flops: float | None) -> str | None:
    """Why a record is of a faster or slower machine, in words; None when it is of one like this."""
    if peak_flops is None:
        return None
    then = record["peak_flops_measured"]
    if abs(peak_flops / then - 1.0) <= SAME_SPEED:
        return None
    return f"the machine's peak was {then / 1e12:.2f} TFLOP/s, now {peak_flops / 1e12:.2f}"


def normalise(value: Any) -> Any:
    """A value as JSON gives it back."""
    return json.loads(json.dumps(value))


def hash_source(*names: str) -> str:
    """16 hex digits over this project's library, file by file, or over what some files of it do.

    A commit would say less: a tree with changes has none, and committing a record makes a new one.
    """
    digest = hashlib.sha256()
    for path in [PACKAGE / name for name in names] or sorted(PACKAGE.rglob("*.py")):
        content = read_code(path.read_text(encoding="utf-8")) if names else path.read_bytes()
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + content)
    return digest.hexdigest()[:16]


def read_code(source: str) -> bytes:
    """A Python source without what does nothing: comments, docstrings, layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            body[:1] = [ast.Pass()]
    return ast.dump(tree).encode()


def write_summary(
    path: Path, rows: list[dict[str, Any]], records: list[Record], environment: dict[str, Any], **facts: Any
) -> None:
    """Write a benchmark's table as JSON: its rows, and the hardware, versions, commits and seeds behind them."""
    content = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
        "rows": rows,
        "seeds": sorted({record["seed"] for record in records}),
        "commits": sorted({str(record["environment"]["commit"]) for record in records}),
        "environment": environment,
        "records": [f"{record['name']}.json" for record in records],
    }
    write_json(path, content)
