from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import logging
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from classifiers import make_args, make_mrpc, make_texts, save_decoder, write_task
from conftest import ENCODERS, ROOT, UNPACKED
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    BertForSequenceClassification,
    EsmTokenizer,
    NanoChatConfig,
    NanoChatForCausalLM,
    PreTrainedTokenizerFast,
)

from oneday import finetuning_processes
from oneday import tuning as tuning_protocol
from oneday.adapters import save_classifier
from oneday.arguments import SettingError
from oneday.classification import (
    PreparedTask,
    build_classifier,
    encode_batch,
    limit_length,
    load_checkpoint,
    pad_batch,
    set_dropout,
    silence_libraries,
)
from oneday.finetuning import prepare_task, run_protocol
from oneday.finetuning_run import (
    ClassificationTrainer,
    build_trainer,
    measure_run,
    predict_splits,
    put_in_place,
    score_splits,
    train_classifier,
)
from oneday.glue import find_task
from oneday.glue_picture import count_confusions, draw_results
from oneday.glue_protocol import (
    FinetuneArguments,
    check_arguments,
    complete_arguments,
    name_protocol,
    warn_of_unread,
)
from oneday.glue_results import hash_run
from oneday.recipe import parse_recipe
from oneday.tuning import choose_setting, hold_out, plan_trials, spread_grid


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


def test_a_batch_is_as_long_as_its_longest_row(bert, data_dir, tmp_path, monkeypatch):
    """On a CPU: there a multiple of 8 is only more to compute."""
    batches, step = [], ClassificationTrainer.training_step

    def record_batch(trainer, model, inputs, *rest):
        batches.append(inputs["attention_mask"])
        return step(trainer, model, inputs, *rest)

    monkeypatch.setattr(ClassificationTrainer, "training_step", record_batch)
    run_protocol(make_args(bert, data_dir, tmp_path, num_train_epochs=1))
    assert all(mask.sum(1).max() == mask.shape[1] for mask in batches)
    assert any(mask.shape[1] % 8 for mask in batches)


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


def test_a_later_task_joins_the_earlier_ones_only_under_the_same_settings(bert, data_dir, tmp_path):
    """And the same inputs; of a task that is scored again on fewer splits none stays from before."""
    args = make_args(bert, data_dir, tmp_path, num_train_epochs=1, max_train_examples=16, max_eval_examples=8)
    run_protocol(args)
    assert list(run_protocol(dataclasses.replace(args, task_names=["stsb"]))["tasks"]) == ["sst2", "stsb"]
    other = dataclasses.replace(args, task_names=["stsb"], learning_rate=1e-4)
    assert list(run_protocol(other)["tasks"]) == ["stsb"]
    shutil.copytree(data_dir / "mnli", tmp_path / "both" / "mnli")
    matched = tmp_path / "both" / "mnli" / "validation_matched.jsonl"
    shutil.copy(matched, matched.with_name("validation_mismatched.jsonl"))
    of_mnli = dataclasses.replace(other, task_names=["mnli"], task_data_dir=str(tmp_path / "both"))
    assert list(run_protocol(of_mnli)["tasks"]) == ["stsb", "mnli_matched", "mnli_mismatched"]
    less = dataclasses.replace(of_mnli, task_data_dir=str(data_dir))
    assert list(run_protocol(less)["tasks"]) == ["stsb", "mnli_matched"]
    copy = shutil.copytree(bert, tmp_path / "copy")
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer | {"normalizer": {"type": "Lowercase"}}))
    assert list(run_protocol(dataclasses.replace(other, model_name_or_path=str(copy)))["tasks"]) == ["stsb"]


def test_each_number_says_on_which_machines_its_runs_were_made(bert, data_dir, tmp_path, monkeypatch):
    """Those of a finished run are not those of the call that reads it."""
    args = make_args(bert, data_dir, tmp_path, num_train_epochs=1, max_train_examples=16, max_eval_examples=8)
    first = run_protocol(args)["tasks"]["sst2"]["environments"]
    describe = finetuning_processes.describe_environment
    monkeypatch.setattr(
        finetuning_processes, "describe_environment", lambda device: describe(device) | {"commit": "another"}
    )
    assert run_protocol(args)["tasks"]["sst2"]["environments"] == first
    both = run_protocol(dataclasses.replace(args, num_seeds=2))["tasks"]["sst2"]["environments"]
    assert both == [*first, first[0] | {"commit": "another"}]
    kept = run_protocol(dataclasses.replace(args, num_seeds=2, task_names=["stsb"]))["tasks"]
    assert kept["sst2"]["environments"] == both and kept["stsb"]["environments"] == both[1:]


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


def test_classifier_holds_the_checkpoint_and_a_head_of_the_seed(bert):
    checkpoint = load_checkpoint(bert)
    saved = BertForMaskedLM.from_pretrained(bert).state_dict()
    models = [build_classifier(checkpoint, find_task("mnli"), 0.1, seed, False) for seed in (0, 0, 1)]
    states = [model.state_dict() for model in models]
    name = "bert.encoder.layer.1.output.dense.weight"
    assert all(torch.equal(state[name], saved[name]) for state in states)
    for head in ("classifier.weight", "bert.pooler.dense.weight"):
        assert torch.equal(states[0][head], states[1][head]) and not torch.equal(states[0][head], states[2][head])
    assert states[0]["classifier.weight"].shape == (3, 32)
    random = build_classifier(checkpoint, find_task("mnli"), 0.1, 0, True).state_dict()
    assert not torch.equal(random[name], saved[name])
    assert models[0].config.hidden_dropout_prob == models[0].config.attention_probs_dropout_prob == 0.1


@pytest.mark.parametrize("old_task", ["mnli", "cola"])
def test_a_checkpoint_of_another_task_begins_with_a_new_head(bert, tmp_path, old_task):
    """Whether or not the old one has as many classes; what was pretrained stays, the pooler too."""
    start = load_checkpoint(bert)
    old = build_classifier(start, find_task(old_task), 0.0, 7, False)
    old.save_pretrained(tmp_path)
    start.tokenizer.save_pretrained(tmp_path)
    checkpoint = load_checkpoint(str(tmp_path))
    states = [build_classifier(checkpoint, find_task("cola"), 0.0, seed, False).state_dict() for seed in (0, 1)]
    assert not torch.equal(states[0]["classifier.weight"], states[1]["classifier.weight"])
    assert all(not torch.equal(state["classifier.weight"], old.classifier.weight) for state in states)
    for name in ("bert.pooler.dense.weight", "bert.encoder.layer.0.output.dense.weight"):
        assert all(torch.equal(state[name], old.state_dict()[name]) for state in states)


@pytest.mark.parametrize(
    ("config", "kept", "dropped"),
    [
        (transformers.ModernBertConfig, {"head.dense.weight", "head.norm.weight"}, {"classifier.weight"}),
        (transformers.ElectraConfig, set(), {"classifier.dense.weight", "classifier.out_proj.weight"}),
        (transformers.Qwen3Config, set(), {"score.weight"}),
    ],
)
def test_of_a_classifier_the_layers_that_words_trained_stay(bert, tmp_path, config, kept, dropped):
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    grouped = {"num_key_value_heads": 2, "head_dim": 16} if config is transformers.Qwen3Config else {}
    config = config(vocab_size=120, pad_token_id=0, num_labels=2, **small, **grouped)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
    weights = set(load_checkpoint(str(tmp_path)).weights)
    assert kept <= weights and not dropped & weights and len(weights) > 8


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (transformers.GPT2Config(), "resid_pdrop embd_pdrop attn_pdrop summary_first_dropout"),
        (transformers.ModernBertConfig(), "attention_dropout embedding_dropout mlp_dropout classifier_dropout"),
        (transformers.DistilBertConfig(), "dropout attention_dropout seq_classif_dropout"),
        (transformers.AlbertConfig(), "hidden_dropout_prob attention_probs_dropout_prob classifier_dropout_prob"),
        (transformers.LlamaConfig(), "attention_dropout"),
    ],
)
def test_dropout_reaches_every_field(config, fields):
    set_dropout(config, 0.123)
    assert [getattr(config, name) for name in fields.split()] == [0.123] * len(fields.split())


def test_decoder_without_padding_token(gpt, data_dir, tmp_path):
    args = make_args(gpt, data_dir, tmp_path, task_names=["sst2", "mnli"], max_seq_length=48)
    results = run_protocol(args)
    assert results["tasks"]["sst2"]["median"] > 0.9
    assert list(results["tasks"]) == ["sst2", "mnli_matched"]


def test_decoder_pairs_are_marked_and_nothing_is_empty(gpt):
    checkpoint = load_checkpoint(gpt)
    batch = {"sentence1": ["good " * 50, ""], "sentence2": ["bad", ""]}
    encoded = encode_batch(batch, find_task("rte"), checkpoint, max_length=20)
    end = checkpoint.tokenizer.eos_token_id
    assert [len(ids) for ids in encoded["input_ids"]] == encoded["length"] == [20, 1]
    assert encoded["input_ids"][0].count(end) == 1 and "token_type_ids" not in encoded
    assert checkpoint.tokenizer.decode(encoded["input_ids"][0]).endswith("<|end|>bad")
    single = encode_batch({"sentence": [""]}, find_task("sst2"), checkpoint, max_length=20)
    assert single == {"input_ids": [[end]], "attention_mask": [[1]], "length": [1]}


def test_encoder_pairs_have_types_and_copas_choices_are_told_apart(bert):
    checkpoint = load_checkpoint(bert)
    encoded = encode_batch({"sentence1": ["good film"], "sentence2": ["bad"]}, find_task("rte"), checkpoint, 16)
    assert encoded["token_type_ids"] == [[0, 0, 0, 0, 1, 1]]
    batch = {"premise": ["good"], "question": ["film"], "choice1": ["bad"], "choice2": ["story"]}
    copa = encode_batch(batch, find_task("copa"), checkpoint, 16)
    assert checkpoint.tokenizer.decode(copa["input_ids"][0]) == "[CLS] good film [SEP] bad [SEP] story [SEP]"


def test_positions_bound_the_length(bert, caplog):
    checkpoint = load_checkpoint(bert)
    with caplog.at_level(logging.INFO):
        assert limit_length(128, checkpoint, find_task("rte")) == 32
    assert "32 positions" in caplog.text and limit_length(16, checkpoint, find_task("rte")) == 16
    assert limit_length(128, dataclasses.replace(checkpoint, num_positions=None), find_task("rte")) == 128


def test_a_length_that_holds_no_word_is_refused(bert):
    """[CLS] and [SEP] beside a text, and another [SEP] beside a pair of them."""
    checkpoint = load_checkpoint(bert)
    assert limit_length(3, checkpoint, find_task("sst2")) == 3 and limit_length(5, checkpoint, find_task("rte")) == 5
    for length, task in ((2, "sst2"), (4, "rte")):
        with pytest.raises(SettingError, match=f"max_seq_length is {length}, and . special tokens go to every row"):
            limit_length(length, checkpoint, find_task(task))


def test_a_text_that_spells_a_special_token_is_ordinary_text(bert):
    checkpoint = load_checkpoint(bert)
    encoded = encode_batch({"sentence": ["good [SEP] film [MASK]"]}, find_task("sst2"), checkpoint, 16)
    (ids,) = encoded["input_ids"]
    assert [id in checkpoint.tokenizer.all_special_ids for id in (ids[0], ids[-1])] == [True, True]
    assert ids.count(checkpoint.tokenizer.sep_token_id) == 1 and checkpoint.tokenizer.mask_token_id not in ids


def test_a_padded_batch_stays_within_the_positions(bert):
    """32 positions: a GPU's multiple of 24 would make 48 of 30 tokens."""
    checkpoint = load_checkpoint(bert)
    rows = [{"input_ids": [5] * n, "attention_mask": [1] * n, "label": 1, "row": 0, "length": n} for n in (30, 7)]
    for multiple, lengths in ((24, (32, 24)), (None, (30, 7)), (8, (32, 8))):
        for chosen, length in zip((rows, rows[1:]), lengths):
            batch = pad_batch(chosen, checkpoint, multiple)
            assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(chosen), length)
            assert batch["attention_mask"].sum(1).tolist() == [row["length"] for row in chosen]
            assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_protocol_keeps_its_name_only_with_its_settings():
    assert name_protocol(FinetuneArguments()) == "cramming"
    assert name_protocol(FinetuneArguments(random_baseline=True, seed=7)) == "cramming"
    assert name_protocol(FinetuneArguments(learning_rate=1e-4)) == "custom"
    assert name_protocol(FinetuneArguments(num_seeds=3)) == "custom"
    assert name_protocol(FinetuneArguments(peft="lora")) == "custom"
    assert name_protocol(FinetuneArguments(protocol="tuned", num_train_epochs=7)) == "tuned"  # chosen, not given
    assert name_protocol(FinetuneArguments(protocol="tuned", tuned_epochs=[4.0])) == "custom tuned"
    assert name_protocol(FinetuneArguments(protocol="probe")) == "probe"
    assert name_protocol(FinetuneArguments(protocol="probe", num_train_epochs=7)) == "custom probe"
    assert name_protocol(FinetuneArguments(learning_rate=1e-4, protocol="quickstart")) == "quickstart"


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


def test_what_a_protocol_takes_no_notice_of_is_said(caplog):
    warn_of_unread(FinetuneArguments(protocol="tuned", tuned_learning_rates=[1e-4], dropout=0.3))
    warn_of_unread(FinetuneArguments(protocol="probe", learning_rate=1e-3, num_train_epochs=7))
    warn_of_unread(FinetuneArguments(learning_rate=1e-3, num_train_epochs=7, dropout=0.3))
    assert not caplog.messages
    warn_of_unread(FinetuneArguments(protocol="tuned", learning_rate=1e-6, num_train_epochs=1))
    warn_of_unread(FinetuneArguments(protocol="probe", dropout=0.3))
    assert caplog.messages == [
        "protocol tuned ignores learning_rate 1e-06: it chooses from tuned_learning_rates",
        "protocol tuned ignores num_train_epochs 1: it chooses from tuned_epochs",
        "protocol probe ignores dropout 0.3: the encoder is frozen",
    ]


@pytest.mark.parametrize(
    ("recipe", "protocol"), [("glue/finetune.yaml", "cramming"), ("quickstart/finetune.yaml", "quickstart")]
)
def test_recipes_parse_and_name_their_hardware(recipe, protocol):
    path = ROOT / "recipes" / recipe
    (args,) = parse_recipe((FinetuneArguments,), [str(path), "--model_name_or_path", "m", "--output_dir", "o"])
    assert check_arguments(args)
    assert name_protocol(args) == protocol
    assert path.read_text().startswith("# For ")


def test_tuned_settings_are_chosen_on_training_rows_and_recorded(bert, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning_protocol, "ENOUGH_HELD_OUT", 100)
    # A learning rate of next to nothing cannot be chosen over one that learns, whatever validation would say.
    write_task(tmp_path / "tasks", "sst2", make_texts(160), make_texts(60))
    write_task(tmp_path / "tasks", "mrpc", make_mrpc(250), make_mrpc(20))
    args = make_args(
        bert, tmp_path / "tasks", tmp_path, protocol="tuned", tuned_learning_rates=[1e-9, 3e-3], tuned_epochs=[6.0],
        task_names=["sst2", "mrpc"], random_baseline=True, seed=7,
    )  # fmt: skip
    tasks = run_protocol(args)["tasks"]
    for name, size, num_parts in (("sst2", 32, 4), ("mrpc", 50, 2)):
        for kind in ("pretrained", "random"):
            tuning = tasks[name]["tuning"][kind]
            assert tuning["chosen"] == {"learning_rate": 3e-3, "num_train_epochs": 6.0}
            assert tuning["num_held_out"] == size and tuning["seeds"] == [8 + part for part in range(num_parts)]
            assert [len(point["scores"]) for point in tuning["grid"]] == [num_parts] * 2
        tuning = tasks[name]["tuning"]["pretrained"]
        assert [point["score"] > 0.9 for point in tuning["grid"]] == [False, True] and tasks[name]["median"] > 0.9
    runs = [json.loads(line) for line in (tmp_path / "out" / "glue_runs.jsonl").read_text().splitlines()]
    # Every trial's score stands in the record of its own task and weights, in its own place.
    for name, kind in itertools.product(tasks, ("pretrained", "random")):
        mine = [run for run in runs if (run["task"], run["weights"]) == (name, kind) and run["seed"] > 7]
        found = [score for point in tasks[name]["tuning"][kind]["grid"] for score in point["scores"]]
        assert found == [run["scores"][name][tasks[name]["metric"]] for run in mine]
    assert len(runs) == 2 * 2 * (4 + 2) + 4 and [run["seed"] for run in runs[-4:]] == [7] * 4
    settings = json.loads((tmp_path / "out" / "glue_results.json").read_text())["settings"]
    assert settings["tuned_learning_rates"] == [1e-9, 3e-3] and settings["learning_rate"] is None


def test_too_few_rows_to_choose_by_are_refused_before_anything_is_written(bert, data_dir, tmp_path):
    args = make_args(bert, data_dir, tmp_path, protocol="tuned", max_train_examples=9)
    with pytest.raises(SettingError, match="sst2 has 9 training rows; it holds a fifth of them out .* needs 10"):
        run_protocol(args)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("num_rows", [40, 560, 8551])
def test_trials_make_as_many_steps_as_the_runs_that_they_stand_for(num_rows):
    args = FinetuneArguments(protocol="tuned", tuned_learning_rates=[1e-5, 2e-5], tuned_epochs=[2.0, 5.0], seed=3)
    rows = Dataset.from_dict({"row": range(num_rows), "label": [0] * num_rows})
    task = PreparedTask(find_task("rte"), {"train": rows}, "hash")
    points, parts = spread_grid(args), hold_out(task)
    trials = plan_trials(args, points, task, parts)
    assert [trial[0] for trial in trials] == parts * 4
    assert [trial[2] for trial in trials] == [8 + number for number in range(len(parts))] * 4  # after 3 to 7
    for (part, settings, _), point in zip(trials, (point for point in points for _ in parts), strict=True):
        rows_seen = settings.num_train_epochs * len(part.splits["train"])
        assert rows_seen == pytest.approx(point.num_train_epochs * num_rows)
        assert settings.learning_rate == point.learning_rate and not settings.save_models


def test_best_mean_is_chosen_and_of_equal_ones_the_first():
    """Not the best first part, nor the best single one, nor the best median."""
    args = FinetuneArguments(protocol="tuned", tuned_learning_rates=[1e-5, 2e-5, 3e-5, 4e-5, 5e-5], tuned_epochs=[2.0])
    rows = Dataset.from_dict({"row": range(2000), "label": [0] * 2000})
    parts = hold_out(PreparedTask(find_task("rte"), {"train": rows}, "hash"))
    scores = [[0.75, 0.25, 0.25], [0.5, 0.625, 0.75], [0.25, 1.0, 0.25], [0.5, 0.75, 0.625], [0.0, 0.6875, 0.6875]]
    lines = [
        {"scores": {"rte": {"accuracy": score}}, "seed": 3, "diverged": False} for point in scores for score in point
    ]
    chosen, record = choose_setting(args, parts, spread_grid(args), lines)
    assert chosen.learning_rate == record["chosen"]["learning_rate"] == 2e-5 and chosen.num_train_epochs == 2.0
    assert [point["scores"] for point in record["grid"]] == scores and record["grid"][1]["score"] == 0.625
    assert record["seeds"] == [3, 3, 3]
    lines[4]["diverged"] = True  # one part of the best
    _, record = choose_setting(args, parts, spread_grid(args), lines)
    assert record["chosen"]["learning_rate"] == 4e-5 and record["grid"][1]["score"] == 0.625
    assert [point["diverged"] for point in record["grid"]] == [False, True, False, False, False]
    for wrong in (lines[:-1], lines + lines[:1]):
        with pytest.raises(ValueError, match="zip"):
            choose_setting(args, parts, spread_grid(args), wrong)


def test_answers_are_kept_in_the_order_of_the_rows_and_submitted(bert, data_dir, tmp_path):
    folder = tmp_path / "tasks" / "sst2"
    shutil.copytree(data_dir / "sst2", folder)
    texts = [row["sentence"] + " town" * (index % 9) for index, row in enumerate(make_texts(60))]  # of many lengths
    truth = [index % 2 for index in range(60)]
    for split, labels in (("validation", truth), ("test", [-1] * 60)):
        rows = [{"sentence": text, "label": label} for text, label in zip(texts, labels)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = make_args(bert, tmp_path / "tasks", tmp_path, max_eval_examples=50)
    median = run_protocol(dataclasses.replace(args, save_models=True))["tasks"]["sst2"]["median"]
    (path,) = (tmp_path / "out" / "runs").glob("*/validation.parquet")
    kept = pq.read_table(path).to_pydict()
    assert len(set(kept["row"])) == 50 and [truth[row] for row in kept["row"]] == kept["label"]
    right = [label == answer for label, answer in zip(kept["label"], kept["prediction"])]
    assert sum(right) / 50 == pytest.approx(median) and median > 0.9
    counts = count_confusions([path], 2)
    assert counts.sum() == 50 and np.trace(counts) == sum(right)
    assert (tmp_path / "out" / "glue_results.png").stat().st_size > 10_000
    # The finished run has no answers to the test split yet: asked for these, it is run again.
    asked = dataclasses.replace(args, write_submission=True, random_baseline=True)
    entry = run_protocol(asked)["tasks"]["sst2"]
    assert entry["submission"] == {"seed": 0, "files": ["SST-2.tsv"]}
    assert (path.parent / "model" / "config.json").exists(), "the model kept before"
    (random,) = (tmp_path / "out" / "runs").glob("sst2-random-*")
    assert [file.name for file in random.iterdir()] == ["validation.parquet"]
    lines = (tmp_path / "out" / "submission" / "SST-2.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction" and [line.split("\t")[0] for line in lines[1:]] == [*map(str, range(60))]
    answers = [int(line.split("\t")[1]) for line in lines[1:]]
    assert sum(answer == label for answer, label in zip(answers, truth)) / 60 > 0.9
    # Other test rows under the same name are answered anew.
    (folder / "test.jsonl").write_text(json.dumps({"sentence": texts[0], "label": -1}) + "\n")
    run_protocol(asked)
    assert (tmp_path / "out" / "submission" / "SST-2.tsv").read_text() == "\n".join(lines[:2]) + "\n"
    # All files of a submission are of one table of scores; what is not of it is not taken away.
    for name in ("RTE.tsv", "notes.txt"):
        (tmp_path / "out" / "submission" / name).write_text("mine")
    run_protocol(asked)
    assert (tmp_path / "out" / "submission" / "RTE.tsv").exists()
    other = dataclasses.replace(asked, learning_rate=1e-3, num_train_epochs=1)
    run_protocol(dataclasses.replace(other, write_submission=False))
    run_protocol(other)
    assert {path.name for path in (tmp_path / "out" / "submission").iterdir()} == {"SST-2.tsv", "notes.txt"}
    # A merged model too is kept where the same run is asked for its answers alone.
    lora = dataclasses.replace(args, peft="lora", output_dir=str(tmp_path / "lora"))
    run_protocol(dataclasses.replace(lora, save_models=True, merge_adapters=True))
    run_protocol(dataclasses.replace(lora, write_submission=True))
    assert (tmp_path / "lora" / "submission" / "SST-2.tsv").is_file()
    assert len(list((tmp_path / "lora" / "runs").glob("*/model/config.json"))) == 1


def test_a_task_without_test_rows_is_left_out_of_the_submission(bert, data_dir, tmp_path, caplog):
    tasks = tmp_path / "tasks"
    shutil.copytree(data_dir, tasks)
    shutil.copy(tasks / "sst2" / "validation.jsonl", tasks / "sst2" / "test.jsonl")
    shared = {"num_train_epochs": 1, "max_train_examples": 16, "write_submission": True, "num_seeds": 2, "seed": 3}
    results = run_protocol(make_args(bert, tasks, tmp_path, task_names=["stsb", "sst2"], **shared))
    assert caplog.text.count("write_submission: stsb has no split test") == 1
    assert [path.name for path in (tmp_path / "out" / "submission").iterdir()] == ["SST-2.tsv"]
    assert "submission" not in results["tasks"]["stsb"]
    entry = results["tasks"]["sst2"]
    lower = entry["seeds"][entry["scores"].index(min(entry["scores"]))]
    assert entry["submission"] == {"seed": lower, "files": ["SST-2.tsv"]}
    args = make_args(bert, tasks, tmp_path, task_names=["stsb"], output_dir=str(tmp_path / "none"), **shared)
    with pytest.raises(SettingError, match="no task of task_names has a test split"):
        run_protocol(args)
    assert not (tmp_path / "none").exists()


def test_held_out_rows_are_not_trained_on(bert, data_dir, tmp_path):
    task = prepare_task("sst2", make_args(bert, data_dir, tmp_path), load_checkpoint(bert))
    parts, everything = hold_out(task), set(task.splits["train"]["row"])
    assert len({part.data_hash for part in parts} | {task.data_hash}) == 6
    for part in parts:
        trained, held_out = (part.splits[split]["row"] for split in ("train", "held_out"))
        assert (len(trained), len(held_out)) == (128, 32) and {*trained, *held_out} == everything
        assert list(part.splits) == ["train", "held_out"] and part.scored_splits == ["held_out"]
    assert {row for part in parts for row in part.splits["held_out"]["row"]} == everything  # five parts of a fifth


@pytest.mark.parametrize(
    "num_rows, num_parts, size",
    [(10, 5, 2), (560, 5, 112), (2490, 3, 498), (3668, 2, 733), (8551, 1, 1710), (67349, 1, 2000)],
)
def test_small_tasks_hold_several_parts_out(num_rows, num_parts, size):
    rows = Dataset.from_dict({"row": range(num_rows), "label": [0] * num_rows})
    parts = hold_out(PreparedTask(find_task("rte"), {"train": rows}, "hash"))
    held_out = [set(part.splits["held_out"]["row"]) for part in parts]
    assert len(parts) == num_parts and {len(rows) for rows in held_out} == {size}
    assert len(set().union(*held_out)) == num_parts * size


def test_probe_leaves_the_encoder_as_it_was(bert, data_dir, tmp_path):
    args = make_args(bert, data_dir, tmp_path, protocol="probe", num_train_epochs=1, save_models=True)
    results = run_protocol(args)
    assert results["protocol"] == "custom probe" and results["settings"]["dropout"] == 0.0
    assert results["tasks"]["sst2"]["trainable_parameters"] == 32 * 32 + 32 + 2 * 32 + 2
    (folder,) = (tmp_path / "out" / "runs").glob("*/model")
    before, after = (BertForSequenceClassification.from_pretrained(path).state_dict() for path in (bert, folder))
    same = {name for name in after if torch.equal(before[name], after[name])}
    assert {name.split(".")[1] for name in same} == {"embeddings", "encoder"}
    assert not same & {"classifier.weight", "bert.pooler.dense.weight"}


@pytest.mark.parametrize(
    ("name", "kind", "have_types"),
    [
        ("bert", "encoder", True),
        ("bert", "decoder", True),
        ("bert", "of another maker", True),
        ("roberta", "encoder", False),
        ("xlnet", "encoder", False),
    ],
)
def test_a_saved_classifier_reads_pairs_as_it_was_trained(tokenizers, tmp_path, name, kind, have_types):
    """Its tokenizer alone makes the inputs: with types of tokens where the model was trained on them."""
    tokenizer = tokenizers.get(kind)
    if tokenizer is None:  # it says nothing of its model's inputs
        ours = tokenizers["encoder"]
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=ours.backend_tokenizer, **ours.special_tokens_map)
    settings = {"pad_token_id": tokenizer.pad_token_id, "vocab_size": 320}
    settings |= {"type_vocab_size": 1} if name == "roberta" else {}
    config = AutoConfig.for_model(name, **(ENCODERS | UNPACKED)[name], **settings)
    AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    checkpoint = load_checkpoint(str(tmp_path / "model"))
    task = find_task("stsb")
    trained_on = encode_batch({"sentence1": ["kalo mi"], "sentence2": ["ter"]}, task, checkpoint, 24)
    assert ("token_type_ids" in trained_on) == have_types
    model = build_classifier(checkpoint, task, None, 0, False).eval()
    save_classifier(model, checkpoint.tokenizer, tmp_path / "saved", False)
    inputs = AutoTokenizer.from_pretrained(tmp_path / "saved")("kalo mi", "ter", return_tensors="pt")
    trained_on.pop("length")
    assert {key: value.tolist() for key, value in inputs.items()} == trained_on
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    wanted = model(**{key: torch.tensor(value) for key, value in trained_on.items()}).logits
    torch.testing.assert_close(loaded(**inputs).logits, wanted, atol=1e-6, rtol=0)


def test_a_text_config_inside_another_is_read(tokenizers, tmp_path):
    """Models of text and pictures keep vocabulary, positions and padding in a config of their own."""
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 16, "intermediate_size": 64, "vocab_size": 320, "max_position_embeddings": 48}  # fmt: skip
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
              "image_size": 56, "patch_size": 14}  # fmt: skip
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizers["decoder"].save_pretrained(tmp_path)
    checkpoint = load_checkpoint(str(tmp_path))
    assert checkpoint.num_positions == 48
    model = build_classifier(checkpoint, find_task("sst2"), None, 0, False).eval()
    pad = checkpoint.tokenizer.pad_token_id
    alone = model(input_ids=torch.tensor([[9, 8, 7]])).logits
    padded = model(
        input_ids=torch.tensor([[9, 8, 7, pad, pad]]), attention_mask=torch.tensor([[1, 1, 1, 0, 0]])
    ).logits
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=0)


def test_a_tokenizer_in_python_keeps_its_words(tmp_path):
    """ESM's finds them as added tokens, which are not to be split with the special ones."""
    words = ["<cls>", "<pad>", "<eos>", "<unk>", "L", "A", "G", "V", "<mask>"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    EsmTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = AutoConfig.for_model(
        "esm", vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=34, pad_token_id=1, mask_token_id=8,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(tmp_path)
    encoded = encode_batch({"sentence": ["LAGV"]}, find_task("sst2"), load_checkpoint(str(tmp_path)), 16)
    assert encoded["input_ids"] == [[0, 4, 5, 6, 7, 2]]


def test_new_names_of_classes_are_another_run(bert, tmp_path):
    keys = []
    for names in (("0", "1"), ("ham", "spam")):
        (tmp_path / "mine.csv").write_text("text,label\n" + "".join(f"good,{name}\n" for name in names * 10))
        args = complete_arguments(make_args(bert, tmp_path, tmp_path, task_file=str(tmp_path / "mine.csv")))
        checkpoint = load_checkpoint(bert)
        keys.append(hash_run(checkpoint, prepare_task(str(args.task_file), args, checkpoint), args, 0, False))
    assert keys[0] != keys[1], "a kept model says what its classes are called"


def test_a_dollar_in_a_label_is_drawn(tmp_path):
    labels = ["Up to $5 (5%) or $6", "<$10_$20"]
    row = {"scores": [0.5], "median": 0.5, "majority": 0.5, "metric": "accuracy", "subset": False, "labels": labels}
    results = {"protocol": "cramming", "tasks": {"price_$_vs_$_x": row}}
    draw_results(results, {"price_$_vs_$_x": np.eye(2)}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_model_without_a_classification_head(tmp_path, data_dir):
    config = NanoChatConfig(
        vocab_size=270, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    folder = save_decoder(tmp_path / "nanochat", NanoChatForCausalLM(config))
    with pytest.raises(SettingError, match="nanochat model, which has no sequence classification head"):
        run_protocol(make_args(folder, data_dir, tmp_path))
    assert not (tmp_path / "out").exists()


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
        ({"protocol": "tunned"}, "protocol is 'tunned'; did you mean 'tuned'?"),
        ({"protocol": "Probe"}, "did you mean 'probe'?"),
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


def test_checkpoint_without_a_tokenizer_is_refused(bert, tmp_path):
    BertForMaskedLM.from_pretrained(bert).save_pretrained(tmp_path)
    with pytest.raises(SettingError) as caught:
        load_checkpoint(str(tmp_path))
    assert "tokenizer" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content"), [("tokenizer.json", "{}"), ("config.json", '{"model_type": "bert", "hidden_size": "x"}')]
)
def test_a_damaged_checkpoint_is_one_sentence(bert, tmp_path, file, content):
    copy = shutil.copytree(bert, tmp_path / "copy")
    (copy / file).write_text(content)
    with pytest.raises(SettingError, match="model_name_or_path .*copy cannot be loaded") as caught:
        load_checkpoint(str(copy))
    assert "\n" not in str(caught.value)


def test_damaged_weights_are_one_sentence(bert, data_dir, tmp_path):
    copy = shutil.copytree(bert, tmp_path / "copy")
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(SettingError, match="The weights in model_name_or_path .*copy cannot be loaded"):
        run_protocol(make_args(copy, data_dir, tmp_path))
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


def test_tokenizer_of_another_model_is_refused(bert, tmp_path):
    model = BertForMaskedLM.from_pretrained(bert)
    model.resize_token_embeddings(20)
    model.save_pretrained(tmp_path)
    for file in Path(bert).glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(SettingError, match="ids and the model 20"):
        load_checkpoint(str(tmp_path))


def test_adapters_are_scored_saved_and_shown_beside_all_weights(bert, data_dir, tmp_path, run_script):
    """`--peft lora` through the program, after the same task with all weights; the same command runs nothing again."""
    model = tmp_path / "model"
    shutil.copytree(bert, model)
    argv = ["--model_name_or_path", model, "--task_names", "sst2", "--task_data_dir", data_dir, "--use_cpu", "true"]
    argv += ["--num_seeds", "1", "--dropout", "0", "--num_train_epochs", "6", "--protocol", "mine"]
    code, _, stderr = run_script("finetune", *argv, "--learning_rate", "3e-3")
    assert code == 0, stderr
    argv += ["--peft", "lora", "--save_models", "true", "--learning_rate", "1e-2"]
    code, shown, stderr = run_script("finetune", *argv)
    assert code == 0, stderr
    results, full = (json.loads((model / f"{name}/glue_results.json").read_text()) for name in ("glue-lora", "glue"))
    scores = [100 * side["tasks"]["sst2"]["median"] for side in (results, full)]
    assert min(scores) > 90 and f"  {'sst2':15}{scores[0]:6.1f} /{scores[1]:6.1f}" in shown
    assert max(map(len, shown.splitlines()[:-1])) <= 80
    sizes = [side["tasks"]["sst2"]["trainable_parameters"] for side in (results, full)]
    assert sizes[0] < sizes[1] and "lora: 0.0" in shown and "trained: 0.0" in shown
    (adapter,) = model.glob("glue-lora/runs/*/model")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(adapter, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    rows = [json.loads(line) for line in (data_dir / "sst2" / "validation.jsonl").read_text().splitlines()]
    batch = tokenizer([row["sentence"] for row in rows], padding=True, return_tensors="pt")
    answers = loaded.eval()(**batch).logits.argmax(-1).tolist()
    assert 100 * np.mean([a == row["label"] for a, row in zip(answers, rows)]) == pytest.approx(scores[0])
    lines = (model / "glue-lora" / "glue_runs.jsonl").read_text()
    assert run_script("finetune", *argv)[0] == 0
    assert (model / "glue-lora" / "glue_runs.jsonl").read_text() == lines


def test_a_task_of_ones_own_is_run_by_one_command_and_under_another_metric(bert, tmp_path):
    """Named as a task of GLUE, it is not taken for it; its rows are known by their place in the file."""
    rows = make_texts(200)
    (tmp_path / "rte.csv").write_text("text,label\n" + "".join(f"{r['sentence']},{r['label']}\n" for r in rows))
    settings = {"task_file": str(tmp_path / "rte.csv"), "max_train_examples": 150}
    args = make_args(bert, tmp_path, tmp_path, **settings)
    entry = run_protocol(args)["tasks"]["rte (own)"]
    assert entry["median"] > 0.9 and entry["subset"] and entry["official_num_train"] == 180
    (path,) = (tmp_path / "out" / "runs").glob("*/validation.parquet")
    kept = pq.read_table(path).to_pydict()
    assert [rows[row]["label"] for row in kept["row"]] == kept["label"] and len(set(kept["row"])) == 20
    results = run_protocol(dataclasses.replace(args, metric="f1"))
    assert results["tasks"]["rte (own)"]["metric"] == "f1" == results["tasks"]["rte (own)"]["own_task"]["metric"]
    (made,) = results["tasks"]["rte (own)"]["environments"]
    assert made["packages"]["torch"] == torch.__version__ and results["device"] == "cpu" == made["device_type"]


def test_a_task_of_ones_own_joins_the_others_of_its_settings(bert, data_dir, tmp_path):
    shared = {"num_train_epochs": 1, "max_train_examples": 16}
    run_protocol(make_args(bert, data_dir, tmp_path, **shared))
    (tmp_path / "mine.csv").write_text("text,label\n" + "good,1\nbad,0\n" * 20)
    own = run_protocol(make_args(bert, data_dir, tmp_path, task_file=str(tmp_path / "mine.csv"), **shared))
    assert list(own["tasks"]) == ["sst2", "mine"]
    (tmp_path / "mine.csv").write_text("text,mood,label\n" + "good,up,1\nbad,up,0\ngood,down,1\nbad,down,0\n" * 10)
    again = make_args(bert, data_dir, tmp_path, task_file=str(tmp_path / "mine.csv"), label_column="mood", **shared)
    with pytest.raises(SettingError, match="with label_column label are kept as mine, as those with mood would be"):
        run_protocol(again)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.csv").write_text("text,label\n" + "nice,1\nawful,0\n" * 20)
    other = make_args(bert, data_dir, tmp_path, task_file=str(tmp_path / "other" / "mine.csv"), **shared)
    with pytest.raises(SettingError, match="The scores of .*mine.csv are kept as mine.*set task_name"):
        run_protocol(other)
    assert list(run_protocol(dataclasses.replace(other, task_name="more"))["tasks"]) == ["sst2", "mine", "more"]


def test_runs_that_diverge_are_counted(bert, data_dir, tmp_path, caplog):
    changes = {"num_train_epochs": 1, "max_train_examples": 32, "learning_rate": 1e30, "num_seeds": 2}
    entry = run_protocol(make_args(bert, data_dir, tmp_path, **changes))["tasks"]["sst2"]
    assert entry["diverged_runs"] == 2 and "the training diverged" in caplog.text


def test_answers_that_are_all_the_same_are_said(bert, data_dir, tmp_path, caplog):
    run_protocol(make_args(bert, data_dir, tmp_path, num_train_epochs=1, max_train_examples=16, learning_rate=1e-9))
    assert "sst2: every answer is the same" in caplog.text


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
