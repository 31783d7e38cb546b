"""Dropout for CPUs, from sixteen random bits an element: torch draws them one at a time, at several times the cost."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BITS = 16


class SixteenBitDropout(nn.Dropout):
    """`torch.nn.Dropout`, its probability rounded to a multiple of 2^-16 and its scale that of the rounded one.

    The units that it drops are others than torch's from the same seed. Where it does not train, and on other devices
    than CPUs, it is the parent.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """`inputs` of any shape, with each element 0 or divided by the probability of keeping it."""
        num_dropped = round(self.p * 2**BITS)  # of the 2^16 values that an element may draw
        if not self.training or inputs.device.type != "cpu" or not 0 < num_dropped < 2**BITS:
            return super().forward(inputs)
        # From the lowest integer on: the default would leave the sign bit 0.
        words = torch.empty((inputs.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        draws = words.view(torch.int16)[: inputs.numel()].view(inputs.shape)
        keep = torch.empty(inputs.shape, dtype=inputs.dtype)
        torch.ge(draws, num_dropped - 2 ** (BITS - 1), out=keep)
        return inputs * keep.mul_(1 / (1 - num_dropped / 2**BITS))


def hasten_dropout(model: nn.Module) -> None:
    """Put a `SixteenBitDropout` in the place of every `torch.nn.Dropout` of a model."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Dropout:
            model.set_submodule(name, SixteenBitDropout(module.p).train(module.training))
