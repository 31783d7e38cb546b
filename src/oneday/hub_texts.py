"""Text of data sets on the Hub."""

from __future__ import annotations

import logging
from pathlib import Path

import datasets
from huggingface_hub import HfApi

from oneday.arguments import DataArguments
from oneday.durable_files import write_json
from oneday.errors import SettingError
from oneday.run_directory import SOURCES
from oneday.stream_files import list_stream_files
from oneday.text_files import describe_missing_column
from oneday.text_streams import FileStream

logger = logging.getLogger(__name__)

# Names of data sets -> commits; a run directory keeps them, so that a run goes on with the same text whatever its
# publisher does meanwhile.
REVISIONS: dict[str, str] = {}
# For an answer that can be done without.
ASK_SECONDS = 10.0


def write_revisions(folder: str | Path) -> None:
    """Keep the commits in a run directory, where data sets of the Hub are read."""
    if REVISIONS:
        write_json(Path(folder) / SOURCES, REVISIONS)


def load_hub(name: str, split: str, args: DataArguments) -> datasets.Dataset | FileStream:
    """Loads a data set of the Hub, whole or as a stream, at the commit that it has when the run begins.

    Args:
        name: `user/name`, also with `:CONFIGURATION` of its own, and with `@REVISION`, a commit, tag or branch.
        split: Of the data set.
        args: Configuration, column, and how a stream is read.

    Raises:
        SettingError: It cannot be had, or has no such column of text.
    """
    repo, config, _ = split_name(name)
    config = config or args.dataset_config_name
    try:
        if args.streaming:
            builder = datasets.load_dataset_builder(repo, config, revision=find_revision(name))
            texts = builder.as_streaming_dataset(split)
        else:
            texts = datasets.load_dataset(repo, config, split=split, revision=find_revision(name, is_needed=False))
        columns = texts.column_names or list(next(iter(texts)))
    except Exception as error:  # the libraries raise a dozen kinds here; each is a name or a network that is wrong
        reason = " ".join(str(error).split())[:200]
        raise SettingError(
            f"dataset_name {name!r} is no file here and could not be loaded from the Hub ({reason}): check the name, "
            f"dataset_config_name and dataset_split, and the network, or name local files."
        ) from error
    if args.text_column not in columns:
        raise SettingError(describe_missing_column(args.text_column, columns, name))
    kind = texts.features[args.text_column] if texts.features else None
    if kind is not None and getattr(kind, "dtype", None) not in ("string", "large_string"):
        raise SettingError(
            f"text_column {args.text_column!r} of {name!r} holds {kind}, not text: name another column."
        )
    if args.streaming:
        return FileStream(
            list_stream_files(builder, texts, split, args.text_column, args.stream_files), args.stream_files
        )
    texts = texts.select_columns(args.text_column)
    texts = texts if args.text_column == "text" else texts.rename_column(args.text_column, "text")
    if texts.features["text"].dtype == "string":
        return texts
    return texts.cast_column("text", datasets.Value("string"))  # of several kinds of text a mixture cannot be made


def split_name(name: str) -> tuple[str, str | None, str | None]:
    """`ann/texts:small@v1` -> `("ann/texts", "small", "v1")`; what is left out is None."""
    rest, _, revision = name.partition("@")
    repo, _, config = rest.partition(":")
    return repo, config or None, revision or None


def find_revision(name: str, is_needed: bool = True) -> str | None:
    """The commit at which a data set of the Hub is read: the one it has now, or had when the run began.

    Args:
        name: As for `load_hub`.
        is_needed: Raise where the Hub does not answer; else it is what the name says, and what was downloaded before
            may be read.
    """
    repo, _, revision = split_name(name)
    if name not in REVISIONS:
        try:
            timeout = None if is_needed else ASK_SECONDS
            REVISIONS[name] = HfApi().dataset_info(repo, revision=revision, timeout=timeout).sha
        except Exception as error:  # of httpx, of huggingface_hub
            if is_needed:
                raise
            logger.warning("The Hub was not asked for the commit of %s (%s).", name, type(error).__name__)
            return revision
        logger.info("%s is read at commit %s.", repo, REVISIONS[name])
    return REVISIONS[name]
