"""BudgetTrainer: the only place where budget, schedules, packing, objectives and optimizers meet."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from oneday.arguments import BudgetTrainingArguments
from oneday.attention import position_offset, probe_packing
from oneday.callbacks import BudgetCallback, BudgetProgressCallback, MetricsCallback
from oneday.collators import Batch
from oneday.compilation import (
    compile_layers,
    compile_loss,
    decide_compiling,
    mark_varying,
    run_eagerly,
    try_compiled,
    uncompile,
)
from oneday.errors import SettingError
from oneday.evaluation import measure_held_out
from oneday.initialization import check_embedding_init, expected_embedding_std
from oneday.loader import StepLoader
from oneday.modeling import recompute_activations
from oneday.objectives import COMPANION, Objective
from oneday.optimizers import check_optimizer
from oneday.packed_dataset import PackedDataset
from oneday.position_init import attend_to_neighbours, check_attention_init
from oneday.pretraining import run_pretraining, update_reserve
from oneday.ranks import check_strategy, read_whole
from oneday.recovery import StepGuard, find_bad_number, fit_into_memory
from oneday.replay import ReplayClock, build_clock
from oneday.row_sources import RowSource
from oneday.saving import RunTrainer
from oneday.schedules import ProgressScheduler, find_plateau_end, learning_rate_multiplier
from oneday.sharding import hidden_from_accelerate, make_ranks
from oneday.steps import StepRecord, build_loader, count_share
from oneday.throughput import forget_peak_memory, keep_freed_memory, measure_peak_flops
from oneday.trackers import name_run, place_tensorboard


def check_model(
    model: PreTrainedModel,
    args: BudgetTrainingArguments,
    objective: Objective,
    train_dataset: PackedDataset | RowSource,
) -> None:
    """Raise SettingError for a model that the settings, or packing, do not go with."""
    if objective.is_packed:
        probe_packing(model)
    check_optimizer(args.optimizer_name)
    check_embedding_init(args.embedding_init, train_dataset)
    check_attention_init(args.attention_init, model)
    if args.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise SettingError(
            "The setting activation_checkpointing (or gradient_checkpointing) is true, which "
            f"{type(model).__name__} does not support; leave it out."
        )


class BudgetTrainer(RunTrainer):
    """Pretrains a stock model inside a budget.

    One item of the data loader is a whole optimizer step: a list of micro-batches, whose summed losses are divided by
    the number of predicted tokens of the step. Loss and gradient are therefore exact for every architecture, any
    accumulation and any number of processes, and the batch may change its size from step to step.

    Args:
        model: A stock model with packed attention.
        args: Settings; `args.budget_*` says what may be spent.
        objective: What is predicted.
        train_dataset: Packed rows on disk, or a stream of them.
        eval_dataset: Packed held-out rows.
        processing_class: The tokenizer, saved with the model.
        data_fingerprint: Says what data and tokenizer these are; a run does not go on under another one.
        model_fingerprint: Likewise, of the model's config file.

    Raises:
        SettingError: When a setting cannot work, a process has several GPUs, or processes differ in text or model.
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
        model_fingerprint: str = "",
    ) -> None:
        check_strategy(args)
        self.ranks = make_ranks(args)
        self.ranks.check_same("The text or tokenizer of dataset_name", data_fingerprint)
        self.ranks.check_same("The file of model_config", model_fingerprint)
        keep_freed_memory()
        self.objective = objective
        self.data_fingerprint, self.model_fingerprint = data_fingerprint, model_fingerprint
        self.begin_counting(args)
        self.position_offset = position_offset(model)
        self.eval_collators = objective.evaluation_collators(self.position_offset)
        check_model(model, args, objective, train_dataset)
        args.use_compile = decide_compiling(args, objective.is_packed)
        self.loader = build_loader(self, args, train_dataset)
        name_run(args)
        args.mixed_precision = "no"  # an accelerate config's would wrap the model in an autocast of its own
        use_cache = getattr(model.config, "use_cache", None)
        super().__init__(
            model=model,
            args=args,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
        )
        if use_cache is not None:
            model.config.use_cache = use_cache  # the parent's setting would be saved with the model
        self.prepare_weights(model)
        self.train_dataset = train_dataset
        self.peak_flops = measure_peak_flops(args.device, self.bf16)
        forget_peak_memory(args.device)  # the products' own
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        for callback in (BudgetCallback(self), MetricsCallback(self), BudgetProgressCallback(self)):
            self.add_callback(callback)
        place_tensorboard(self)

    def begin_counting(self, args: BudgetTrainingArguments) -> None:
        """The clock and the schedule, and what is known of steps, signals and evaluations before the first of each."""
        self.clock = build_clock(args)
        self.guard = StepGuard(args.max_bad_steps)
        self.eval_batch_tokens = args.micro_batch_tokens
        self.multiplier = learning_rate_multiplier(args.lr_shape, args.warmup_fraction, args.decay_fraction)
        self.plateau_end = find_plateau_end(args.lr_shape, args.decay_fraction)
        self.step_record: StepRecord | None = None
        self.signals: list[int] = []
        self.is_interrupted = False
        self.failure: SettingError | None = None  # of its stream, which ended the steps
        self.counted: tuple[list[Batch], tuple[int, float, dict[str, int]]] | None = None
        self.eval_seconds = self.save_seconds = 0.0
        self.preparation_seconds = 0.0  # of this process, for the text
        self.tracked_loss = torch.zeros((), device=args.device)  # of the last step that was finite
        self.last_eval_seconds: float | None = None
        self.last_eval: dict[str, float] = {}

    def prepare_weights(self, model: PreTrainedModel) -> None:
        """Begin, place and share out the weights, and compile the layers."""
        args, objective = self.args, self.objective
        # Only placed, not wrapped: see `ranks`.
        self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        objective.attach(model)
        if args.attention_init is not None:  # the companion is there, and nothing is shared out yet
            attend_to_neighbours(model, expected_embedding_std(args.embedding_init, model))
        self.ranks.share_weights(model)
        self.flop_counter = objective.make_flop_counter(model, self.loader.source.row_length)
        self.bf16 = args.computes_in_bf16
        # What is not packed is not this project's path through the model: there autocast decides.
        self.half_weights = self.ranks.spread(model, args.device, self.bf16 and objective.is_packed)
        if args.gradient_checkpointing:
            recompute_activations(model, args)
        if args.use_compile:
            for part in (model, getattr(model, COMPANION, None)):
                compile_layers(part) if part is not None else None
            compile_loss(model)

    def create_accelerator_and_postprocess(self) -> None:
        """As the parent, for a model that is not to be wrapped."""
        with hidden_from_accelerate():
            super().create_accelerator_and_postprocess()

    def _move_model_to_device(self, model: torch.nn.Module, device: torch.device) -> None:
        """As the parent, unless the device is to have a share only; see `Ranks.spread`."""
        if self.ranks.holds_whole:
            super()._move_model_to_device(model, device)

    # ---- Data ----

    @functools.cached_property
    def reads_ahead(self) -> bool:
        """Whether the next step's batches are made while a GPU computes the gradients of this one.

        Not from a stream, which may have to be waited for, nor in a replay, which does not know the next plan yet.
        """
        is_on_disk = self.loader.source.num_rows is not None
        return self.args.device.type == "cuda" and is_on_disk and not isinstance(self.clock, ReplayClock)

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
        tokens, flops, counts = self.count_step(inputs)
        progress = self.clock.step_progress(tokens, flops)
        self.ranks.seed_step(self.args.seed, self.clock.steps_taken)
        total, progress = fit_into_memory(self, inputs, functools.partial(self.accumulate, model, counts), progress)
        self.lr_scheduler.set_progress(progress)
        plan = self.loader.current_plan
        if self.reads_ahead:
            self.loader.peek(self.clock.progress_after(tokens, flops, begun))
        loss = self.ranks.sum_gradients(model, total)
        self.step_record = StepRecord(begun, tokens, flops, counts, progress, loss, plan)
        # The parent adds this up for its trackers, and would never get rid of a NaN.
        self.tracked_loss = torch.where(torch.isfinite(loss), loss, self.tracked_loss)
        return self.tracked_loss

    def accumulate(self, model: torch.nn.Module, counts: dict[str, int], step: list[Batch]) -> torch.Tensor:
        """The gradient of a step's micro-batches; returns this process's share of its mean loss."""
        total = torch.zeros((), device=self.args.device)
        with self.precision():
            for batch, pass_counts in self.ranks.even_out(step, counts):
                total += self.backward(model, batch.to(self.args.device), pass_counts)
        return total

    @contextmanager
    def precision(self) -> Iterator[None]:
        """What the model computes in."""
        enabled = self.bf16 and not self.objective.is_packed
        # Sharded weights are gathered anew in each pass: what was made of them is not to be kept.
        autocast = torch.autocast(
            self.args.device.type, torch.bfloat16, enabled=enabled, cache_enabled=self.ranks.holds_whole
        )
        with self.half_weights.lent(), autocast:
            yield

    def describe_precision(self) -> str:
        """The same in words."""
        if not self.bf16:
            return "float32"
        return "bfloat16, float32 master weights" if self.objective.is_packed else "bfloat16 autocast"

    def backward(self, model: torch.nn.Module, batch: Batch, counts: dict[str, int]) -> torch.Tensor:
        """Add one micro-batch's gradient; returns its share of the step's mean loss."""
        if self.args.use_compile and self.objective.is_packed:
            mark_varying(batch.inputs["cu_seq_lens"])
        loss = self.objective.mean_loss(self.objective.summed_terms(model, batch), counts)
        self.accelerator.backward(loss)
        self.half_weights.collect()
        return loss.detach()

    def rehearse_step(self) -> bool:
        """Forward and backward over the coming micro-batch, which compiles, without a trace; whether it compiled."""
        self.model.train()

        def rehearse(step: list[Batch]) -> bool:
            counts = self.objective.count_terms(step[0])
            run = functools.partial(self.accumulate, self.model, counts, step[:1])
            return try_compiled(self.model, run, self.ranks.refuse_to_repeat)

        is_compiled, _ = fit_into_memory(self, self.loader.peek(), rehearse)
        self.model.zero_grad()
        (num_failed,) = self.ranks.all_reduce(not is_compiled)
        if num_failed:  # on one of the processes: all plan their steps alike
            uncompile(self.model)
        return not num_failed

    def count_step(self, step: list[Batch]) -> tuple[int, float, dict[str, int]]:
        """(tokens, FLOPs, counts of the loss's terms) over all processes; also hears of signals that reached any."""
        if self.counted is None or self.counted[0] is not step:
            tokens, flops, counts = count_share(self.objective, self.flop_counter, step)
            tokens, flops, signals, *totals = self.ranks.all_reduce(tokens, flops, len(self.signals), *counts.values())
            self.is_interrupted = signals > 0
            self.counted = step, (int(tokens), flops, dict(zip(counts, map(int, totals))))
        return self.counted[1]

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> float | None:
        """As the parent, and remembered; a step that is not finite is one that the optimizer must not take."""
        grad_norm, record = read_whole(super()._get_grad_norm(model, grad_norm=grad_norm)), self.step_record
        # Read here, where the norm is waited for anyway: after the optimizer it would be waited for as well.
        record.loss, record.grad_norm = float(record.loss), float(grad_norm)
        record.bad_number = find_bad_number(record.loss, record.grad_norm)
        self.composite.is_skipping = record.bad_number is not None
        return grad_norm

    def next_step_fits(self) -> bool:
        """Whether the coming step ends inside the budget, by this process's clock; process 0's is the one to ask.

        Raises:
            SettingError: Its stream cannot be read on, on every process, and the budget is not used up.
        """
        try:
            step = self.loader.peek()
        except SettingError:
            if any(self.ranks.decide(self.clock.fits(0, 0.0))):
                raise
            return False
        tokens, flops, _ = self.count_step(step)
        return self.clock.fits(tokens, flops)

    def must_end(self) -> bool:
        """Whether a signal came, or the budget is used up by this process's clock: a stream is waited for no more."""
        return bool(self.signals) or not self.clock.fits(0, 0.0)

    def floating_point_ops(self, inputs: list[Batch]) -> float:
        """Executed FLOPs of the step just taken, over all processes, for `total_flos`."""
        return self.step_record.flops

    def store_flos(self) -> None:
        """As the parent with one process: the FLOPs are over all of them already."""
        self.state.total_flos += self.current_flos
        self.current_flos = 0

    # ---- Optimizer and schedule ----

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the settings name."""
        if self.optimizer is None:
            model = self.model if model is None else model
            self.optimizer = self.composite = self.ranks.build_optimizer(model, self.args)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """A scheduler that follows the budget."""
        if self.lr_scheduler is None:
            self.lr_scheduler = ProgressScheduler(optimizer or self.optimizer, self.multiplier)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # ---- Evaluation ----

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Held-out losses, during training only the objective's own; see `evaluation.measure_held_out`."""
        begun = time.monotonic()
        with self.clock.account("evaluation"):
            metrics = measure_held_out(self, own_only=self.is_in_train)
        # During training one collator runs, at the end all of them.
        times = len(self.eval_collators) if self.is_in_train else 1
        seconds = time.monotonic() - begun
        # The first whole one during training replaces what a part of one promised: that may have been disturbed.
        longest = 0.0 if self.last_eval_seconds is None else self.eval_seconds
        self.eval_seconds = max(longest, times * seconds)
        self.last_eval_seconds = seconds if self.is_in_train else self.last_eval_seconds
        self.last_eval = metrics if self.clock.steps else {}  # that of random weights is no news beside the loss
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        update_reserve(self)
        return metrics

    @contextmanager
    def evaluation_precision(self) -> Iterator[None]:
        """The precision of training, without compiled layers: the last batch of an evaluation is smaller."""
        with ExitStack() as stack:
            stack.enter_context(self.precision())
            if self.args.use_compile:
                stack.enter_context(run_eagerly())
            yield

    # ---- A whole run ----

    def run(self, resume: bool = False) -> dict[str, float]:
        """Train until the budget is used up, save, evaluate; see `pretraining.run_pretraining`."""
        try:
            return run_pretraining(self, resume)
        finally:
            self.loader.source.close(waits=False)

    @property
    def mfu(self) -> float:
        """Executed FLOPs per second of training over the measured peak of one device, per process."""
        seconds = self.clock.train_seconds
        return (self.clock.flops / seconds if seconds else 0.0) / (self.peak_flops * self.args.world_size)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the parent; the trackers also get tokens, progress, throughput and MFU."""
        extra = {"tokens": self.clock.tokens, "progress": self.clock.progress}
        logs.pop("train_samples_per_second", None)  # of a batch size that is not this run's
        if self.clock.steps:
            extra |= {"tokens_per_second": self.clock.tokens_per_second, "mfu": self.mfu}
        super().log({**logs, **extra}, start_time)
