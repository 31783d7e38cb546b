"""Fully sharded data parallelism (FSDP2): each process holds a share of every weight, gradient and optimizer state.

torch's `fully_shard` (Zhao et al. 2023, arXiv 2304.11277) gathers a layer's weights while it computes, and sums its
gradients into shares: rows of dimension 0, for rank r those from r * ceil(n / size) on. Gathered at once are those
of a layer; tables and what is tied to them, in float32; and the rest. accelerate's config says that the model
is to be sharded, but its own wrapping, which averages gradients and changes the optimizer afterwards, is not used. The
optimizers' part is `sharded_optimizers`.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from oneday.arguments import BudgetTrainingArguments
from oneday.collators import Batch
from oneday.compilation import find_layers
from oneday.errors import SettingError
from oneday.mixed_precision import HalfWeights, find_table_modules
from oneday.objectives import COMPANION
from oneday.optimizers import CompositeOptimizer, plan_optimizer
from oneday.ranks import Ranks, is_fsdp, is_true
from oneday.sharded_optimizers import ShardedOptimizer, cut_rows_of


def make_ranks(args: BudgetTrainingArguments) -> Ranks:
    """The processes of a run, each with the whole model or a share of it, as accelerate's config says."""
    kind = ShardedRanks if is_fsdp() and args.world_size > 1 else Ranks
    return kind(args.process_index, args.world_size, args.ddp_timeout)


@contextmanager
def hidden_from_accelerate() -> Iterator[None]:
    """Inside, accelerate takes a sharded run for one of whole models, and leaves model and optimizer alone.

    Nor does it compile, as its config may ask for: `torch_compile` is the setting for that.
    """
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_DYNAMO_BACKEND")
    held = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(held)


class ShardedRanks(Ranks):
    """Processes that share one model's weights; see `Ranks`."""

    holds_whole = False

    def spread(self, model: nn.Module, device: torch.device, half: bool) -> HalfWeights:
        """Leave this process its share of a model's weights, on its device.

        Args:
            model: Whole and the same on every process; changed in place.
            device: Where to compute.
            half: Compute in bfloat16.

        Raises:
            SettingError: When the model carries a second one.
        """
        if hasattr(model, COMPANION):
            raise SettingError(
                "The setting objective is rtd, whose two models share a table and run one after the other, which FSDP "
                "does not support; start with recipes/accelerate_configs/ddp.yaml, or set objective to mlm."
            )
        weights = ShardedWeights(model, half)
        shard_model(model, device, self.size, half)
        return weights

    def edit(self, parameter: nn.Parameter, change: Callable[[Tensor], None]) -> None:
        """See Ranks."""
        with torch.no_grad():
            whole = parameter.full_tensor()
            if self.is_first:
                change(whole)
            dist.broadcast(whole, 0)
            local = parameter.to_local()
            local.copy_(cut_rows_of(whole, self.rank, self.size))

    def even_out(self, step: list[Batch], counts: dict[str, int]) -> Iterator[tuple[Batch, dict[str, float]]]:
        """See Ranks: weights are gathered by all in every pass, so that all make as many.

        What is filled up with is a pass whose loss is counted over infinitely many things: its gradient is zero.
        """
        missing = int(max(self.all_gather(len(step)))) - len(step)
        yield from ((batch, counts) for batch in step)
        yield from ((step[-1], dict.fromkeys(counts, math.inf)) for _ in range(missing))

    def sum_gradients(self, model: nn.Module, loss: Tensor) -> Tensor:
        """See Ranks; the gradients were summed in the backward passes."""
        dist.all_reduce(loss)
        return loss

    def build_optimizer(self, model: nn.Module, args: BudgetTrainingArguments) -> ShardedOptimizer:
        """See Ranks."""
        return ShardedOptimizer(plan_optimizer(model, args), self)

    def refuse_to_repeat(self, failure: str, mend: str) -> None:
        """See Ranks: the weights of a layer are gathered, and the others wait inside the pass that has failed here.

        Raises:
            SettingError: Always.
        """
        raise SettingError(
            f"{failure} (process {self.rank}), and sharded processes cannot do a step again; {mend}, and the same "
            "command goes on from the last checkpoint."
        )

    @contextmanager
    def whole(self, model: nn.Module, optimizer: CompositeOptimizer | None = None) -> Iterator[None]:
        """See Ranks; what is gathered lies in the main memory of process 0."""
        weights = collect_weights(model, self)
        state = optimizer.collect_state() if optimizer is not None else {}
        if not self.is_first:
            yield
            return
        model.state_dict = lambda *args, **kwargs: dict(weights)
        if optimizer is not None:
            optimizer.state_dict = lambda: state
        try:
            yield
        finally:
            del model.state_dict
            if optimizer is not None:
                del optimizer.state_dict

    def gather_to_first(self, value: Any) -> list[Any] | None:
        """Everyone's value by rank, on process 0 only, in main memory; tensors of a dictionary come along."""
        values = [None] * self.size if self.is_first else None
        dist.gather_object(to_memory(value), values, 0, self.group)
        return values


class ShardedWeights(HalfWeights):
    """Precision of a sharded model: `fully_shard` gathers its layers in bfloat16; only the tables' hooks are ours.

    Args:
        model: Not yet sharded.
        enabled: Compute in bfloat16.
    """

    def __init__(self, model: nn.Module, enabled: bool) -> None:
        super().__init__(model, enabled, lends=False)
        self.model = model

    @contextmanager
    def lent(self) -> Iterator[None]:
        """After it nothing is gathered any more: a forward pass without a backward one leaves tables whole."""
        try:
            with super().lent():
                yield
        finally:
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()


def shard_model(model: nn.Module, device: torch.device, size: int, half: bool) -> None:
    """Shard a model in place; its gradients are summed over the processes, not averaged.

    Args:
        model: Whole, anywhere.
        device: Where its shares go.
        size: Processes.
        half: Gather all but tables in bfloat16; gradients are summed in float32.
    """
    # Of embeddings that are views, into which no architecture writes in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (size,))
    policy = MixedPrecisionPolicy(torch.bfloat16 if half else None, torch.float32, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(None, torch.float32, cast_forward_inputs=False)
    names = [(name, id(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)]
    for layer in find_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=is_true("FSDP_RESHARD_AFTER_FORWARD"))
    # The loss reads a tied projection after the forward pass is over.
    tables = find_table_modules(model)
    if tables:
        fully_shard(tables, mesh=mesh, mp_policy=exact, reshard_after_forward=False)
    tie_again(model, names)
    shared = {parameter for parameter in model.parameters() if isinstance(parameter, DTensor)}
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=shared)
    add_hooks(model, dist.get_rank(), size)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def tie_again(model: nn.Module, names: list[tuple[str, int]]) -> None:
    """Give every name of a parameter that was sharded its share: BERT's head has its projection's bias as its own too.

    Args:
        model: Some of its modules sharded.
        names: (name, identity) of each parameter before that, with every name it has.
    """
    shares = {key: model.get_parameter(name) for name, key in names if is_share(model.get_parameter(name))}
    for name, key in names:
        if key in shares and model.get_parameter(name) is not shares[key]:
            path, _, last = name.rpartition(".")
            setattr(model.get_submodule(path), last, shares[key])


def is_share(tensor: Tensor) -> bool:
    """Whether this process holds only rows of it."""
    return isinstance(tensor, DTensor)


def add_hooks(model: nn.Module, rank: int, size: int) -> None:
    """Have a sharded model take whole weights: of each `load_state_dict` it keeps its own rows."""
    shares = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if is_share(tensor)}

    def cut(module: nn.Module, state: dict[str, Tensor], *rest: Any) -> None:
        """Put this process's rows in the place of whole tensors."""
        for name, value in state.items():
            if name in shares and not is_share(value):
                share = shares[name]
                rows = cut_rows_of(value, rank, size).to(share.device, share.dtype)
                state[name] = DTensor.from_local(
                    rows,
                    share.device_mesh,
                    share.placements,
                    run_check=False,
                    shape=share.shape,
                    stride=share.stride(),
                )

    model.register_load_state_dict_pre_hook(cut)


def to_memory(value: Any) -> Any:
    """A value with its tensors in main memory, each with no more storage than it needs."""
    if isinstance(value, dict):
        return {key: to_memory(item) for key, item in value.items()}
    return value.detach().cpu().clone() if torch.is_tensor(value) else value


def collect_weights(model: nn.Module, ranks: ShardedRanks) -> dict[str, Tensor]:
    """Whole weights and buffers by name on process 0, tied ones as one tensor; {} on the others."""
    found: dict[int, Tensor] = {}
    weights = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if is_share(tensor) and id(tensor) not in found:
            rows = ranks.gather_to_first(tensor.detach().to_local())
            found[id(tensor)] = torch.cat(rows) if ranks.is_first else tensor
        weights[name] = found.get(id(tensor), tensor)
    return weights if ranks.is_first else {}
