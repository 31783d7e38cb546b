"""Benchmarks: arithmetic by hand, and whole benchmarks from start to table."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
from types import SimpleNamespace

import pytest
import yaml
from benchmark_parts import ENVIRONMENT, TINY_BERT, write_record
from conftest import ROW_LENGTH
from transformers import AutoModelForMaskedLM

from oneday.arguments import BudgetTrainingArguments
from oneday.assembly import CLASSES
from oneday.benchmarks.ablation import describe_change, find_verdict, paired_difference, run_ablation
from oneday.benchmarks.arguments import AblationArguments, KeepArguments, SeedArguments, VersusStockArguments
from oneday.benchmarks.ours import run_ours
from oneday.benchmarks.planning import Plan, Text, read_changes
from oneday.benchmarks.records import RecordStore
from oneday.benchmarks.throughput import expand_grid
from oneday.benchmarks.versus_stock import choose_batch_and_rate, choose_best, find_baselines, median_match
from oneday.comparison import time_to_match
from oneday.errors import SettingError
from oneday.ladder import LadderArguments, read_records, run_ladder
from oneday.processes import RunError, run_in_fresh_process
from oneday.recipe import complete_settings, split_command_line, split_mode
from oneday.reporting import format_report
from oneday.run_directory import inspect_run

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


@pytest.mark.parametrize("objective", ["mlm_nsp", "plm", "rtd"])
def test_versus_stock_refuses_objectives_that_stock_has_no_loss_of(objective):
    plan = SimpleNamespace(settings={"objective": objective}, text=SimpleNamespace(kind="encoder"))
    with pytest.raises(
        SettingError, match=f"objective {objective} has its own; set it to one of mlm, clm, word_order"
    ):
        find_baselines(plan, VersusStockArguments())
