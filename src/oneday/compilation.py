"""`torch.compile` for the repeated layers of a stock model.

All layers of a kind run one compiled graph, so that compiling takes seconds instead of minutes, and the head and the
loss, whose sizes change from step to step, stay outside.
"""

from __future__ import annotations

import logging
import shutil
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


def find_layers(model: nn.Module) -> list[nn.Module]:
    """The model's repeated layers: the members of its longest module list whose members are of one class."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1]
    return list(max(lists, key=len, default=[]))


def compile_layers(model: nn.Module) -> int:
    """Compile the repeated layers in place; returns how many. State dict and module names stay as they are.

    Without a C++ compiler, which a CPU needs, the model runs uncompiled and a warning says so.
    """
    layers = find_layers(model)
    if next(model.parameters()).device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        logger.warning("torch_compile is true, but no C++ compiler is there: running uncompiled; install g++.")
        return 0
    torch._dynamo.config.cache_size_limit = max(16, torch._dynamo.config.cache_size_limit)
    for layer in layers:
        layer.compile(dynamic=False)
    return len(layers)


def mark_varying(bounds: Tensor) -> None:
    """Tell the compiler that the number of documents, the length of `cu_seq_lens`, differs from batch to batch."""
    torch._dynamo.maybe_mark_dynamic(bounds, 0)


def run_eagerly() -> AbstractContextManager:
    """A context in which compiled layers run uncompiled: for evaluation, whose last batch is smaller."""
    return torch.compiler.set_stance("force_eager")
