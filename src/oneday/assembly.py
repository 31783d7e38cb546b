"""From settings to a trainer that can start: what the programs that pretrain have in common."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from oneday.arguments import BudgetTrainingArguments, DataArguments, ModelArguments
from oneday.budget import Budget
from oneday.durable_files import read_json
from oneday.errors import SettingError
from oneday.modeling import build_model, check_config_file, hash_config, load_config, read_skeleton
from oneday.objectives import Objective, find_objective
from oneday.position_init import check_attention_init
from oneday.preparation import PreparedData, prepare_data
from oneday.ranks import check_strategy
from oneday.run_directory import BUDGET, check_same_run
from oneday.sharding import make_ranks
from oneday.throughput import set_threads
from oneday.tokenization import adopt_layout, check_mask, load_tokenizer
from oneday.trackers import check_trackers
from oneday.trainer import BudgetTrainer

# The settings of a pretraining recipe.
CLASSES = (ModelArguments, DataArguments, BudgetTrainingArguments)


def check_settings(model_args: ModelArguments, args: BudgetTrainingArguments) -> Budget:
    """What can be said before any text is read: budget, devices, config, trackers; gives this process its threads.

    Raises:
        SettingError: When no budget is set, or the config, a tracker or the devices cannot be used.
    """
    budget = Budget.from_arguments(args)
    check_strategy(args)
    check_config_file(model_args.model_config)
    if args.attention_init is not None:
        check_attention_init(args.attention_init, read_skeleton(model_args.model_config))
    check_trackers(args)
    set_threads(args.num_threads)
    return budget


def prepare_objective(data_args: DataArguments, args: BudgetTrainingArguments) -> tuple[Objective, PreparedData]:
    """The objective over the prepared text.

    Raises:
        SettingError: When there is no such objective, or the text cannot be used.
    """
    objective_class = find_objective(args.objective)
    if not objective_class.is_packed and (data_args.packing_strategy != "padded" or data_args.max_seq_length % 2):
        raise SettingError(
            f"The setting objective is {args.objective}, whose rows are one document each, of even length; set "
            f"packing_strategy to padded and max_seq_length to an even number (now {data_args.packing_strategy} and "
            f"{data_args.max_seq_length})."
        )
    for name, value in (("max_seq_length_start", args.max_seq_length_start), ("torch_compile", args.use_compile)):
        if not objective_class.is_packed and value:
            raise SettingError(f"{name} is {value}, which objective {args.objective} does not support; leave it out.")
    objective_class.check_rows(
        args, min(args.max_seq_length_start or data_args.max_seq_length, data_args.max_seq_length)
    )
    if data_args.tokenizer_name is not None and objective_class.needs_mask:
        check_mask(load_tokenizer(data_args.tokenizer_name), data_args.tokenizer_name)
    with make_ranks(args).first_alone():
        data = prepare_data(data_args, objective_class.kind, args.shuffle_seed)
    return objective_class(data.tokenizer, args), data


def assemble_trainer(
    model_args: ModelArguments, data_args: DataArguments, args: BudgetTrainingArguments
) -> tuple[BudgetTrainer, PreparedData]:
    """A trainer with random weights from `args.seed`, and the text it trains on; see `check_settings` first.

    Raises:
        SettingError: When a setting cannot work.
    """
    args.shown_settings = {**asdict(model_args), **asdict(data_args)}
    objective, data = prepare_objective(data_args, args)
    model_fingerprint = hash_config(model_args.model_config)
    if args.replay:
        record = read_json(Path(args.replay) / BUDGET)
        check_same_run(args.replay, record, data.fingerprint, model_fingerprint, "train without replay")
    config = load_config(
        model_args.model_config, data.tokenizer, data_args.max_seq_length, model_args.position_encoding
    )
    torch.manual_seed(args.seed)
    model = build_model(config, objective.find_class(config), objective.is_packed)
    fingerprints = data.fingerprint, model_fingerprint
    tokenizer = adopt_layout(data.tokenizer, objective.kind, data_args.max_seq_length)
    trainer = BudgetTrainer(model, args, objective, data.train, data.validation, tokenizer, *fingerprints)
    trainer.preparation_seconds = data.seconds
    return trainer, data
