"""`plm`: permuted language modelling (Yang et al. 2019, "XLNet", arXiv 1906.08237), with transformers' own XLNet.

The tokens of a document are predicted in a random order, each from those before it in that order, by a second stream
of attention that knows the place but not the word. XLNet has its own attention, so that a row is one document.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from oneday.collators import Collator, PermutationCollator
from oneday.errors import SettingError
from oneday.objectives.base import EVALUATION_SEED, Objective


class PermutedLanguageModeling(Objective):
    """A sixth of the tokens, in spans, is predicted, as in the paper."""

    name, kind, auto_class, is_packed = "plm", "encoder", AutoModelForCausalLM, False

    def find_class(self, config: PreTrainedConfig) -> type:
        """See Objective.

        Raises:
            SettingError: When the architecture is not XLNet.
        """
        if config.model_type != "xlnet":
            raise SettingError(
                f"The setting objective is plm, but the model_config is {config.model_type}; take an XLNet config, "
                "say model_configs/xlnet-mini.json."
            )
        return self.auto_class

    def training_collator(self, position_offset: int) -> Collator:
        """Spans and orders by (seed, sample)."""
        return PermutationCollator(self.tokenizer, self.args.seed)

    def evaluation_collators(self, position_offset: int) -> dict[str, Collator]:
        """`eval_loss`: nats a predicted token."""
        return {"eval_loss": PermutationCollator(self.tokenizer, EVALUATION_SEED)}

    def make_flop_counter(self, model: PreTrainedModel, row_length: int) -> TwoStreamFlops:
        """See Objective."""
        return TwoStreamFlops(model, row_length)


class TwoStreamFlops:
    """FLOPs of XLNet with target places, counted once: its projections are bare parameters that no hook sees.

    A row with P targets takes a + b P in forward and backward; both are found from two of them. The backward pass is
    less than twice the forward: places and targets need no gradient, nor do the words' states after the last layer.

    Args:
        model: An XLNet.
        row_length: Tokens of a row, padding included, which is executed too.
    """

    def __init__(self, model: PreTrainedModel, row_length: int) -> None:
        self.model, self.row_length = model, row_length
        # With a single target torch sums no dimension, and counts no product.
        two, three = (self.count_row(num_targets) for num_targets in (2, 3))
        self.of_target = three - two
        self.of_row = two - 2 * self.of_target

    def count_row(self, num_targets: int) -> float:
        """FLOPs of forward and backward of one row; leaves no gradient."""
        device, training = self.model.device, self.model.training
        inputs: dict[str, Any] = {
            "input_ids": torch.zeros(1, self.row_length, dtype=torch.long, device=device),
            "perm_mask": torch.zeros(1, self.row_length, self.row_length, device=device),
            "target_mapping": torch.zeros(1, num_targets, self.row_length, device=device),
            "use_mems": False,
        }
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with torch.enable_grad(), FlopCounterMode(display=False) as counted:
            logits = self.model.eval()(**inputs).logits
            torch.autograd.grad(logits.sum(), trained, allow_unused=True)
        self.model.train(training)
        return float(counted.get_total_flops())

    def step_flops(
        self, num_tokens: int, sum_squared_doc_lengths: int, num_predicted: int, doc_lengths: Any = None
    ) -> float:
        """See `FlopCounter.step_flops`; the tokens fill their rows, padding included, the targets do not.

        A row of fewer targets than its micro-batch's most is computed for as many, which is not counted.
        """
        return num_tokens / self.row_length * self.of_row + num_predicted * self.of_target
