"""One fine-tuning run: a task, a seed, a setting -> trained, answered and scored."""

from __future__ import annotations

import functools
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from oneday.adapters import count_trained, restrict_training, save_classifier
from oneday.classification import (
    Checkpoint,
    PreparedTask,
    build_classifier,
    pad_batch,
    silence_libraries,
)
from oneday.dropout import hasten_dropout
from oneday.durable_files import synchronize_tree, write_json
from oneday.errors import SettingError, describe_error, is_out_of_memory
from oneday.glue import Task, score_predictions
from oneday.glue_protocol import (
    FinetuneArguments,
    choose_attention,
    choose_bf16,
    choose_device,
    choose_pad_multiple,
    find_output_dir,
)
from oneday.glue_results import hash_run
from oneday.graphed_loss import MAX_PARAMETERS, GraphedLoss
from oneday.predictions import are_answered, decide, write_predictions
from oneday.throughput import peak_memory_bytes

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_config.json"
WEIGHTS = {False: "pretrained", True: "random"}

Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class PlannedRun:
    """A run as it is asked for.

    Attributes:
        task: Tokenised for the checkpoint.
        args: The settings, complete.
        seed: Of the new head, the order of the examples and dropout.
        from_random: Start from random weights of the same architecture.
        key: Of everything that its scores follow from.
    """

    task: PreparedTask
    args: FinetuneArguments
    seed: int
    from_random: bool
    key: str

    @property
    def name(self) -> str:
        """`rte-pretrained-seed0-0123abcd`."""
        return f"{self.task.task.name}-{WEIGHTS[self.from_random]}-seed{self.seed}-{self.key[:8]}"

    @property
    def folder(self) -> Path:
        """Where its answers and its model are kept."""
        return find_output_dir(self.args) / "runs" / self.name

    @property
    def is_kept(self) -> bool:
        """Whether its answers, and its model where that is asked for, are there."""
        has_model = not self.saves_model or (self.folder / "model" / self.model_file).exists()
        return has_model and are_answered(self.folder, self.task)

    @property
    def saves_model(self) -> bool:
        """Whether its model is to be kept: of random weights there is none that anyone would load."""
        return self.args.save_models and not self.from_random

    @property
    def model_file(self) -> str:
        """By which a kept model is known: a whole one, or an adapter."""
        return "config.json" if self.args.peft is None or self.args.merge_adapters else ADAPTER_FILE


def plan_run(
    checkpoint: Checkpoint, task: PreparedTask, args: FinetuneArguments, seed: int, from_random: bool
) -> PlannedRun:
    """A run with its key; only one of pretrained weights answers test rows."""
    task = task.without_tests if from_random else task
    return PlannedRun(task, args, seed, from_random, hash_run(checkpoint, task, args, seed, from_random))


def describe_run(run: dict) -> str:
    """`rte seed 0 pretrained, accuracy 0.561, 12.3 s`."""
    scores = next(iter(run["scores"].values()))
    name, value = next(iter(scores.items()))
    return f"{run['task']} seed {run['seed']} {run['weights']}, {name} {value:.3f}, {run['seconds']:.1f} s"


def measure_run(checkpoint: Checkpoint, run: PlannedRun) -> dict:
    """Do a run; returns its line of `glue_runs.jsonl`, with what is kept of it in a folder of its own."""
    started, task, args, device = time.perf_counter(), run.task, run.args, choose_device(run.args)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    line = {"key": run.key, "task": task.task.name, "seed": run.seed, "weights": WEIGHTS[run.from_random]}
    with silence_libraries():
        trainer = train_classifier(checkpoint, task, args, run.seed, run.from_random)
        logits = predict_splits(trainer, task)
        cost = count_trained(trainer.model) | {"peak_memory_bytes": peak_memory_bytes(device)}
        # Aside, then renamed: a killed process leaves nothing that looks whole.
        new = run.folder.with_name(f".{run.name}")
        shutil.rmtree(new, ignore_errors=True)
        write_predictions(new, task, logits)
        if run.saves_model:
            max_length = min(args.max_seq_length, checkpoint.num_positions or args.max_seq_length)
            save_classifier(trainer.model, checkpoint.tokenizer, new / "model", args.merge_adapters, max_length)
            if task.task.label_scale and run.model_file == ADAPTER_FILE:  # beside it there is no config.json
                write_json(new / "model" / "label_scale.json", task.task.label_scale)
        synchronize_tree(new)
        put_in_place(new, run.folder)
    seconds = round(time.perf_counter() - started, 3)
    facts = {"scores": score_splits(task, logits), "seconds": seconds, "threads": torch.get_num_threads()}
    facts["diverged"] = not all(np.isfinite(outputs).all() for outputs in logits.values())
    return line | facts | cost


def put_in_place(new: Path, folder: Path) -> None:
    """Move what a run has left to where it belongs; what lies there is of the same run, and stays or is replaced."""
    if not folder.exists():
        new.rename(folder)
        return
    for part in new.iterdir():
        if part.is_dir():
            shutil.rmtree(folder / part.name, ignore_errors=True)
        part.rename(folder / part.name)
    new.rmdir()


def train_classifier(
    checkpoint: Checkpoint, prepared: PreparedTask, args: FinetuneArguments, seed: int, from_random: bool
) -> Trainer:
    """The trainer after its last step; it holds the model.

    Raises:
        SettingError: The architecture does not run in bfloat16, asked for or taken as the hardware is fast in it.
    """
    model = build_classifier(checkpoint, prepared.task, args.dropout, seed, from_random, choose_attention(args))
    model = restrict_training(model, args)
    hasten_dropout(model)
    trainer = build_trainer(model, checkpoint, prepared, args, seed)
    try:
        trainer.train()
    except RuntimeError as error:
        if trainer.state.global_step or not choose_bf16(args) or is_out_of_memory(error):
            raise
        raise SettingError(
            f"A {model.config.model_type} model does not run in bfloat16 ({describe_error(error)}); set bf16 to false."
        ) from error
    return trainer


def predict_splits(trainer: Trainer, prepared: PreparedTask) -> dict[str, np.ndarray]:
    """The model's outputs on each split but the training one, (rows, num_labels), in the order of its rows.

    Those of a regression are in the unit of its labels.
    """
    # Grouping by length would shuffle the rows here too, in an order of the sampler's own.
    trainer.args.train_sampling_strategy = "sequential"
    outputs = {}
    asked = {split: prepared.splits[split] for split in prepared.scored_splits} | prepared.test_splits
    for split, rows in asked.items():
        order = np.argsort(rows["length"][:], kind="stable")
        logits = trainer.predict(rows.select(order)).predictions
        outputs[split] = (logits[0] if isinstance(logits, tuple) else logits)[np.argsort(order)]
        if prepared.task.label_scale:
            outputs[split] = outputs[split].astype(np.float64) * prepared.task.label_std + prepared.task.label_mean
    return outputs


def score_splits(prepared: PreparedTask, logits: dict[str, np.ndarray]) -> Scores:
    """Metrics of each split under its number's name."""
    task, splits = prepared.task, prepared.splits
    return {
        task.name_number(split): score_logits(task, outputs, np.asarray(splits[split]["label"][:]))
        for split, outputs in logits.items()
        if split in splits
    }


class ClassificationTrainer(Trainer):
    """A Trainer whose batches of rows of like length are drawn from their lengths in a list.

    Attributes:
        train_lengths: Tokens of each training row; the parent would look them up in the data set, one by one.
        graphed_loss: The loss of a training batch, where CUDA graphs give it.
    """

    train_lengths: list[int]
    graphed_loss: GraphedLoss | None = None

    def compute_loss(
        self, model: PreTrainedModel, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """As the parent; in training from `graphed_loss`, where there is one."""
        if self.graphed_loss is None or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        return self.graphed_loss(inputs)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        """As the parent, where it groups by length."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        return LengthGroupedSampler(self.args.train_batch_size, lengths=self.train_lengths)

    def _get_grad_norm(self, model: PreTrainedModel, grad_norm: Any = None) -> None:
        """Not taken: the parent's is for its log, which is silent here; clipping takes its own before."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the parent goes through all parameters in every step for a number that nothing here shows."""
        return 0


def build_trainer(
    model: PreTrainedModel, checkpoint: Checkpoint, prepared: PreparedTask, args: FinetuneArguments, seed: int
) -> Trainer:
    """A stock Trainer that logs, saves and evaluates nothing by itself."""
    same_name = ("learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm")
    training_args = TrainingArguments(
        output_dir=str(find_output_dir(args)),
        **{name: getattr(args, name) for name in same_name},
        per_device_train_batch_size=args.per_device_train_batch_size,
        per_device_eval_batch_size=args.per_device_eval_batch_size,
        num_train_epochs=args.num_train_epochs,
        lr_scheduler_type=args.lr_scheduler_type,
        warmup_steps=args.warmup_fraction,
        bf16=choose_bf16(args),
        # transformers takes bf16 without a CUDA device only when it is told so.
        use_cpu=args.use_cpu or (choose_bf16(args) and not torch.cuda.is_available()),
        seed=seed,
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,  # it would wait for a GPU after every step, for a log that is silent
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available() and not args.use_cpu,
    )
    training_args.mixed_precision = "bf16" if choose_bf16(args) else "no"  # not an accelerate config's
    # Several visible GPUs would multiply the batch, and with it change the protocol.
    training_args._n_gpu = min(training_args.n_gpu, 1)
    collate = functools.partial(
        pad_batch, checkpoint=checkpoint, task=prepared.task, multiple=choose_pad_multiple(args)
    )
    trainer = ClassificationTrainer(
        model, training_args, data_collator=collate, train_dataset=prepared.splits["train"]
    )
    trainer.train_lengths = prepared.train_lengths
    if choose_device(args).type == "cuda" and args.peft != "qlora" and model.num_parameters() <= MAX_PARAMETERS:
        trainer.graphed_loss = GraphedLoss(trainer.model)
    trainer.remove_callback(PrinterCallback)
    return trainer


def score_logits(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Metrics from a model's outputs, (rows, num_labels)."""
    if not np.isfinite(logits).all():
        logger.warning("%s: the model's outputs are not finite; the training diverged", task.name)
    answers = decide(task, logits)
    if len(set(answers.tolist())) == 1 and len(set(labels.tolist())) > 1:
        logger.warning("%s: every answer is the same (%s); the training did not take", task.name, answers[0])
    return score_predictions(task, answers, labels)
