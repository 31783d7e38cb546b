"""The programs as a user starts them: whole runs on small text."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from program_parts import SMALL, flags
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import processors
from transformers import AutoModelForMaskedLM, AutoTokenizer

from oneday import run_directory as rundir
from oneday.assembly import CLASSES, assemble_trainer
from oneday.checkpoints import list_checkpoints
from oneday.durable_files import read_json
from oneday.errors import SettingError
from oneday.packed_dataset import PackedDataset
from oneday.recipe import build_arguments, complete_settings, resolve_settings
from oneday.scoring import load_scorer
from oneday.tokenization import hash_tokenizer


def test_the_trainer_knows_how_long_the_text_took(text_file, tmp_path):
    """A resumed run is not charged for it."""
    argv = flags(**SMALL, dataset_name=text_file, cache_dir=tmp_path / "cache", output_dir=tmp_path / "run")
    settings = complete_settings(CLASSES, resolve_settings(CLASSES, argv))
    trainer, data = assemble_trainer(*build_arguments(CLASSES, settings))
    assert trainer.preparation_seconds == data.seconds > 0


def test_the_saved_tokenizer_sets_the_start_token_of_the_rows(text_file, tmp_path, tokenizers):
    """Where the tokenizer is another project's and sets none; prepared text is known by the one that is named."""
    given = copy.deepcopy(tokenizers["decoder"])
    given.backend_tokenizer.post_processor = processors.ByteLevel()
    given.save_pretrained(tmp_path / "tokenizer")
    settings = {**SMALL, "objective": "clm", "model_config": ROOT / "model_configs/gpt2-mini.json"}
    folders = {name: tmp_path / name for name in ("cache_dir", "output_dir")}
    argv = flags(**settings, **folders, dataset_name=text_file, tokenizer_name=tmp_path / "tokenizer")
    argv = resolve_settings(CLASSES, argv)
    trainer, data = assemble_trainer(*build_arguments(CLASSES, complete_settings(CLASSES, argv)))
    assert given("ka")["input_ids"][0] != given.bos_token_id
    trainer.save_model(tmp_path / "saved")
    scorer = load_scorer(str(tmp_path / "saved"), 512, torch.device("cpu"))
    first_of_a_row = data.train.get_rows(np.array([0]))[0][0, 0]
    assert scorer.sets_start and scorer.tokenizer("ka")["input_ids"][0] == first_of_a_row == given.bos_token_id
    assert hash_tokenizer(data.tokenizer) == hash_tokenizer(given)


def test_devices_are_looked_at_before_any_text(run_script, monkeypatch, tmp_path):
    def refuse(args):
        raise SettingError("2 GPUs are visible.")

    monkeypatch.setattr("oneday.assembly.check_strategy", refuse)
    code, _, said = run_script("pretrain", *flags(**SMALL, dataset_name=tmp_path / "none.txt", output_dir="runs/none"))
    assert code == 1 and "2 GPUs are visible." in said


@pytest.mark.parametrize("is_first", [False, True])
def test_processes_beside_the_first_close_undisturbed(run_script, monkeypatch, tmp_path, is_first):
    """Their exit code is not changed by what ends them because the first has ended; that is still to be stopped."""
    calls = []
    ranks = SimpleNamespace(is_first=is_first, lead=lambda run: "new", close=lambda: calls.append("close"))
    parts = SimpleNamespace(ranks=ranks, model_fingerprint=""), SimpleNamespace(fingerprint="")
    monkeypatch.setattr("oneday.assembly.check_settings", lambda *given: None)
    monkeypatch.setattr("oneday.assembly.assemble_trainer", lambda *given: parts)
    monkeypatch.setattr("oneday.pretraining.perform_run", lambda *given: 75)
    monkeypatch.setattr("oneday.signals.end_undisturbed", lambda: calls.append("undisturbed"))
    assert run_script("pretrain", "--output_dir", tmp_path / "run")[0] == 75
    assert calls == (["close"] if is_first else ["undisturbed", "close"])


@pytest.mark.parametrize("at_start", [1e9, 9e9])
def test_the_better_of_two_measured_peaks_counts(run_script, text_file, tmp_path, monkeypatch, at_start):
    monkeypatch.setattr("oneday.trainer.measure_peak_flops", lambda device, bf16: at_start)
    monkeypatch.setattr("oneday.throughput.time_products", lambda size, *_: 2 * size**3 / 5e9)
    code, _, stderr = run_script("pretrain", *flags(**SMALL, dataset_name=text_file, output_dir=tmp_path / "run"))
    assert code == 0, stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["peak_flops_measured"] == max(at_start, 5e9)
    assert results["mfu"] == pytest.approx(results["flops"] / results["train_seconds"] / max(at_start, 5e9))


def assert_tensorboard_has_it(out, results):
    """Losses at their steps, and what goes with them."""
    scalars = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.step for event in scalars.Scalars("train/loss")] == [1, 2, 3]
    assert scalars.Scalars("train/loss")[-1].value == pytest.approx(rundir.read_metrics(out)[5]["loss"], abs=1e-3)
    held_out = scalars.Scalars("eval/loss")
    assert [event.step for event in held_out] == [0, 3], "before the first step, and the final model"
    assert held_out[-1].value == pytest.approx(results["eval_loss"], rel=1e-5)
    names = ("learning_rate", "grad_norm", "tokens", "progress", "tokens_per_second", "mfu")
    assert {f"train/{name}" for name in names} <= set(scalars.Tags()["scalars"])


def assert_replay_is_refused(run_script, out, text_file, folder):
    """Under other settings, text or model, and in the directory itself."""
    refused = {"optim": "adamw", "dataset_name": folder / "other.txt", "model_config": folder / "other.json"}
    refused["dataset_name"].write_text(text_file.read_text() + "\n\nOne more document.\n")
    config = json.loads(Path(SMALL["model_config"]).read_text())
    refused["model_config"].write_text(json.dumps({**config, "num_hidden_layers": 1}))
    for (name, value), words in zip(refused.items(), ("leave optim out", "is not what", "is not what")):
        again = flags(replay=out, output_dir=folder / "again", **{name: value})
        code, _, stderr = run_script("pretrain", *again)
        assert code == 1 and name in stderr and words in stderr, stderr
        assert not (folder / "again").exists()
    code, _, stderr = run_script("pretrain", "--replay", out)
    assert code == 1 and "in a directory of its own; set output_dir" in stderr


def assert_scores_reach_the_card(run_script, out, folder):
    """Those of the run's own directory, and no others."""
    card = (out / "README.md").read_text()
    (folder / "mine.csv").write_text("text,label\n" + "good,1\nbad,0\n" * 20)
    tune = ["--model_name_or_path", out, "--task_file", folder / "mine.csv", "--num_seeds", 1, "--use_cpu", "true"]
    assert run_script("finetune", *tune, "--output_dir", folder / "elsewhere")[0] == 0
    assert (out / "README.md").read_text() == card, "scores that are not the directory's are not on its card"
    assert run_script("finetune", *tune)[0] == 0
    assert "| mine | accuracy |" in (out / "README.md").read_text()


def test_pretrain_leaves_a_whole_run_directory(run_script, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    out = tmp_path / "run"
    argv = flags(**SMALL, dataset_name=text_file, output_dir="~/run", report_to="tensorboard", logging_steps=1)
    code, _, stderr = run_script("pretrain", *argv)
    assert code == 0, stderr
    assert "100.0 % of 3 steps spent: " in stderr and " s in steps" in stderr
    names = {path.name for path in out.iterdir()}
    assert {
        "model.safetensors", "config.json", "tokenizer.json", "recipe.yaml", "metrics.jsonl", "environment.json",
        "budget.json", "results.json", "README.md", "training_curve.png",
    } <= names  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    assert {
        "eval_loss", "eval_mlm_loss", "corpus_hash", "threads", "tokens_seen", "steps", "train_seconds", "budget_used",
        "tokens_per_second", "mfu", "peak_memory_bytes", "packing_efficiency",
    } <= results.keys()  # fmt: skip
    assert results["steps"] == 3
    assert (out / "training_curve.png").read_bytes().startswith(b"\x89PNG")
    events = [event["event"] for event in rundir.read_metrics(out)]
    assert events == ["eval", "start", "step", "step", "checkpoint", "step", "eval", "end"]
    assert_tensorboard_has_it(out, results)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert str(tmp_path) not in card
    model = AutoModelForMaskedLM.from_pretrained(out)
    assert model.config.vocab_size % 64 == 0
    assert len(AutoTokenizer.from_pretrained(out)) == 150
    assert_replay_is_refused(run_script, out, text_file, tmp_path)
    assert_scores_reach_the_card(run_script, out, tmp_path)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert any(path.parent.name.startswith("checkpoint-") for path in files)
    assert not [path for path in files if path.suffix in (".bin", ".py", ".pkl")], "weights are safetensors"
    configs = [json.loads(path.read_text()) for path in files if path.name in ("config.json", "tokenizer_config.json")]
    assert len(configs) >= 4 and not any("auto_map" in config for config in configs), "no code comes along"

    again, _, said = run_script("pretrain", *argv)
    assert again == 0
    assert "finished; name another output_dir to train again" in said
    again, _, said = run_script("pretrain", *argv, "--extend")
    assert again == 0 and "finished; to extend it set a larger budget than it had" in said
    repeated = tmp_path / "repeated"
    code, *_ = run_script("pretrain", out / "recipe.yaml", "--output_dir", repeated)
    assert code == 0
    first, second = ((folder / "model.safetensors").read_bytes() for folder in (out, repeated))
    assert first == second, "feeding the recipe back repeats the run"


@pytest.mark.slow
def test_two_trackers_get_the_run_offline(text_file, tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", "")  # restored afterwards
    monkeypatch.delenv("TRACKIO_DIR")
    monkeypatch.setenv("ONEDAY_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "run"
    argv = flags(**SMALL, dataset_name=text_file, output_dir=out, report_to="tensorboard,trackio", logging_steps=1)
    script = [sys.executable, ROOT / "scripts" / "pretrain.py", *argv]
    done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    (database,) = (out / "trackio").glob("oneday*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, metrics FROM metrics ORDER BY id").fetchall()
    assert {name for name, _ in rows} == {"run"}, "the final loss is in the same line as the steps"
    logged = [json.loads(metrics) for _, metrics in rows]
    assert sum("train/loss" in metrics for metrics in logged) == 3
    results = json.loads((out / "results.json").read_text())
    assert logged[-1]["eval/loss"] == pytest.approx(results["eval_loss"], rel=1e-5)
    assert "train/loss" in EventAccumulator(str(out / "tensorboard")).Reload().Tags()["scalars"]


def test_gpt_and_report(run_script, text_file, tmp_path, monkeypatch):
    # As of a stream of which nothing was read since the training.
    monkeypatch.setattr(PackedDataset, "packing_efficiency", None)
    out = tmp_path / "run"
    settings = SMALL | {
        "model_config": str(ROOT / "model_configs/gpt2-mini.json"),
        "vocab_size": 320,
        "attention_init": "null",
    }
    argv = flags(**settings, objective="clm", tokenizer_type="bpe", dataset_name=text_file, output_dir=out)
    code, _, stderr = run_script("pretrain", *argv)
    assert code == 0, stderr
    results = json.loads((out / "results.json").read_text())
    assert results["bits_per_byte"] > 0 and len(results["masks_hash"]) == 16
    assert "packing_efficiency" not in results
    assert "packed at 32 tokens; documents in one row" in (out / "README.md").read_text()
    scores = {"accuracy": 0.612, "standard_error": 0.01, "chance": 0.5, "num_questions": 200}
    (out / "zero_shot_results.json").write_text(json.dumps({"tasks": {"blimp": scores}}))
    code, shown, _ = run_script("report", "--run_dir", out)
    assert code == 0
    assert "bits / byte" in shown and "blimp zero-shot (floor 50.0)" in shown and "61.2%" in shown
    assert max(map(len, shown.splitlines()[-12:])) <= 80


def test_a_chinese_corpus_goes_all_the_way(run_script, tmp_path):
    subjects, verbs = ["我们", "老师", "小猫", "科学家", "他的朋友"], ["喜欢", "研究", "看见", "忘记", "制造"]
    objects, places = (
        ["语言模型", "一本旧书", "红色的花", "数学问题", "新机器"],
        ["在学校", "昨天晚上", "在北京", "每天"],
    )
    lines = [f"{s}{p}{v}{o}。" for s in subjects for v in verbs for o in objects for p in places]
    text = tmp_path / "zh.txt"
    text.write_text("\n\n".join(" ".join(lines[start : start + 5]) for start in range(0, len(lines), 2)))
    out = tmp_path / "run"
    settings = SMALL | {"vocab_size": 55, "budget_steps": 20}
    code, _, stderr = run_script("pretrain", *flags(**settings, dataset_name=text, output_dir=out))
    assert code == 0, stderr
    results = json.loads((out / "results.json").read_text())
    assert results["eval_mlm_loss"] < results["before"]["eval_mlm_loss"] - 0.5
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("老师在学校研究数学问题。")["input_ids"]
    assert tokenizer.unk_token_id not in ids


def test_killed_by_a_signal_and_started_again(text_file, tmp_path):
    """As a user does it: SIGTERM in the middle gives code 75; started again, here by `accelerate launch`, it ends."""
    out = tmp_path / "run"
    settings = flags(**SMALL | {"budget_steps": 80}, dataset_name=text_file, output_dir=out)
    environment = {**os.environ, "ONEDAY_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    plain = [sys.executable, "scripts/pretrain.py", *settings]
    with open(tmp_path / "log", "w") as log:
        first = subprocess.Popen(plain, cwd=ROOT, env=environment, stderr=log)
    deadline = time.monotonic() + 120
    while len(rundir.read_metrics(out) if out.exists() else []) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    first.terminate()
    assert first.wait(60) == 75, (tmp_path / "log").read_text()
    assert list_checkpoints(out)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    launch += [str(ROOT / "recipes/accelerate_configs/cpu.yaml"), "scripts/pretrain.py", *settings]
    launch += ["--hub_license", "cc-by-sa-3.0"]  # it may change when a run goes on
    second = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert json.loads((out / "results.json").read_text())["steps"] == 80
    assert "license: cc-by-sa-3.0" in (out / "README.md").read_text()
    report = read_json(out / "budget.json")
    assert report["ledger_seconds"]["lost"] > 1.0, "starting again takes seconds, and they count"
    assert sum(report["ledger_seconds"].values()) == pytest.approx(report["spent"]["seconds"], rel=0.01)


def test_a_signal_before_the_first_step_says_run_me_again(texts, tmp_path):
    """While the text is prepared there is nothing to save: the program ends at once, with nothing half-written."""
    many, out, log = tmp_path / "many.txt", tmp_path / "run", tmp_path / "log"
    many.write_text("\n\n".join(text + f" {number}" for number in range(40) for text in texts))
    environment = {**os.environ, "ONEDAY_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    argv = flags(**SMALL, dataset_name=many, output_dir=out)
    with open(log, "w") as handle:
        process = subprocess.Popen(
            [sys.executable, "scripts/pretrain.py", *argv], cwd=ROOT, env=environment, stderr=handle
        )
    deadline = time.monotonic() + 120
    while "Training a wordpiece tokenizer" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 75, log.read_text()
    assert "SIGUSR1 came while nothing was being trained; run the same command again." in log.read_text()
    assert "Traceback" not in log.read_text()
    assert not out.exists()


def test_the_program_evaluate_does_not_hide_the_library():
    code = "import oneday, evaluate; assert callable(evaluate.load)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    path = ROOT / "scripts" / "evaluate.py"
    program = f"import sys; sys.path[0] = {str(path.parent)!r}; {code}"
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_prepare_data_fills_the_cache(run_script, text_file, tmp_path):
    settings = {key: SMALL[key] for key in ("vocab_size", "max_seq_length", "validation_fraction")}
    code, shown, _ = run_script("prepare_data", *flags(**settings, dataset_name=text_file))
    assert code == 0
    assert re.search(r"train +2\d\d documents", shown)
    assert list((tmp_path / "cache" / "packed").rglob("index.json"))
    code, shown, _ = run_script("prepare_data", *flags(**settings, dataset_name=text_file, shard=1, num_shards=2))
    assert code == 0
    assert re.fullmatch(r"part +\S+/part-00001-of-00002.arrow\n", shown)


def test_prepare_data_reads_a_stream_in_the_order_of_the_run(run_script, text_file, monkeypatch):
    def prepare_data(args, kind, seed):
        raise SettingError(f"prepared in order {seed}")

    monkeypatch.setattr("oneday.preparation.prepare_data", prepare_data)
    code, _, said = run_script("prepare_data", *flags(dataset_name=text_file, seed=1, data_seed=7))
    assert code == 1 and "prepared in order 7" in said


def test_prepare_data_says_that_datatrove_is_not_here(run_script, text_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove.executor", None)
    monkeypatch.delitem(sys.modules, "oneday.datatrove_tasks", raising=False)
    code, _, stderr = run_script("prepare_data", *flags(dataset_name=text_file, executor="local", tasks=2))
    assert code == 1
    assert re.search(r"error: The setting executor needs .*: pip install datatrove, or leave it out\.", stderr)
    code, _, stderr = run_script("prepare_data", *flags(dataset_name=text_file, executor="local", shard=0))
    assert code == 1
    assert "shard is 0 and executor local; keep one of them" in stderr
    code, _, stderr = run_script("prepare_data", *flags(dataset_name=text_file, tasks=2))
    assert code == 1
    assert "tasks is 2, but executor is empty" in stderr


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "scripts").glob("*.py")))
def test_every_program_only_assembles(name):
    assert len((ROOT / "scripts" / f"{name}.py").read_text().splitlines()) < 150


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "scripts").glob("*.py")))
def test_every_program_has_help_with_an_example(run_script, name):
    code, shown, _ = run_script(name, "--help")
    assert code == 0
    assert f"scripts/{name}.py" in shown
    assert max(map(len, shown.splitlines())) <= 80
