"""Fine-tuning from a checkpoint to scores: what is learnt, kept, repeated and refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import transformers
from classifiers import make_args
from conftest import ROOT
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from oneday import finetuning_processes
from oneday.classification import build_classifier, load_checkpoint, silence_libraries
from oneday.errors import SettingError
from oneday.finetuning import prepare_task, run_protocol
from oneday.finetuning_run import (
    build_trainer,
    measure_run,
    predict_splits,
    put_in_place,
    score_splits,
    train_classifier,
)


def test_separable_task_is_learnt_and_the_results_have_their_form(bert, data_dir, tmp_path):
    args = make_args(bert, data_dir, tmp_path, num_seeds=2, random_baseline=True)
    results = run_protocol(args)
    entry = results["tasks"]["sst2"]
    assert entry["median"] > 0.9 and len(entry["scores"]) == 2
    assert entry["metric"] == "accuracy" and entry["majority"] == 0.5
    assert len(entry["random_weights"]["scores"]) == 2
    assert entry["subset"] and (entry["num_train"], entry["official_num_train"]) == (160, 67349)
    assert results["average"] == entry["median"] and results["average_over"] == ["sst2"]
    assert results["average_name"] == "average of sst2"
    assert results["protocol"] == "test"
    written = json.loads((tmp_path / "out" / "glue_results.json").read_text())
    assert written == results


def test_mixed_precision_of_an_accelerate_config_changes_nothing(bert, data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    args, checkpoint = make_args(bert, data_dir, tmp_path, bf16=False), load_checkpoint(bert)
    task = prepare_task("sst2", args, checkpoint)
    trainer = build_trainer(build_classifier(checkpoint, task.task, None, 0, False), checkpoint, task, args, 0)
    assert not trainer.accelerator.native_amp


def test_finished_runs_are_not_run_again(bert, data_dir, tmp_path, monkeypatch):
    args = make_args(bert, data_dir, tmp_path, num_train_epochs=1)
    first = run_protocol(args)
    started = []

    def count_runs(*arguments):
        started.append(arguments)
        return measure_run(*arguments)

    monkeypatch.setattr(finetuning_processes, "measure_run", count_runs)
    # A crash in the middle of a line must not lose the lines before it.
    with (tmp_path / "out" / "glue_runs.jsonl").open("a") as file:
        file.write('{"task": "sst2", "se')
    assert run_protocol(args) == first and not started
    run_protocol(dataclasses.replace(args, num_seeds=2))
    assert len(started) == 1
    run_protocol(dataclasses.replace(args, num_seeds=2))
    assert len(started) == 1, "the line after the cut one is whole"
    run_protocol(dataclasses.replace(args, learning_rate=1e-3))
    assert len(started) == 2
    shutil.copytree(bert, tmp_path / "moved")
    moved = dataclasses.replace(args, model_name_or_path=str(tmp_path / "moved"))
    run_protocol(moved)
    assert len(started) == 2, "the same model elsewhere"
    tokenizer = json.loads((tmp_path / "moved" / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "moved" / "tokenizer.json").write_text(json.dumps(tokenizer))
    run_protocol(moved)
    assert len(started) == 3, "the same words, read otherwise"
    monkeypatch.setattr("oneday.glue_results.choose_pad_multiple", lambda args: 8)  # as where there is a GPU
    run_protocol(args)
    assert len(started) == 4, "other lengths draw other dropout"


def test_a_finished_run_is_put_in_place_whole(tmp_path):
    """What lies there is of the same run: its model stays where there is no new one."""
    for name, content in (("run", "old"), (".run", "new")):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "validation.parquet").write_text(content)
        (tmp_path / name / "model" / "config.json").write_text(content)
    shutil.rmtree(tmp_path / ".run" / "model")
    put_in_place(tmp_path / ".run", tmp_path / "run")
    assert not (tmp_path / ".run").exists()
    assert (tmp_path / "run" / "validation.parquet").read_text() == "new"
    assert (tmp_path / "run" / "model" / "config.json").read_text() == "old"
    (tmp_path / ".run" / "model").mkdir(parents=True)
    (tmp_path / ".run" / "model" / "adapter_config.json").write_text("new")
    put_in_place(tmp_path / ".run", tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "model").iterdir()] == ["adapter_config.json"]
    (tmp_path / ".other").mkdir()
    put_in_place(tmp_path / ".other", tmp_path / "other")
    assert (tmp_path / "other").is_dir()


def test_seed_decides_everything(bert, data_dir, tmp_path):
    args = make_args(
        bert, data_dir, tmp_path, num_train_epochs=1, dropout=0.1, max_train_examples=32, task_names=["stsb"],
        bf16=False,  # two steps of training leave outputs that bfloat16 rounds to one value
    )  # fmt: skip
    checkpoint = load_checkpoint(bert)
    task = prepare_task("stsb", args, checkpoint)

    def score(checkpoint, seed, from_random=False):
        trainer = train_classifier(checkpoint, task, args, seed, from_random)
        return score_splits(task, predict_splits(trainer, task))

    first, again, other = (score(checkpoint, seed) for seed in (0, 0, 1))
    assert first == again and first != other
    assert score(load_checkpoint(bert), 0) == first
    assert score(checkpoint, 0, from_random=True) != first


def test_bars_stay_as_they_were():
    shows = transformers.logging.is_progress_bar_enabled()
    try:
        for is_shown in (False, True):
            (transformers.logging.enable_progress_bar if is_shown else transformers.logging.disable_progress_bar)()
            with silence_libraries():
                assert not transformers.logging.is_progress_bar_enabled()
            assert transformers.logging.is_progress_bar_enabled() == is_shown
    finally:
        (transformers.logging.enable_progress_bar if shows else transformers.logging.disable_progress_bar)()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_name_or_path": ""}, "model_name_or_path is empty"),
        ({"model_name_or_path": "no/such/place", "output_dir": None}, "no/such/place is not a local directory"),
        ({"task_names": ["sst"]}, "'sst'"),
        ({"task_names": []}, "task_names is empty"),
        ({"task_names": ["rte"]}, "has no folder rte"),
        ({"num_seeds": 0}, "num_seeds is 0"),
        ({"num_train_epochs": -1.0}, "num_train_epochs is -1.0"),
        ({"warmup_fraction": 1.5}, "warmup_fraction is 1.5"),
        ({"adam_beta1": 1.5}, "adam_beta1 is 1.5"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"peft": "lora", "protocol": "probe"}, "protocol is probe and peft is 'lora'"),
        ({"protocol": "tuned", "tuned_epochs": [0.0]}, "tuned_epochs must hold numbers above 0"),
        ({"protocol": "tuned", "tuned_epochs": []}, "tuned_epochs must hold numbers above 0"),
        ({"protocol": "tuned", "seed": 2**32 - 2, "num_seeds": 1}, "with num_seeds and 5 for the trials, below 2^32"),
        ({"protocol": "tunned"}, "protocol is 'tunned'; take 'tuned'"),
        ({"protocol": "Probe"}, "take 'probe'"),
        ({"peft": "loha"}, "peft is 'loha'; it must be one of lora, dora, qlora"),
        ({"merge_adapters": True, "save_models": True}, "merge_adapters is on and peft is empty"),
        ({"lr_scheduler_type": "triangle"}, "'triangle'"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "'reduce_lr_on_plateau'"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32 - 1, "num_seeds": 2}, "below 2^32"),
        ({"task_name": "rte"}, "task_name is 'rte' and task_file is empty (task_names has the known tasks)"),
        ({"metric": "f1"}, "metric is 'f1' and task_file is empty"),
        ({"tuned_epochs": [2.0]}, "tuned_epochs is [2.0] and protocol is test"),
        ({"lora_rank": 16}, "lora_rank is 16 and peft is empty"),
    ],
)
def test_bad_settings_get_one_sentence_and_write_nothing(bert, data_dir, tmp_path, changes, words):
    args = make_args(bert, data_dir, tmp_path, **changes)
    with pytest.raises(SettingError) as caught:
        run_protocol(args)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_written_is_said_before_anything_is_read(bert, data_dir, tmp_path, monkeypatch):
    (tmp_path / "out").write_text("a file")
    monkeypatch.setattr("oneday.finetuning.load_checkpoint", None)
    with pytest.raises(SettingError, match="output_dir is '.*out', which cannot be written .out is a file."):
        run_protocol(make_args(bert, data_dir, tmp_path))


def test_a_full_disk_is_one_sentence(bert, data_dir, tmp_path, monkeypatch):
    def fill_disk(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("oneday.finetuning_run.write_predictions", fill_disk)
    args = make_args(bert, data_dir, tmp_path, num_train_epochs=1, max_train_examples=16, max_eval_examples=8)
    with pytest.raises(SettingError, match="The disk of output_dir .*out is full"):
        run_protocol(args)


def test_run_finetune_from_elsewhere(bert, data_dir):
    """The shell script takes a relative model from the caller's directory, passes flags on, and prints the table."""
    model = Path(bert)
    command = [
        str(ROOT / "run_finetune.sh"),
        model.name,
        "sst2",
        "--task-data-dir",  # the parser takes either
        os.path.relpath(data_dir, model.parent),
    ]
    command += ["--num_seeds", "1", "--num_train_epochs", "1", "--max_train_examples", "16", "--use_cpu"]
    done = subprocess.run(command, cwd=model.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sst2*" in done.stdout and max(map(len, done.stdout.splitlines()[:-1])) <= 80
    results = json.loads((model / "glue" / "glue_results.json").read_text())
    assert results["protocol"] == "custom" and results["tasks"]["sst2"]["num_train"] == 16
    done = subprocess.run([*command, "--task-file=mine.csv"], cwd=model.parent, capture_output=True, text=True)
    assert done.returncode == 1 and "The tasks sst2 and --task_file are given" in done.stderr


def test_an_architecture_that_does_not_run_in_bfloat16_is_one_sentence(bert, data_dir, tmp_path):
    """DeBERTa masks with the least number of float32; in float32 it trains."""
    tokenizer = AutoTokenizer.from_pretrained(bert)
    config = AutoConfig.for_model(
        "deberta", vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    folder = tmp_path / "deberta"
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    args = make_args(str(folder), data_dir, tmp_path, num_train_epochs=1, bf16=True)
    with pytest.raises(SettingError, match="A deberta model does not run in bfloat16 .*; set bf16 to false"):
        run_protocol(args)
    assert run_protocol(dataclasses.replace(args, bf16=False))["tasks"]["sst2"]["scores"]
