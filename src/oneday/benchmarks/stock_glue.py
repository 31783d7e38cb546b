"""The other side of `finetuning`: one task, one seed, one process, as the Hub's run_glue.py does it.

`python -m oneday.benchmarks.stock_glue SETTINGS.json RESULT.json`. The checkpoint is loaded, every row is tokenised
and padded to the full length, Trainer trains with the model as it is (its own dropout, transformers' attention, all
cores in one run). Where the example leaves a choice it is made for stock: the protocol's optimizer settings, bfloat16
where ours takes it, large batches for scoring, nothing saved or logged.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from oneday.attention import count_positions
from oneday.glue import Task, find_task, score_predictions
from oneday.task_data import complete_task, load_task, take_examples
from oneday.throughput import set_threads

# What both sides' TrainingArguments have under one name.
SAME_NAME = (
    "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size", "learning_rate",
    "lr_scheduler_type", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm",
)  # fmt: skip


def run_glue(settings: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune and score once.

    Args:
        settings: Those of `FinetuneArguments`, complete, with one `task_name`, one `seed` and `bf16` decided.

    Returns:
        `scores`: metrics by number, and `phase_seconds` from the first line of this function on.
    """
    times = [time.perf_counter()]
    set_threads(settings["num_threads"])
    set_seed(settings["seed"])
    task, data = load_rows(settings)
    name, regression = settings["model_name_or_path"], task.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # a decoder's may have none
    config = AutoConfig.from_pretrained(name, num_labels=task.num_labels, pad_token_id=tokenizer.pad_token_id)
    config.problem_type = "regression" if regression else "single_label_classification"
    model = AutoModelForSequenceClassification.from_pretrained(name, config=config, ignore_mismatched_sizes=True)
    times.append(time.perf_counter())
    limit = count_positions(model) or settings["max_seq_length"]
    data = {
        split: tokenize(rows, task, tokenizer, min(settings["max_seq_length"], limit)) for split, rows in data.items()
    }
    times.append(time.perf_counter())
    with tempfile.TemporaryDirectory(prefix="oneday-benchmark-") as folder:
        trainer = build_trainer(model, settings, data["train"], folder)
        trainer.train()
        times.append(time.perf_counter())
        scores = {}
        for split in data.keys() - {"train"}:
            logits = trainer.predict(data[split]).predictions
            logits = logits[0] if isinstance(logits, tuple) else logits
            answers = logits.reshape(-1) if regression else logits.argmax(-1)
            scores[task.name_number(split)] = score_predictions(task, answers, np.asarray(data[split]["label"]))
        times.append(time.perf_counter())
    names = ("load", "tokenise", "train", "score")
    return {
        "scores": scores,
        "phase_seconds": dict(zip(names, np.diff(times).tolist())),
        "threads": torch.get_num_threads(),
    }


def load_rows(settings: dict[str, Any]) -> tuple[Task, dict[str, Dataset]]:
    """The task and the rows that our side takes, too."""
    name, limits = settings["task_name"], {"train": settings["max_train_examples"]}
    data = load_task(name, settings["task_data_dir"], settings["cache_dir"])
    rows = {
        split: take_examples(part, limits.get(split, settings["max_eval_examples"])) for split, part in data.items()
    }
    return complete_task(find_task(name), data["train"]), rows


def tokenize(rows: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Model inputs of one length, as the example's `preprocess_function` gives them."""

    def encode(batch: dict[str, list]) -> dict[str, list]:
        split = task.num_first_columns
        groups = [[batch[name] for name in names] for names in (task.columns[:split], task.columns[split:]) if names]
        texts = [[" ".join(parts) for parts in zip(*group)] for group in groups]
        return tokenizer(*texts, padding="max_length", max_length=max_length, truncation=True)

    return rows.map(encode, batched=True, remove_columns=list(task.columns), load_from_cache_file=False)


def build_trainer(model: torch.nn.Module, settings: dict[str, Any], train: Dataset, folder: str) -> Trainer:
    """Trainer as the example builds it, with the protocol's settings."""
    args = TrainingArguments(
        output_dir=folder,
        **{name: settings[name] for name in SAME_NAME},
        warmup_steps=settings["warmup_fraction"],
        bf16=settings["bf16"],
        use_cpu=settings["use_cpu"] or not torch.cuda.is_available(),
        seed=settings["seed"],
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    args._n_gpu = min(args.n_gpu, 1)  # one GPU, as ours; more would be DataParallel
    return Trainer(model, args, train_dataset=train, data_collator=default_data_collator)


def main() -> None:
    """Read the settings, write the result."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    source, target = map(Path, sys.argv[1:])
    target.write_text(json.dumps(run_glue(json.loads(source.read_text(encoding="utf-8")))), encoding="utf-8")


if __name__ == "__main__":
    main()
