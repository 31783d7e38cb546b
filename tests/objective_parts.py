"""What tests of the objectives share: documents of sentences that fit together, and the plain model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from conftest import ROW_LENGTH

from oneday.objectives import find_objective
from oneday.packed_dataset import pack_corpus
from oneday.tokenizer_training import train_tokenizer


@pytest.fixture(scope="session")
def sentences():
    """Documents of sentences on one of six subjects, each with words of its own: what follows fits what came.

    The first sentence of each has a word of its own, too: there is an order.
    """
    generator = np.random.default_rng(1)
    letters = list("abcdefghijklmnopqrst")
    vocabularies = [["".join(generator.choice(letters, 3)) for _ in range(14)] for _ in range(6)]
    documents = []
    for number in range(600):
        words = vocabularies[number % 6]
        parts = [" ".join(generator.choice(words, generator.integers(4, 8))) for _ in range(generator.integers(2, 5))]
        documents.append("zu " + ". ".join(parts) + ".")
    return documents


@pytest.fixture(scope="session")
def paired(sentences):
    return train_tokenizer(sentences, "wordpiece", 150)


@pytest.fixture(scope="session")
def rows(sentences, paired, tmp_path_factory):
    """Strategy -> (training rows, held-out rows) of these documents."""
    folder = tmp_path_factory.mktemp("rows")
    return {
        strategy: tuple(
            pack_corpus([part], paired, "encoder", 2 * ROW_LENGTH, strategy, folder / f"{strategy}-{name}")
            for name, part in (("train", sentences[:540]), ("validation", sentences[540:]))
        )
        for strategy in ("best_fit", "padded")
    }


@pytest.fixture
def make_objective_trainer(make_trainer, rows, paired):
    """A trainer of an objective over these documents."""

    def build(objective, name, output="run", strategy="best_fit", **settings):
        chosen = rows[strategy if find_objective(objective).is_packed else "padded"]
        defaults = {
            "objective": objective,
            "batch_size_tokens": 12 * 2 * ROW_LENGTH,
            "micro_batch_tokens": 4 * 2 * ROW_LENGTH,
            "generator_size": 0.5,
        }
        return make_trainer(name, output, rows=chosen, tokenizer=paired, **{**defaults, **settings})

    return build


def read_documents(batch):
    """(slice of the flattened tokens) of every document, padding included as documents of their own."""
    bounds = batch.inputs["cu_seq_lens"].tolist()
    return [slice(start, end) for start, end in zip(bounds, bounds[1:])]


def plain(model):
    """The stock model in float64 with eager attention and no hooks."""
    model = copy.deepcopy(model).double().eval()
    model.set_attn_implementation("eager")
    for module in model.modules():
        module._forward_hooks.clear()
    return model
