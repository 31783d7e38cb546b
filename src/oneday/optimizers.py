"""Optimizers by name, and which parameters each one trains.

Hidden matrices (every weight of two dimensions that is neither an embedding nor the output projection, and those that
a weight of three holds) go to the named optimizer. Embeddings, norms and biases always stay with AdamW in 32 bit:
8-bit states are unstable there, and Muon is not defined for them. To add one: write a builder and enter it in
HIDDEN_OPTIMIZERS.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from oneday.arguments import BudgetTrainingArguments
from oneday.errors import SettingError, describe_error
from oneday.muon import Muon, Muon8bit

# Below this many elements a block-wise 8-bit state saves nothing (bitsandbytes' own default).
MIN_8BIT_ELEMENTS = 4096

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
# Ends of names. Biases may have a row a head (XLNet) or an expert; the others are XLNet's segments and its mask.
NO_MATRICES = ("_bias", "seg_embed", "mask_emb")
BY_HEADS = ".rel_attn."

Builder = Callable[[list[nn.Parameter], BudgetTrainingArguments], Optimizer]


class CompositeOptimizer(Optimizer):
    """Several optimizers behind one: their parameter groups stay live, so that schedulers reach every one.

    Args:
        optimizers: Optimizers over disjoint parameters.

    Attributes:
        is_skipping: A step leaves parameters and state as they are; what schedulers and counters do is not its affair.
    """

    def __init__(self, optimizers: list[Optimizer]) -> None:
        self.optimizers, self.is_skipping = optimizers, False
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Any, Any]:
        """Every parameter's state."""
        return {key: value for optimizer in self.optimizers for key, value in optimizer.state.items()}

    @state.setter
    def state(self, value: object) -> None:
        """The parent sets an empty state; the parts keep their own."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step each part."""
        loss = closure() if closure is not None else None
        for optimizer in () if self.is_skipping else self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of every part."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """One state dictionary a part."""
        return {"parts": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load each part, then show its (new) groups here again."""
        for optimizer, state in zip(self.optimizers, state_dict["parts"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters as (hidden matrices, embeddings and output projection, norms and biases).

    Weights of three dimensions are stacks of matrices (a mixture's experts), but for the kernels of convolutions and
    for XLNet's projections by heads: with Muon plm-cpu stood longer at the loss of single words (EXPERIMENTS.md,
    2026-11-27).
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in (model, *model.children()):  # a companion has a projection of its own
        output = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
        if output is not None:
            embeddings.add(id(output.weight))
    kernels = {id(module.weight) for module in model.modules() if isinstance(module, CONVOLUTIONS)}
    hidden, tables, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_stack = parameter.ndim == 3 and id(parameter) not in kernels and BY_HEADS not in name
        is_matrix = (parameter.ndim == 2 or is_stack) and not name.endswith(NO_MATRICES)
        kind = tables if id(parameter) in embeddings else hidden if is_matrix else vectors
        kind.append(parameter)
    return hidden, tables, vectors


def build_adamw(parameters: list[nn.Parameter], args: BudgetTrainingArguments) -> Optimizer:
    """PyTorch's fused AdamW in 32 bit."""
    return torch.optim.AdamW(parameters, **adam_settings(args), fused=True)


def adam_settings(args: BudgetTrainingArguments) -> dict[str, Any]:
    """Learning rate, betas, epsilon and weight decay as the settings say."""
    return {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
    }


def build_adamw_8bit(parameters: list[nn.Parameter], args: BudgetTrainingArguments) -> Optimizer:
    """AdamW with block-wise 8-bit moments (Dettmers et al. 2021, arXiv 2110.02861)."""
    return import_bitsandbytes().optim.AdamW8bit(parameters, **adam_settings(args), min_8bit_size=MIN_8BIT_ELEMENTS)


def build_lion_8bit(parameters: list[nn.Parameter], args: BudgetTrainingArguments) -> Optimizer:
    """Lion with 8-bit momentum; betas .9/.99, a tenth of AdamW's learning rate and ten times its weight decay, so that
    a step decays as much (arXiv 2302.06675)."""
    settings = {"lr": args.learning_rate / 10, "betas": (0.9, 0.99), "weight_decay": 10 * args.weight_decay}
    return import_bitsandbytes().optim.Lion8bit(parameters, **settings, min_8bit_size=MIN_8BIT_ELEMENTS)


def build_ademamix_8bit(parameters: list[nn.Parameter], args: BudgetTrainingArguments) -> Optimizer:
    """AdEMAMix with 8-bit moments; betas .9/.999/.9999 (Pagliardini et al. 2024, arXiv 2409.03137).

    Without the paper's schedules of alpha and of the third beta, which need the number of steps: its slow average
    takes some ten thousand to fill.
    """
    settings = {
        "lr": args.learning_rate,
        "betas": (0.9, 0.999, 0.9999),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
    }
    return import_bitsandbytes().optim.AdEMAMix8bit(parameters, **settings, min_8bit_size=MIN_8BIT_ELEMENTS)


def build_muon(parameters: list[nn.Parameter], args: BudgetTrainingArguments) -> Optimizer:
    """Muon, its update scaled to AdamW's root mean square (Liu et al. 2025, arXiv 2502.16982)."""
    return Muon(parameters, lr=args.muon_learning_rate, weight_decay=args.weight_decay)


def build_muon_8bit(parameters: list[nn.Parameter], args: BudgetTrainingArguments) -> Optimizer:
    """Muon with block-wise 8-bit momentum."""
    settings = {"lr": args.muon_learning_rate, "weight_decay": args.weight_decay}
    return Muon8bit(parameters, import_bitsandbytes().functional, min_8bit_size=MIN_8BIT_ELEMENTS, **settings)


HIDDEN_OPTIMIZERS: dict[str, Builder] = {
    "adamw": build_adamw,
    "adamw_8bit": build_adamw_8bit,
    "lion_8bit": build_lion_8bit,
    "ademamix_8bit": build_ademamix_8bit,
    "muon": build_muon,
    "muon_8bit": build_muon_8bit,
}

# Those whose update of an element depends on that element alone. Of these each sharded process (FSDP) steps its rows
# of every matrix, of the others some matrices whole.
ELEMENTWISE = {"adamw"}


@dataclass(frozen=True)
class Part:
    """Parameters that one optimizer trains.

    Attributes:
        parameters: Disjoint from those of other parts.
        build: The optimizer over them, or over what stands for them.
        shared_by: What sharded processes share the work out by: `rows` of every matrix, or whole `matrices`.
    """

    parameters: list[nn.Parameter]
    build: Callable[[list[nn.Parameter]], Optimizer]
    shared_by: str


def import_bitsandbytes() -> ModuleType:
    """The module bitsandbytes, imported only when asked for (it prints on machines without a GPU).

    Raises:
        SettingError: When the library is not installed or does not load.
    """
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise SettingError(
            f"An 8-bit optimizer needs bitsandbytes, which does not load here ({describe_error(error)}); "
            "pip install bitsandbytes, or set optim to adamw or muon."
        ) from None
    return bitsandbytes


def check_optimizer(name: str) -> None:
    """Raise SettingError when the name is unknown or its library is missing."""
    if name not in HIDDEN_OPTIMIZERS:
        raise SettingError(f"The setting optim is {name!r}; it must be one of {', '.join(HIDDEN_OPTIMIZERS)}.")
    if name.endswith("_8bit"):
        import_bitsandbytes()


def build_undecayed(parameters: list[nn.Parameter], args: BudgetTrainingArguments) -> Optimizer:
    """AdamW in 32 bit without weight decay, for embeddings, norms and biases."""
    return torch.optim.AdamW(parameters, **{**adam_settings(args), "weight_decay": 0.0}, fused=True)


def plan_optimizer(model: nn.Module, args: BudgetTrainingArguments) -> list[Part]:
    """Which optimizers `args.optimizer_name` asks for, and what each trains.

    Raises:
        SettingError: When the name is unknown or its library is missing.
    """
    check_optimizer(args.optimizer_name)
    hidden, tables, vectors = split_parameters(model)
    builder = HIDDEN_OPTIMIZERS[args.optimizer_name]
    shared_by = "rows" if args.optimizer_name in ELEMENTWISE else "matrices"
    undecayed = Part(tables + vectors, functools.partial(build_undecayed, args=args), "rows")
    return [Part(hidden, functools.partial(builder, args=args), shared_by), undecayed] if hidden else [undecayed]


def build_optimizer(model: nn.Module, args: BudgetTrainingArguments) -> CompositeOptimizer:
    """The optimizer that `args.optimizer_name` asks for, over whole parameters.

    Raises:
        SettingError: When the name is unknown or its library is missing.
    """
    return CompositeOptimizer([part.build(part.parameters) for part in plan_optimizer(model, args)])


def count_state_bytes(optimizers: Iterable[Optimizer]) -> int:
    """Bytes that the optimizers' states hold; a tensor that several share (bitsandbytes' code books) counts once."""
    held = {
        id(value): value.numel() * value.element_size()
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    }
    return sum(held.values())
