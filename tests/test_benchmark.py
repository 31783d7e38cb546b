"""Benchmarks: both sides measured alike, arithmetic by hand, records that stand or fall, and whole benchmarks."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import signal
from contextlib import nullcontext
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from benchmark_parts import ENVIRONMENT, TINY_BERT, TINY_GPT2
from conftest import ROW_LENGTH
from datasets import Dataset
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from oneday.arguments import BudgetTrainingArguments, SettingError
from oneday.assembly import CLASSES
from oneday.benchmarks.ablation import describe_change, find_verdict, paired_difference, run_ablation
from oneday.benchmarks.arguments import AblationArguments, KeepArguments, SeedArguments, VersusStockArguments
from oneday.benchmarks.heldout import CurveCallback, HeldOut, point_times
from oneday.benchmarks.ours import run_ours
from oneday.benchmarks.planning import Plan, Text, find_machine_changes, read_changes
from oneday.benchmarks.records import Job, RecordStore, find_speed_difference, hash_source
from oneday.benchmarks.stock import ChunkDataset, StepClock, chunk_documents, load_chunks, note_deviation, run_stock
from oneday.benchmarks.throughput import describe_peaks, expand_grid, measure_throughput, pick_figures
from oneday.benchmarks.throughput import format_table as format_grid
from oneday.benchmarks.throughput import make_job as make_throughput_job
from oneday.benchmarks.versus_stock import choose_batch_and_rate, choose_best, find_baselines, median_match
from oneday.budget import Budget, BudgetClock
from oneday.collators import CausalCollator, MaskedCollator
from oneday.comparison import time_to_match
from oneday.corpus import Corpus
from oneday.ladder import LadderArguments, read_records, run_ladder
from oneday.modeling import FlopCounter
from oneday.objectives import EVALUATION_SEED, find_objective
from oneday.packed_dataset import pack_corpus
from oneday.preparation import PreparedData
from oneday.processes import RunError, run_in_fresh_process
from oneday.recipe import complete_settings, split_command_line, split_mode
from oneday.reporting import format_report
from oneday.run_directory import inspect_run
from oneday.throughput import has_fast_bf16
from oneday.trainer import BudgetTrainer


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


# ---- Measuring ----


@pytest.mark.parametrize("strategy", ["best_fit", "padded"])
@pytest.mark.parametrize(("kind", "settings"), [("encoder", TINY_BERT), ("decoder", TINY_GPT2)])
def test_stock_is_measured_as_a_plain_computation_would(kind, settings, strategy, objectives, texts, tmp_path):
    """Row by row, the whole row as one text, dropout off: the mean of -log p over the positions that ours predicts."""
    tokenizer = objectives[kind].tokenizer
    rows = pack_corpus([texts[270:]], tokenizer, kind, ROW_LENGTH, strategy, tmp_path / "rows")
    model = build_stock(settings, AutoModelForMaskedLM if kind == "encoder" else AutoModelForCausalLM)
    held_out = HeldOut(model.train(), objectives[kind], rows, 4 * ROW_LENGTH, nullcontext, plain=True)
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
        HeldOut(model, objectives["encoder"], packed["encoder"][1], 64, nullcontext, plain=plain)
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


# ---- Stock's data and clock ----


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


# ---- Arithmetic ----


def curve_of(*points):
    return [{"clock_seconds": float(seconds), "loss": loss} for seconds, loss in points]


def test_time_to_match():
    curve = curve_of((10, 6.0), (20, 5.0), (40, 5.5), (100, 4.0))
    assert time_to_match(curve, 5.25, 100.0, "loss").ratio == pytest.approx(100 / 17.5)
    assert time_to_match(curve, 5.0, 100.0, "loss").ratio == pytest.approx(5.0), "the first time it is there"
    assert time_to_match(curve, 4.5, 100.0, "loss").ratio == pytest.approx(100 / 80)
    assert str(time_to_match(curve, 6.5, 100.0, "loss")) == "> 10.00 x"
    assert str(time_to_match(curve, 3.9, 100.0, "loss")) == "not reached"


def test_median_of_matches():
    curve = curve_of((10, 6.0), (50, 4.0))
    fast, slow, never = (time_to_match(curve, target, 100.0, "loss") for target in (6.5, 4.0, 3.0))
    assert median_match([never, fast, slow]) == slow
    assert median_match([never, never, fast]) == never
    assert median_match([fast, fast, slow]) == fast
    assert median_match([slow, fast]) == slow, "of two, the more careful"


def test_paired_difference_by_hand():
    """Differences -0.3, -0.1, -0.2: mean -0.2, standard deviation 0.1, over the root of 3."""
    mean, error = paired_difference([5.0, 4.0, 6.0], [4.7, 3.9, 5.8])
    assert mean == pytest.approx(-0.2)
    assert error == pytest.approx(0.1 / math.sqrt(3))
    assert math.isnan(paired_difference([1.0], [2.0])[1])


@pytest.mark.parametrize(
    ("difference", "error", "seeds", "verdict"),
    [
        (-0.2, 0.2 / 4.31, 3, "better"),
        (0.2, 0.2 / 4.31, 3, "worse"),
        (-0.2, 0.2 / 4.30, 3, "not clear"),
        (-0.2, 0.2 / 2.79, 5, "better"),
        (-0.2, 0.2 / 2.77, 5, "not clear"),
        (math.nan, 0.01, 3, "not clear"),
        (-0.2, 0.01, 2, "needs 3 seeds"),
    ],
)
def test_verdict_only_outside_students_95_percent(difference, error, seeds, verdict):
    assert find_verdict(difference, error, seeds) == verdict


def test_changes_of_one_kind_of_text_only_are_compared():
    def records(*losses):
        return [{"measure": "loss", "final": {"loss": loss}, "tokens_per_second": 100.0} for loss in losses]

    row = describe_change("optim=adamw", records(3.0, 3.1, 3.2), records(4.0, 4.0, 4.0), obstacle="")
    assert row["difference"] == pytest.approx(-0.9)
    assert (row["verdict"], row["tokens_per_second_ratio"]) == ("better", 1.0)
    row = describe_change("vocab_size=90", records(3.0, 3.1, 3.2), records(4.0, 4.0, 4.0), obstacle="other text")
    assert (row["difference"], row["verdict"]) == (None, "other text")


def test_grid_and_changes_are_read():
    assert expand_grid(["optim=muon,adamw", "torch_compile=false"]) == [
        {"optim": "muon", "torch_compile": False},
        {"optim": "adamw", "torch_compile": False},
    ]
    assert read_changes("lr_shape=linear,warmup_fraction=0.1", "change") == {
        "lr_shape": "linear",
        "warmup_fraction": 0.1,
    }
    assert read_changes("dataset_name=a.txt,b.txt,seed=3", "change") == {"dataset_name": "a.txt,b.txt", "seed": 3}


def test_repeated_words_of_the_command_line():
    assert split_command_line(["--a", "1", "--a", "2", "--b", "1", "--b", "2"], {"a"})[1] == {
        "a": ["1", "2"],
        "b": "2",
    }
    assert split_mode(("x", "y"), ["y", "r.yaml"]) == ("y", ["r.yaml"])
    assert split_mode(("x", "y"), ["--help"]) == (None, ["--help"])


# ---- Records ----


def make_job(kind="ours", **settings):
    return Job(kind, "a-record", run_ours, {}, {}, {"budget_seconds": 60.0, "seed": 1, "rates": (1, 2)} | settings)


def write_record(folder, job, environment=ENVIRONMENT, source_hash=None, **facts):
    record = {"name": job.name, "settings": job.settings, "environment": environment, **facts}
    record["source_hash"] = source_hash or hash_source()
    (folder / f"{job.name}.json").write_text(json.dumps(record))


def test_a_record_stands_while_nothing_changes(tmp_path):
    store = RecordStore(tmp_path, ENVIRONMENT)
    assert store.find(make_job()) is None
    write_record(tmp_path, make_job())
    assert store.find(make_job())["settings"]["seed"] == 1
    assert store.obtain([make_job()]).keys() == {"a-record"}
    moved = ENVIRONMENT | {"commit": "def", "packages": ENVIRONMENT["packages"] | {"oneday": "0.2.0"}}
    assert RecordStore(tmp_path, moved).find(make_job()), "a new commit of the same code changes nothing"


def test_a_record_that_no_longer_stands_is_set_aside(tmp_path, in_this_process):
    """On other text, say, whose run has the same name."""
    store, made = RecordStore(tmp_path, ENVIRONMENT), []

    def run(job):
        made.append(job.settings["text"])
        return {"environment": ENVIRONMENT, "text": job.settings["text"]}

    for text in ("a", "a", "b", "a"):
        job = dataclasses.replace(make_job(text=text), run=run)
        assert store.obtain([job])["a-record"]["text"] == text
    assert made == ["a", "b", "a"]
    aside = sorted(tmp_path.glob("a-record.*.replaced"))
    assert {json.loads(path.read_text())["text"] for path in aside} == {"a", "b"}
    assert json.loads((tmp_path / "a-record.json").read_text())["text"] == "a"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "Another"}, "device was A processor, now Another"),
        ({"threads": 1}, "threads was 2, now 1"),
        ({"packages": {"oneday": "0.1.0", "torch": "2.14.0"}}, "torch was 2.13.0, now 2.14.0"),
    ],
)
def test_a_record_falls_with_its_machine(tmp_path, caplog, change, words):
    caplog.set_level("INFO")
    write_record(tmp_path, make_job("stock"))
    assert RecordStore(tmp_path, ENVIRONMENT | change).find(make_job("stock")) is None
    assert words in caplog.text


def test_a_run_whose_own_settings_change_the_machine_keeps_its_record(tmp_path):
    """One of one thread, or in another precision, was never made with the threads and at the peak of the recipe."""
    job = dataclasses.replace(make_job(), machine={"threads": 1, "peak_flops": 1e12})
    write_record(tmp_path, job, ENVIRONMENT | {"threads": 1}, peak_flops_measured=1.1e12)
    store = RecordStore(tmp_path, ENVIRONMENT, peak_flops=2e11)
    assert store.find(job) and store.find(make_job()) is None
    assert store.find(dataclasses.replace(job, machine={"threads": 1})) is None
    assert store.find(dataclasses.replace(job, machine={"threads": 1, "peak_flops": None}))


def test_what_settings_change_of_the_machine(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("oneday.benchmarks.planning.measure_peak_flops", lambda *args: asked.append(args) or 3e12)
    base = {"bf16": False, "num_threads": None, "use_cpu": True, "optim": "muon", "budget_steps": 1}
    settings = complete_settings(CLASSES, base | {"output_dir": str(tmp_path)})
    assert find_machine_changes(settings, settings | {"optim": "adamw", "budget_steps": 2}) == {}
    assert find_machine_changes(settings, settings | {"bf16": True})["peak_flops"] == 3e12
    assert asked == [(torch.device("cpu"), True)]
    changed = find_machine_changes(settings, settings | {"num_threads": 3})
    assert (changed["threads"], changed["peak_flops"]) == (3, None)


def test_a_record_falls_with_its_settings(tmp_path, caplog):
    caplog.set_level("INFO")
    write_record(tmp_path, make_job("stock"))
    assert RecordStore(tmp_path, ENVIRONMENT).find(make_job("stock", seed=2)) is None
    assert "seed was 1, now 2" in caplog.text
    assert RecordStore(tmp_path, ENVIRONMENT).find(make_job("stock", new=3)) is None
    assert "new was None, now 3" in caplog.text


def test_only_our_side_falls_with_our_code(tmp_path, caplog):
    caplog.set_level("INFO")
    write_record(tmp_path, make_job(), source_hash="other")
    assert RecordStore(tmp_path, ENVIRONMENT).find(make_job("ours")) is None
    assert "code has changed" in caplog.text
    assert RecordStore(tmp_path, ENVIRONMENT, reuse_ours=True).find(make_job("ours"))
    assert RecordStore(tmp_path, ENVIRONMENT).find(make_job("stock"))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_record_falls(tmp_path, caplog, text):
    caplog.set_level("INFO")
    (tmp_path / "a-record.json").write_text(text)
    assert RecordStore(tmp_path, ENVIRONMENT).find(make_job()) is None
    assert "damaged" in caplog.text


def test_of_equal_runs_the_smallest_batch_is_taken():
    def record(rows, loss):
        return {"rows": rows, "measure": "loss", "final": {"loss": loss}}

    equal = [record(32, 7.150), record(8, 7.153), record(8, 7.160), record(32, 7.155)]
    assert choose_best(equal) is equal[1]
    assert choose_best([*equal, record(32, 7.0)])["final"]["loss"] == 7.0


def test_the_best_learning_rate_is_taken(tmp_path):
    """From records of short runs: 1e-3 has the lowest final loss; without all of them stock is left out."""
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(TINY_BERT))
    settings = complete_settings((BudgetTrainingArguments,), {"max_seq_length": 32})
    plan = Plan("tiny", settings, RecordStore(tmp_path, ENVIRONMENT))
    plan.__dict__["text"] = Text("f", "h", "m", "texts", "encoder", "eval_mlm_loss", 150)
    args = VersusStockArguments(
        learning_rates=[3e-4, 1e-3, 3e-3], stock_rows=[8, 32], screen_minutes=2.0, sides=["ours"]
    )
    assert choose_batch_and_rate(plan, args, "tiny", str(config), 1) is None
    grid = list(itertools.product(args.stock_rows, args.learning_rates))
    for (rows, rate), loss in zip(grid, (6.0, 5.5, 5.6, 6.1, 6.2, 5.9)):
        job = plan.stock_job("tiny", str(config), rows, rate, 1, 120.0, 1)
        facts = {"measure": "eval_mlm_loss", "learning_rate": rate, "rows": rows}
        write_record(tmp_path, job, final={"eval_mlm_loss": loss}, **facts)
    assert choose_batch_and_rate(plan, args, "tiny", str(config), 1) == (8, 1e-3)
    args.sides = ["stock"]
    assert choose_batch_and_rate(plan, args, "tiny", str(config), 1) == (8, 1e-3), "records that stand are kept"
    args.learning_rates, args.stock_rows = [7e-4], [16]
    assert choose_batch_and_rate(plan, args, "tiny", str(config), 1) == (16, 7e-4)


# ---- Whole benchmarks ----


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


def test_versus_stock_from_start_to_table(run_benchmark, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("oneday.benchmarks.records.SAME_SPEED", 100.0)  # other tests may run beside this one
    records = tmp_path / "records"
    argv = ["versus-stock", recipe, "--baselines", tmp_path / "rival.json",
            "--learning_rates", "1e-3", "--stock_rows", 8, "--seeds", 1,
            "--num_points", 5, "--records_dir", records, "--keep_runs", tmp_path / "kept"]  # fmt: skip
    code, table, stderr = run_benchmark(*argv)
    assert code == 0, stderr
    kept = tmp_path / "kept" / "ours-mini-pretrain-3s-seed1"
    assert AutoModelForMaskedLM.from_pretrained(kept).num_parameters() > 0
    assert max(map(len, table.splitlines())) <= 80, table
    assert {path.name for path in records.iterdir()} == {
        "ours-mini-pretrain-3s-seed1.json", "stock-mini-pretrain-rival-8rows-lr0.001-3s-seed1.json",
        "versus_stock-mini-pretrain.json", "versus_stock-mini-pretrain.png",
    }  # fmt: skip
    assert (records / "versus_stock-mini-pretrain.png").read_bytes().startswith(b"\x89PNG")
    ours, stock = (json.loads(next(records.glob(f"{kind}-*.json")).read_text()) for kind in ("ours", "stock"))
    for record in (ours, stock):
        seconds = [point["clock_seconds"] for point in record["curve"]]
        assert seconds == sorted(seconds)
        assert 2 <= len(seconds) <= 5
        assert record["final"] == record["curve"][-1]
        assert record["final"]["eval_mlm_loss"] < math.log(150), "it learnt something"
        assert record["tokens"] == record["final"]["tokens"] > 0
        assert record["mfu"] == pytest.approx(record["flops"] / seconds[-1] / record["peak_flops_measured"])
        assert {"date", "peak_memory_bytes", "num_parameters", "environment", "seed", "settings"} <= record.keys()
        assert str(tmp_path.parent) not in json.dumps(record), "no path of this machine"
    assert ours["settings"]["held_out"] == stock["settings"]["held_out"]
    assert ours["clock_seconds"] <= 3.0 * 1.02
    passes, rest = divmod(stock["steps"], math.ceil(stock["num_chunks"] / 8))
    assert stock["tokens"] == (passes * stock["num_chunks"] + 8 * rest) * ROW_LENGTH
    assert stock["steps"] == max(1, round(3.0 / stock["step_seconds_probed"]))

    summary = json.loads((records / "versus_stock-mini-pretrain.json").read_text())
    assert summary["seeds"] == [1]
    assert [row["side"] for row in summary["rows"]] == ["ours", "rival"]
    target = stock["final"]
    measured = time_to_match(ours["curve"], target["eval_mlm_loss"], target["clock_seconds"], "eval_mlm_loss")
    assert summary["rows"][1]["time_to_match"] == str(measured)
    assert str(measured) in table

    before = {path: path.read_bytes() for path in records.glob("*seed1.json")}
    code, again, stderr = run_benchmark(*argv)
    assert code == 0
    assert again == table
    assert "2 of 2 runs have records that stand" in stderr
    assert {path: path.read_bytes() for path in before} == before

    weights = (kept / "model.safetensors").read_bytes()
    next(records.glob("ours-*.json")).unlink()
    assert run_benchmark(*argv)[0] == 0
    assert (kept / "model.safetensors").read_bytes() != weights, "another run, in place of the older one"
    assert {path.name for path in kept.parent.iterdir()} == {kept.name}


def test_a_kept_run_is_a_run_directory(recipe, tmp_path, monkeypatch):
    """Of a finished run, so that the programs that take one take it; what was measured is what the record has."""
    monkeypatch.setenv("ONEDAY_CACHE", str(tmp_path / "cache"))
    settings = yaml.safe_load(recipe.read_text()) | {"budget_minutes": None, "budget_steps": 2}
    plan = Plan("tiny", complete_settings(CLASSES, settings), RecordStore(tmp_path, ENVIRONMENT))
    job = plan.keeping(KeepArguments(str(tmp_path / "kept"))).our_job("ours", "", 1, 1)
    record, kept = job.run(job), tmp_path / "kept" / job.name
    assert "budget used" in format_report(kept)
    assert {"environment.json", "training_curve.png", "model.safetensors"} <= {path.name for path in kept.iterdir()}
    assert f"# {job.name}" in (kept / "README.md").read_text().splitlines()
    assert inspect_run(kept, {**job.recipe, "output_dir": str(kept)}) == "finished"
    results = json.loads((kept / "results.json").read_text())
    assert results["eval_mlm_loss"] == record["final"]["eval_mlm_loss"] and results["steps"] == record["steps"] == 2
    assert str(tmp_path) not in json.dumps(record)


@pytest.mark.slow
def test_a_run_that_was_killed_is_told_what_helps_there():
    with pytest.raises(RunError, match="often a lack of memory; take a smaller model or batch"):
        run_in_fresh_process(signal.raise_signal, signal.SIGKILL, "mine")


def test_a_ladder_makes_a_record_a_budget(recipe, tmp_path, monkeypatch, in_this_process):
    monkeypatch.setenv("ONEDAY_CACHE", str(tmp_path / "cache"))
    settings, records = yaml.safe_load(recipe.read_text()), tmp_path / "ladder"
    made = run_ladder(str(recipe), settings, LadderArguments(tokens=[2048.0, 4096.0], records_dir=str(records)))
    assert [record["budget"] for record in made] == [{"tokens": 2048.0}, {"tokens": 4096.0}]
    assert all(0.9 <= record["tokens"] / record["budget"]["tokens"] <= 1.0 for record in made)
    assert len(read_records([records])) == 2
    with pytest.raises(SettingError, match="models has 2 files named tiny"):
        run_ladder(str(recipe), settings, LadderArguments(models=["a/tiny.json", "b/tiny.json"]))


def test_throughput_over_a_grid_with_a_point_that_cannot_run(run_benchmark, recipe, tmp_path, in_this_process):
    records = tmp_path / "records"
    code, table, stderr = run_benchmark(
        "throughput", recipe, "--grid", "optim=adamw,adamw_9bit", "--measure_seconds", 0.5, "--records_dir", records
    )
    assert code == 0, stderr
    assert max(map(len, table.splitlines())) <= 80, table
    assert "cannot run: The setting optim is 'adamw_9bit'" in " ".join(table.split())
    precision = "bfloat16" if has_fast_bf16(torch.device("cpu")) else "float32"
    assert "beside each point's own steps, " in " ".join(table.split()) and f" TFLOP/s in {precision};" in table
    record = json.loads((records / "throughput-mini-pretrain-optim=adamw.json").read_text())
    assert record["tokens_per_second"] > 0
    assert record["mfu"] == pytest.approx(record["flops_per_second"] / record["peak_flops_measured"])
    steps = record["step_seconds"]
    assert all(0 < steps[name] < steps["step"] for name in ("data", "forward_backward", "optimizer"))
    assert steps["data"] + steps["forward_backward"] + steps["optimizer"] == pytest.approx(steps["step"], rel=0.3)
    assert 8 * record["num_parameters"] == pytest.approx(record["optimizer_state_bytes"], rel=0.01), "two moments"
    assert record["batch_size_tokens"] == record["micro_batch_tokens"] == 512
    summary = json.loads((records / "throughput-mini-pretrain.json").read_text())
    assert [row["point"]["optim"] for row in summary["rows"]] == ["adamw", "adamw_9bit"]
    assert summary["environment"]["packages"]["torch"] == metadata.version("torch")


def make_point(recipe, tmp_path, **point):
    plan = Plan("tiny", complete_settings(CLASSES, yaml.safe_load(recipe.read_text())), RecordStore(tmp_path, {}))
    return make_throughput_job(plan, point, 0.2)


def test_throughput_says_what_micro_batch_ran(recipe, tmp_path, monkeypatch):
    """A batch of 512 tokens caps it; a memory that does not hold it makes the point one that cannot run."""
    monkeypatch.setenv("ONEDAY_CACHE", str(tmp_path / "cache"))
    job = make_point(recipe, tmp_path, micro_batch_tokens=4096)
    record = measure_throughput(job) | {"name": job.name, "seed": 1}
    assert (record["batch_size_tokens"], record["micro_batch_tokens"]) == (512, 512)
    row = {"point": {"micro_batch_tokens": 4096}} | pick_figures(record)
    assert "ran in micro-batches of 512 tokens" in format_grid(SimpleNamespace(
        name="tiny", store=SimpleNamespace(environment=record["environment"])), [row], [record])  # fmt: skip

    def refuse(trainer, model, batch, counts, backward=BudgetTrainer.backward):
        if batch.inputs["input_ids"].numel() > 128:
            raise torch.OutOfMemoryError("injected")
        return backward(trainer, model, batch, counts)

    monkeypatch.setattr(BudgetTrainer, "backward", refuse)
    assert measure_throughput(make_point(recipe, tmp_path, micro_batch_tokens=128))["micro_batch_tokens"] == 128
    with pytest.raises(SettingError, match="does not hold a micro-batch of 256 tokens; it held 128"):
        measure_throughput(make_point(recipe, tmp_path, micro_batch_tokens=256))


def test_peaks_are_named_as_the_points_have_them():
    points = [("float32", 0.93e12), ("bfloat16 autocast", 1.8e12), ("float32", 0.91e12)]
    points.append(("bfloat16, float32 master weights", 1.8001e12))
    records = [{"precision": precision, "peak_flops_measured": peak} for precision, peak in points]
    assert describe_peaks(records) == "0.910 to 0.930 TFLOP/s in float32, 1.800 TFLOP/s in bfloat16"


def test_a_stream_that_breaks_off_gives_no_rate(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("ONEDAY_CACHE", str(tmp_path / "cache"))
    fits = itertools.chain([True] * 4, [SettingError("a file is damaged")])

    def next_step_fits(trainer):
        found = next(fits)
        if found is not True:
            raise found
        return True

    monkeypatch.setattr("oneday.trainer.BudgetTrainer.next_step_fits", next_step_fits)
    with pytest.raises(SettingError, match="a file is damaged"):
        measure_throughput(make_point(recipe, tmp_path))


def test_rows_that_grow_are_measured_at_their_full_length(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("ONEDAY_CACHE", str(tmp_path / "cache"))
    job = make_point(recipe, tmp_path, max_seq_length_start=ROW_LENGTH // 2)
    assert job.recipe["max_seq_length_start"] == ROW_LENGTH // 2, "asked for by name"
    settings = yaml.safe_load(recipe.read_text()) | {"max_seq_length_start": ROW_LENGTH // 2}
    recipe.write_text(yaml.safe_dump(settings))
    assert make_point(recipe, tmp_path).recipe["max_seq_length_start"] is None


def test_ablate_compares_runs_of_one_seed(recipe, tmp_path, monkeypatch, caplog):
    """Base and change are really run, over a budget of steps; the table is of their records."""
    monkeypatch.setenv("ONEDAY_CACHE", str(tmp_path / "cache"))
    records = tmp_path / "records"
    records.mkdir()
    settings = yaml.safe_load(recipe.read_text()) | {"budget_minutes": None, "budget_steps": 4}
    plan = Plan("tiny", complete_settings(CLASSES, settings), RecordStore(records, ENVIRONMENT))
    for label, change in (("base", {}), ("lr_shape=linear", {"lr_shape": "linear"})):
        job = plan.our_job("ablation", label, 7, 1, change)
        assert job.name == f"ablation-tiny-{label}-4steps-seed7"
        result = run_ours(job)
        assert result["steps"] == 4
        write_record(records, job, **job.details | {key: result[key] for key in result.keys() - {"environment"}})
    table = run_ablation(
        plan, AblationArguments(change=["lr_shape = linear"]), SeedArguments(seeds=[7]), KeepArguments()
    )
    assert max(map(len, table.splitlines())) <= 80, table
    rows = json.loads((records / "ablation-tiny.json").read_text())["rows"]
    assert [row["change"] for row in rows] == ["base", "lr_shape=linear"]
    base, changed = (row["losses"][0] for row in rows)
    assert base != changed
    (tmp_path / "full").write_text("no directory can be made here")
    assert run_ours(job, tmp_path / "full" / "run")["steps"] == 4 and "is not kept in" in caplog.text
    assert rows[1]["difference"] == pytest.approx(changed - base)
    assert (rows[1]["standard_error"], rows[1]["verdict"]) == (None, "needs 3 seeds")
    monkeypatch.setattr("oneday.benchmarks.ablation.name_obstacle", lambda text, base: "other loss")
    run_ablation(plan, AblationArguments(change=["lr_shape = linear"]), SeedArguments(seeds=[7]), KeepArguments())
    (row,) = json.loads((records / "ablation-tiny.json").read_text())["rows"][1:]
    assert (row["difference"], row["verdict"]) == (None, "other loss")


BAD = [
    ((), "first word of the command is missing; it must be one of throughput, versus-stock, ablate, finetuning"),
    (("speed",), "first word of the command is 'speed'"),
    (("throughput", "--grid", "optim"), "grid is 'optim'; write NAME=VALUE"),
    (("throughput", "--grid", "optimizer=muon"), "unknown setting 'optimizer'; the nearest is"),
    (("throughput", "--grid", "micro_batch_tokens=many"), "micro_batch_tokens is 'many'; it must be int"),
    (("throughput", "--measure_seconds", "0"), "measure_seconds is 0"),
    (("throughput", "--seeds", "1"), "unknown setting 'seeds'"),
    (("versus-stock", "--sides", "mine"), "sides is 'mine'"),
    (("versus-stock", "--seeds", "1,1"), "seeds is '1,1'"),
    (("versus-stock", "--learning_rates", "0.0"), "learning_rates is 0"),
    (("versus-stock", "--baselines", "xlnet"), "baselines has 'xlnet'"),
    (("versus-stock", "--baselines", "GPT2"), "baselines has 'gpt2', which has no AutoModelForMaskedLM"),
    (("versus-stock", "--budget_steps", "5"), "one wall clock"),
    (("versus-stock", "--budget_minutes", "0"), "budget_minutes is 0"),
    (
        ("versus-stock", "--streaming", "true", "--dataset_name", "you/texts"),
        "streaming is True, and versus-stock cuts the whole text",
    ),
    (("versus-stock",), "baselines is empty, and stock bert has .* name config JSONs of its size"),
    (("versus-stock", "--baselines", "RIVAL"), "screen_minutes is 2.5, and the budget 0.05 minutes"),
    (("ablate",), "No change is given"),
    (("ablate", "--seed", "7"), "seed is for one run, and ablate has several; set seeds"),
    (("ablate", "--change", "linear"), "change is 'linear'; write NAME=VALUE"),
    (("ablate", "--change", "lr_shap=linear"), "unknown setting 'lr_shap'; the nearest is 'lr_shape'"),
    (("throughput", "--grid", "optim=adamw", "--records_dir", "FILE"), "records_dir is .*cannot be written"),
]


@pytest.mark.parametrize(("argv", "words"), BAD, ids=[" ".join(argv) or "nothing" for argv, _ in BAD])
def test_bad_input_gets_one_sentence(run_benchmark, recipe, tmp_path, argv, words):
    (tmp_path / "file").write_text("mine")
    places = {"FILE": str(tmp_path / "file")} | {name.upper(): f"{tmp_path / name}.json" for name in ("gpt2", "rival")}
    argv = [places.get(word, word) for word in argv]
    if argv and argv[0] != "speed":
        argv.insert(1, str(recipe))
        argv += [] if "--records_dir" in argv else ["--records_dir", str(tmp_path / "records")]
    code, _, stderr = run_benchmark(*argv)
    assert code == 1
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    assert re.search(words, errors[0]), errors[0]
    assert "Traceback" not in stderr
    assert not os.path.exists(tmp_path / "records")


def test_a_record_of_a_machine_of_another_speed_does_not_stand():
    record = {"peak_flops_measured": 4.0e11}
    assert find_speed_difference(record, 4.5e11) is None
    assert find_speed_difference(record, None) is None
    assert find_speed_difference(record, 7.6e11) == "the machine's peak was 0.40 TFLOP/s, now 0.76"


@pytest.mark.parametrize(
    ("details", "stands"), [({}, False), ({"budget_seconds": 9.0}, False), ({"budget_seconds": None}, True)]
)
def test_a_run_of_so_many_tokens_stands_whatever_the_machines_speed(tmp_path, details, stands):
    job = dataclasses.replace(make_job("stock"), details=details)
    write_record(tmp_path, job, peak_flops_measured=4.0e11)
    assert (RecordStore(tmp_path, ENVIRONMENT, peak_flops=7.6e11).find(job) is not None) == stands


@pytest.mark.parametrize("objective", ["mlm_nsp", "plm", "rtd"])
def test_versus_stock_refuses_objectives_that_stock_has_no_loss_of(objective):
    plan = SimpleNamespace(settings={"objective": objective}, text=SimpleNamespace(kind="encoder"))
    with pytest.raises(
        SettingError, match=f"objective {objective} has its own; set it to one of mlm, clm, word_order"
    ):
        find_baselines(plan, VersusStockArguments())
