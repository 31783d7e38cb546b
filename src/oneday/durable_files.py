"""Files that are whole after a crash, whenever it comes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from oneday.errors import SettingError


def write_whole(path: str | Path, text: str, is_durable: bool = True) -> None:
    """Write a file aside and rename it, so that a reader or a crash never meets half of it."""
    with written_aside(Path(path), is_durable) as aside:
        aside.write_text(text, encoding="utf-8")


@contextmanager
def written_aside(path: Path, is_durable: bool = True) -> Iterator[Path]:
    """Gives the name beside `path` to write a file or a directory under; afterwards it is on the disk, at `path`.

    A file replaces what is there. Of a directory that another process has made meanwhile, theirs stays.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        yield aside
        if is_durable:
            synchronize_tree(aside)
        try:
            os.replace(aside, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if is_durable:
            synchronize_names(path.parent)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any, is_durable: bool = True) -> None:
    """Write a JSON file whole, as `write_whole` does."""
    write_whole(path, json.dumps(content, indent=2) + "\n", is_durable)


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON file, or {} when it is not there or not whole."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def append_line(path: Path, content: dict[str, Any]) -> None:
    """Add a line of JSON, after the end of one that a full disk or a kill cut off."""
    with path.open("a+b") as handle:
        end = handle.seek(0, os.SEEK_END)
        handle.seek(max(0, end - 1))
        is_torn = end > 0 and handle.read(1) != b"\n"
        handle.write(b"\n" * is_torn + json.dumps(content).encode() + b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of JSON in a file, without those that were cut off; [] when it is not there."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def check_folder(folder: Path, setting: str) -> None:
    """Look, and make nothing: is a directory that a setting names there and writable, or can it be made?

    Raises:
        SettingError: When it cannot be.
    """
    # Not Path.exists, which raises where a directory above may not be read.
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    reason = None if os.access(nearest, os.W_OK | os.X_OK) else "no permission"
    refuse_folder(folder, setting, reason if nearest.is_dir() else f"{nearest.name} is a file")


def make_folder(folder: Path, setting: str) -> None:
    """Make a directory that a setting names.

    Raises:
        SettingError: When it cannot be written.
    """
    check_folder(folder, setting)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse_folder(folder, setting, error.strerror or str(error))


def refuse_folder(folder: Path, setting: str, reason: str | None) -> None:
    """Raise SettingError where there is a reason that a directory cannot be written."""
    if reason is not None:
        raise SettingError(
            f"The setting {setting} is {str(folder)!r}, which cannot be written ({reason}); name another."
        )


def synchronize_path(path: Path) -> None:
    """Bring a file's bytes, or a directory's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def synchronize_names(folder: Path) -> None:
    """Bring a directory's names to the disk, where its file system and its permissions let that be done."""
    try:
        synchronize_path(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EACCES, errno.EPERM, errno.ENOTSUP, errno.EBADF):
            raise


def synchronize_tree(folder: Path) -> None:
    """Bring a file, or all that is in a directory and its names, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        synchronize_path(path)


@contextmanager
def explain_failed_write(path: Path) -> Iterator[None]:
    """Say what to do where prepared data cannot be written.

    Raises:
        SettingError: In place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise SettingError(
            f"{path} could not be written ({error.strerror or error}): free some space or set cache_dir elsewhere."
        ) from error
