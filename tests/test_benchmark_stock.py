"""The stock side of a benchmark: measured as ours is, and trained as its examples do it."""

from __future__ import annotations

import dataclasses
import json
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import yaml
from benchmark_parts import ENVIRONMENT, TINY_BERT, TINY_GPT2
from conftest import ROW_LENGTH
from datasets import Dataset
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from oneday.arguments import BudgetTrainingArguments
from oneday.assembly import CLASSES
from oneday.benchmarks.heldout import CurveCallback, HeldOutLoss, point_times
from oneday.benchmarks.planning import Plan
from oneday.benchmarks.records import RecordStore
from oneday.benchmarks.stock import ChunkDataset, StepClock, chunk_documents, load_chunks, note_deviation, run_stock
from oneday.budget import Budget
from oneday.budget_clock import BudgetClock
from oneday.collators import CausalCollator, MaskedCollator
from oneday.corpus import Corpus
from oneday.errors import SettingError
from oneday.flops import FlopCounter
from oneday.objectives import EVALUATION_SEED, find_objective
from oneday.packed_dataset import pack_corpus
from oneday.preparation import PreparedData
from oneday.recipe import complete_settings


def build_stock(settings, auto_class):
    torch.manual_seed(0)
    return auto_class.from_config(AutoConfig.for_model(**settings))


@pytest.fixture
def objectives(tokenizers, tmp_path):
    args = BudgetTrainingArguments(output_dir=str(tmp_path), budget_steps=1, use_cpu=True)
    return {
        "encoder": find_objective("mlm")(tokenizers["encoder"], args),
        "decoder": find_objective("clm")(tokenizers["decoder"], args),
    }


@pytest.mark.parametrize("strategy", ["best_fit", "padded"])
@pytest.mark.parametrize(("kind", "settings"), [("encoder", TINY_BERT), ("decoder", TINY_GPT2)])
def test_stock_is_measured_as_a_plain_computation_would(kind, settings, strategy, objectives, texts, tmp_path):
    """Row by row, the whole row as one text, dropout off: the mean of -log p over the positions that ours predicts."""
    tokenizer = objectives[kind].tokenizer
    rows = pack_corpus([texts[270:]], tokenizer, kind, ROW_LENGTH, strategy, tmp_path / "rows")
    model = build_stock(settings, AutoModelForMaskedLM if kind == "encoder" else AutoModelForCausalLM)
    held_out = HeldOutLoss(model.train(), objectives[kind], rows, 4 * ROW_LENGTH, nullcontext, plain=True)
    measured = held_out.measure()
    assert model.training, "the model goes on training"

    if kind == "encoder":
        collator = MaskedCollator(tokenizer, EVALUATION_SEED, 0, 0.15)
    else:
        collator = CausalCollator(tokenizer, EVALUATION_SEED, 0)
    nats, predicted = 0.0, 0
    for index in range(len(rows)):
        tokens, lengths = rows.get_rows([index])
        batch = collator(tokens, lengths, np.array([index]))
        used = int(lengths[0].sum())
        with torch.no_grad():
            logits = model.eval()(input_ids=batch.inputs["input_ids"][:, :used]).logits[0]
        nats += F.cross_entropy(logits[batch.positions], batch.labels, reduction="sum").item()
        predicted += len(batch.labels)
    name = "eval_mlm_loss" if kind == "encoder" else "eval_loss"
    assert measured[name] == pytest.approx(nats / predicted, rel=1e-5)
    if kind == "decoder":
        assert measured["bits_per_byte"] == pytest.approx(nats / math.log(2) / rows.num_bytes_text, rel=1e-5)


def test_both_sides_see_the_same_masks(objectives, packed, make_model):
    stock = build_stock(TINY_BERT, AutoModelForMaskedLM)
    sides = [
        HeldOutLoss(model, objectives["encoder"], packed["encoder"][1], 64, nullcontext, plain=plain)
        for model, plain in ((make_model("modernbert"), False), (stock, True))
    ]
    rows, hidden = packed["encoder"][1], 0
    for part in np.split(np.arange(len(rows)), range(3, len(rows), 3)):
        ours, theirs = (side.collate(*rows.get_rows(part), part) for side in sides)
        hidden += len(ours.labels)
        assert torch.equal(ours.inputs["input_ids"], theirs.inputs["input_ids"])
        assert torch.equal(ours.positions, theirs.positions)
        assert torch.equal(ours.labels, theirs.labels)
        assert {"input_ids"} <= theirs.inputs.keys() <= {"input_ids", "attention_mask"}
    assert hidden / rows.num_tokens == pytest.approx(0.15, abs=0.03)


def test_points_are_denser_early_and_cost_no_time():
    times = point_times(100.0, 10)
    assert len(times) == 9
    assert times[4] == pytest.approx(100 * 0.5**1.7)
    assert all(np.diff(np.diff([0.0, *times, 100.0])) > 0)

    seconds = [0.0]
    clock = BudgetClock(Budget(seconds=100.0), now=lambda: seconds[0])

    def measure():
        seconds[0] += 1000.0
        return {"eval_loss": 5.0 - clock.steps}

    curve = CurveCallback(clock, [1.0, 2.0, 30.0], measure, torch.device("cpu"))
    clock.start()
    for _ in range(4):
        seconds[0] += 10.0
        clock.count_step(8, 1.0, 10.0)
        curve.on_step_end(None, None, None)
    curve.on_train_end(None, None, None)
    curve.add_point({"eval_loss": 0.5})
    assert [point["clock_seconds"] for point in curve.points] == [10.0, 30.0, 40.0]
    assert [point["eval_loss"] for point in curve.points] == [4.0, 2.0, 0.5]
    assert [point["tokens"] for point in curve.points] == [8, 24, 32]


@pytest.fixture
def prepared(texts, tokenizers, packed):
    def prepare(kind):
        train, validation = (Dataset.from_dict({"text": part}) for part in (texts[:270], texts[270:]))
        return PreparedData(Corpus("texts", train, validation, "c"), tokenizers[kind], *packed[kind], 0.0)

    return prepare


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_chunks_are_the_documents_one_after_another(kind, prepared, texts, tokenizers):
    """As the examples' own code makes them: tokenizer(text) with special tokens, joined, cut, the rest dropped."""
    expected = [token for text in texts[:270] for token in tokenizers[kind](text)["input_ids"]]
    chunks = chunk_documents(prepared(kind), kind, ROW_LENGTH, None)
    assert chunks.shape == (len(expected) // ROW_LENGTH, ROW_LENGTH)
    assert chunks.ravel().tolist() == expected[: chunks.size]
    item = ChunkDataset(chunks, tokenizers[kind].all_special_ids, kind)[0]
    if kind == "encoder":
        known = tokenizers[kind].get_special_tokens_mask(item["input_ids"], already_has_special_tokens=True)
        assert item["special_tokens_mask"] == known
        assert sum(known) >= 1
    else:
        assert item["labels"] == item["input_ids"]


def test_only_so_much_is_tokenised_as_can_be_seen(prepared, tmp_path):
    data = prepared("encoder")
    whole = load_chunks(data, "encoder", ROW_LENGTH, 1e9, tmp_path)
    files = set((tmp_path / "stock").iterdir())
    again = load_chunks(data, "encoder", ROW_LENGTH, 2e9, tmp_path)
    assert np.array_equal(whole, again)
    assert set((tmp_path / "stock").iterdir()) == files, "one file serves every budget that sees the whole text"
    many = dataclasses.replace(data, corpus=dataclasses.replace(data.corpus))
    many.corpus.train = Dataset.from_dict({"text": list(data.corpus.train["text"]) * 10})
    part = chunk_documents(many, "encoder", ROW_LENGTH, 4096)
    assert 4096 - ROW_LENGTH <= part.size < 0.95 * 10 * whole.size
    with pytest.raises(SettingError, match="fewer than max_seq_length"):
        chunk_documents(dataclasses.replace(data, corpus=dataclasses.replace(
            data.corpus, train=Dataset.from_dict({"text": ["ka lo"]}))), "encoder", ROW_LENGTH, None)  # fmt: skip


def test_the_last_batch_of_a_pass_is_counted_as_small_as_it_is():
    model = build_stock(TINY_BERT, AutoModelForMaskedLM)
    seconds = [0.0]
    clock = BudgetClock(Budget(seconds=100.0), now=lambda: seconds[0])
    counter = StepClock(clock, FlopCounter(model), num_chunks=10, rows=4, row_length=ROW_LENGTH)
    for step in range(1, 7):
        state = type("State", (), {"global_step": step})
        counter.on_step_begin(None, state, None)
        seconds[0] += 2.0
        counter.on_step_end(None, state, None)
    assert clock.tokens == 20 * ROW_LENGTH
    assert clock.ledger["steps"] == pytest.approx(12.0)
    everywhere = FlopCounter(model).step_flops(20 * ROW_LENGTH, 20 * ROW_LENGTH**2, 20 * ROW_LENGTH)
    assert clock.flops == pytest.approx(everywhere), "the head runs on every position"


OTHER_BASELINES = {
    "modernbert": {"model_type": "modernbert", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2,
                   "intermediate_size": 64, "max_position_embeddings": 64, "vocab_size": 192},
    "gpt2": TINY_GPT2,
    "llama": {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2,
              "intermediate_size": 64, "max_position_embeddings": 64, "vocab_size": 320, "tie_word_embeddings": True},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_BASELINES)
def test_stock_runs_every_kind_of_baseline(name, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("ONEDAY_CACHE", str(tmp_path / "cache"))
    config = tmp_path / f"{name}.json"
    config.write_text(json.dumps(OTHER_BASELINES[name]))
    settings = yaml.safe_load(recipe.read_text())
    if name != "modernbert":
        settings |= {"objective": "clm", "tokenizer_type": "bpe", "vocab_size": 320}
    complete = complete_settings(CLASSES, settings)
    plan = Plan("tiny", complete, RecordStore(tmp_path, ENVIRONMENT))
    job = plan.stock_job(name, str(config), 8, 1e-2, 1, 1.0, 2)
    record = run_stock(job)
    assert record["final"][plan.text.measure] < math.log(400) - 0.5, "it learnt something"
    assert ("bits_per_byte" in record["final"]) == (name != "modernbert")
    again = json.loads(json.dumps(record))
    assert again["steps"] == max(1, round(1.0 / again["step_seconds_probed"]))


@pytest.mark.parametrize(("seconds", "word"), [(640.0, "slower"), (560.0, "faster"), (620.0, ""), (580.0, "")])
def test_a_stock_run_of_another_length_is_said(caplog, seconds, word):
    note_deviation(seconds, 600.0)
    expected = [f"Stock took {seconds:.0f} of 600 s: the machine was {word} than when its steps were probed."]
    assert caplog.messages == expected * bool(word)
