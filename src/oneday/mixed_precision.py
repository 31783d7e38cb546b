"""Computing in bfloat16 with float32 master weights (Micikevicius et al. 2018, arXiv 1710.03740).

Autocast keeps the residual stream in float32 and casts around every matrix product. Here the whole model computes in
bfloat16 for the length of a step, then holds its float32 weights again: the optimizer, clipping, checkpoints and
everything else outside a step see an ordinary float32 model. Buffers (rotary frequencies) stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class HalfWeights:
    """Lends a float32 model bfloat16 weights.

    Args:
        model: Its floating-point parameters are float32 whenever no context of this object is open.
        enabled: False makes every method leave the model as it is.
        dtype: What is computed in.
    """

    def __init__(self, model: nn.Module, enabled: bool = True, dtype: torch.dtype = torch.bfloat16) -> None:
        self.enabled = enabled
        self.parameters = [p for p in model.parameters() if p.is_floating_point()] if enabled else []
        self.halves = [torch.empty_like(p, dtype=dtype, requires_grad=False) for p in self.parameters]
        self.sums: list[torch.Tensor | None] = [None] * len(self.parameters)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Inside, parameters are bfloat16; after it they are float32 again, with the collected float32 gradients."""
        masters = [p.data for p in self.parameters]
        if masters:
            torch._foreach_copy_(self.halves, masters)
        for parameter, half in zip(self.parameters, self.halves):
            self.swap(parameter, half, None)
        try:
            yield
        finally:
            for index, (parameter, master) in enumerate(zip(self.parameters, masters)):
                self.swap(parameter, master, self.sums[index])
                self.sums[index] = None

    @staticmethod
    def swap(parameter: nn.Parameter, data: torch.Tensor, grad: torch.Tensor | None) -> None:
        """Give a parameter other storage; its gradient must be of the same type."""
        parameter.grad = None
        parameter.data = data
        parameter.grad = grad

    def collect(self) -> None:
        """Add the gradients of the backward pass just done to float32 sums; call after each one inside `lent`."""
        for index, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                continue
            if self.sums[index] is None:
                self.sums[index] = parameter.grad.float()
            else:
                self.sums[index].add_(parameter.grad)
            parameter.grad = None
