"""What every objective has.

Losses are sums over predicted things, never means: the trainer divides each by its number in the whole optimizer step,
so that any split into micro-batches and processes gives the same gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import ClassVar, Protocol

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from oneday.arguments import BudgetTrainingArguments
from oneday.collators import Batch, Collator
from oneday.errors import SettingError
from oneday.flops import FlopCounter
from oneday.objectives.selection import SelectedPositions
from oneday.tokenization import keeps_text

# Held-out masks do not depend on the run's own seed, so that runs compare.
EVALUATION_SEED = 20_240_229
STANDARD_MLM_PROBABILITY = 0.15
# Under this name a model carries what is trained with it and not saved with it.
COMPANION = "companion"


class StepFlops(Protocol):
    """Counts the FLOPs of a training step; see `flops.FlopCounter.step_flops`."""

    def step_flops(
        self, num_tokens: int, sum_squared_doc_lengths: int, num_predicted: int, doc_lengths: object = None
    ) -> float:
        """FLOPs of forward and backward."""


class Objective:
    """What is predicted and how it is scored.

    Attributes:
        name: As the setting `objective` has it.
        kind: `encoder` or `decoder`; decides the special tokens around each document.
        auto_class: The class of the model that is trained and saved.
        is_packed: Whether it takes packed rows; otherwise one document a row, under the stock attention.
        needs_mask: Whether it hides tokens behind the tokenizer's mask token.
        pipeline: transformers' pipeline that its checkpoint serves; without a head for words it gives features.
        loss_unit: What its loss is in.
        has_stock_loss: Whether a stock model trained by its own class has the same held-out loss.
        weights: Term of the loss -> its weight; a term without one is only reported.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    auto_class: ClassVar[type]
    is_packed: ClassVar[bool] = True
    needs_mask: ClassVar[bool] = False
    pipeline: ClassVar[str] = "feature-extraction"
    loss_unit: ClassVar[str] = "nats a predicted token"
    has_stock_loss: ClassVar[bool] = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, args: BudgetTrainingArguments) -> None:
        self.tokenizer = tokenizer
        self.args = args
        self.weights: dict[str, float] = {"loss": 1.0}

    @functools.cached_property
    def keeps_text(self) -> bool:
        """Whether its tokenizer loses nothing of a text."""
        return keeps_text(self.tokenizer)

    @classmethod
    def check_rows(cls, args: BudgetTrainingArguments, row_length: int) -> None:
        """Called before any text is read, with the tokens of the run's shortest rows.

        Raises:
            SettingError: When they have no room for what the objective does.
        """

    def find_class(self, config: PreTrainedConfig) -> type:
        """The auto class whose model this objective trains."""
        return self.auto_class

    def training_collator(self, position_offset: int) -> Collator:
        """The collator of the training batches."""
        raise NotImplementedError

    def evaluation_collators(self, position_offset: int) -> dict[str, Collator]:
        """Collators of the held-out losses, by metric name; the first is the objective's own `eval_loss`."""
        raise NotImplementedError

    def attach(self, model: PreTrainedModel) -> None:
        """Prepare a model for its losses; called once, before any wrapping.

        Raises:
            SettingError: When the architecture lacks what the objective needs.
        """
        model.selected_positions = SelectedPositions(model)

    def make_flop_counter(self, model: PreTrainedModel, row_length: int) -> StepFlops:
        """Counts what a step executes, after `attach`; `row_length` is that of the packed rows."""
        return FlopCounter(model)

    def count_terms(self, batch: Batch) -> dict[str, int]:
        """Over how many things each term of the loss is a mean; the first is the number of predicted tokens."""
        return {"loss": len(batch.labels)}

    def summed_terms(self, model: PreTrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
        """Each term summed over the batch, float32 scalars; the keys of `count_terms`.

        Args:
            model: The model after `attach`.
            batch: A batch of this objective's collator.
        """
        return {"loss": self.summed_loss(model, batch)}

    def summed_loss(self, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        """Cross-entropy summed over the predicted positions, in nats, float32 scalar."""
        return model.selected_positions.summed_loss(model, batch)

    def mean_loss(self, sums: Mapping[str, torch.Tensor], counts: Mapping[str, int]) -> torch.Tensor:
        """The weighted sum of the terms' means; of a part of the step, its share of that.

        Args:
            sums: From `summed_terms`.
            counts: From `count_terms`, added up over the step.
        """
        return sum(weight * sums[term] / max(counts[term], 1) for term, weight in self.weights.items() if term in sums)

    def check_fraction(self, *names: str) -> None:
        """Raise SettingError unless these settings, where they are set, lie between 0 and 1."""
        for name in names:
            value = getattr(self.args, name)
            if value is not None and not 0.0 < value < 1.0:
                raise SettingError(f"The setting {name} is {value:g}; it must lie between 0 and 1.")
