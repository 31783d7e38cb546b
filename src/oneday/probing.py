"""What a model costs on this machine, measured in real steps: seconds, memory, FLOPs."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from oneday.arguments import BudgetTrainingArguments
from oneday.assembly import CLASSES
from oneday.energy import open_energy_meter
from oneday.flops import FlopCounter
from oneday.modeling import build_model, count_parameters, load_config
from oneday.objectives import COMPANION, Objective
from oneday.optimizers import HIDDEN_OPTIMIZERS, count_state_bytes, split_parameters
from oneday.packed_dataset import PackedDataset, pack_corpus
from oneday.pretraining import prepare_first_step
from oneday.recipe import Settings, build_arguments
from oneday.step_timer import ENDLESS, QUIET, StepTimer
from oneday.tokenization import load_tokenizer
from oneday.tokenizer_training import train_tokenizer
from oneday.trainer import BudgetTrainer

# A parameter of this shape shows what an optimizer keeps an element; block-wise states have their blocks in it.
SAMPLE_SHAPE = (1024, 1024)
# AdamW in 32 bit, with which embeddings and vectors are always trained: two moments of four bytes.
TABLE_STATE_BYTES = 8
# A forward and backward pass of a probe may take this long, by a guess at a third of the peak.
PASS_SECONDS, GUESSED_MFU = 0.5, 0.3
# Rows whose FLOPs are counted: padded ones differ.
COUNTED_ROWS = 64
STAND_IN_DOCUMENTS, STAND_IN_WORDS = 1500, 250


@dataclass(frozen=True)
class Material:
    """What probes train on.

    Attributes:
        objective: What is predicted.
        tokenizer: Of the recipe's vocabulary.
        train: Packed rows.
        validation: Packed rows.
        num_tokens: Tokens of the corpus; None where it is a stream, which no probe reads.
    """

    objective: Objective
    tokenizer: PreTrainedTokenizerBase
    train: PackedDataset
    validation: PackedDataset
    num_tokens: int | None


@dataclass(frozen=True)
class Probe:
    """What one model takes.

    Attributes:
        num_parameters: Of what is saved.
        num_parameters_without_embeddings: The same without tables.
        flops_per_token: Of forward and backward.
        model_bytes: Weights, their bfloat16 copy, and the gradients of both.
        activation_bytes: Kept from forward to backward, a token of a micro-batch.
        state_bytes: Of the optimizer in 32 and in 8 bit, by optimizer.
        token_share: Of the places in a batch, those that are no padding.
    """

    num_parameters: int
    num_parameters_without_embeddings: int
    flops_per_token: float
    model_bytes: int
    activation_bytes: float
    state_bytes: dict[str, int]
    token_share: float = 1.0


@dataclass(frozen=True)
class Pace:
    """How fast it trains here.

    Attributes:
        seconds_per_token: Data, forward and backward.
        seconds_per_step: The optimizer.
        fixed_seconds: What happens once: counting embeddings, compiling.
        watts: Metered; None: no counter can be read.
    """

    seconds_per_token: float
    seconds_per_step: float
    fixed_seconds: float = 0.0
    watts: float | None = None

    def tokens_per_second(self, batch_tokens: float) -> float:
        """Rate at a batch size."""
        return batch_tokens / (batch_tokens * self.seconds_per_token + self.seconds_per_step)


def optimizer_pair(name: str) -> tuple[str | None, str | None]:
    """(32-bit name, 8-bit name) of an optimizer; None where this project has no such form of it.

    >>> optimizer_pair("muon"), optimizer_pair("lion_8bit")
    (('muon', 'muon_8bit'), (None, 'lion_8bit'))
    """
    plain = name.removesuffix("_8bit")
    return tuple(form if form in HIDDEN_OPTIMIZERS else None for form in (plain, f"{plain}_8bit"))


def state_bytes_per_element(name: str, args: BudgetTrainingArguments) -> float:
    """Bytes that an optimizer keeps for an element of a hidden matrix, from its real state after one step."""
    parameter = torch.nn.Parameter(torch.zeros(SAMPLE_SHAPE))
    parameter.grad = torch.ones(SAMPLE_SHAPE)
    optimizer = HIDDEN_OPTIMIZERS[name]([parameter], args)
    optimizer.step()
    return count_state_bytes([optimizer]) / parameter.numel()


@contextmanager
def count_saved_bytes(known: set[int]) -> Iterator[dict[int, int]]:
    """Fills storage address -> bytes of what is kept inside for the backward pass; those in `known` do not count."""
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def make_stand_in(objective_class: type[Objective], settings: Settings, folder: Path) -> Material:
    """Rows of random words under the recipe's tokenizer, or a vocabulary of its size, where its text is a stream."""
    _, data_args, args = build_arguments(CLASSES, settings)
    kind, generator = objective_class.kind, np.random.default_rng(0)
    words = ["".join(generator.choice(list("abcdefghijkl"), 4)) for _ in range(2000)]
    texts = [" ".join(generator.choice(words, STAND_IN_WORDS)) for _ in range(STAND_IN_DOCUMENTS)]
    if data_args.tokenizer_name is not None:
        tokenizer = load_tokenizer(data_args.tokenizer_name)
    else:
        tokenizer = train_tokenizer(texts, data_args.tokenizer_type, 1000, data_args.lowercase, kind)
        tokenizer.add_tokens([f"<{index}>" for index in range(data_args.vocab_size - len(tokenizer))])
    packing = (tokenizer, kind, data_args.max_seq_length, data_args.packing_strategy)
    train, validation = (
        pack_corpus([part], *packing, folder / name)
        for name, part in (("train", texts[20:]), ("validation", texts[:20]))
    )
    return Material(objective_class(tokenizer, args), tokenizer, train, validation, None)


def assemble_probe(material: Material, settings: Settings, folder: str) -> BudgetTrainer:
    """A trainer whose budget does not end."""
    endless = {**settings, **QUIET, **ENDLESS, "max_seq_length_start": None, "output_dir": folder}
    model_args, data_args, args = build_arguments(CLASSES, endless)
    config = load_config(
        model_args.model_config, material.tokenizer, data_args.max_seq_length, model_args.position_encoding
    )
    objective = type(material.objective)(material.tokenizer, args)
    torch.manual_seed(args.seed)
    model = build_model(config, objective.find_class(config), objective.is_packed)
    return BudgetTrainer(model, args, objective, material.train, material.validation, material.tokenizer)


@contextmanager
def probing(material: Material, settings: Settings) -> Iterator[BudgetTrainer]:
    """A trainer for measuring, whose memory is given back: at the latest to the next one, for its user may hold it."""
    give_back_memory()
    with tempfile.TemporaryDirectory(prefix="oneday-probe-") as folder:
        yield assemble_probe(material, settings, folder)
    give_back_memory()


def give_back_memory() -> None:
    """Free what nothing holds any more; a trainer is in cycles of references."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def count_flops(material: Material, settings: Settings) -> tuple[int, float]:
    """(parameters, FLOPs per token in full rows) of a model, without storing its weights; companions not counted."""
    model_args, data_args, args = build_arguments(CLASSES, settings)
    row, objective = data_args.max_seq_length, material.objective
    config = load_config(model_args.model_config, material.tokenizer, row, model_args.position_encoding)
    with torch.device("meta" if objective.is_packed else "cpu"):  # XLNet allocates past the device that is set
        model = build_model(config, objective.find_class(config), objective.is_packed)
    predicted = row if objective.kind == "decoder" else round(args.mlm_probability * row)
    return count_parameters(model)[0], FlopCounter(model).step_flops(row, row**2, predicted, [row]) / row


def measure_model(material: Material, settings: Settings) -> Probe:
    """Sizes of a model, from a forward and backward pass over one row and over two.

    Args:
        material: What to train on.
        settings: Every setting of the recipe, with this `model_config`.
    """
    row = settings["max_seq_length"]
    counted = max(2, min(COUNTED_ROWS, len(material.train)) // 2 * 2)
    small = {"torch_compile": False, "batch_size_tokens": counted * row, "micro_batch_tokens": 2 * row}
    with probing(material, {**settings, **small, "embedding_init": "random"}) as trainer:
        model = trainer.model
        saved = [measure_activations(trainer, num_rows) for num_rows in (1, 2)]
        tokens, flops, _ = trainer.count_step(trainer.loader.peek())
        hidden, tables, vectors = (sum(p.numel() for p in group) for group in split_parameters(model))
        halves = sum(half.numel() for half in trainer.half_weights.halves)
        total, without_embeddings = count_parameters(model, COMPANION)
        weights = sum(parameter.numel() for parameter in model.parameters())
        pair = [name for name in optimizer_pair(settings["optim"]) if name is not None]
        return Probe(
            num_parameters=total,
            num_parameters_without_embeddings=without_embeddings,
            flops_per_token=flops / tokens,
            model_bytes=2 * (4 * weights + 2 * halves),
            activation_bytes=max(0, saved[1] - saved[0]) / row,
            state_bytes={
                name: round(
                    hidden * state_bytes_per_element(name, trainer.args) + TABLE_STATE_BYTES * (tables + vectors)
                )
                for name in pair
            },
            token_share=material.train.packing_efficiency,
        )


def measure_activations(trainer: BudgetTrainer, num_rows: int) -> int:
    """Bytes that a forward pass over some rows keeps for its backward pass, weights not counted."""
    batch = take_batch(trainer, num_rows)
    counts = trainer.objective.count_terms(batch)
    with trainer.precision():
        known = {p.untyped_storage().data_ptr() for p in (*trainer.model.parameters(), *trainer.model.buffers())}
        with count_saved_bytes(known) as saved:
            trainer.backward(trainer.model.train(), batch.to(trainer.args.device), counts)
    trainer.model.zero_grad()
    return sum(saved.values())


def take_batch(trainer: BudgetTrainer, num_rows: int) -> Any:
    """The first held-out rows, again where there are fewer, as a training batch."""
    samples = np.arange(num_rows)
    rows, doc_lengths = trainer.eval_dataset.get_rows(samples % len(trainer.eval_dataset))
    return trainer.loader.collator(rows, doc_lengths, samples, 0.0)


def measure_pace(material: Material, settings: Settings, seconds: float) -> Pace:
    """Speed of a model in real steps of one micro-batch, a large one's made small enough to be measured.

    Args:
        material: What to train on.
        settings: Every setting of the recipe, with this `model_config`.
        seconds: How long to measure, after three steps to warm up.
    """
    with probing(material, settings) as trainer:
        timer = StepTimer(trainer, seconds)
        trainer.add_callback(timer)
        trainer.signals = []
        meter = open_energy_meter(trainer.args.device)
        prepare_first_step(trainer, is_new=True)
        fixed = trainer.clock.ledger["initialization"] + trainer.clock.ledger["compilation"]
        begun, joules = trainer.clock.now(), meter.read() if meter else 0.0
        trainer.train()
        if trainer.failure is not None:
            raise trainer.failure
        watts = (meter.read() - joules) / (trainer.clock.now() - begun) if meter else None
        parts = {key: median(step[key] for step in timer.steps) for key in timer.steps[0]}
        tokens = timer.tokens / len(timer.steps)
        return Pace((parts["forward_backward"] + parts["data"]) / tokens, parts["optimizer"], fixed, watts)


def measure_fixed_seconds(material: Material, settings: Settings) -> float:
    """Seconds that a run takes before its first step, for what counts against its clock: words counted, compiling."""
    with probing(material, settings) as trainer:
        prepare_first_step(trainer, is_new=True)
        return trainer.clock.ledger["initialization"] + trainer.clock.ledger["compilation"]


def choose_probe_tokens(flops_per_token: float, peak_flops: float, micro_tokens: int, row_length: int) -> int:
    """Tokens of a probing step: the micro-batch, or as many whole rows as take about half a second."""
    affordable = PASS_SECONDS * GUESSED_MFU * peak_flops / flops_per_token
    return max(1, int(min(affordable, micro_tokens)) // row_length) * row_length
