"""What is predicted and how it is scored. One class an objective and one entry in OBJECTIVES.

The loss is a sum over predicted positions, never a mean: the trainer divides by the number predicted in the whole
optimizer step, so that any split into micro-batches and processes gives the same gradient.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerBase

from oneday.arguments import BudgetTrainingArguments, SettingError
from oneday.collators import Batch, CausalCollator, Collator, MaskedCollator
from oneday.cross_entropy import find_fusable_projection, summed_cross_entropy, summed_linear_cross_entropy

# Held-out masks do not depend on the run's own seed, so that runs compare.
EVALUATION_SEED = 20_240_229
STANDARD_MLM_PROBABILITY = 0.15


class SelectedPositions:
    """Lets a stock model's head see only chosen positions, and ends it before the output projection where it can.

    A forward hook on the body (the base model, or the part of it that the head calls) replaces its (rows, row_length,
    width) output by the (1, num_predicted, width) rows that are predicted; the stock head then runs on those alone,
    whatever the architecture's head is. Where the logits are the output projection's own result, that projection
    passes its input through and is fused with the loss.
    """

    def __init__(self, model: nn.Module) -> None:
        self.positions: torch.Tensor | None = None
        self.projection = find_fusable_projection(model)
        find_body(model).register_forward_hook(self.select)

    def select(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook; does nothing while no positions are set."""
        if self.positions is not None:
            hidden = output.last_hidden_state
            output.last_hidden_state = hidden.flatten(0, 1).index_select(0, self.positions).unsqueeze(0)
        return output

    def summed_loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Cross-entropy summed over the batch's predicted positions."""
        self.positions = batch.positions
        if self.projection is not None:
            self.projection.forward = pass_through
        try:
            output = model(**batch.inputs).logits[0]  # (num_predicted, ...)
        finally:
            self.positions = None
            if self.projection is not None:
                del self.projection.forward
        if self.projection is None:
            return summed_cross_entropy(output, batch.labels)
        return summed_linear_cross_entropy(output, self.projection.weight, self.projection.bias, batch.labels)


def find_body(model: nn.Module) -> nn.Module:
    """The module whose `last_hidden_state` the head gets, found by a forward of four tokens.

    Usually it is `base_model`, but OPT's head calls `base_model.decoder` and no hook of `base_model` runs.
    """
    ended: list[nn.Module] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if getattr(output, "last_hidden_state", None) is not None:
            ended.append(module)

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(input_ids=torch.arange(4, device=next(model.parameters()).device)[None])
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return ended[-1] if ended else model.base_model  # the outermost one ends last


def pass_through(hidden: torch.Tensor) -> torch.Tensor:
    """The output projection's forward while it is fused with the loss."""
    return hidden


class Objective:
    """What every objective has: a model class, a collator for training and those it is evaluated by, and a loss."""

    name: ClassVar[str]
    kind: ClassVar[str]
    auto_class: ClassVar[type]

    def __init__(self, tokenizer: PreTrainedTokenizerBase, args: BudgetTrainingArguments) -> None:
        self.tokenizer = tokenizer
        self.args = args

    def training_collator(self, position_offset: int) -> Collator:
        """The collator of the training batches."""
        raise NotImplementedError

    def evaluation_collators(self, position_offset: int) -> dict[str, Collator]:
        """Collators of the held-out losses, by metric name; the first is the objective's own `eval_loss`."""
        raise NotImplementedError

    def attach(self, model: nn.Module) -> None:
        """Prepare a model for `summed_loss`; called once, before any wrapping."""
        model.selected_positions = SelectedPositions(model)

    def summed_loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Cross-entropy summed over the predicted positions, in nats, float32 scalar.

        Args:
            model: The stock model, wrapped or not, after `attach`.
            batch: A batch of this objective's collator.
        """
        return find_selected(model).summed_loss(model, batch)


def find_selected(model: nn.Module) -> SelectedPositions:
    """The hook that `attach` put on a model, through any wrapper (DDP, compiled)."""
    while not hasattr(model, "selected_positions"):
        model = model.module if hasattr(model, "module") else model._orig_mod
    return model.selected_positions


class MaskedLanguageModeling(Objective):
    """`mlm`: tokens are hidden and predicted from both sides (Devlin et al. 2019, arXiv 1810.04805)."""

    name, kind, auto_class = "mlm", "encoder", AutoModelForMaskedLM

    def training_collator(self, position_offset: int) -> Collator:
        """Masks at the rate and with the replacement that the settings say."""
        args = self.args
        ends = [args.mlm_probability, args.mlm_probability_end]
        for name, value in zip(("mlm_probability", "mlm_probability_end"), ends):
            if value is not None and not 0.0 < value < 1.0:
                raise SettingError(f"The setting {name} is {value:g}; it must lie between 0 and 1.")
        if args.mask_replacement not in ("mask", "bert"):
            raise SettingError(f"The setting mask_replacement is {args.mask_replacement!r}; it must be mask or bert.")
        return MaskedCollator(self.tokenizer, args.seed, position_offset, *ends, args.mask_replacement)

    def evaluation_collators(self, position_offset: int) -> dict[str, Collator]:
        """`eval_loss` at the run's final rate, and `eval_mlm_loss` at 15 % all-mask, which objectives share."""
        args = self.args
        rate = args.mlm_probability if args.mlm_probability_end is None else args.mlm_probability_end
        common = (self.tokenizer, EVALUATION_SEED, position_offset)
        return {
            "eval_loss": MaskedCollator(*common, rate, None, args.mask_replacement),
            "eval_mlm_loss": MaskedCollator(*common, STANDARD_MLM_PROBABILITY),
        }


class CausalLanguageModeling(Objective):
    """`clm`: each token is predicted from those before it in its document."""

    name, kind, auto_class = "clm", "decoder", AutoModelForCausalLM

    def training_collator(self, position_offset: int) -> Collator:
        """Every token of a document but its first."""
        return CausalCollator(self.tokenizer, self.args.seed, position_offset)

    def evaluation_collators(self, position_offset: int) -> dict[str, Collator]:
        """`eval_loss`: nats a predicted token."""
        return {"eval_loss": CausalCollator(self.tokenizer, EVALUATION_SEED, position_offset)}


OBJECTIVES: dict[str, type[Objective]] = {cls.name: cls for cls in (MaskedLanguageModeling, CausalLanguageModeling)}


def find_objective(name: str) -> type[Objective]:
    """The objective class of that name.

    Raises:
        SettingError: When there is none.
    """
    if name not in OBJECTIVES:
        raise SettingError(f"The setting objective is {name!r}; it must be one of {', '.join(OBJECTIVES)}.")
    return OBJECTIVES[name]
