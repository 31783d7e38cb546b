"""YAML and command line become arguments; what is wrong with either is said in one sentence."""

from __future__ import annotations

import dataclasses
import re
import shlex
from dataclasses import dataclass

import pytest
import yaml
from transformers import TrainingArguments

from oneday.arguments import BudgetTrainingArguments, DataArguments, ModelArguments, setting
from oneday.errors import SettingError
from oneday.recipe import (
    build_arguments,
    complete_settings,
    format_help,
    format_usage,
    parse_recipe,
    resolve_settings,
    wrap_command,
)
from oneday.refused_settings import REFUSED_SETTINGS

CLASSES = (ModelArguments, DataArguments, BudgetTrainingArguments)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_command_line_over_recipe_over_parent_over_default(tmp_path):
    write(tmp_path / "base.yaml", "vocab_size: 100\nmax_seq_length: 64\nseed: 1\n")
    recipe = write(tmp_path / "r.yaml", "extends: base.yaml\nmax_seq_length: 32\nseed: 2\n")
    settings = resolve_settings(CLASSES, [recipe, "--seed", "3", "--lowercase", "false"])
    assert settings == {"vocab_size": 100, "max_seq_length": 32, "seed": 3, "lowercase": False}


def test_values_take_the_type_of_their_field(tmp_path):
    argv = ["--budget_tokens", "1e6", "--learning_rate=3e-4", "--dataset_weights", "0.7,0.3", "--streaming"]
    settings = resolve_settings(CLASSES, argv)
    assert settings["budget_tokens"] == 1_000_000.0
    assert settings["learning_rate"] == 3e-4
    assert settings["dataset_weights"] == [0.7, 0.3]
    assert settings["streaming"] is True


def test_null_unsets(tmp_path):
    recipe = write(tmp_path / "r.yaml", "budget_minutes: 5\nbudget_steps: 7\n")
    _, _, args = parse_recipe(CLASSES, [recipe, "--budget_minutes", "null", "--output_dir", str(tmp_path / "o")])
    assert (args.budget_minutes, args.budget_steps) == (None, 7)


def test_words_that_yaml_takes_for_truth_values_stay_words():
    settings = resolve_settings(CLASSES, ["--dataset_config_name", "no", "--text_column", "on", "--streaming", "yes"])
    assert settings == {"dataset_config_name": "no", "text_column": "on", "streaming": True}
    assert resolve_settings(CLASSES, ["--streaming", "--bf16"]) == {"streaming": True, "bf16": True}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("output_dir", "runs/try #2", "runs/try #2"),
        ("output_dir", "2024_11_27", "2024_11_27"),
        ("output_dir", "'runs/1'", "runs/1"),
        ("output_dir", "1.50", "1.50"),
        ("output_dir", '"Stop": she said.', '"Stop": she said.'),
        ("output_dir", "[2024-13-45]", "[2024-13-45]"),
        ("dataset_name", "/data/corpus #1/*.txt", "/data/corpus #1/*.txt"),
        ("seed", "042", 42),
        ("vocab_size", "8192.0", 8192),
        ("vocab_size", "1e4", 10_000),
        ("budget_tokens", "1e9", 1e9),
        ("budget_minutes", "null", None),
        ("dataset_weights", "[0.5, 0.5]", [0.5, 0.5]),
        ("dataset_weights", "0.5,0.5", [0.5, 0.5]),
    ],
)
def test_a_value_is_what_was_written(name, text, value):
    assert resolve_settings(CLASSES, [f"--{name}", text]) == {name: value}


@pytest.mark.parametrize(("name", "text"), [("budget_hours", "1:30"), ("seed", "1:30"), ("vocab_size", "inf")])
def test_what_is_no_number_is_not_made_one(name, text):
    with pytest.raises(SettingError, match=f"The setting {name} is '{text}'; it must be"):
        resolve_settings(CLASSES, [f"--{name}", text])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"learning_rate": -1e-3}, "learning_rate is -0.001; it must be above zero"),
        ({"batch_ramp_fraction": 60}, "batch_ramp_fraction is 60; it must be above 0, at most 1"),
        ({"seq_length_ramp_fraction": 0}, "seq_length_ramp_fraction is 0; it must be above 0, at most 1"),
        ({"muon_learning_rate": 0.0}, "muon_learning_rate is 0.0; it must be above zero"),
        ({"adam_beta2": 1.0}, "adam_beta2 is 1.0; it must be from 0 to below 1"),
        ({"seed": -1}, "seed is -1; it must not be below zero"),
        ({"seed": 2**32}, "seed is 4294967296; it must be below 2^32"),
        ({"weight_decay": float("nan")}, "weight_decay is nan; it must not be below zero"),
        ({"hub_strategy": "sometimes"}, "hub_strategy is 'sometimes'; it must be one of end, every_save"),
    ],
)
def test_values_that_no_optimizer_takes_are_refused_at_once(tmp_path, settings, words):
    with pytest.raises(SettingError, match=re.escape(words)):
        build_arguments((BudgetTrainingArguments,), {"output_dir": str(tmp_path), "budget_steps": 1, **settings})


def test_one_budget_spelling_replaces_the_other(tmp_path):
    recipe = write(tmp_path / "r.yaml", "budget_hours: 24\nbudget_tokens: 5\n")
    assert resolve_settings(CLASSES, [recipe, "--budget_minutes", "10"]) == {
        "budget_minutes": 10.0,
        "budget_tokens": 5.0,
    }


def test_saved_recipe_gives_the_same_settings(tmp_path):
    recipe = write(tmp_path / "r.yaml", "budget_minutes: 5\noptim: adamw_8bit\nmax_grad_norm: 0.5\n")
    settings = complete_settings(CLASSES, resolve_settings(CLASSES, [recipe]))
    again = complete_settings(
        CLASSES, resolve_settings(CLASSES, [write(tmp_path / "s.yaml", yaml.safe_dump(settings))])
    )
    assert again == settings
    assert build_arguments(CLASSES, again)[2].optimizer_name == "adamw_8bit"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--budget_minuts", "5"], "'budget_minuts'; the nearest is 'budget_minutes'"),
        (["--budget_minutes", "five"], "budget_minutes is 'five'; it must be float"),
        (["--vocab_size", "8.5"], "vocab_size is '8.5'; it must be int"),
        (["--streaming", "maybe"], "streaming is 'maybe'; it must be bool"),
        (["--budget_minutes", "5", "--budget_hours", "1"], "both budget_hours and budget_minutes"),
        (["--output_dir", "--budget_minutes", "5"], "output_dir is given without a value"),
        (["--dataset_weights", "--streaming"], "dataset_weights is given without a value"),
        (["--output_dir", "a", "--output_dir"], "output_dir is given without a value"),
        (["--max_steps", "5"], "max_steps, which the budget decides; set budget_steps"),
        (["nowhere.yaml"], "no recipe nowhere.yaml"),
        (["a.yaml", "b.yaml"], "beside the recipe"),
    ],
)
def test_bad_command_lines(argv, words):
    with pytest.raises(SettingError, match=words):
        resolve_settings(CLASSES, argv)


INERT = [
    "label_names", "dataloader_multiprocessing_context", "dataloader_in_order", "eval_do_concat_batches",
    "eval_use_gather_object", "include_num_input_tokens_seen", "use_cache", "fsdp_config", "parallelism_config",
    "use_liger_kernel", "liger_kernel_config",
]  # fmt: skip


@pytest.mark.parametrize("name", INERT)
def test_inherited_settings_that_would_do_nothing_or_break_are_refused(name):
    with pytest.raises(SettingError, match=rf"the command line sets {name}, which (has|is|would) .*; \w.*\.$"):
        resolve_settings(CLASSES, [f"--{name}", "1"])


def test_what_is_refused_is_a_setting_of_transformers():
    assert REFUSED_SETTINGS.keys() <= {field.name for field in dataclasses.fields(TrainingArguments)}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("vocab_size: [", "cannot be read as YAML"),
        ("- 1\n", "must be lines of `key: value`"),
        ("budget_hours: 1\nbudget_minutes: 2\n", "both budget_hours and budget_minutes"),
        ("extends: nothing.yaml\n", "There is no recipe"),
    ],
)
def test_bad_recipes(tmp_path, text, words):
    with pytest.raises(SettingError, match=words):
        resolve_settings(CLASSES, [write(tmp_path / "r.yaml", text)])


def test_extends_is_one_level(tmp_path):
    write(tmp_path / "a.yaml", "seed: 1\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\n")
    with pytest.raises(SettingError, match="one level"):
        resolve_settings(CLASSES, [write(tmp_path / "c.yaml", "extends: b.yaml\n")])


@dataclass
class OneRun:
    run_dir: str = setting("runs/first", "One.", bare_words="RUN_DIR")
    last: bool = setting(False, "Whether it is the last.")


@dataclass
class SeveralRuns:
    run_dirs: list[str] | None = setting(None, "Several.", bare_words="RUN_DIR ...")


@pytest.mark.parametrize(
    ("cls", "argv", "settings"),
    [
        (OneRun, ["runs/a,b", "--last"], {"run_dir": "runs/a,b", "last": True}),
        (OneRun, ["--run_dir", "runs/a"], {"run_dir": "runs/a"}),
        (OneRun, [], {}),
        (SeveralRuns, ["runs/a,b", "r.yaml"], {"run_dirs": ["runs/a,b", "r.yaml"]}),
        (SeveralRuns, ["runs/a"], {"run_dirs": ["runs/a"]}),
        (SeveralRuns, ["--run_dirs", "runs/a,runs/b"], {"run_dirs": ["runs/a", "runs/b"]}),
    ],
)
def test_bare_words_are_the_setting_that_takes_them(cls, argv, settings):
    assert resolve_settings((cls,), argv) == settings


@pytest.mark.parametrize(
    ("cls", "argv", "words"),
    [
        (OneRun, ["runs/a", "--run_dir", "runs/b"], "names 'runs/a' beside --run_dir; give one of them."),
        (SeveralRuns, ["--run-dirs=runs/a", "runs/b"], "names 'runs/b' beside --run_dirs; give one of them."),
        (OneRun, ["runs/a", "runs/b"], "names 'runs/b' beside 'runs/a'; give one run_dir."),
    ],
)
def test_bare_words_too_many_are_refused(cls, argv, words):
    with pytest.raises(SettingError, match=re.escape(words)):
        resolve_settings((cls,), argv)


def test_the_usage_shows_what_takes_bare_words():
    several = format_help((SeveralRuns,), "Compares.", "python scripts/compare_runs.py runs/a runs/b")
    assert "Usage: python scripts/compare_runs.py [RUN_DIR ...] [--key value ...]\n" in several
    one = format_help((OneRun,), "Tries.", "python scripts/try_model.py --last")
    assert "Usage: python scripts/try_model.py [RUN_DIR] [--key value ...]\n" in one


def test_help_names_every_own_setting_in_80_columns():
    text = format_help(CLASSES, "What it does.", "python x.py")
    assert max(map(len, text.splitlines())) < 80
    assert "--budget_kwh" in text
    assert "in kilowatt-hours" in text
    assert "--max_steps" not in text


def test_the_example_of_help_can_be_pasted():
    """Lines end between words only, and what was quoted stays one word."""
    command = "python scripts/try_model.py runs/quickstart-bert --text 'The [MASK] is empty.'"
    for width in (20, 40, 70):
        lines = wrap_command(command, width)
        assert len(lines) > 1
        assert [word for line in lines for word in shlex.split(line)] == shlex.split(command)
    usage = "python scripts/try_model.py [RUN_DIR] [--key value ...]"
    assert format_usage(command, ("run_dir", "RUN_DIR")) == usage
    assert format_usage("python a.py ladder b.yaml --c 1") == "python a.py MODE [RECIPE.yaml] [--key value ...]"
