"""What corpora are called: the parts of a mixture, ids on the Hub, and a name that holds no folder of somebody's."""

from __future__ import annotations

import os
from pathlib import Path

from oneday import hub_texts
from oneday.arguments import DataArguments
from oneday.python_docs import PYTHON_DOCS
from oneday.text_files import is_local

# Folders of homes.
HOMES = ("home", "users")


def split_names(names: str | list[str]) -> list[str]:
    """Returns the parts of a comma-separated mixture; a path that exists is one part, commas or not."""
    if isinstance(names, str):
        names = [names] if os.path.exists(os.path.expanduser(names)) else names.split(",")
    return [name.strip() for name in names if name.strip()]


def name_corpus(names: list[str], args: DataArguments) -> str:
    """What the model card calls the corpus: Hub ids with their configuration, of a local path its last two parts."""
    shown = []
    for name in names:
        if is_local(name):
            name = name_path(Path(name))
        elif name != PYTHON_DOCS and args.dataset_config_name and hub_texts.split_name(name)[1] is None:
            name = f"{name} ({args.dataset_config_name})"
        shown.append(name)
    return ", ".join(shown)


def list_hub_ids(names: str | list[str]) -> list[str]:
    """The Hub ids among the parts of `dataset_name`."""
    others = [name for name in split_names(names) if name != PYTHON_DOCS and not is_local(name)]
    return list(dict.fromkeys(hub_texts.split_name(name)[0] for name in others))


def name_path(path: Path) -> str:
    """The last two parts of a path, the last alone where the one before is somebody's home."""
    folder = path.parent
    is_home = folder.parent.name.lower() in HOMES or folder.expanduser() == Path.home()
    parts = path.parts[-1:] if is_home else path.parts[-2:]
    return "/".join(part for part in parts if part not in ("/", "~", "..", "."))
