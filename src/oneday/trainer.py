"""BudgetTrainer: the only place where budget, schedules, packing, objectives and optimizers meet."""

from __future__ import annotations

import functools
import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from oneday import run_directory as rundir
from oneday.arguments import BudgetTrainingArguments, SettingError
from oneday.attention import position_offset, probe_packing
from oneday.budget import Budget, BudgetClock, write_whole
from oneday.callbacks import BudgetCallback, BudgetProgressCallback, MetricsCallback
from oneday.collators import Batch
from oneday.compilation import compile_layers, mark_varying, run_eagerly
from oneday.evaluation import evaluate_objective
from oneday.initialization import check_embedding_init
from oneday.loader import StepLoader, StepPlan, plan_rows
from oneday.mixed_precision import HalfWeights
from oneday.modeling import FlopCounter
from oneday.objectives import Objective
from oneday.optimizers import build_optimizer, check_optimizer
from oneday.packed_dataset import PackedDataset
from oneday.pretraining import run_pretraining, update_reserve
from oneday.row_sources import RowSource, ShuffledRows
from oneday.schedules import ProgressScheduler, interpolate, learning_rate_multiplier
from oneday.throughput import has_fast_bf16, keep_freed_memory, measure_peak_flops, synchronize

logger = logging.getLogger(__name__)


@dataclass
class StepRecord:
    """What one optimizer step was: global counts, the mean loss in nats, and when it began."""

    begun: float
    tokens: int
    flops: float
    num_predicted: int
    progress: float
    loss: torch.Tensor


def micro_tokens(args: BudgetTrainingArguments) -> int:
    """Tokens of a micro-batch; compiled layers get all of one size, that of the smallest step, and compile once."""
    smallest = args.batch_size_tokens_start if args.use_compile else None
    return min(args.micro_batch_tokens, smallest or args.micro_batch_tokens)


class BudgetTrainer(Trainer):
    """Pretrains a stock model inside a budget.

    One item of the data loader is a whole optimizer step: a list of micro-batches, whose summed losses are divided by
    the number of predicted tokens of the step. Loss and gradient are therefore exact for every architecture and any
    accumulation, and the batch may change its size from step to step.

    Args:
        model: A stock model with packed attention.
        args: Settings; `args.budget_*` says what may be spent.
        objective: What is predicted.
        train_dataset: Packed rows on disk, or a stream of them.
        eval_dataset: Packed held-out rows.
        processing_class: The tokenizer, saved with the model.
        data_fingerprint: Says what data and tokenizer these are; a run does not go on under another one.

    Raises:
        SettingError: When a setting cannot work, or several processes or GPUs are at hand.
    """

    args: BudgetTrainingArguments

    def __init__(
        self,
        model: PreTrainedModel,
        args: BudgetTrainingArguments,
        objective: Objective,
        train_dataset: PackedDataset | RowSource,
        eval_dataset: PackedDataset,
        processing_class: PreTrainedTokenizerBase,
        data_fingerprint: str = "",
    ) -> None:
        if args.world_size > 1 or args.n_gpu > 1:
            raise SettingError(
                f"{args.world_size} processes and {args.n_gpu} GPUs were given; this version trains with one process "
                "on one device: start one, with CUDA_VISIBLE_DEVICES=0."
            )
        keep_freed_memory()
        self.objective, self.data_fingerprint = objective, data_fingerprint
        self.clock = BudgetClock(Budget.from_arguments(args))
        self.multiplier = learning_rate_multiplier(args.lr_shape, args.warmup_fraction, args.decay_fraction)
        self.step_record: StepRecord | None = None
        self.eval_seconds = self.save_seconds = self.checkpoint_seconds = 0.0
        self.last_eval: dict[str, float] = {}
        self.status = "running"
        self.position_offset = position_offset(model)
        probe_packing(model)
        check_optimizer(args.optimizer_name)
        check_embedding_init(args.embedding_init, train_dataset)
        self.loader = self.build_loader(args, train_dataset)
        super().__init__(
            model=model,
            args=args,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
        )
        objective.attach(model)
        self.flop_counter = FlopCounter(model)
        self.bf16 = has_fast_bf16(args.device) if args.use_bf16 is None else args.use_bf16
        self.half_weights = HalfWeights(model, self.bf16)
        if args.use_compile:
            compile_layers(model)
        self.train_dataset = train_dataset
        self.peak_flops = measure_peak_flops(args.device, self.bf16)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        for callback in (BudgetCallback(self), MetricsCallback(self), BudgetProgressCallback(self)):
            self.add_callback(callback)

    # ---- Data ----

    def build_loader(self, args: BudgetTrainingArguments, dataset: PackedDataset | RowSource) -> StepLoader:
        """The loader of this rank."""
        seed = args.data_seed if args.data_seed is not None else args.seed
        source = ShuffledRows(dataset, seed) if isinstance(dataset, PackedDataset) else dataset
        largest = max(args.batch_size_tokens, args.batch_size_tokens_start or 0)
        largest_rows, _ = plan_rows(largest, micro_tokens(args), source.row_length, args.world_size)
        return StepLoader(
            source,
            self.objective.training_collator(self.position_offset),
            functools.partial(self.plan_step, args, source.row_length),
            args.process_index,
            args.world_size,
            largest_rows,
        )

    def plan_step(self, args: BudgetTrainingArguments, row_length: int) -> StepPlan:
        """Size of the next step, as the schedules say at the present progress."""
        progress = self.clock.progress
        tokens = interpolate(args.batch_size_tokens_start, args.batch_size_tokens, progress, args.batch_ramp_fraction)
        return StepPlan(*plan_rows(tokens, micro_tokens(args), row_length, args.world_size), progress)

    def get_train_dataloader(self) -> StepLoader:
        """The loader as it is: it shards by rank itself, so accelerate must not."""
        return self.loader

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, None]:
        """One item is one whole step."""
        with self.clock.account("data"):
            return [next(epoch_iterator)], None

    # ---- One step ----

    def training_step(
        self, model: torch.nn.Module, inputs: list[Batch], num_items_in_batch: None = None
    ) -> torch.Tensor:
        """Forward and backward over the step's micro-batches; returns the mean loss a predicted token, in nats."""
        begun = self.clock.now()
        model.train()
        tokens, flops, predicted = self.count_step(inputs)
        progress = self.clock.step_progress(tokens, flops)
        self.lr_scheduler.set_progress(progress)
        total = torch.zeros((), device=self.args.device)
        with self.half_weights.lent():
            for index, batch in enumerate(inputs):
                last = index == len(inputs) - 1
                with nullcontext() if last else self.accelerator.no_sync(model):
                    total += self.backward(model, batch.to(self.args.device), predicted)
        loss = self.reduce_sum(total)
        self.step_record = StepRecord(begun, tokens, flops, predicted, progress, loss)
        return loss

    def backward(self, model: torch.nn.Module, batch: Batch, num_predicted: int) -> torch.Tensor:
        """Add one micro-batch's gradient; returns its share of the step's mean loss."""
        if self.args.use_compile:
            mark_varying(batch.inputs["cu_seq_lens"])
        loss = self.objective.summed_loss(model, batch) / max(num_predicted, 1)
        # Data-parallel wrappers average gradients over processes; the sum is wanted.
        self.accelerator.backward(loss * self.args.world_size)
        self.half_weights.collect()
        return loss.detach()

    def rehearse_step(self) -> None:
        """Forward and backward over the coming micro-batch, for what happens only once; leaves no gradient."""
        self.model.train()
        batch = self.loader.peek()[0].to(self.args.device)
        with self.half_weights.lent():
            self.backward(self.model, batch, len(batch.labels))
        self.model.zero_grad()

    def count_step(self, step: list[Batch]) -> tuple[int, float, int]:
        """(tokens, FLOPs, predicted tokens) of a step; windowed layers count the pairs inside their window."""
        lengths = np.concatenate([batch.doc_lengths for batch in step])
        predicted = sum(len(batch.labels) for batch in step)
        tokens, squares = int(lengths.sum()), int((lengths**2).sum())
        return tokens, self.flop_counter.step_flops(tokens, squares, predicted, lengths), predicted

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> float | None:
        """As the parent, and remembered for metrics.jsonl."""
        self.grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.grad_norm

    def reduce_sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over the processes."""
        return self.accelerator.reduce(value, "sum") if self.args.world_size > 1 else value

    def next_step_fits(self) -> bool:
        """Whether the coming step ends inside the budget; rank 0 decides for all."""
        tokens, flops, _ = self.count_step(self.loader.peek())
        fits = self.clock.fits(tokens, flops)
        if self.args.world_size == 1:
            return fits
        flag = torch.tensor(int(fits), device=self.args.device)
        torch.distributed.broadcast(flag, 0)
        return bool(flag.item())

    def floating_point_ops(self, inputs: list[Batch]) -> float:
        """Executed FLOPs of the step just taken, for `total_flos`."""
        return self.step_record.flops / self.args.world_size

    # ---- Optimizer and schedule ----

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the settings name."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.model if model is None else model, self.args)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """A scheduler that follows the budget."""
        if self.lr_scheduler is None:
            self.lr_scheduler = ProgressScheduler(optimizer or self.optimizer, self.multiplier)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # ---- Evaluation ----

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Held-out losses, during training only the objective's own; see `evaluation.evaluate_objective`."""
        begun = time.monotonic()
        with self.clock.account("evaluation"):
            metrics = self.measure_held_out(own_only=self.is_in_train)
        # During training one collator runs, at the end all of them.
        times = len(self.objective.evaluation_collators(self.position_offset)) if self.is_in_train else 1
        self.eval_seconds = max(self.eval_seconds, times * (time.monotonic() - begun))
        self.last_eval = metrics
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        update_reserve(self)
        return metrics

    @contextmanager
    def evaluation_precision(self) -> Iterator[None]:
        """The precision of training, without compiled layers: the last batch of an evaluation is smaller."""
        with ExitStack() as stack:
            stack.enter_context(self.half_weights.lent())
            if self.args.use_compile:
                stack.enter_context(run_eagerly())
            yield

    def measure_held_out(self, own_only: bool = False, max_parts: int | None = None) -> dict[str, float]:
        """Held-out losses of the present weights."""
        collators = list(self.objective.evaluation_collators(self.position_offset).items())
        metrics = evaluate_objective(
            self.model,
            self.objective,
            self.eval_dataset,
            self.args.micro_batch_tokens,
            self.evaluation_precision,
            dict(collators[:1] if own_only else collators),
            self.args.process_index,
            self.args.world_size,
            self.reduce_sum,
            max_parts,
        )
        synchronize(self.args.device)
        return metrics

    # ---- Saving ----

    def _save_checkpoint(self, model: torch.nn.Module, trial: None = None) -> None:
        """Write a checkpoint aside and rename it: a directory of that name is always whole."""
        name, begun = f"checkpoint-{self.state.global_step}", time.monotonic()
        with self.clock.account("checkpoints"), rundir.staging(self.args.output_dir, "checkpoint") as folder:
            self._staging_dir = folder
            super()._save_checkpoint(model, trial)
            self._staging_dir = None
            if self.args.should_save:
                self.write_state(folder / name)
                rundir.publish(folder / name, Path(self.args.output_dir) / name)
                self.remove_old_checkpoints()
        self.checkpoint_seconds = time.monotonic() - begun
        rundir.append_metrics(self.args.output_dir, {"event": "checkpoint", **self.describe_place()})

    _staging_dir: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        """Where the parent writes checkpoints: the staging directory while one is being written."""
        return str(self._staging_dir or self.args.output_dir)

    def write_state(self, folder: Path) -> None:
        """This project's own state beside the parent's: position in the data, and the clock."""
        state = {
            "data": self.data_fingerprint,
            "loader": self.loader.state_dict(),
            "clock": self.clock.state_dict(),
        }
        write_whole(folder / rundir.STATE, json.dumps(state, indent=2) + "\n")

    def remove_old_checkpoints(self) -> None:
        """Keep the newest `save_total_limit`, and always one."""
        if self.args.save_total_limit:
            for folder in rundir.list_checkpoints(self.args.output_dir)[: -max(1, self.args.save_total_limit)]:
                shutil.rmtree(folder, ignore_errors=True)

    def save_final(self) -> None:
        """The final model and tokenizer at the top of the run directory."""
        with self.clock.account("checkpoints"), rundir.staging(self.args.output_dir, "final") as folder:
            self.save_model(str(folder), _internal_call=True)
            if self.args.should_save:
                (folder / "training_args.bin").unlink(missing_ok=True)
                rundir.publish_files(folder, Path(self.args.output_dir))

    # ---- A whole run ----

    def run(self, resume: bool = False) -> dict[str, float]:
        """Train until the budget is used up, save, evaluate; see `pretraining.run_pretraining`."""
        return run_pretraining(self, resume)

    def describe_place(self) -> dict[str, Any]:
        """Where the run is: the keys that every line of metrics.jsonl has."""
        return {
            "step": self.clock.steps,
            "tokens": self.clock.tokens,
            "progress": self.clock.progress,
            "train_seconds": self.train_seconds,
            "budget_seconds": self.clock.elapsed_seconds,
        }

    def write_budget(self) -> None:
        """Write budget.json: the report at the end, the heartbeat before it."""
        if self.args.should_save:
            self.clock.write(Path(self.args.output_dir) / rundir.BUDGET, self.status)

    @property
    def train_seconds(self) -> float:
        """Seconds of training: the steps and the waits for their data."""
        return self.clock.ledger["steps"] + self.clock.ledger["data"]

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of training."""
        return self.clock.tokens / self.train_seconds if self.train_seconds else 0.0

    @property
    def mfu(self) -> float:
        """Executed FLOPs a second of training over the measured peak of one device, per process."""
        rate = self.clock.flops / self.train_seconds if self.train_seconds else 0.0
        return rate / (self.peak_flops * self.args.world_size)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the parent; the trackers also get tokens, progress, throughput and MFU."""
        extra = {"tokens": self.clock.tokens, "progress": self.clock.progress}
        if self.clock.steps:
            extra |= {"tokens_per_second": self.tokens_per_second, "mfu": self.mfu}
        super().log({**logs, **extra}, start_time)
