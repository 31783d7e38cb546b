"""Checkpoints that are whole or not there, and which of them counts.

One is written aside, its bytes brought to the disk, sealed with a checksum of every file and renamed into place. A
directory named `checkpoint-N` was therefore whole once; the seal tells whether it still is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from oneday.durable_files import read_json, synchronize_path, synchronize_tree, write_json
from oneday.errors import SettingError

logger = logging.getLogger(__name__)

STATE, SEAL = "oneday_state.json", "checksums.json"
PREFIX, DAMAGED, REMOVED = "checkpoint-", "damaged-", ".removed-"


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoints from the oldest to the newest, by step; only what was whole once has this name."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX}*") if re.fullmatch(rf"{PREFIX}\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def list_kept(output_dir: str | Path) -> list[Path]:
    """Those that `--extend` can start from: written before the learning rate fell."""
    return [path for path in list_checkpoints(output_dir) if read_state(path).get("is_kept")]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """This project's own part of a checkpoint: position in the data, clock, counts; {} where it cannot be read."""
    return read_json(checkpoint / STATE)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def seal_checkpoint(folder: Path) -> None:
    """Write `checksums.json`: path -> bytes and SHA-256 of every file in the directory."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    seal = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": hash_file(path)} for path in files}
    write_json(folder / SEAL, seal)


def find_fault(checkpoint: Path) -> str | None:
    """What is wrong with a sealed checkpoint, in words; None when every file is as it was written.

    Raises:
        SettingError: When a file cannot be read, which says nothing of what is in it.
    """
    try:
        seal = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        faults = [find_file_fault(checkpoint / name, entry["bytes"], entry["sha256"]) for name, entry in seal.items()]
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{SEAL} is damaged"
    except OSError as error:
        raise SettingError(
            f"{checkpoint} cannot be read ({error.strerror or error}); look at its disk and permissions, then run the "
            "same command again."
        ) from None
    if STATE not in seal:
        return f"{SEAL} is damaged"
    return next((fault for fault in faults if fault is not None), None)


def find_file_fault(path: Path, num_bytes: int, sha256: str) -> str | None:
    """What is wrong with one file."""
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != num_bytes:
        return f"{path.name} has {path.stat().st_size} bytes instead of {num_bytes}"
    return None if hash_file(path) == sha256 else f"{path.name} has changed since it was written"


def find_good_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest whole checkpoint; damaged ones after it are named and set aside as `damaged-checkpoint-N`.

    Returns:
        None where there is no checkpoint.

    Raises:
        SettingError: When there are some and none is whole, or one cannot be read; then nothing is set aside.
    """
    faults: dict[Path, str] = {}
    for checkpoint in reversed(list_checkpoints(output_dir)):
        fault = find_fault(checkpoint)
        if fault is None:
            set_aside(faults)
            return checkpoint
        faults[checkpoint] = fault
    if faults:
        newest, fault = next(iter(faults.items()))
        others = f", as are {len(faults) - 1} before it" if len(faults) > 1 else ""
        raise SettingError(
            f"{newest} is damaged ({fault}){others}, and no other is there; bring a copy back, or remove what is "
            "damaged: the same command then begins again with what is left of the budget."
        )
    return None


def set_aside(faults: dict[Path, str]) -> None:
    """Say what is wrong with damaged checkpoints, and give them another name."""
    for checkpoint, fault in faults.items():
        logger.warning("%s is damaged (%s) and set aside; the one before it is used.", checkpoint.name, fault)
        aside = checkpoint.with_name(DAMAGED + checkpoint.name)
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(checkpoint, aside)


def publish_checkpoint(source: Path, target: Path) -> None:
    """Seal a staged checkpoint and move it into place once its bytes are on the disk."""
    seal_checkpoint(source)
    synchronize_tree(source)
    if target.exists():
        remove_checkpoint(target)
    os.replace(source, target)
    synchronize_path(target.parent)


def remove_checkpoint(checkpoint: Path) -> None:
    """Take its name away before its files: of a process killed meanwhile no half of a checkpoint is left."""
    aside = checkpoint.with_name(REMOVED + checkpoint.name)
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(checkpoint, aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_old_checkpoints(output_dir: str | Path, limit: int | None) -> None:
    """Keep the newest `limit`, at least one, and the one that `--extend` starts from; None keeps all."""
    for leftover in Path(output_dir).glob(f"{REMOVED}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if not limit:
        return
    kept = list_kept(output_dir)[-1:]
    ordinary = [path for path in list_checkpoints(output_dir) if path not in kept]
    for checkpoint in ordinary[: -max(1, limit)]:
        remove_checkpoint(checkpoint)
