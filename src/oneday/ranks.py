"""The processes of a run, kept in step: one clock, one batch, one sum of gradients.

Here each process holds the whole model; `sharding` has those that share one. Nothing is wrapped around it: torch's
DistributedDataParallel hooks the gradients while the backward pass makes them; here parameters lend their storage to
bfloat16 weights for that time (`mixed_precision`), a pass that runs out of memory is done again, and processes may
hold different numbers of micro-batches. So each process adds up its own micro-batches alone, and the float32 gradients
are summed once a step, before they are clipped: exact for every objective and optimizer, and nothing is left half-way
when a pass fails.

What depends on the clock is decided by process 0 and told to all; what any process may run into (a signal, memory) is
added up. These words are float64 numbers and go through gloo, whatever the gradients go through: four short messages
a step, none of which waits for a GPU.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from oneday.arguments import BudgetTrainingArguments
from oneday.beating import beating
from oneday.collators import Batch
from oneday.errors import SettingError
from oneday.mixed_precision import HalfWeights
from oneday.optimizers import CompositeOptimizer, build_optimizer

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
# Gradients are summed in pieces of this many elements.
BUCKET_ELEMENTS = 2**24
# How often a process that works alone tells the others that it still does.
BEAT_SECONDS = 60.0
# How accelerate may start the processes. Under FSDP it says so in its environment alone.
STRATEGIES = ("NO", "MULTI_CPU", "MULTI_GPU")
# What an accelerate config may ask for and this project does not support.
REFUSED_OPTIONS = {
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "use_parallelism_config",
}


def is_true(name: str) -> bool:
    """Whether an environment variable of accelerate's says yes."""
    return os.environ.get(name, "false").lower() in ("true", "1")


def is_fsdp() -> bool:
    """Whether accelerate was told to shard the model."""
    return is_true("ACCELERATE_USE_FSDP")


def check_strategy(args: BudgetTrainingArguments) -> None:
    """Refuse what is neither one whole model a process nor FSDP2.

    Raises:
        SettingError: On several GPUs in one process, other ways to shard, or options that are not done.
    """
    if args.n_gpu > 1:
        raise SettingError(
            f"{args.n_gpu} GPUs are visible to one process, whose packed rows cannot be scattered over them; start "
            "accelerate launch with recipes/accelerate_configs/ddp.yaml, or set CUDA_VISIBLE_DEVICES=0."
        )
    name = args.distributed_state.distributed_type.value
    if args.deepspeed or is_true("ACCELERATE_USE_DEEPSPEED"):
        name = "DEEPSPEED"
    if name not in STRATEGIES:
        raise SettingError(
            f"The distributed_type is {name}, which this project does not support; set it to MULTI_GPU "
            "(recipes/accelerate_configs/ddp.yaml) or FSDP (fsdp.yaml there)."
        )
    if args.fsdp:
        raise SettingError(
            f"The setting fsdp is {args.fsdp}; leave it out and start accelerate launch with "
            "recipes/accelerate_configs/fsdp.yaml."
        )
    if not is_fsdp():
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise SettingError(f"The fsdp_version of the accelerate config is {version}; set it to 2.")
    for variable, option in REFUSED_OPTIONS.items():
        if is_true(variable):
            raise SettingError(
                f"The {option} of the accelerate config is true, which is not done here; set it to false."
            )
    if args.gradient_checkpointing:  # transformers gives it the value of activation_checkpointing too
        raise SettingError(
            "The setting activation_checkpointing (or gradient_checkpointing) is true, which sharded processes do not "
            "do; leave it out, or start with recipes/accelerate_configs/ddp.yaml."
        )


class Ranks:
    """What the processes say to each other; with one process every method returns its own value.

    Args:
        rank: This process.
        size: All of them.
        timeout_seconds: How long one may keep the others waiting.

    Attributes:
        holds_whole: Whether each process holds the whole model.
    """

    holds_whole = True

    def __init__(self, rank: int = 0, size: int = 1, timeout_seconds: float = 1800) -> None:
        self.rank, self.size, self.timeout_seconds = rank, size, timeout_seconds
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds)) if size > 1 else None

    @property
    def is_first(self) -> bool:
        """Whether this is process 0: the one with the clock, and the only one that writes."""
        return self.rank == 0

    def decide(self, *numbers: float) -> list[float]:
        """Process 0's numbers."""
        return self.all_reduce(*(number if self.is_first else 0.0 for number in numbers))

    def all_reduce(self, *numbers: float) -> list[float]:
        """Each number summed over the processes; exact for integers below 2^53."""
        if self.size == 1:
            return list(numbers)
        words = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(words, group=self.group)
        return words.tolist()

    def all_gather(self, value: Result) -> list[Result]:
        """Everyone's value, by rank; for what is rare."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, rank: int, value: Result) -> Result:
        """The value of one process; what the others give is not looked at."""
        if self.size == 1:
            return value
        values: list[Any] = [value if rank == self.rank else None]
        dist.broadcast_object_list(values, rank, group=self.group)
        return values[0]

    def lead(self, call: Callable[[], Result]) -> Result:
        """What process 0's call returns; the others do not make it.

        Raises:
            SettingError: On every process, when process 0's call does.
        """
        result: tuple[Any, str | None] = None, None
        if self.is_first:
            try:
                result = call(), None
            except SettingError as error:
                result = None, str(error)
        result, refusal = self.all_gather(result)[0]
        if refusal is not None:
            raise SettingError(refusal)
        return result

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Inside, process 0 is alone; the others enter when it has left, however long that takes.

        It tells them every minute that it is still at it, so that the timeout, after which a process counts as lost,
        need not be as long as the work.
        """
        if self.size == 1:
            yield
            return
        if not self.is_first:
            while not self.decide(0)[0]:
                pass
            yield
            return
        try:
            with beating(lambda: self.decide(False), min(BEAT_SECONDS, self.timeout_seconds / 3)):
                yield
        finally:
            self.decide(True)

    def check_same(self, what: str, fingerprint: str) -> None:
        """Refuse processes that do not read the same.

        Args:
            what: The start of the sentence that refuses them.
            fingerprint: Of what this process has read.

        Raises:
            SettingError: When another has a different one.
        """
        if len(set(self.all_gather(fingerprint))) > 1:
            raise SettingError(f"{what} is not the same for all processes; have every machine read the same files.")

    def share_weights(self, model: nn.Module) -> None:
        """Give every process the weights and buffers of process 0, before `spread`."""
        if self.size > 1:
            for tensor in model.state_dict(keep_vars=True).values():
                dist.broadcast(tensor.data, 0, self.group if tensor.device.type == "cpu" else None)

    def spread(self, model: nn.Module, device: torch.device, half: bool) -> HalfWeights:
        """Leave this process what it holds of a model, the same on every process; returns its precision.

        Args:
            model: Whole.
            device: Where to compute.
            half: Compute in bfloat16.
        """
        return HalfWeights(model, half)

    def edit(self, parameter: nn.Parameter, change: Callable[[torch.Tensor], None]) -> None:
        """Have process 0 change a weight in place, and give it to all."""
        if self.is_first:
            change(parameter.data)
        if self.size > 1:
            dist.broadcast(parameter.data, 0)

    def even_out(self, step: list[Batch], counts: dict[str, int]) -> Iterator[tuple[Batch, dict[str, float]]]:
        """The passes of a step on this process: micro-batches, and over how many things their losses are means."""
        yield from ((batch, counts) for batch in step)

    def build_optimizer(self, model: nn.Module, args: BudgetTrainingArguments) -> CompositeOptimizer:
        """The optimizer that the settings name, over what this process holds; see `optimizers.build_optimizer`."""
        return build_optimizer(model, args)

    def refuse_to_repeat(self, failure: str, mend: str) -> None:
        """Called where a pass has failed half-way; raises SettingError unless it can be done again some other way."""

    @contextmanager
    def whole(self, model: nn.Module, optimizer: CompositeOptimizer | None = None) -> Iterator[None]:
        """Inside, `state_dict` of these gives whole tensors on process 0; every process must enter."""
        yield

    def sum_gradients(self, model: nn.Module, loss: torch.Tensor) -> torch.Tensor:
        """Sum every gradient over the processes, in place; where no process has one, there is none.

        Args:
            model: Its parameters are float32.
            loss: A scalar that goes along.

        Returns:
            The sum of the losses.
        """
        if self.size == 1:
            return loss
        bucket: list[nn.Parameter] = []
        for parameter in model.parameters():
            if not parameter.requires_grad:
                continue
            if sum(member.numel() for member in bucket) >= BUCKET_ELEMENTS:
                sum_bucket(bucket, loss)
                bucket = []
            bucket.append(parameter)
        return sum_bucket(bucket, loss)

    def seed_step(self, seed: int, step: int) -> None:
        """Random numbers (dropout) of this step and process, which need no state to go on after an interruption.

        One process keeps the one sequence that its checkpoints hold.
        """
        if self.size > 1:
            torch.manual_seed(int(np.random.SeedSequence([seed, step, self.rank]).generate_state(1)[0]))

    def close(self) -> None:
        """Wait for all at the end of a run: one that left early would end under the messages of the others."""
        if self.size > 1 and dist.is_initialized():
            dist.barrier(self.group)
            dist.destroy_process_group()


def sum_bucket(parameters: list[nn.Parameter], loss: torch.Tensor) -> torch.Tensor:
    """Sum some gradients over the processes in one message; returns the sum of the losses."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    has_grad = torch.tensor([p.grad is not None for p in parameters], dtype=loss.dtype, device=loss.device)
    flat = torch.cat([*(grad.flatten() for grad in grads), has_grad, loss.reshape(1)])
    dist.all_reduce(flat)
    *totals, counts, loss = flat.split([*(grad.numel() for grad in grads), len(grads), 1])
    for parameter, grad, total, count in zip(parameters, grads, totals, counts.tolist()):
        parameter.grad = grad.copy_(total.view_as(grad)) if count else None
    return loss[0].clone()


def read_whole(tensor: torch.Tensor) -> torch.Tensor:
    """The value of a tensor that may be shared out; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def read_own(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
