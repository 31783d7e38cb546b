"""Fully sharded data parallelism (FSDP2): each process holds a share of every weight, gradient and optimizer state.

torch's `fully_shard` (Zhao et al. 2023, arXiv 2304.11277) gathers a layer's weights while it computes, and sums its
gradients into shares: rows of dimension 0, for rank r those from r * ceil(n / size) on. Gathered at once are those
of a layer; tables and what is tied to them, in float32; and the rest. accelerate's config says that the model
is to be sharded, but its own wrapping, which averages gradients and changes the optimizer afterwards, is not used.

An optimizer never sees a DTensor. AdamW works element by element, so that each process steps its own rows. What needs
whole matrices (Muon) or blocks of a whole matrix (8-bit states) is shared out by the matrix: one process owns it, gets
its gradient and its weights from all, holds its state, steps it and gives the rows back. Both compute what one process
computes, and the state in a checkpoint is that of whole tensors, whatever the number of processes.
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

from oneday.arguments import BudgetTrainingArguments, SettingError
from oneday.collators import Batch
from oneday.compilation import find_layers
from oneday.mixed_precision import HalfWeights, find_table_modules
from oneday.objectives import COMPANION
from oneday.optimizers import CompositeOptimizer, Part, plan_optimizer
from oneday.ranks import Ranks, is_fsdp, is_true

# Parameter (by its place in its part) -> name -> value; of the parameters that have one.
States = dict[int, dict[str, Any]]


def make_ranks(args: BudgetTrainingArguments) -> Ranks:
    """The processes of a run, each with the whole model or a share of it, as accelerate's config says."""
    kind = ShardedRanks if is_fsdp() and args.world_size > 1 else Ranks
    return kind(args.process_index, args.world_size, args.ddp_timeout)


@contextmanager
def hidden_from_accelerate() -> Iterator[None]:
    """Inside, accelerate takes a sharded run for one of whole models, and leaves model and optimizer alone."""
    held = os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        yield
    finally:
        if held is not None:
            os.environ["ACCELERATE_USE_FSDP"] = held


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
                "does not do; start with recipes/accelerate_configs/ddp.yaml, or set objective to mlm."
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
        missing = int(max(self.gather(len(step)))) - len(step)
        yield from ((batch, counts) for batch in step)
        yield from ((step[-1], dict.fromkeys(counts, math.inf)) for _ in range(missing))

    def sum_gradients(self, model: nn.Module, loss: Tensor) -> Tensor:
        """See Ranks; the gradients were summed in the backward passes."""
        dist.all_reduce(loss)
        return loss

    def build_optimizer(self, model: nn.Module, args: BudgetTrainingArguments) -> ShardedOptimizer:
        """See Ranks."""
        return ShardedOptimizer(plan_optimizer(model, args), self)

    def refuse_to_repeat(self, micro_batch_tokens: int) -> None:
        """See Ranks: the others wait inside the pass that has failed here.

        Raises:
            SettingError: Always.
        """
        raise SettingError(
            f"The memory of process {self.rank} does not hold a micro-batch of {micro_batch_tokens} tokens, and "
            "sharded processes cannot do a step again; lower micro_batch_tokens, and the same command goes on from "
            "the last checkpoint."
        )

    def refuse_to_go_on_uncompiled(self, reason: str) -> None:
        """See Ranks: a layer that has failed half-way leaves its weights gathered.

        Raises:
            SettingError: Always.
        """
        raise SettingError(
            f"torch_compile does not work on process {self.rank} ({reason}), and sharded processes cannot do a step "
            "again; set torch_compile to false, or see that g++ is installed."
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

    def collect(self, value: Any) -> list[Any] | None:
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


def cut_rows_of(whole: Tensor, rank: int, size: int) -> Tensor:
    """The rows of a tensor that a process holds: a view, empty where there are too few for all."""
    rows = -(-whole.shape[0] // size)
    return whole[rank * rows : (rank + 1) * rows]


def count_rows(length: int, rank: int, size: int) -> int:
    """How many these are."""
    rows = -(-length // size)
    return max(0, min(rows, length - rank * rows))


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
            rows = ranks.collect(tensor.detach().to_local())
            found[id(tensor)] = torch.cat(rows) if ranks.is_first else tensor
        weights[name] = found.get(id(tensor), tensor)
    return weights if ranks.is_first else {}


class RowShares:
    """Parameters of which each process steps its own rows.

    Args:
        parameters: DTensors.
        ranks: The processes.

    Attributes:
        own: What the optimizer is built for: one parameter each, over the storage of this process's rows.
    """

    def __init__(self, parameters: list[nn.Parameter], ranks: ShardedRanks) -> None:
        self.parameters, self.ranks = parameters, ranks
        self.own = [nn.Parameter(parameter.detach().to_local()) for parameter in parameters]

    def take(self) -> None:
        """Show the optimizer the gradients."""
        for parameter, own in zip(self.parameters, self.own):
            own.grad = None if parameter.grad is None else parameter.grad.to_local()

    def give(self) -> None:
        """The weights were stepped in place."""
        for own in self.own:
            own.grad = None

    def collect(self, states: States) -> States:
        """Whole states on process 0: what has the shape of this process's rows is put together from all."""
        whole: States = {}
        for index, own in enumerate(self.own):
            shares = self.ranks.collect(states.get(index, {}))
            if shares is None or not shares[0]:
                continue
            shape = own.shape
            whole[index] = {
                name: torch.cat([share[name] for share in shares])
                if torch.is_tensor(value) and value.shape == shape
                else value
                for name, value in shares[0].items()
            }
        return whole

    def cut(self, states: States) -> States:
        """This process's rows of whole states."""
        rank, size = self.ranks.rank, self.ranks.size
        return {
            index: {
                name: cut_rows_of(value, rank, size).clone()
                if torch.is_tensor(value) and value.shape == self.parameters[index].shape
                else value
                for name, value in state.items()
            }
            for index, state in states.items()
        }


class MatrixShares:
    """Parameters each of which one process steps whole; the largest is given first, to the one with the least so far.

    All of a process's matrices are gathered at once, which takes no more memory than its rows of all of them.

    Args:
        parameters: DTensors.
        ranks: The processes.

    Attributes:
        own: What the optimizer is built for: one parameter each; those of the other processes never have a gradient.
        owners: Rank by parameter.
    """

    def __init__(self, parameters: list[nn.Parameter], ranks: ShardedRanks) -> None:
        self.parameters, self.ranks = parameters, ranks
        self.own = [nn.Parameter(without_storage(parameter)) for parameter in parameters]
        held, self.owners = [0] * ranks.size, [0] * len(parameters)
        for index in sorted(range(len(parameters)), key=lambda index: -parameters[index].numel()):
            self.owners[index] = held.index(min(held))
            held[self.owners[index]] += parameters[index].numel()

    def take(self) -> None:
        """Gather the gradients and weights of this process's matrices."""
        self.live = [index for index, parameter in enumerate(self.parameters) if parameter.grad is not None]
        gradients = self.to_owners({index: self.parameters[index].grad.to_local() for index in self.live})
        weights = self.to_owners({index: self.parameters[index].detach().to_local() for index in self.live})
        for index, gradient in gradients.items():
            self.own[index].data, self.own[index].grad = weights[index], gradient

    def to_owners(self, rows: dict[int, Tensor]) -> dict[int, Tensor]:
        """Whole tensors of this process's matrices, from everyone's rows."""
        rank, size = self.ranks.rank, self.ranks.size
        sent = [[rows[i].flatten() for i in self.live if self.owners[i] == owner] for owner in range(size)]
        mine = [i for i in self.live if self.owners[i] == rank]
        sizes = [[self.rows_shape(i, other).numel() for i in mine] for other in range(size)]
        received = exchange(sent, sizes, self.parameters[0].device)
        parts = {i: [] for i in mine}
        for other in range(size):
            for i, part in zip(mine, received[other]):
                parts[i].append(part.view(self.rows_shape(i, other)))
        return {i: torch.cat(part) for i, part in parts.items()}

    def rows_shape(self, index: int, rank: int) -> torch.Size:
        """Shape of a process's rows of a matrix."""
        shape = self.parameters[index].shape
        return torch.Size((count_rows(shape[0], rank, self.ranks.size), *shape[1:]))

    def give(self) -> None:
        """Give the rows of stepped matrices back, and let the whole ones go."""
        rank, size = self.ranks.rank, self.ranks.size
        mine = [i for i in self.live if self.owners[i] == rank]
        sent = [[cut_rows_of(self.own[i].data, other, size).flatten() for i in mine] for other in range(size)]
        theirs = [[i for i in self.live if self.owners[i] == owner] for owner in range(size)]
        sizes = [[self.rows_shape(i, rank).numel() for i in indices] for indices in theirs]
        for indices, parts in zip(theirs, exchange(sent, sizes, self.parameters[0].device)):
            for i, part in zip(indices, parts):
                self.parameters[i].detach().to_local().copy_(part.view(self.rows_shape(i, rank)))
        for i in mine:
            self.own[i].grad = None
            self.own[i].data = without_storage(self.parameters[i])

    def collect(self, states: States) -> States:
        """Everyone's states on process 0."""
        whole: States = {}
        for index, owner in enumerate(self.owners):
            shares = self.ranks.collect(states.get(index) if owner == self.ranks.rank else None)
            if shares is not None and shares[owner]:
                whole[index] = shares[owner]
        return whole

    def cut(self, states: States) -> States:
        """The states of this process's matrices."""
        return {index: state for index, state in states.items() if self.owners[index] == self.ranks.rank}


def without_storage(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and device that takes the memory of one element."""
    return torch.empty(1, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def exchange(sent: list[list[Tensor]], sizes: list[list[int]], device: torch.device) -> list[list[Tensor]]:
    """Send flat float32 tensors to every process, in one message each; returns what came, by sender.

    Args:
        sent: By receiver.
        sizes: Elements of the tensors that come, by sender.
        device: Of them all.
    """
    nothing = torch.empty(0, device=device)  # some may own no matrix
    message = torch.cat([nothing, *(tensor for tensors in sent for tensor in tensors)])
    totals = [sum(part) for part in sizes]
    received = message.new_empty(sum(totals))
    dist.all_to_all_single(received, message, totals, [sum(t.numel() for t in tensors) for tensors in sent])
    return [list(part.split(size)) for part, size in zip(received.split(totals), sizes)]


SHARES = {"rows": RowShares, "matrices": MatrixShares}


class ShardedOptimizer(CompositeOptimizer):
    """A composite optimizer over shares; its whole state is `collect_state` and goes into `load_state_dict`.

    Args:
        parts: See `plan_optimizer`; their parameters are DTensors.
        ranks: The processes.
    """

    def __init__(self, parts: list[Part], ranks: ShardedRanks) -> None:
        self.shares = [SHARES[part.shared_by](part.parameters, ranks) for part in parts]
        super().__init__([part.build(shares.own) for part, shares in zip(parts, self.shares)])

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step each part, on every process at once."""
        loss = closure() if closure is not None else None
        for shares, optimizer in () if self.is_skipping else zip(self.shares, self.optimizers):
            shares.take()
            optimizer.step()
            shares.give()
        return loss

    def collect_state(self) -> dict[str, Any]:
        """What `state_dict` is with whole parameters, on process 0; every process must call it."""
        parts = [optimizer.state_dict() for optimizer in self.optimizers]
        return {"parts": [{**part, "state": s.collect(part["state"])} for s, part in zip(self.shares, parts)]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this process's shares of a whole state."""
        parts = state_dict["parts"]
        super().load_state_dict(
            {"parts": [{**part, "state": s.cut(part["state"])} for s, part in zip(self.shares, parts, strict=True)]}
        )
