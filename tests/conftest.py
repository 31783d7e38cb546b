"""Small real parts that the tests share: a corpus, tokenizers, packed rows, models of every style."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CI", "1")
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    # Each worker, and what it starts, keeps to cores of its own: threads that share cores wait for one another.
    worker, count = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[worker::count] or cores)

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, TrainerCallback

from oneday.arguments import BudgetTrainingArguments
from oneday.modeling import build_model
from oneday.objectives import find_objective
from oneday.packed_dataset import pack_corpus
from oneday.program import run_program
from oneday.run_directory import read_metrics
from oneday.tokenizer_training import train_tokenizer
from oneday.trainer import BudgetTrainer

# Where fixtures are that several files share, but not all of them.
pytest_plugins = (
    "benchmark_parts", "classifiers", "corpus_parts", "hub_server", "objective_parts", "planning_parts",
    "program_parts", "scoring_parts",
)  # fmt: skip

ROOT = Path(__file__).parent.parent
ROW_LENGTH = 32
TINY = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODERS = {
    "bert": {**TINY, **NO_DROPOUT},
    "roberta": {**TINY, **NO_DROPOUT},
    "electra": {**TINY, **NO_DROPOUT, "embedding_size": 16},
    "modernbert": {**TINY, "global_attn_every_n_layers": 2, "local_attention": 16},
}
UNPACKED = {"xlnet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, "dropout": 0.0, "mem_len": None}}
DECODERS = {
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {**TINY, "num_key_value_heads": 1},
    "qwen3": {**TINY, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
    "nanochat": {**TINY, "num_key_value_heads": 2},
}


class StopAt(TrainerCallback):
    """Behaves like a process that is killed (or told to stop) before a step."""

    def __init__(self, step, number=None):
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            if self.number is None:
                raise KeyboardInterrupt("killed")
            signal.raise_signal(self.number)


def steps_of(trainer):
    """The steps that led to a trainer's weights, from its metrics."""
    return [event for event in read_metrics(trainer.args.output_dir) if event["event"] == "step"]


def weights(trainer):
    """A copy of its weights."""
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.fixture(autouse=True)
def own_logging():
    """A program that ran inside a test logs to that test's stderr, which is closed afterwards."""
    yield
    for handler in logging.getLogger().handlers[:]:
        if type(handler) is logging.StreamHandler:
            logging.getLogger().removeHandler(handler)


@pytest.fixture(scope="session")
def texts():
    """300 documents of a language with order in it: each word is followed by one of three."""
    generator = np.random.default_rng(0)
    syllables = ["ka", "lo", "mi", "ter", "un", "ves", "pra", "do", "sil", "en"]
    words = ["".join(generator.choice(syllables, generator.integers(1, 4))) for _ in range(120)]
    follows = generator.integers(0, len(words), (len(words), 3))
    documents = []
    for _ in range(300):
        word, document = int(generator.integers(len(words))), []
        for _ in range(int(generator.integers(5, 90))):
            document.append(words[word])
            word = int(follows[word, generator.integers(3)])
        documents.append(" ".join(document))
    return documents


@pytest.fixture(scope="session")
def tokenizers(texts):
    """A tokenizer for each kind of model."""
    return {
        "encoder": train_tokenizer(texts, "wordpiece", 150),
        "decoder": train_tokenizer(texts, "bpe", 320),
    }


@pytest.fixture(scope="session")
def packed(texts, tokenizers, tmp_path_factory):
    """(training rows, held-out rows) for each kind of model."""
    folder = tmp_path_factory.mktemp("packed")
    return {
        kind: tuple(
            pack_corpus([part], tokenizer, kind, ROW_LENGTH, "best_fit", folder / f"{kind}-{name}")
            for name, part in (("train", texts[:270]), ("validation", texts[270:]))
        )
        for kind, tokenizer in tokenizers.items()
    }


def build_tiny(name, tokenizers, seed=0, objective=None):
    """A tiny model of one architecture, in float32, from a seed, for an objective."""
    kind = "decoder" if name in DECODERS else "encoder"
    tokenizer = tokenizers[kind] if objective is None else objective.tokenizer
    ids = {"pad_token_id": tokenizer.pad_token_id}
    for special in ("bos", "eos", "cls", "sep"):
        ids[f"{special}_token_id"] = getattr(tokenizer, f"{special}_token_id")
    settings = {**(ENCODERS | DECODERS | UNPACKED)[name], **ids, "vocab_size": 320}
    if name not in UNPACKED:
        settings["n_positions" if name == "gpt2" else "max_position_embeddings"] = 64
    config = AutoConfig.for_model(name, **settings)
    torch.manual_seed(seed)
    if objective is not None:
        return build_model(config, objective.find_class(config), objective.is_packed)
    return build_model(config, AutoModelForMaskedLM if kind == "encoder" else AutoModelForCausalLM)


def build_trainer(folder, name, tokenizers, rows, tokenizer=None, **settings):
    """A trainer of a tiny model over (training, held-out) rows; settings go over small defaults."""
    kind = "decoder" if name in DECODERS else "encoder"
    defaults = {
        "batch_size_tokens": 8 * ROW_LENGTH,
        "micro_batch_tokens": 4 * ROW_LENGTH,
        "objective": "mlm" if kind == "encoder" else "clm",
        "optim": "adamw",
        "bf16": False,
        "num_evaluations": 1,
    }
    folder.mkdir(exist_ok=True)
    args = BudgetTrainingArguments(output_dir=str(folder), **{**defaults, **settings})
    objective = find_objective(args.objective)(tokenizer or tokenizers[kind], args)
    model = build_tiny(name, tokenizers, objective=objective)
    return BudgetTrainer(model, args, objective, *rows, objective.tokenizer)


@pytest.fixture
def make_model(tokenizers):
    """Builds a tiny model; see `build_tiny`."""

    def make(name, seed=0, objective=None):
        return build_tiny(name, tokenizers, seed, objective)

    return make


@pytest.fixture
def make_trainer(tokenizers, packed, tmp_path):
    """Builds a trainer over the shared corpus, or `rows` of (training, held-out); see `build_trainer`."""

    def make(name="modernbert", output="run", rows=None, tokenizer=None, **settings):
        rows = rows or packed["decoder" if name in DECODERS else "encoder"]
        return build_trainer(tmp_path / output, name, tokenizers, rows, tokenizer, **settings)

    return make


@pytest.fixture
def run_script(monkeypatch, tmp_path, capsys):
    """Runs a script's main in this process; returns (exit code, stdout, stderr)."""
    monkeypatch.setenv("ONEDAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(ROOT)

    def run(name, *argv):
        spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
        with pytest.raises(SystemExit) as stop:
            run_program(module.main)
        return stop.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def run_benchmark(run_script):
    """Runs scripts/benchmark.py as `run_script` does."""
    return functools.partial(run_script, "benchmark")


def run_killed(make, step, **settings):
    """A run that dies before a step (a process that is killed leaves the same on the disk)."""
    killed = make(**settings)
    killed.add_callback(StopAt(step))
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    return Path(killed.args.output_dir)


def assert_same_weights(one, other):
    expected, got = weights(one), weights(other)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)
