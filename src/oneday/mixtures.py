"""Several texts as one: each document once, or drawn by weight; with a stream among them, a stream."""

from __future__ import annotations

import datasets
import numpy as np

from oneday.arguments import DataArguments
from oneday.errors import SettingError
from oneday.stream_files import TablePart
from oneday.text_streams import FileStream, MixedStream, TextStream

Texts = datasets.Dataset | TextStream

# Mixtures are drawn with a seed of their own: the training seed does not change the corpus, nor what is cached of it.
MIXTURE_SEED = 0


def mix(trains: list[Texts], args: DataArguments) -> Texts:
    """Interleaves the parts, in the proportions of `dataset_weights` if there are any, else every document once."""
    if len(trains) == 1:
        return trains[0]
    is_stream = any(isinstance(train, TextStream) for train in trains)
    weights = args.dataset_weights
    if weights is None and is_stream:
        raise SettingError("dataset_weights must be given for a mixture with a stream in it: its size is not known.")
    shares = np.array(weights if weights is not None else [len(train) for train in trains], dtype=float)
    shares = (shares / shares.sum()).tolist()
    if is_stream:
        return MixedStream([as_stream(train, args.stream_files) for train in trains], shares)
    if weights is None:
        return shuffle_together(trains)
    return datasets.interleave_datasets(
        trains, probabilities=shares, seed=MIXTURE_SEED, stopping_strategy="first_exhausted"
    )


def shuffle_together(trains: list[datasets.Dataset]) -> datasets.Dataset:
    """Every document of every part once, each part in its order, all of them spread over the whole."""
    lengths = [len(train) for train in trains]
    part_of = np.random.default_rng(MIXTURE_SEED).permutation(np.repeat(np.arange(len(trains)), lengths))
    # Stable: the k-th place of a part gets its k-th document.
    rows = np.empty(len(part_of), np.int64)
    rows[np.argsort(part_of, kind="stable")] = np.arange(len(part_of))
    return datasets.concatenate_datasets(trains).select(rows)


def as_stream(texts: Texts, files_at_once: int) -> TextStream:
    """Texts on disk as a stream that is read in several places at once; a stream as it is."""
    if isinstance(texts, TextStream):
        return texts
    return FileStream([TablePart(texts, part, files_at_once) for part in range(files_at_once)], files_at_once)
