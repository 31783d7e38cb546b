"""Fine-tune a checkpoint on tasks, over several seeds, under one protocol for all of them."""

from __future__ import annotations

import functools
import hashlib
import logging
import time

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, DatasetDict
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from oneday.adapters import count_trained, restrict_training, save_classifier
from oneday.classification import (
    Checkpoint,
    PreparedTask,
    build_classifier,
    encode_batch,
    limit_length,
    load_checkpoint,
    silence_libraries,
    tokenize_split,
)
from oneday.glue import Task, complete_task, find_task, load_task, score_predictions
from oneday.glue_picture import PICTURE_FILE, count_confusions, draw_results
from oneday.glue_protocol import (
    TUNED,
    FinetuneArguments,
    check_arguments,
    choose_attention,
    choose_bf16,
    choose_device,
    complete_arguments,
    find_output_dir,
)
from oneday.glue_results import (
    RESULTS_FILE,
    RUNS_FILE,
    append_run,
    hash_run,
    read_earlier,
    read_runs,
    summarize_runs,
    write_json,
)
from oneday.own_task import load_own_task
from oneday.predictions import decide, read_test_splits, write_predictions, write_submission
from oneday.throughput import keep_freed_memory, peak_memory_bytes, set_threads
from oneday.tuning import choose_setting

logger = logging.getLogger(__name__)

WEIGHTS = {False: "pretrained", True: "random"}

Scores = dict[str, dict[str, float]]


def run_protocol(args: FinetuneArguments) -> dict:
    """Fine-tune on every task with every seed, and write `glue_results.json` into the output directory.

    A finished run is written to `glue_runs.jsonl` at once and is not run again by the same command. Scores of other
    tasks stay in the file as long as they are of the same weights and settings.

    Returns:
        What the file holds: `{"protocol", "tasks": {number: {"metric", "median", "scores", ...}}, "average",
        "average_over", ...}`; scores are fractions (accuracy 0.9, not 90).

    Raises:
        SettingError: When a setting cannot work; nothing has been written then.
    """
    args = complete_arguments(args)
    names = check_arguments(args)
    set_threads(args.num_threads)
    keep_freed_memory()
    checkpoint = load_checkpoint(args.model_name_or_path)
    prepared = [prepare_task(name, args, checkpoint) for name in names]
    output_dir = find_output_dir(args)
    output_dir.mkdir(parents=True, exist_ok=True)
    obtain_run = functools.partial(take_run, checkpoint, read_runs(output_dir / RUNS_FILE))
    kinds = (False, True) if args.random_baseline else (False,)
    plan = [(task, from_random) for task in prepared for from_random in kinds]
    runs, choices = [], {}
    with tqdm(total=len(plan) * args.num_seeds, desc="fine-tuning", unit="run", mininterval=1.0, disable=None) as bar:
        for task, from_random in plan:
            bar.set_postfix_str(f"{task.task.name}{' random' * from_random}")
            settings = args
            if args.protocol == TUNED:
                once = functools.partial(obtain_run, seed=args.seed, from_random=from_random)
                settings, choices[task.task.name, WEIGHTS[from_random]] = choose_setting(task, args, once)
            for seed in range(args.seed, args.seed + args.num_seeds):
                runs.append(obtain_run(task, settings, seed, from_random))
                bar.update()
                if bar.disable:
                    logger.info("%d of %d: %s", len(runs), bar.total, describe_run(runs[-1]))
    earlier = read_earlier(output_dir / RESULTS_FILE)
    results = summarize_runs(args, checkpoint, prepared, runs, earlier, choices)
    write_json(output_dir / RESULTS_FILE, results)
    show_answers(args, prepared, runs, results)
    return results


def show_answers(args: FinetuneArguments, prepared: list[PreparedTask], runs: list[dict], results: dict) -> None:
    """What is made of the pretrained runs' kept answers: the picture, and the submission where it is asked for."""
    output_dir, confusions = find_output_dir(args), {}
    for task in prepared:
        mine = [run for run in runs if run["task"] == task.task.name and run["weights"] == WEIGHTS[False]]
        folders = [output_dir / name_run(run) for run in mine]
        for split in task.scored_splits if task.task.num_labels > 1 else ():
            paths = [folder / f"{split}.parquet" for folder in folders]
            confusions[task.task.name_number(split)] = count_confusions(paths, task.task.num_labels)
        if args.write_submission:
            write_submission(output_dir, task, list(zip(mine, folders)))
    draw_results(results, confusions, output_dir / PICTURE_FILE)


def take_run(
    checkpoint: Checkpoint,
    finished: dict[str, dict],
    task: PreparedTask,
    args: FinetuneArguments,
    seed: int,
    from_random: bool,
) -> dict:
    """The line of one run: the finished one, or a new one, which is written down at once."""
    key = hash_run(checkpoint, task, args, seed, from_random)
    if not is_finished(key, finished, task, args):
        finished[key] = measure_run(checkpoint, task, args, seed, from_random, key)
        append_run(find_output_dir(args) / RUNS_FILE, finished[key])
    return finished[key]


def is_finished(key: str, finished: dict[str, dict], task: PreparedTask, args: FinetuneArguments) -> bool:
    """Whether a run has its scores, and its answers and its model where these are asked for."""
    if key not in finished:
        return False
    model = "config.json" if args.peft is None or args.merge_adapters else "adapter_config.json"
    wanted = [f"{split}.parquet" for split in (*task.scored_splits, *task.test_splits)]
    wanted += [f"model/{model}"] * args.save_models
    return all((find_output_dir(args) / name_run(finished[key]) / file).exists() for file in wanted)


def name_run(run: dict) -> str:
    """The folder of what is kept of a run, within the output directory: `runs/rte-pretrained-seed0-0123abcd`."""
    return f"runs/{run['task']}-{run['weights']}-seed{run['seed']}-{run['key'][:8]}"


def describe_run(run: dict) -> str:
    """`rte seed 0 pretrained, accuracy 0.561, 12.3 s`."""
    scores = next(iter(run["scores"].values()))
    name, value = next(iter(scores.items()))
    return f"{run['task']} seed {run['seed']} {run['weights']}, {name} {value:.3f}, {run['seconds']:.1f} s"


def prepare_task(name: str, args: FinetuneArguments, checkpoint: Checkpoint) -> PreparedTask:
    """Load a task and tokenise it."""
    with silence_libraries():
        task, data = read_task(name, args)
        limits = {split: args.max_train_examples if split == "train" else args.max_eval_examples for split in data}
        data = {split: take_examples(number_rows(rows), limits[split]) for split, rows in data.items()}
        hashes = [pd.util.hash_pandas_object(rows.to_pandas()).to_numpy().tobytes() for rows in data.values()]
        max_length = limit_length(args.max_seq_length, checkpoint)
        encode = functools.partial(encode_batch, task=task, checkpoint=checkpoint, max_length=max_length)
        splits = {split: tokenize_split(rows, encode) for split, rows in data.items()}
        tests = read_test_splits(name, args.task_data_dir, args.cache_dir) if args.write_submission else {}
        tests = {file: tokenize_split(number_rows(rows), encode) for file, rows in tests.items()}
    return PreparedTask(task, splits, hashlib.sha256(b"".join(hashes)).hexdigest()[:16], tests)


def read_task(name: str, args: FinetuneArguments) -> tuple[Task, DatasetDict]:
    """A task's row and its splits: of the user's own file, when there is one, or by its name."""
    if args.task_file:
        return load_own_task(args)
    data = load_task(name, args.task_data_dir, args.cache_dir)
    return complete_task(find_task(name), data["train"]), data


def number_rows(rows: Dataset) -> Dataset:
    """With each row's place in the split's data, which drawing and sorting rows would lose."""
    return rows.add_column("row", np.arange(len(rows)))


def take_examples(rows: Dataset, limit: int | None) -> Dataset:
    """`limit` rows drawn without regard to the run's seed, so that all runs share them."""
    return rows if limit is None or limit >= len(rows) else rows.shuffle(seed=0).select(range(limit))


def measure_run(
    checkpoint: Checkpoint, task: PreparedTask, args: FinetuneArguments, seed: int, from_random: bool, key: str
) -> dict:
    """One run and its line of `glue_runs.jsonl`, with what is kept of it in a folder of its own."""
    started, device = time.perf_counter(), choose_device(args)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run = {"key": key, "task": task.task.name, "seed": seed, "weights": WEIGHTS[from_random]}
    with silence_libraries():
        trainer = train_classifier(checkpoint, task, args, seed, from_random)
        logits = predict_splits(trainer, task)
        cost = count_trained(trainer.model) | {"peak_memory_bytes": peak_memory_bytes(device)}
        folder = find_output_dir(args) / name_run(run)
        write_predictions(folder, task, logits)
        if args.save_models:
            save_classifier(trainer.model, checkpoint.tokenizer, folder / "model", args.merge_adapters)
    seconds = round(time.perf_counter() - started, 3)
    return run | {"scores": score_splits(task, logits), "seconds": seconds} | cost


def finetune_task(
    model_name_or_path: str | Checkpoint,
    task: str | PreparedTask,
    args: FinetuneArguments,
    seed: int,
    from_random: bool = False,
) -> Scores:
    """Fine-tune once and score the last weights.

    Args:
        model_name_or_path: A directory, a Hub id, or a checkpoint already read.
        task: A name in `glue.TASKS`, or a task already tokenised for this checkpoint.
        args: The protocol.
        seed: Of the new head, the order of the examples and dropout.
        from_random: Start from random weights of the same architecture.

    Returns:
        Metrics of each validation split under its number's name, as `{"rte": {"accuracy": 0.57}}`.
    """
    name, args = model_name_or_path, complete_arguments(args)
    checkpoint = name if isinstance(name, Checkpoint) else load_checkpoint(name)
    prepared = task if isinstance(task, PreparedTask) else prepare_task(task, args, checkpoint)
    with silence_libraries():
        trainer = train_classifier(checkpoint, prepared, args, seed, from_random)
        return score_splits(prepared, predict_splits(trainer, prepared))


def train_classifier(
    checkpoint: Checkpoint, prepared: PreparedTask, args: FinetuneArguments, seed: int, from_random: bool
) -> Trainer:
    """The trainer after its last step; it holds the model."""
    model = build_classifier(checkpoint, prepared.task, args.dropout, seed, from_random, choose_attention(args))
    trainer = build_trainer(restrict_training(model, args), checkpoint, prepared, args, seed)
    trainer.train()
    return trainer


def predict_splits(trainer: Trainer, prepared: PreparedTask) -> dict[str, np.ndarray]:
    """The model's outputs on each split but the training one, (rows, num_labels), in the order of its rows."""
    # Grouping by length would shuffle the rows here too, in an order of the sampler's own.
    trainer.args.train_sampling_strategy = "sequential"
    outputs = {}
    asked = {split: prepared.splits[split] for split in prepared.scored_splits} | prepared.test_splits
    for split, rows in asked.items():
        order = np.argsort(rows["length"], kind="stable")
        logits = trainer.predict(rows.select(order)).predictions
        outputs[split] = (logits[0] if isinstance(logits, tuple) else logits)[np.argsort(order)]
    return outputs


def score_splits(prepared: PreparedTask, logits: dict[str, np.ndarray]) -> Scores:
    """Metrics of each split under its number's name."""
    task, splits = prepared.task, prepared.splits
    return {
        task.name_number(split): score_logits(task, outputs, np.asarray(splits[split]["label"]))
        for split, outputs in logits.items()
        if split in splits
    }


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
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available() and not args.use_cpu,
    )
    # Several visible GPUs would multiply the batch, and with it change the protocol.
    training_args._n_gpu = min(training_args.n_gpu, 1)
    pad = DataCollatorWithPadding(checkpoint.tokenizer, pad_to_multiple_of=8)

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        return pad([{key: value for key, value in row.items() if key not in ("length", "row")} for row in rows])

    trainer = Trainer(model, training_args, data_collator=collate, train_dataset=prepared.splits["train"])
    trainer.remove_callback(PrinterCallback)
    return trainer


def score_logits(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Metrics from a model's outputs, (rows, num_labels)."""
    if not np.isfinite(logits).all():
        logger.warning("%s: the model's outputs are not finite; the training diverged", task.name)
    return score_predictions(task, decide(task, logits), labels)
