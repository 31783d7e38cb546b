"""What tests of scoring share: pairs of texts, weights that make scores differ, a scorer of given scores."""

from __future__ import annotations

import pytest
import torch

PAIRS = [
    ("", "ka lo mi"),
    ("ka lo", " mi ter un"),
    ("ka lo ", "mi"),
    ("ves pra do sil en ka lo mi ter", " un"),
    ("", "ves pra do sil en ka lo mi ter un ves pra do"),
]


@pytest.fixture(scope="session")
def anyone():
    """A model whose weights are far from their first values, so that scores differ."""

    def spread(model):
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.15)
        return model.eval()

    return spread


class Fixed:
    """A scorer that gives the scores it was given."""

    def __init__(self, scores):
        self.scores = scores

    def score(self, pairs):
        assert len(pairs) == len(self.scores)
        return self.scores
