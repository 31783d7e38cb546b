"""Lets a stock model's head see only the positions that are predicted."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from oneday.collators import Batch
from oneday.cross_entropy import (
    differentiate,
    find_fusable_projection,
    read_logits,
    summed_cross_entropy,
    summed_linear_cross_entropy,
)


class SelectedPositions:
    """Lets a stock model's head see only chosen positions, and ends it before the output projection where it can.

    A forward hook on the body (the base model, or the part of it that the head calls) replaces its (rows, row_length,
    width) output by the (1, num_predicted, width) rows that are predicted; the stock head then runs on those alone,
    whatever the architecture's head is. Where the logits are the output projection's own result, that projection
    passes its input through and is fused with the loss.

    Attributes:
        positions: Places in the flattened tokens that the head sees; None leaves the model alone.
        others: Further places whose states are kept in `other_states` (num_others, width), for a second head.
        differentiate: What the fused loss takes the gradients of the logits with.
    """

    def __init__(self, model: nn.Module) -> None:
        self.positions: torch.Tensor | None = None
        self.others: torch.Tensor | None = None
        self.other_states: torch.Tensor | None = None
        self.projection = find_fusable_projection(model)
        self.num_words = model.config.get_text_config().vocab_size
        self.differentiate = differentiate
        find_body(model).register_forward_hook(self.select)

    def select(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook; does nothing while no positions are set."""
        if self.positions is not None:
            hidden = output.last_hidden_state.flatten(0, 1)
            if self.others is not None:
                self.other_states = hidden.index_select(0, self.others)
            output.last_hidden_state = hidden.index_select(0, self.positions).unsqueeze(0)
        return output

    def run(self, model: nn.Module, inputs: dict[str, Any], positions: torch.Tensor) -> torch.Tensor:
        """What the head makes of these positions: states before the projection where it is fused, else logits."""
        self.positions = positions
        if self.projection is not None:
            self.projection.forward = pass_through
        try:
            return read_logits(model(**inputs))[0]  # (num_predicted, ...)
        finally:
            self.positions = None
            if self.projection is not None:
                del self.projection.forward

    def summed_loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Cross-entropy summed over the batch's predicted positions."""
        return self.score(self.run(model, batch.inputs, batch.positions), batch.labels)

    def score(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Summed cross-entropy of what `run` returned."""
        if self.projection is None:
            return summed_cross_entropy(output, labels)
        weight, bias = self.projection.weight, self.projection.bias
        return summed_linear_cross_entropy(output, weight, bias, labels, self.differentiate)

    def logits(self, output: torch.Tensor) -> torch.Tensor:
        """Logits (num_predicted, vocabulary) of what `run` returned."""
        if self.projection is None:
            return output
        bias = self.projection.bias
        weight, bias = self.projection.weight.to(output.dtype), None if bias is None else bias.to(output.dtype)
        return nn.functional.linear(output, weight, bias)


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
