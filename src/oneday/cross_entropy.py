"""Summed cross-entropy, alone or fused with the output projection before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

# Logits held at once, in elements.
CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}
# Of them those that are in float32 at once: on a CPU few enough for the caches of its cores.
BLOCK_ELEMENTS = {"cpu": 2**19}


def chunk_rows(device_type: str, vocab_size: int) -> int:
    """Rows of logits that are held at once."""
    return max(1, CHUNK_ELEMENTS.get(device_type, 2**25) // vocab_size)


def split_blocks(logits: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of rows that are computed at once, and their labels."""
    most = BLOCK_ELEMENTS.get(logits.device.type) or CHUNK_ELEMENTS.get(logits.device.type, 2**25)
    rows = max(1, most // logits.shape[1])
    return zip(logits.split(rows), labels.split(rows))


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log softmax(logits)[label] in float32, in blocks that bound the memory of the upcast.

    Args:
        logits: (num_predicted, vocabulary), any floating type.
        labels: (num_predicted,) int64.
    """
    assert len(logits) == len(labels), f"{len(logits)} rows of logits, {len(labels)} labels"
    if logits.shape[0] == 0:
        return logits.sum().float()
    blocks = split_blocks(logits, labels)
    return torch.stack([F.cross_entropy(part.float(), label, reduction="sum") for part, label in blocks]).sum()


def differentiate(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy, computed in float32, and its gradient with respect to the logits.

    Args:
        logits: (num_predicted, vocabulary); written over.
        labels: (num_predicted, 1) int64.

    Returns:
        A float32 scalar, and the gradient in the memory and dtype of the logits.
    """
    losses = []
    for part, label in split_blocks(logits, labels):
        probabilities = part.softmax(-1, dtype=torch.float32)
        # log sum exp(x) = max x - log max p, which stays finite where the label's own p is 0.
        below = part.amax(-1, keepdim=True).float() - part.gather(1, label).float()
        losses.append((below - probabilities.amax(-1, keepdim=True).log()).sum())
        minus_one = probabilities.new_full((), -1.0)
        part.copy_(probabilities.scatter_add_(1, label, minus_one.expand(label.shape)))
    return torch.stack(losses).sum(), logits


def differentiate_at_once(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """As `differentiate`, written for a compiler that fuses it; the gradient in the dtype of the logits.

    Eagerly on a GPU the passes over the logits take as long as the three products with the output projection.
    """
    precise = logits.float()
    log_sums = precise.logsumexp(-1, keepdim=True)
    loss = (log_sums - precise.gather(1, labels)).sum()
    probabilities = (precise - log_sums).exp()
    places = torch.arange(logits.shape[1], device=logits.device)
    return loss, torch.where(places == labels, probabilities - 1, probabilities).to(logits.dtype)


Differentiate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def summed_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, differentiate: Differentiate = differentiate
) -> Tensor:
    """`summed_cross_entropy(hidden @ weight.T + bias, labels)` without ever holding all logits.

    The gradients are taken chunk by chunk in the forward pass, as in Liger Kernel (Hsu et al. 2024, arXiv 2410.10989);
    torch's own `linear_cross_entropy` does likewise, but only from torch 2.13 on.

    Args:
        hidden: (num_predicted, width).
        weight: (vocabulary, width).
        bias: (vocabulary,) or None.
        labels: (num_predicted,) int64.
        differentiate: Takes the loss and its gradient of a chunk of logits.
    """
    assert len(hidden) == len(labels), f"{len(hidden)} rows of states, {len(labels)} labels"
    device = hidden.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    # A table and its bias stay in float32 while the model computes in bfloat16.
    weight, bias = weight.to(hidden.dtype), bias if bias is None else bias.to(hidden.dtype)
    if not torch.is_grad_enabled() or hidden.shape[0] == 0:
        rows = chunk_rows(device, weight.shape[0])
        parts = zip(hidden.split(rows), labels.split(rows))
        return torch.stack([summed_cross_entropy(F.linear(part, weight, bias), label) for part, label in parts]).sum()
    return LinearCrossEntropy.apply(hidden, weight, bias, labels, differentiate)


class LinearCrossEntropy(torch.autograd.Function):
    """The differentiable part of `summed_linear_cross_entropy`; no second derivatives."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        differentiate: Differentiate,
    ) -> Tensor:
        """The summed loss, float32; keeps the gradients of all inputs."""
        rows = chunk_rows(hidden.device.type, weight.shape[0])
        losses, grad_weight, grad_bias = [], None, None
        grad_hidden = torch.empty_like(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], rows):
                part, label = hidden[start : start + rows], labels[start : start + rows, None]
                loss, grad_logits = differentiate(F.linear(part, weight, bias), label)
                losses.append(loss)
                grad_bias = add_to(grad_bias, grad_logits.sum(0, dtype=torch.float32)) if bias is not None else None
                torch.mm(grad_logits, weight, out=grad_hidden[start : start + rows])
                grad_weight = add_to(grad_weight, grad_logits.t() @ part)
        grad_weight = grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias if bias is None else grad_bias.to(bias.dtype))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: FunctionCtx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients that the forward pass left; by a float32 number, also where they are bfloat16."""
        gradients = ctx.saved_tensors
        return *(grad if grad is None else grad * grad_loss for grad in gradients), None, None


def add_to(total: Tensor | None, part: Tensor) -> Tensor:
    """Sum of chunks in float32; a lone chunk stays as it is."""
    return part if total is None else total.float().add_(part)


def read_logits(output: Any) -> Tensor:
    """The word logits of a model's output; classes with several heads call them `prediction_logits`."""
    return output.logits if hasattr(output, "logits") else output.prediction_logits


def find_fusable_projection(model: nn.Module) -> nn.Linear | None:
    """The output projection, if the model's logits are exactly its output (no soft cap or scale after it); else None.

    Found by trying: the logits of four tokens must be exactly the projection's own output.
    """
    projection = model.get_output_embeddings()
    if not isinstance(projection, nn.Linear):
        return None
    seen: list[Tensor] = []
    handle = projection.register_forward_hook(lambda module, args, output: seen.append(output))
    ids = torch.arange(4, device=model.device)[None]
    training = model.training
    try:
        with torch.no_grad():
            logits = read_logits(model.eval()(input_ids=ids))
    finally:
        handle.remove()
        model.train(training)
    plain = len(seen) == 1 and seen[0].shape == logits.shape and torch.equal(seen[0], logits)
    return projection if plain else None
