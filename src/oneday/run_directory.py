"""The run directory: its files, who may write to it, and the one reader of its metrics."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml
from safetensors import SafetensorError

from oneday.durable_files import append_line, check_folder, read_json, read_lines, synchronize_path, write_whole
from oneday.errors import SettingError
from oneday.recipe import read_yaml

RECIPE, METRICS, BUDGET, RESULTS = "recipe.yaml", "metrics.jsonl", "budget.json", "results.json"
# What the code on a card calls the model, until a push to the Hub puts the id there.
PLACEHOLDER = "PATH_OR_ID"
SOURCES = "sources.json"  # commits of the data sets that are read from the Hub
ENVIRONMENT, CARD, CURVE = "environment.json", "README.md", "training_curve.png"
GLUE, GLUE_RESULTS, ZERO_SHOT_RESULTS = "glue", "glue_results.json", "zero_shot_results.json"  # GLUE is a directory
STAGING, LOCK = ".staging", ".lock"
WANDB_RUN = "wandb_run.json"  # the id under which W&B knows the run
TRACKERS = ("tensorboard", "trackio", "wandb")
# What writing a file with Python, torch or safetensors may raise.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
NO_SPACE_BYTES = 2**20

logger = logging.getLogger(__name__)

# Settings that do not touch the training: they may change when a run goes on.
FREE_SETTINGS = {
    "output_dir", "save_minutes", "save_steps", "save_total_limit", "logging_steps", "report_to", "disable_tqdm",
    "run_name", "cache_dir", "extend", "logging_first_step", "logging_strategy", "log_level_replica",
    "log_on_each_node", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
    "num_threads", "log_level", "micro_batch_tokens", "ddp_timeout",
    "push_to_hub", "hub_model_id", "hub_strategy", "hub_license", "hub_private_repo", "resume_from_hub",
}  # fmt: skip
# Where text, tokenizer and model lie; what they hold is known by fingerprints.
PLACES = {"dataset_name", "validation_name", "text_column", "tokenizer_name", "model_config"}
# Those of them that are of one call, by their defaults.
ONCE = {"resume_from_hub": None, "extend": False, "push_to_hub": False}


def check_same_run(
    folder: str | Path, record: dict[str, Any], data: str, model: str, otherwise: str = "name another output_dir"
) -> None:
    """Refuse to go on with a run, or to repeat it, on other text or with another model.

    Args:
        folder: Its directory.
        record: Its budget.json, or a checkpoint's state; older ones lack fingerprints and pass.
        data: Fingerprint of the text and tokenizer at hand.
        model: That of the model config; empty where there is none.
        otherwise: What else can be done.

    Raises:
        SettingError: When one of them is not the run's.
    """
    if record.get("data", data) != data:
        raise SettingError(
            f"The text or tokenizer of dataset_name is not what the run in {folder} was trained on; "
            f"bring the same text back, or {otherwise}."
        )
    if (record.get("model") or model) != model:
        raise SettingError(
            f"The file of model_config is not what the run in {folder} was begun with; "
            f"bring its contents back, or {otherwise}."
        )


def inspect_run(output_dir: str | Path, settings: dict[str, Any]) -> str:
    """Whether this run is `new`, to be `resumed`, `finished`, or finished and to be `extended`. Writes nothing.

    Raises:
        SettingError: When the directory holds another run, or files that are not a run's.
    """
    folder = Path(output_dir)
    recipe = folder / RECIPE
    if not os.path.exists(recipe):
        check_folder(folder, "output_dir")
        if folder.exists() and any(path.name not in (LOCK, STAGING) for path in folder.iterdir()):
            raise SettingError(f"The output_dir {output_dir} is not empty and holds no run; name another directory.")
        return "new"
    before = read_yaml(str(recipe))
    is_finished = (folder / RESULTS).exists()
    if settings.get("extend") and is_finished:
        budget = {name: settings.get(name) for name in before.keys() | settings.keys() if name.startswith("budget_")}
        is_extended = bool(differing_settings(before, {**before, **budget}))
        before |= budget
    differing = differing_settings(before, settings)
    if differing:
        raise SettingError(
            f"The output_dir {output_dir} holds a run with other settings ({', '.join(differing)}); "
            "name another output_dir, or give the same settings to go on with that run."
        )
    if settings.get("extend") and is_finished:
        return "extended" if is_extended or read_json(folder / BUDGET).get("status") == "extending" else "finished"
    return "finished" if is_finished else "resumed"


def create_run(output_dir: str | Path, settings: dict[str, Any]) -> None:
    """Make the directory of a new run with the resolved recipe in it.

    Raises:
        SettingError: When it cannot be written.
    """
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_recipe(folder, settings)
    except OSError as error:
        raise SettingError(f"The output_dir {folder} cannot be written ({error.strerror}); name another.") from None


def write_recipe(folder: Path, settings: dict[str, Any]) -> None:
    """Write recipe.yaml; of what was asked for once (where it came from, whether it is pushed) it has the default."""
    write_whole(folder / RECIPE, yaml.safe_dump({**settings, **ONCE}, sort_keys=True, allow_unicode=True))


def read_recipe(output_dir: str | Path) -> dict[str, Any]:
    """Every setting of a run; {}: there is no run."""
    path = Path(output_dir) / RECIPE
    return read_yaml(str(path)) if path.exists() else {}


def refresh_recipe(output_dir: str | Path, settings: dict[str, Any]) -> None:
    """Enter the present values of the settings that may change when a run goes on."""
    folder = Path(output_dir)
    before = read_recipe(folder)
    free = {name: value for name, value in settings.items() if name in FREE_SETTINGS}
    if {**before, **free, **ONCE} != before:
        with refuse_full_disk(folder):
            write_recipe(folder, {**before, **free})


def lock_run(output_dir: str | Path) -> IO[str]:
    """Make the run directory if need be, and hold it for the life of this process (of the returned file).

    Raises:
        SettingError: When another process holds it, or it cannot be written.
    """
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        handle = open(Path(output_dir) / LOCK, "w")  # noqa: SIM115
    except OSError as error:
        raise SettingError(
            f"The output_dir {output_dir} cannot be written ({error.strerror}); name another."
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise SettingError(
            f"Another process is training in the output_dir {output_dir}; wait for it or end it."
        ) from None
    except OSError as error:  # some network file systems
        logger.warning("The output_dir cannot be locked (%s): see that no other process trains in it.", error.strerror)
    for leftover in Path(output_dir).glob(".*.json.*"):  # of a process killed while writing a file aside
        leftover.unlink(missing_ok=True)
    return handle


def discard_run(output_dir: str | Path) -> None:
    """Take back a run that took no step, so that its directory can be used with other settings."""
    for name in (RECIPE, METRICS, BUDGET, SOURCES, ENVIRONMENT, WANDB_RUN, LOCK):
        (Path(output_dir) / name).unlink(missing_ok=True)
    for name in TRACKERS:
        shutil.rmtree(Path(output_dir) / name, ignore_errors=True)
    if not any(Path(output_dir).iterdir()):
        Path(output_dir).rmdir()


def differing_settings(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """`name: old, now new` for each setting that differs and touches the training."""
    names = sorted((before.keys() | after.keys()) - FREE_SETTINGS)
    return [
        f"{name}: {before.get(name)}, now {after.get(name)}" for name in names if before.get(name) != after.get(name)
    ]


def publish_files(source: Path, target: Path) -> None:
    """Move each file of a staged directory into an existing one, its bytes on the disk before its name."""
    for path in sorted(source.iterdir()):
        synchronize_path(path)
        os.replace(path, target / path.name)
    synchronize_path(target)
    source.rmdir()


@contextmanager
def staging(output_dir: str | Path, name: str) -> Iterator[Path]:
    """A directory to write into before publishing; whatever is left of it is removed."""
    folder = Path(output_dir) / STAGING / name
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.parent.is_dir() and not any(folder.parent.iterdir()):
            folder.parent.rmdir()


def is_disk_full(error: BaseException, folder: str | Path) -> bool:
    """Whether writing failed for lack of space; torch and safetensors say it in words of their own."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    if isinstance(error, (OSError, RuntimeError, SafetensorError)) and "No space left" in str(error):
        return True
    try:
        return isinstance(error, WRITE_ERRORS) and shutil.disk_usage(folder).free < NO_SPACE_BYTES
    except OSError:  # a disk that has gone does not say how full it is
        return False


@contextmanager
def refuse_full_disk(output_dir: str | Path) -> Iterator[None]:
    """For what must be written: a full disk becomes one sentence.

    Raises:
        SettingError: When the disk is full.
    """
    try:
        yield
    except WRITE_ERRORS as error:
        if is_disk_full(error, output_dir):
            raise SettingError(
                f"The disk of output_dir {output_dir} is full; free some space and run again."
            ) from None
        raise


def read_results(run_dir: str | Path) -> dict[str, Any]:
    """results.json of a run; {} when it is not there, or another project's."""
    results = read_json(Path(run_dir) / RESULTS)
    return results if isinstance(results, dict) and "objective" in results else {}


def append_metrics(output_dir: str | Path, event: dict[str, Any]) -> None:
    """Add one line to metrics.jsonl; where that fails the line is lost, the training is not."""
    try:
        append_line(Path(output_dir) / METRICS, event)
    except OSError as error:  # a network disk may stumble; the next line may reach it again
        reason = "The disk is full" if is_disk_full(error, output_dir) else f"It was not written ({error.strerror})"
        logger.warning("%s: %s of step %s is not in %s.", reason, event["event"], event["step"], METRICS)


def read_metrics(output_dir: str | Path, undone_by_rollback: bool = False) -> list[dict[str, Any]]:
    """The events that led to the weights, a torn last line left out.

    Args:
        output_dir: A run directory.
        undone_by_rollback: Also the lines that a rollback undid; those that a resume undid are always left out.
    """
    events: list[dict[str, Any]] = []
    for event in read_lines(Path(output_dir) / METRICS):
        if "event" not in event:  # another project's
            continue
        if event["event"] == "resume":
            last = event.get("from_taken", event["from_step"])
            events = [old for old in events if old.get("taken", old["step"]) <= last]
        elif event["event"] == "rollback" and not undone_by_rollback:
            events = [old for old in events if old["step"] <= event["from_step"]]
        events.append(event)
    return events
