"""`mlm_nsp`: masked words, and whether the second half of a document follows its first (arXiv 1810.04805, 3.1)."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers import AutoModelForPreTraining, PreTrainedModel

from oneday.collators import Batch, PairedCollator
from oneday.errors import SettingError
from oneday.objectives.language_modeling import MaskedLanguageModeling

NEGATIVES = ("swapped", "random")


class MaskedWithNextSentence(MaskedLanguageModeling):
    """L = mean over masked tokens of -log P(x_i | rest) + mean over pairs of -log P(IsNext or NotNext | A, B).

    The pair head reads the state of each document's own [CLS], of which a packed row has several.
    """

    name, auto_class, has_stock_loss = "mlm_nsp", AutoModelForPreTraining, False
    loss_unit = "the sum of both terms' means"
    collator_class = PairedCollator

    def mask_settings(self) -> dict[str, object]:
        """As for `mlm`, and where negatives come from."""
        if self.args.nsp_negatives not in NEGATIVES:
            raise SettingError(
                f"The setting nsp_negatives is {self.args.nsp_negatives!r}; it must be {' or '.join(NEGATIVES)}."
            )
        return {**super().mask_settings(), "negatives": self.args.nsp_negatives}

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.weights = {"masked": 1.0, "nsp": 1.0}

    def attach(self, model: PreTrainedModel) -> None:
        """See Objective; the model must have a pooler and a head over it that tells two classes."""
        head = getattr(getattr(model, "cls", None), "seq_relationship", None)
        types = getattr(model.config, "type_vocab_size", 0)
        if head is None or getattr(model.base_model, "pooler", None) is None or types < 2:
            raise SettingError(
                f"The setting objective is mlm_nsp, but {model.config.model_type} has no next-sentence head with two "
                "segments; take a BERT config, say model_configs/bert-mini.json, or set objective to mlm."
            )
        super().attach(model)

    def count_terms(self, batch: Batch) -> dict[str, int]:
        """Masked tokens and pairs; `pair_accuracy` is reported."""
        counts = {"masked": len(batch.labels)}
        if "pair_labels" in batch.extras:
            counts |= dict.fromkeys(("nsp", "pair_accuracy"), len(batch.extras["pair_labels"]))
        return counts

    def summed_terms(self, model: PreTrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
        """See Objective."""
        selected = model.selected_positions
        selected.others = batch.extras.get("pair_starts")
        try:
            sums = {"masked": selected.summed_loss(model, batch)}
            states = selected.other_states
        finally:
            selected.others = selected.other_states = None
        if "pair_labels" in batch.extras:
            labels = batch.extras["pair_labels"]
            logits = model.cls.seq_relationship(model.base_model.pooler(states[:, None])).float()
            sums["nsp"] = F.cross_entropy(logits, labels, reduction="sum")
            sums["pair_accuracy"] = (logits.argmax(-1) == labels).sum().float()
        return sums
