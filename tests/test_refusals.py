"""Bad input to pretraining: one sentence, and nothing left behind."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT
from program_parts import SMALL, flags


def test_an_unknown_tracker_is_refused_before_anything_is_read(run_script, text_file, tmp_path):
    argv = flags(**SMALL, dataset_name=text_file, output_dir=tmp_path / "run", report_to="tensorboard,wnadb")
    code, _, stderr = run_script("pretrain", *argv)
    assert code == 1 and "report_to names wnadb, which is not installed or not known; here are " in stderr
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_start_so_is_refused_before_anything_is_read(run_script, tmp_path):
    settings = {"model_config": ROOT / "model_configs/gpt2-mini.json", "dataset_name": tmp_path / "missing.txt"}
    argv = (ROOT / "recipes/quickstart/gpt.yaml", *flags(**settings, output_dir=tmp_path / "run"))
    code, _, stderr = run_script("pretrain", *argv)
    assert code == 1 and "for this gpt2 set attention_init to null" in stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


BAD = [
    ({"budget_stepz": 3}, "unknown setting 'budget_stepz'; the nearest is 'budget_steps'"),
    ({"dataset_name": "nowhere/*.txt"}, "nowhere"),
    ({"dataset_name": "EMPTY"}, "holds no text|no text"),
    ({"dataset_name": "LATIN"}, "UTF-8"),
    ({"text_column": "body"}, "'body'.*text"),
    ({"batch_size_tokens": 10**6}, "fewer than the .* of one step"),
    ({"batch_size_tokens_start": 256, "batch_size_tokens": 10**6}, "fewer than the .* of one step"),
    ({"vocab_size": 90_000}, "vocab_size.*larger than the text supports"),
    ({"max_seq_length": 1024}, "max_seq_length"),
    ({"budget_steps": 0}, "budget_steps is 0"),
    ({"budget_minutes": 1, "budget_hours": 1}, "both budget_hours and budget_minutes"),
    ({"budget_steps": "null"}, "No budget is set"),
    ({"optim": "adamw_9bit"}, "optim is 'adamw_9bit'"),
    ({"objective": "nsp"}, "objective is 'nsp'"),
    ({"lr_shape": "zigzag"}, "lr_shape is 'zigzag'"),
    ({"mlm_probability": 1.5}, "mlm_probability is 1.5"),
    ({"model_config": "model_configs/bert-mimi.json"}, "bert-mini"),
    ({"objective": "clm", "model_config": "model_configs/modernbert-mini.json"}, "modernbert|Masked|CausalLM"),
    ({"objective": "clm", "model_config": "model_configs/bert-mini.json"}, "bert is an encoder, whose tokens see"),
    ({"objective": "word_order", "word_order_span": 30}, "word_order_span is 30, and the shortest rows of 32"),
    (
        {"objective": "word_order", "word_order_span": 14, "max_seq_length_start": 16, "dataset_name": "nowhere"},
        "the shortest rows of 16 tokens have 13",
    ),
    ({"tokenizer_name": "nowhere"}, "nowhere"),
    ({"tokenizer_type": "morse"}, "morse"),
    ({"packing_strategy": "loose"}, "packing_strategy"),
    ({"output_dir": "OCCUPIED"}, "not empty"),
    ({"output_dir": "FILE"}, "is a file"),
    ({"output_dir": "BELOW"}, "output_dir is .* cannot be written .file is a file."),
    ({"log_level": "WARN"}, "log_level is 'WARN'; it must be one of .*warning"),
    ({"tokenizer_name": "MASKLESS"}, "has no mask token, behind which the objective hides words"),
    ({"tokenizer_name": "GAPPED"}, "tokens and an id of 900: number them without gaps"),
    ({"validation_name": "CHINESE"}, "The held-out text is nothing but unknown tokens"),
]


@pytest.mark.parametrize(
    ("wrong", "words"), BAD, ids=[" ".join(f"{k}={v}" for k, v in wrong.items()) for wrong, _ in BAD]
)
def test_bad_input_gets_one_sentence_and_leaves_nothing(run_script, text_file, tokenizers, tmp_path, wrong, words):
    (tmp_path / "empty.txt").write_text(" \n\n ")
    (tmp_path / "latin.txt").write_bytes("naïve café".encode("latin-1"))
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "chinese.txt").write_text("的一是不了在人有我他这\n")
    for name in ("maskless", "gapped"):
        tokenizers["encoder"].save_pretrained(tmp_path / name)
    config = tmp_path / "maskless" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "mask_token": None}))
    words_file = tmp_path / "gapped" / "tokenizer.json"
    content = json.loads(words_file.read_text())
    content["model"]["vocab"]["word"] = 900
    words_file.write_text(json.dumps(content))
    places = {
        "MASKLESS": tmp_path / "maskless", "GAPPED": tmp_path / "gapped", "CHINESE": tmp_path / "chinese.txt",
        "EMPTY": tmp_path / "empty.txt", "LATIN": tmp_path / "latin.txt",
        "OCCUPIED": tmp_path / "occupied", "FILE": tmp_path / "file", "BELOW": tmp_path / "file" / "run",
    }  # fmt: skip
    out = tmp_path / "run"
    settings = {**SMALL, "dataset_name": text_file, "output_dir": out, **wrong}
    code, _, stderr = run_script(
        "pretrain", *flags(**{key: places.get(value, value) for key, value in settings.items()})
    )
    assert code == 1
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    assert re.search(words, errors[0]), errors[0]
    assert "Traceback" not in stderr
    assert not out.exists()
    assert (tmp_path / "occupied" / "thesis.tex").read_text() == "mine"
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(("content", "words"), [("[", "cannot be read as YAML"), ("[1]", "holds a list")])
def test_a_recipe_of_a_run_that_is_none_is_named(run_script, text_file, tmp_path, content, words):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(content)
    code, _, stderr = run_script("pretrain", *flags(**SMALL, dataset_name=text_file, output_dir=tmp_path / "run"))
    assert code == 1 and words in stderr and "Traceback" not in stderr


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_any_error_before_the_first_step_leaves_nothing(run_script, text_file, tmp_path, monkeypatch, error):
    def fail(trainer, *args, **kwargs):
        (Path(trainer.args.output_dir) / "tensorboard").mkdir()
        trainer.write_environment()
        raise error("within a library")

    monkeypatch.setattr("oneday.trainer.BudgetTrainer.run", fail)
    argv = flags(**SMALL, dataset_name=text_file, output_dir=tmp_path / "run")
    if error is KeyboardInterrupt:
        assert run_script("pretrain", *argv)[0] == 130
    else:
        with pytest.raises(error):
            run_script("pretrain", *argv)
    assert not (tmp_path / "run").exists()


def test_another_run_in_the_directory_is_refused(run_script, text_file, tmp_path):
    out = tmp_path / "run"
    assert run_script("pretrain", *flags(**SMALL, dataset_name=text_file, output_dir=out))[0] == 0
    before = (out / "model.safetensors").read_bytes()
    other = SMALL | {"budget_steps": 5}
    code, _, stderr = run_script("pretrain", *flags(**other, dataset_name=text_file, output_dir=out))
    assert code == 1
    assert "other settings (budget_steps: 3, now 5)" in stderr
    assert (out / "model.safetensors").read_bytes() == before
    code, *_ = run_script("pretrain", *flags(**SMALL, dataset_name=text_file, output_dir=out, save_minutes=1))
    assert code == 0, "how often it saves does not touch the training"
