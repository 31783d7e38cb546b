"""`rtd`: replaced-token detection (Clark et al. 2020, "ELECTRA", arXiv 2003.10555).

A small generator fills masks; the model, the discriminator, says of every token whether it is the original. Both are
trained at once, L = L_mlm(generator) + weight * L_bce(discriminator), each a mean over its own tokens. The generator
is the same architecture with fewer layers and shares the token embeddings (as in He et al. 2021, arXiv 2111.09543); it
is not part of the saved model.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from oneday.collators import Batch, Collator, ReplacedTokenCollator
from oneday.cross_entropy import chunk_rows
from oneday.errors import SettingError
from oneday.flops import FlopCounter
from oneday.modeling import build_model
from oneday.objectives.base import COMPANION
from oneday.objectives.language_modeling import MaskedLanguageModeling
from oneday.objectives.selection import SelectedPositions

OWN_HEAD = "electra"


class ReplacedTokenDetection(MaskedLanguageModeling):
    """Trains ELECTRA's own class for ELECTRA configs, the token-classification class (one output) for the others."""

    name, auto_class = "rtd", AutoModelForTokenClassification
    pipeline, has_stock_loss = "feature-extraction", False
    loss_unit = "the weighted sum of both terms' means"
    collator_class = ReplacedTokenCollator

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.weights = {"generator": 1.0, "discriminator": self.args.discriminator_weight}

    def find_class(self, config: PreTrainedConfig) -> type:
        """See Objective; one logit a token."""
        if config.model_type == OWN_HEAD:
            return AutoModelForPreTraining
        config.num_labels = 1
        return self.auto_class

    def evaluation_collators(self, position_offset: int) -> dict[str, Collator]:
        """The own loss only: the discriminator predicts no words."""
        return {"eval_loss": super().evaluation_collators(position_offset)["eval_loss"]}

    def attach(self, model: PreTrainedModel) -> None:
        """Build the generator and let the model carry it.

        Raises:
            SettingError: When the architecture has no masked-language-model class.
        """
        self.check_fraction("generator_size")
        config = copy.deepcopy(model.config)
        shrink_depth(config, self.args.generator_size)
        generator = build_model(config, AutoModelForMaskedLM).to(model.device)
        generator.set_input_embeddings(model.get_input_embeddings())
        generator.tie_weights()
        model.add_module(COMPANION, generator)
        model.selected_positions = SelectedPositions(generator)

    def make_flop_counter(self, model: PreTrainedModel, row_length: int) -> PairFlops:
        """Both models count."""
        return PairFlops(FlopCounter(getattr(model, COMPANION)), FlopCounter(model))

    def count_terms(self, batch: Batch) -> dict[str, int]:
        """Masked tokens, and all tokens; `detection_accuracy` is reported."""
        tokens = int(batch.doc_lengths.sum())
        return {"generator": len(batch.labels), "discriminator": tokens, "detection_accuracy": tokens}

    def summed_terms(self, model: PreTrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
        """See Objective."""
        generator, selected = getattr(model, COMPANION), model.selected_positions
        output = selected.run(generator, batch.inputs, batch.positions)
        sums = {"generator": selected.score(output, batch.labels)}
        with torch.no_grad():
            rows = chunk_rows(output.device.type, selected.num_words)
            parts = zip(output.split(rows), batch.extras["draws"].split(rows))
            drawn = torch.cat([draw_tokens(selected.logits(part), draws) for part, draws in parts])
        inputs, is_replaced = self.replace(batch, drawn)
        logits = model(**inputs).logits.reshape(is_replaced.shape).float()
        is_token = batch.extras["is_token"]
        errors = F.binary_cross_entropy_with_logits(logits, is_replaced.float(), reduction="none")
        sums["discriminator"] = (errors * is_token).sum()
        sums["detection_accuracy"] = (((logits > 0) == is_replaced) & is_token).sum().float()
        return sums

    def replace(self, batch: Batch, drawn: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor]:
        """The discriminator's inputs, and where (rows, row_length) a token is not the original."""
        ids = batch.inputs["input_ids"]
        filled = ids.flatten().index_copy(0, batch.positions, drawn).view_as(ids)
        is_replaced = torch.zeros(ids.numel(), dtype=torch.bool, device=ids.device)
        is_replaced[batch.positions] = drawn != batch.labels
        return {**batch.inputs, "input_ids": filled}, is_replaced.view_as(ids)


class PairFlops:
    """FLOPs of generator and discriminator together.

    Args:
        generator: Runs on all tokens, its head on the masked ones; its projection a second time, to draw.
        discriminator: Runs on all tokens, head and all.
    """

    def __init__(self, generator: FlopCounter, discriminator: FlopCounter) -> None:
        self.generator, self.discriminator = generator, discriminator

    def step_flops(
        self, num_tokens: int, sum_squared_doc_lengths: int, num_predicted: int, doc_lengths: Any = None
    ) -> float:
        """See `FlopCounter.step_flops`; `num_predicted` are the masked tokens."""
        common = (num_tokens, sum_squared_doc_lengths)
        drawing = num_predicted * self.generator.head
        generator = self.generator.step_flops(*common, num_predicted, doc_lengths)
        return generator + drawing + self.discriminator.step_flops(*common, num_tokens, doc_lengths)


def draw_tokens(logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Token ids drawn from softmax(logits), (num_masked, vocabulary), by uniform numbers (num_masked,) in [0, 1)."""
    cumulative = logits.float().softmax(-1).cumsum(-1)
    # Rounding may leave the last sum below 1.
    places = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)
    return places.squeeze(1).clamp(max=logits.shape[-1] - 1)


def shrink_depth(config: PreTrainedConfig, fraction: float) -> None:
    """Leave the first layers only: `fraction` of them, at least one."""
    if config.num_hidden_layers < 2:
        raise SettingError(
            "objective rtd needs a generator with fewer layers than the model, which has one; take a deeper "
            "model_config."
        )
    config.num_hidden_layers = min(config.num_hidden_layers - 1, max(1, round(fraction * config.num_hidden_layers)))
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[: config.num_hidden_layers]
