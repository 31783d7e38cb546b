"""Computing in bfloat16 with float32 master weights (Micikevicius et al. 2018, arXiv 1710.03740).

Autocast keeps the residual stream in float32 and casts around every matrix product. Here the whole model computes in
bfloat16 for the length of a step, then holds its float32 weights again: the optimizer, clipping, checkpoints and
everything else outside a step see an ordinary float32 model. Buffers (rotary frequencies) stay as they are, and so do
embedding tables: their gradient adds up thousands of rows for one token ([MASK], a token type), and in bfloat16 a sum
stops growing at 256 times its terms. Only what is read from them becomes bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def find_table_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that stay in float32: embeddings, and projections that share their weight with one."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return [m for m in model.modules() if any(id(p) in tables for p in m.parameters(recurse=False))]


class HalfWeights:
    """Lends a float32 model bfloat16 weights.

    Args:
        model: Its floating-point parameters are float32 whenever no context of this object is open.
        enabled: False makes every method leave the model as it is.
        dtype: What is computed in.
        lends: False where others give the model its bfloat16 weights: then only its tables are seen to.
    """

    def __init__(
        self, model: nn.Module, enabled: bool = True, dtype: torch.dtype = torch.bfloat16, lends: bool = True
    ) -> None:
        self.enabled, self.dtype, self.open = enabled, dtype, False
        sharing = find_table_modules(model)
        kept = {id(p) for m in sharing for p in m.parameters(recurse=False)}
        floating = [p for p in model.parameters() if p.is_floating_point()] if enabled and lends else []
        self.parameters = [p for p in floating if id(p) not in kept]
        self.halves = [torch.empty_like(p, dtype=dtype, requires_grad=False) for p in self.parameters]
        self.sums: list[torch.Tensor | None] = [None] * len(self.parameters)
        for module in sharing if enabled else ():
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(self.halve_output)
            else:
                module.register_forward_pre_hook(self.widen_input)

    def halve_output(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """Forward hook of a table: what is looked up, in half precision."""
        return output.to(self.dtype) if self.open else output

    def widen_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Forward pre-hook of a projection that shares its weight with a table and is not fused with the loss.

        A fused one only passes its input on, see `objectives.SelectedPositions`; its loss casts the weight itself.
        """
        if not self.open or "forward" in vars(module):
            return None
        return tuple(arg.float() if torch.is_tensor(arg) and arg.is_floating_point() else arg for arg in args)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Inside, weights are bfloat16; after it they are float32 again, with the collected float32 gradients."""
        masters = [p.data for p in self.parameters]
        if masters:
            torch._foreach_copy_(self.halves, masters)
        for parameter, half in zip(self.parameters, self.halves):
            self.swap(parameter, half, None)
        self.open = self.enabled
        try:
            yield
        finally:
            self.open = False
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
