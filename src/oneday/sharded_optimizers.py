"""Optimizers of sharded processes: what one process computes, over shares of the parameters.

An optimizer never sees a DTensor. AdamW works element by element, so that each process steps its own rows. What needs
whole matrices (Muon) or blocks of a whole matrix (8-bit states) is shared out by the matrix: one process owns it, gets
its gradient and its weights from all, holds its state, steps it and gives the rows back. Both compute what one process
computes, and the state in a checkpoint is that of whole tensors, whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from oneday.optimizers import CompositeOptimizer, Part

if TYPE_CHECKING:
    from oneday.sharding import ShardedRanks

# Parameter (by its place in its part) -> name -> value; of the parameters that have one.
States = dict[int, dict[str, Any]]


def cut_rows_of(whole: Tensor, rank: int, size: int) -> Tensor:
    """The rows of a tensor that a process holds: a view, empty where there are too few for all."""
    rows = -(-whole.shape[0] // size)
    return whole[rank * rows : (rank + 1) * rows]


def count_rows(length: int, rank: int, size: int) -> int:
    """How many these are."""
    rows = -(-length // size)
    return max(0, min(rows, length - rank * rows))


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
            shares = self.ranks.gather_to_first(states.get(index, {}))
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
            shares = self.ranks.gather_to_first(states.get(index) if owner == self.ranks.rank else None)
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
