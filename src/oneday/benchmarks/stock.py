"""The other side: a stock model under transformers.Trainer, as the Hub's run_mlm.py and run_clm.py train it.

Documents with their special tokens are concatenated and cut into rows; rows hold several documents, which see each
other; the head runs on every position; AdamW with a linear schedule over a step count that is probed to fill the
budget. Where the examples leave a choice, it is made for stock: the best batch and learning rate of a grid, 6 %
warm-up, bfloat16 where it is fast, masks of special tokens known ahead instead of looked up.
"""

from __future__ import annotations

import functools
import gc
import logging
import math
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_callback import PrinterCallback

from oneday.arguments import BudgetTrainingArguments
from oneday.assembly import CLASSES, check_settings, prepare_objective
from oneday.benchmarks.heldout import CurveCallback, HeldOutLoss, describe_result, point_times
from oneday.benchmarks.records import Job
from oneday.budget import Budget
from oneday.budget_clock import BudgetClock
from oneday.corpus import resolve_cache_dir
from oneday.durable_files import written_aside
from oneday.errors import SettingError
from oneday.flops import FlopCounter
from oneday.modeling import build_model, load_config
from oneday.objectives import STANDARD_MLM_PROBABILITY, Objective
from oneday.packed_dataset import smallest_dtype
from oneday.preparation import TEXTS_AT_ONCE, PreparedData, digest
from oneday.recipe import build_arguments
from oneday.throughput import measure_peak_flops, synchronize
from oneday.tokenization import encode_documents, special_layout

logger = logging.getLogger(__name__)

WEIGHT_DECAY, WARMUP_FRACTION = 0.01, 0.06
# Steps before the probed ones, and the probed ones.
PROBE_WARMUP_STEPS, PROBE_STEPS = 3, 12
# Of a run's time from its budget, of which a word is said.
NOTED_DEVIATION = 0.05
# Order of the documents when not all of them are tokenised.
DOCUMENT_SEED = 0


class ChunkDataset(Dataset):
    """Rows of concatenated documents as the examples' `group_texts` gives them.

    Args:
        chunks: (rows, row_length) token ids.
        special_ids: Ids that are never masked.
        kind: `encoder` or `decoder`.
    """

    def __init__(self, chunks: np.ndarray, special_ids: list[int], kind: str) -> None:
        self.chunks, self.special_ids, self.kind = chunks, np.array(special_ids), kind

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self.chunks[index]
        item = {"input_ids": row.tolist(), "attention_mask": [1] * len(row)}
        if self.kind == "decoder":
            return {**item, "labels": item["input_ids"]}
        return {**item, "special_tokens_mask": np.isin(row, self.special_ids).astype(int).tolist()}


class StepClock(TrainerCallback):
    """Counts stock's steps on a budget's clock, from the beginning of the first.

    Args:
        clock: Started at the first step, stopped after the last.
        flop_counter: Of the model; every position goes through the head.
        num_chunks: Rows of the data set; the last batch of a pass over it may be smaller.
        rows: Rows of a batch.
        row_length: Tokens of a row.
    """

    def __init__(
        self, clock: BudgetClock, flop_counter: FlopCounter, num_chunks: int, rows: int, row_length: int
    ) -> None:
        self.clock, self.flop_counter, self.row_length = clock, flop_counter, row_length
        self.num_chunks, self.rows = num_chunks, rows
        self.last_seconds = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The clock starts with the first step."""
        self.clock.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the step: a full batch, or what is left of the pass."""
        steps_a_pass = math.ceil(self.num_chunks / self.rows)
        is_last = state.global_step % steps_a_pass == 0
        rows = self.num_chunks - (steps_a_pass - 1) * self.rows if is_last else self.rows
        tokens = rows * self.row_length
        flops = self.flop_counter.step_flops(tokens, rows * self.row_length**2, tokens)
        now = self.clock.elapsed_seconds
        self.clock.count_step(tokens, flops, now - self.last_seconds)
        self.last_seconds = now

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The last step is over."""
        synchronize(args.device)
        self.clock.ledger["steps"] += self.clock.elapsed_seconds - self.last_seconds
        self.clock.stop()


class StepTimes(TrainerCallback):
    """When each step of a probe ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the time."""
        synchronize(args.device)
        self.ends.append(time.perf_counter())


def run_stock(job: Job) -> dict[str, Any]:
    """Train a stock model for a wall-clock budget; for a fresh process.

    Args:
        job: `recipe` gives the text and the model, `details` holds `learning_rate`, `seed`, `rows`, `budget_seconds`
            and `num_points`.

    Raises:
        SettingError: When a setting cannot work.
    """
    details = job.details
    with tempfile.TemporaryDirectory(prefix="oneday-benchmark-") as folder:
        model_args, data_args, args = build_arguments(CLASSES, {**job.recipe, "output_dir": folder})
        check_settings(model_args, args)
        objective, data = prepare_objective(data_args, args)
        config = load_config(model_args.model_config, data.tokenizer, data_args.max_seq_length)
        bf16 = args.computes_in_bf16
        peak_flops = measure_peak_flops(args.device, bf16)
        flop_counter = FlopCounter(build_stock_model(config, objective, details["seed"]))
        row_length, cache = data_args.max_seq_length, resolve_cache_dir(data_args.cache_dir)
        most_tokens = count_reachable_tokens(flop_counter, row_length, details["budget_seconds"], peak_flops)
        chunks = load_chunks(data, objective.kind, row_length, most_tokens, cache)
        dataset = ChunkDataset(chunks, data.tokenizer.all_special_ids, objective.kind)

        def build(num_steps: int) -> Trainer:
            model = build_stock_model(config, objective, details["seed"])
            return build_stock_trainer(model, dataset, objective, args, details, num_steps, bf16)

        step_seconds = probe_step_seconds(build(PROBE_WARMUP_STEPS + PROBE_STEPS))
        free_memory(args.device)
        num_steps = max(1, round(details["budget_seconds"] / step_seconds))
        logger.info("Stock takes %.4f s a step: %d steps fill the budget.", step_seconds, num_steps)
        trainer, clock = build(num_steps), BudgetClock(Budget(seconds=details["budget_seconds"]))
        precision = functools.partial(torch.autocast, args.device.type, torch.bfloat16, enabled=bf16)
        # Passes no larger than those of its training, whose memory is what is to be measured.
        pass_tokens = min(args.micro_batch_tokens, details["rows"] * row_length)
        held_out = HeldOutLoss(trainer.model, objective, data.validation, pass_tokens, precision, plain=True)
        times = point_times(details["budget_seconds"], details["num_points"])
        curve = CurveCallback(clock, times, held_out.measure, args.device)
        trainer.add_callback(StepClock(clock, flop_counter, len(dataset), details["rows"], row_length))
        trainer.add_callback(curve)
        trainer.train()
        curve.add_point(held_out.measure())
        result = describe_result(clock, curve, trainer.model, args.device, peak_flops, bf16)
    note_deviation(result["clock_seconds"], details["budget_seconds"])
    facts = {"step_seconds_probed": step_seconds, "num_chunks": len(chunks)}
    return {**result, **facts, "precision": "bfloat16 autocast" if bf16 else "float32"}


def note_deviation(seconds: float, budget_seconds: float) -> None:
    """A word of a run that took clearly more or less than its budget."""
    if abs(seconds / budget_seconds - 1) > NOTED_DEVIATION:
        pace = "slower" if seconds > budget_seconds else "faster"
        logger.warning(
            "Stock took %.0f of %.0f s: the machine was %s than when its steps were probed.",
            seconds, budget_seconds, pace,
        )  # fmt: skip


def free_memory(device: torch.device) -> None:
    """Let go of a trainer that is not needed any more; a GPU's peak is counted anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def build_stock_model(config: Any, objective: Objective, seed: int) -> PreTrainedModel:
    """The stock model with its own attention and dropout."""
    torch.manual_seed(seed)
    return build_model(config, objective.auto_class, packed=False)


def build_stock_trainer(
    model: PreTrainedModel,
    dataset: ChunkDataset,
    objective: Objective,
    args: BudgetTrainingArguments,
    details: dict[str, Any],
    num_steps: int,
    bf16: bool,
) -> Trainer:
    """transformers.Trainer with the examples' settings."""
    stock_args = TrainingArguments(
        output_dir=args.output_dir,
        per_device_train_batch_size=details["rows"],
        learning_rate=details["learning_rate"],
        weight_decay=WEIGHT_DECAY,
        lr_scheduler_type="linear",
        warmup_steps=WARMUP_FRACTION,
        max_steps=num_steps,
        max_grad_norm=1.0,
        bf16=bf16,
        seed=details["seed"],
        use_cpu=args.device.type == "cpu",
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    stock_args._n_gpu = min(stock_args.n_gpu, 1)  # one GPU, as ours; more would be DataParallel
    if objective.kind == "encoder":
        collator = DataCollatorForLanguageModeling(objective.tokenizer, mlm_probability=STANDARD_MLM_PROBABILITY)
    else:
        collator = default_data_collator
    trainer = Trainer(model, stock_args, data_collator=collator, train_dataset=dataset)
    trainer.remove_callback(PrinterCallback)
    return trainer


def probe_step_seconds(trainer: Trainer) -> float:
    """The median time of a training step, from the end of one to the end of the next, of a trainer thrown away."""
    times = StepTimes()
    trainer.add_callback(times)
    trainer.train()
    return median(np.diff(times.ends[PROBE_WARMUP_STEPS - 1 :]).tolist())


def count_reachable_tokens(
    flop_counter: FlopCounter, row_length: int, budget_seconds: float, peak_flops: float
) -> float:
    """Tokens that no run can see more of within the budget: those it would take at the measured peak."""
    return budget_seconds * peak_flops * row_length / flop_counter.step_flops(row_length, row_length**2, row_length)


def load_chunks(data: PreparedData, kind: str, row_length: int, most_tokens: float, cache: Path) -> np.ndarray:
    """Training text as stock sees it, tokenised once and kept in the cache.

    Args:
        data: The prepared text.
        kind: `encoder` or `decoder`.
        row_length: Tokens of a row.
        most_tokens: More than a run can see; a corpus that has more is drawn from, in whole documents.
        cache: Where chunks are kept.

    Returns:
        (rows, row_length) token ids, mapped into memory.

    Raises:
        SettingError: When the text does not fill one row.
    """
    limit = 2 ** math.ceil(math.log2(max(most_tokens, row_length)))
    available = getattr(data.train, "num_tokens", None)
    limit = None if available is not None and available <= limit else limit
    path = cache / "stock" / f"{digest(data.fingerprint, kind, row_length, limit)}.npy"
    if not path.exists():
        logger.info("Tokenising the text for stock, once.")
        chunks = chunk_documents(data, kind, row_length, limit)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside, aside.open("wb") as sink:
            np.save(sink, chunks)
    return np.load(path, mmap_mode="r")


def chunk_documents(data: PreparedData, kind: str, row_length: int, limit: int | None) -> np.ndarray:
    """Documents with their special tokens, one after another, cut into rows; the rest that fills none is left out.

    With a limit, documents are drawn in a fixed random order until there are that many tokens.
    """
    prefix, suffix = special_layout(data.tokenizer, kind)
    texts, parts, num_tokens = data.corpus.train, [], 0
    if limit is not None and isinstance(texts, datasets.Dataset):
        texts = texts.select(np.random.default_rng(DOCUMENT_SEED).permutation(len(texts)))
    dtype = smallest_dtype(len(data.tokenizer))
    for batch in texts.iter(TEXTS_AT_ONCE):
        tokens, lengths = encode_documents(data.tokenizer, batch["text"])
        for document in np.split(tokens, np.cumsum(lengths)[:-1]):
            parts.append(np.concatenate([prefix, document, suffix]).astype(dtype))
            num_tokens += len(parts[-1])
        if limit is not None and num_tokens >= limit:
            break
    num_rows = num_tokens // row_length
    if not num_rows:
        raise SettingError(f"dataset_name has {num_tokens} tokens, fewer than max_seq_length {row_length}; add text.")
    return np.concatenate(parts)[: num_rows * row_length].reshape(num_rows, row_length)
