"""Protocols: settings under a name, and what makes a run another one."""

from __future__ import annotations

import dataclasses

import pytest
from classifiers import make_args
from conftest import ROOT

from oneday.classification import load_checkpoint
from oneday.finetuning import prepare_task
from oneday.glue_protocol import FinetuneArguments, check_arguments, complete_arguments, name_protocol, warn_of_unread
from oneday.glue_results import hash_run
from oneday.recipe import parse_recipe


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


def test_new_names_of_classes_are_another_run(bert, tmp_path):
    keys = []
    for names in (("0", "1"), ("ham", "spam")):
        (tmp_path / "mine.csv").write_text("text,label\n" + "".join(f"good,{name}\n" for name in names * 10))
        args = complete_arguments(make_args(bert, tmp_path, tmp_path, task_file=str(tmp_path / "mine.csv")))
        checkpoint = load_checkpoint(bert)
        keys.append(hash_run(checkpoint, prepare_task(str(args.task_file), args, checkpoint), args, 0, False))
    assert keys[0] != keys[1], "a kept model says what its classes are called"


def test_labels_learnt_in_another_unit_are_another_run(bert, tmp_path):
    """As those were that ran before labels were scaled."""
    (tmp_path / "mine.csv").write_text("text,label\n" + "".join(f"film {year},{year}\n" for year in range(1990, 2010)))
    settings = {"task_file": str(tmp_path / "mine.csv"), "metric": "pearson"}
    args, checkpoint = complete_arguments(make_args(bert, tmp_path, tmp_path, **settings)), load_checkpoint(bert)
    scaled = prepare_task(str(args.task_file), args, checkpoint)
    plain = dataclasses.replace(scaled, task=dataclasses.replace(scaled.task, label_mean=0.0, label_std=1.0))
    assert scaled.task.label_scale and not plain.task.label_scale
    assert len({hash_run(checkpoint, task, args, 0, False) for task in (scaled, plain)}) == 2
