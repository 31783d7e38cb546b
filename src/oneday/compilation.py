"""`torch.compile` for the repeated layers of a stock model, and on a GPU for the gradient of its logits.

All layers of a kind run one compiled graph, so that compiling takes seconds instead of minutes; the embeddings and the
head, which run once, stay outside.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch._inductor.config
from torch import Tensor, nn

from oneday.arguments import BudgetTrainingArguments
from oneday.cross_entropy import differentiate, differentiate_at_once
from oneday.errors import SettingError, is_out_of_memory

logger = logging.getLogger(__name__)


def decide_compiling(args: BudgetTrainingArguments, is_packed: bool) -> bool:
    """`torch_compile`, or where that is empty, whether it soon makes up for its half minute.

    In float32 a CPU's step is nearly all products: compiled layers took 2 to 5 % off forward and backward pass, and a
    fifth where it computed in bfloat16 (EXPERIMENTS.md, 2026-11-23 and 2026-11-27).

    Args:
        args: Of the training.
        is_packed: Whether the objective's rows are; others do not compile.
    """
    if args.use_compile is not None:
        return args.use_compile
    pays = args.device.type == "cuda" or (args.device.type == "cpu" and args.computes_in_bf16)
    return pays and is_packed and args.max_seq_length_start is None


def find_layers(model: nn.Module) -> list[nn.Module]:
    """The model's repeated layers: the members of its longest module list whose members are of one class."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1]
    return list(max(lists, key=len, default=[]))


def compile_layers(model: nn.Module) -> int:
    """Have the repeated layers compiled in place at their first call; returns how many.

    State dict and module names stay as they are. `try_compiled` makes the first call.
    """
    layers = find_layers(model)
    if not layers:
        logger.warning(
            "torch_compile is true, but %s has no repeated layers: running uncompiled.", type(model).__name__
        )
    # The compiler's own check of each vector extension compiles a program for it: 7 s of 21. The kernel lists what the
    # processor has; should g++ be too old for that, `try_compiled` says so.
    torch._inductor.config.cpp.vec_isa_ok = True
    for layer in layers:
        layer.compile(dynamic=False)
    return len(layers)


def compile_loss(model: nn.Module) -> None:
    """Have the gradient of a model's logits compiled at its first call, where that pays: on a GPU.

    On two CPU cores the compiled passes took as long as the plain ones, which were a seventh of the products.
    """
    if next(model.parameters()).device.type == "cuda" and hasattr(model, "selected_positions"):
        compiled = torch.compile(differentiate_at_once, dynamic=False)

        def run(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            for tensor in (logits, labels):  # the last chunk has fewer rows
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
            return compiled(logits, labels)

        model.selected_positions.differentiate = run


def try_compiled(model: nn.Module, run: Callable[[], None], refuse: Callable[[str, str], None]) -> bool:
    """Call `run`, which compiles; if that fails, say why, leave the model uncompiled and return False.

    Compiling needs a C++ compiler on a CPU and a C compiler on a GPU, at run time.

    Args:
        model: Compiled layer by layer.
        run: Calls it.
        refuse: Is told what failed and what to do; raises where the model cannot be run once more.
    """
    try:
        run()
    except SettingError:
        raise
    except Exception as error:  # the compiler's back ends fail in many ways
        if is_out_of_memory(error):
            raise
        uncompile(model)
        reason = (" ".join(str(error).split()) or type(error).__name__)[:120]
        refuse(f"torch_compile does not work here ({reason})", "see that g++ is installed, or begin a run without it")
        logger.warning("torch_compile does not work here (%s): running uncompiled; is g++ installed?", reason)
        return False
    return True


def uncompile(model: nn.Module) -> None:
    """Have a model's layers and the gradient of its logits run as they were written."""
    for module in model.modules():
        module._compiled_call_impl = None
        if hasattr(module, "selected_positions"):
            module.selected_positions.differentiate = differentiate


def mark_varying(bounds: Tensor) -> None:
    """Tell the compiler that the number of documents, the length of `cu_seq_lens`, differs from batch to batch."""
    torch._dynamo.maybe_mark_dynamic(bounds, 0)


def run_eagerly() -> AbstractContextManager:
    """A context in which compiled layers run uncompiled: for evaluation, whose last batch is smaller."""
    return torch.compiler.set_stance("force_eager")
