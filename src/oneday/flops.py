"""Floating-point operations of a model, by tokens, documents and predicted positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from oneday.attention import PACKED, AttentionCall, build_layout, position_offset, record_attention_calls
from oneday.modeling import OWN_ATTENTION
from oneday.optimizers import NO_MATRICES


class FlopCounter:
    """FLOPs of a model, from one forward of 8 tokens through it.

    Conventions: a multiplication and an addition are two. Counted are the products of `nn.Linear` and `Conv1D` (as
    often as they run: ALBERT shares its layer) and of attention, 2 (head_dim + value_dim) a head and query-key pair.
    Pairs are those of a document's whole square: causal masking is not discounted (as in PaLM, arXiv 2204.02311,
    appendix B), document bounds and windows are. The head outside `base_model` runs on the predicted tokens only.
    Training is three times the forward pass. Of a mixture's experts those count that a token goes to. Norms,
    activations, lookups and recomputation are not counted.

    Attributes:
        body: forward FLOPs per token in the linear layers of `base_model`.
        head: forward FLOPs a predicted token.
        attention: one entry a call of an attention layer.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.body, self.head, self.attention = measure_layers(model)

    def count_pairs(
        self, num_tokens: int, sum_squared: int, lengths: Sequence[int] | None, window: int | None
    ) -> float:
        """Query-key pairs inside documents and the window; without lengths an upper bound for a windowed layer."""
        if window is None:
            return sum_squared
        reach = window - 1
        if lengths is None:
            return min(sum_squared, num_tokens * (2 * reach + 1))
        tokens = np.asarray(lengths, dtype=np.int64)
        inside = tokens * (2 * reach + 1) - reach * (reach + 1)
        return float(np.where(tokens <= reach, tokens**2, inside).sum())

    def forward_flops(
        self,
        num_tokens: int,
        sum_squared_doc_lengths: int,
        num_predicted: int,
        doc_lengths: Sequence[int] | None = None,
    ) -> float:
        """FLOPs of a forward pass; arguments as for `step_flops`."""
        flops = float(num_tokens * self.body + num_predicted * self.head)
        for call in self.attention:
            pairs = self.count_pairs(num_tokens, sum_squared_doc_lengths, doc_lengths, call.sliding_window)
            flops += 2.0 * call.num_heads * (call.head_dim + call.value_dim) * pairs
        return flops

    def step_flops(
        self,
        num_tokens: int,
        sum_squared_doc_lengths: int,
        num_predicted: int,
        doc_lengths: Sequence[int] | None = None,
    ) -> float:
        """FLOPs of forward and backward.

        Args:
            num_tokens: tokens that go through the model, padding included.
            sum_squared_doc_lengths: sum over documents, padded tails of rows among them, of their squared length.
            num_predicted: tokens that the head and the loss are computed for.
            doc_lengths: makes windowed layers exact; without it they are bounded by tokens times window.
        """
        return 3.0 * self.forward_flops(num_tokens, sum_squared_doc_lengths, num_predicted, doc_lengths)


def measure_layers(model: PreTrainedModel, num_tokens: int = 8) -> tuple[float, float, list[AttentionCall]]:
    """FLOPs per token of the linear layers inside and outside `base_model`, and the calls of attention."""
    in_body = set(model.base_model.modules())
    flops = {True: 0.0, False: 0.0}

    def add_flops(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        # A pooler sees one token a row, not all of them.
        if args[0].numel() // args[0].shape[-1] == num_tokens:
            flops[module in in_body] += 2.0 * args[0].shape[-1] * output.shape[-1]

    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))]
    hooks = [layer.register_forward_hook(add_flops) for layer in layers]
    is_packed = model.config._attn_implementation == PACKED
    layout = build_layout([[num_tokens]], num_tokens, position_offset(model)).to(model.device)._asdict()
    was_training = model.training
    try:
        with torch.no_grad(), record_attention_calls() as calls:
            ids = torch.ones(1, num_tokens, dtype=torch.long, device=model.device)
            model.eval()(input_ids=ids, **(layout if is_packed else {}))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    body = flops[True] + measure_bare_weights(model)
    return body, flops[False], list(calls) or describe_attention(model.config)


def measure_bare_weights(model: PreTrainedModel) -> float:
    """FLOPs per token of the products of `base_model` with parameters that belong to no linear layer.

    Those are XLNet's projections, of three dimensions, and a mixture's routers and stacked experts, of which a token
    goes to `num_experts_per_tok`.
    """
    is_own, config = model.config.model_type in OWN_ATTENTION, model.config
    used = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", None)
    if isinstance(used, (list, tuple)):  # one number a layer
        used = sum(used) / len(used)
    flops = 0.0
    for module in model.base_model.modules():
        if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
            continue
        for name, weight in module.named_parameters(recurse=False):
            if name.endswith(NO_MATRICES) or weight.ndim not in (2, 3):
                continue
            is_stack = weight.ndim == 3 and used and not is_own
            flops += 2.0 * weight.numel() * (used / len(weight) if is_stack else 1.0)
    return flops


def describe_attention(config: PreTrainedConfig) -> list[AttentionCall]:
    """The attention of a model that does not use the packed function, as its config tells it."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [AttentionCall(config.num_attention_heads, dim, dim, None, False)] * config.num_hidden_layers
