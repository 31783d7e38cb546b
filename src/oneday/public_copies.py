"""What of a run is sent to the Hub: copies in which every absolute path has been cut down to its last name."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from oneday import run_directory as rundir
from oneday.checkpoints import SEAL, seal_checkpoint
from oneday.durable_files import read_json, read_lines, write_json
from oneday.saving import COMPANION_FILE

logger = logging.getLogger(__name__)

# A pickle of every setting, paths included, which nothing reads, and what only a run that goes on needs.
UNSENT = {"training_args.bin", rundir.LOCK, rundir.WANDB_RUN}
# Of a finished run, beside its weights.
SENT = {
    *(rundir.CARD, rundir.RECIPE, rundir.BUDGET, rundir.METRICS, rundir.SOURCES, rundir.ENVIRONMENT, rundir.RESULTS),
    *(rundir.CURVE, rundir.ZERO_SHOT_RESULTS),
    *("config.json", "generation_config.json", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja"),
}
# What a run needs beside a checkpoint to go on.
RESUMED_FILES = (rundir.RECIPE, rundir.BUDGET, rundir.METRICS, rundir.SOURCES, rundir.WANDB_RUN)

# `/a/b`, `~/a`, `../a/b` and `C:\a\b`, and the same after `file://`; never a word of a sentence with one slash.
PATH_START = r"(?:file://)?(?:~|\.\.|[A-Za-z]:)?"
LOCAL_PATH = re.compile(rf"(?<![\w/.\\]){PATH_START}(?:[/\\][^/\\\s,'\"`]+){{2,}}[/\\]?|(?<![\w/.])~[/\\][^\s,'\"`]+")
# The same with spaces in it: as a whole setting, or between quotes.
WHOLE_PATH = re.compile(rf"{PATH_START}(?:[/\\][^/\\]+){{2,}}[/\\]?|(?:~|\.\.)[/\\].+", re.DOTALL)
QUOTED = re.compile(r"([`'\"])([^`'\"\n]+)\1")


def hide_paths(value: Any) -> Any:
    """The same value with every local path in its strings cut down to its last name.

    Absolute paths, those of the home directory and those that go upward; one inside the project stays.

    Example: {"dataset_name": "/home/ann/texts/*.parquet"} -> {"dataset_name": "*.parquet"}.
    """
    if isinstance(value, dict):
        return {key: hide_paths(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [hide_paths(entry) for entry in value]
    if not isinstance(value, str):
        return value
    if is_path_here(value):
        return last_name(value.strip())
    if "\n" not in value:
        value = ",".join(hide_whole_path(part) for part in value.split(","))
    value = QUOTED.sub(lambda match: match[1] + hide_whole_path(match[2]) + match[1], value)
    return LOCAL_PATH.sub(lambda match: last_name(match.group()), value)


def is_path_here(text: str) -> bool:
    """Whether a text is a path from the root or the home directory that exists, whatever is in its names."""
    path = text.strip()
    return path.startswith(("/", "~/")) and len(path) > 1 and "\n" not in path and Path(path).expanduser().exists()


def hide_whole_path(text: str) -> str:
    """The last name of a text that is one path, spaces and all; any other text as it is."""
    path = text.strip()
    return last_name(path) if WHOLE_PATH.fullmatch(path) or is_path_here(path) else text


def last_name(path: str) -> str:
    """`*.parquet` of `/home/ann/texts/*.parquet`."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def copy_publicly(source: Path, target: Path) -> None:
    """A copy of one file that names no local path; weights, states and vocabularies hold none and are linked."""
    if source.name == "tokenizer.json" or source.suffix not in (".json", ".jsonl", ".yaml", ".md"):
        try:
            os.link(source, target)
        except OSError:  # another file system
            shutil.copyfile(source, target)
        return
    text = source.read_text(encoding="utf-8")
    if source.suffix == ".yaml":
        text = yaml.safe_dump(hide_paths(yaml.safe_load(text)), sort_keys=True, allow_unicode=True)
    elif source.suffix == ".json":
        text = json.dumps(hide_paths(json.loads(text)), indent=2) + "\n"
    elif source.suffix == ".jsonl":
        text = "".join(json.dumps(hide_paths(line)) + "\n" for line in read_lines(source))
    else:
        text = hide_paths(text)
    target.write_text(text, encoding="utf-8")


def stage_model(run_dir: Path, folder: Path) -> None:
    """Copies of a run's files at the top of its directory, and of its scores; what else lies there is named."""
    strangers = []
    for path in sorted(path for path in run_dir.iterdir() if path.is_file() and not path.name.startswith(".")):
        if path.name in SENT or path.suffix == ".safetensors":
            copy_publicly(path, folder / path.name)
        elif path.name not in UNSENT:
            strangers.append(path.name)
    if strangers:
        logger.info("Not sent, as they are not a run's files: %s", ", ".join(strangers))
    scores = run_dir / rundir.GLUE / rundir.GLUE_RESULTS
    if scores.is_file():
        (folder / rundir.GLUE).mkdir()
        copy_publicly(scores, folder / rundir.GLUE / scores.name)


def stage_saved_model(checkpoint: Path, folder: Path) -> None:
    """Copies of what a checkpoint holds of the model and its tokenizer, without what only resuming needs."""
    for path in sorted(checkpoint.iterdir()):
        if path.name == COMPANION_FILE:
            continue
        if path.suffix == ".safetensors" or "config" in path.name or path.name.startswith("tokenizer"):
            copy_publicly(path, folder / path.name)


def stage_checkpoint(checkpoint: Path, folder: Path, name: str) -> None:
    """Copies of a checkpoint, sealed anew, under `name`, and of what a run needs beside it to go on."""
    (folder / name).mkdir()
    for path in sorted(checkpoint.iterdir()):
        if path.is_file() and path.name not in UNSENT | {SEAL}:
            copy_publicly(path, folder / name / path.name)
    seal_checkpoint(folder / name)
    for file in RESUMED_FILES:
        if (checkpoint.parent / file).is_file():
            copy_publicly(checkpoint.parent / file, folder / file)
    # The run may have ended meanwhile; where a checkpoint comes back without the final model, it has not.
    if (folder / rundir.BUDGET).is_file():
        report = {**read_json(folder / rundir.BUDGET), "status": "interrupted"}
        write_json(folder / rundir.BUDGET, report)
