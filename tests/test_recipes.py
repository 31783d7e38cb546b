"""Every recipe is read by its program's arguments, names its hardware, and its model can be built."""

from __future__ import annotations

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT

from oneday.arguments import BudgetTrainingArguments, DataArguments, ModelArguments
from oneday.budget import Budget
from oneday.glue_protocol import FinetuneArguments
from oneday.modeling import build_model, load_config
from oneday.objectives import find_objective
from oneday.optimizers import check_optimizer
from oneday.position_init import check_attention_init
from oneday.recipe import parse_recipe
from oneday.schedules import learning_rate_multiplier

PRETRAIN = (ModelArguments, DataArguments, BudgetTrainingArguments)
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if "accelerate_configs" not in path.parts)
PRETRAINING = [path for path in RECIPES if not path.stem.startswith("finetune")]
FINETUNING = [path for path in RECIPES if path.stem.startswith("finetune")]


def name_of(path):
    return str(path.relative_to(ROOT / "recipes"))


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_first_line_names_the_hardware(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert any(word in first for word in ("CPU", "GPU"))


@pytest.mark.parametrize("path", PRETRAINING, ids=name_of)
def test_pretraining_recipe(path, tokenizers, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    model_args, data_args, args = parse_recipe(PRETRAIN, [str(path), "--output_dir", str(tmp_path)])
    Budget.from_arguments(args)
    check_optimizer(args.optimizer_name)
    learning_rate_multiplier(args.lr_shape, args.warmup_fraction, args.decay_fraction)
    objective_class = find_objective(args.objective)
    assert objective_class.is_packed or data_args.packing_strategy == "padded"
    tokenizer = tokenizers[objective_class.kind]
    objective = objective_class(tokenizer, args)
    objective.training_collator(0)
    config = load_config(model_args.model_config, tokenizer, data_args.max_seq_length, model_args.position_encoding)
    with torch.device("meta"):
        model = build_model(config, objective.find_class(config), objective.is_packed)
    check_attention_init(args.attention_init, model)
    assert model.get_input_embeddings().weight.shape[0] % 64 == 0
    assert args.batch_size_tokens % args.micro_batch_tokens == 0
    assert args.micro_batch_tokens % data_args.max_seq_length == 0


@pytest.mark.parametrize("path", FINETUNING, ids=name_of)
def test_finetuning_recipe(path):
    parse_recipe((FinetuneArguments,), [str(path)])


def test_recipes_that_the_contract_names_exist():
    names = {name_of(path) for path in RECIPES}
    assert {"quickstart/bert.yaml", "quickstart/gpt.yaml", "quickstart/finetune.yaml", "glue/finetune.yaml"} <= names
    for style in ("bert", "gpt"):
        assert {f"{style}-consumer/pretrain_24h.yaml", f"{style}-datacentre/pretrain_24h.yaml"} <= names


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes" / "accelerate_configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_accelerate_config(path):
    """Accelerate refuses unknown keys at the top of a file; those of its parts it would hand on unread."""
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    options = {action.dest for action in launch_command_parser()._actions}
    given = [key for part in vars(config).values() if isinstance(part, dict) for key in part]
    assert options.issuperset(given)
    assert bool(given) == (config.distributed_type == "FSDP")
