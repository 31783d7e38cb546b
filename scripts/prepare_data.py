"""Prepare the data of a recipe ahead of its run: corpus, tokenizer and packed rows go into the cache."""

from __future__ import annotations

import logging

from oneday.arguments import BudgetTrainingArguments, DataArguments, ExecutorArguments, ModelArguments, ShardArguments
from oneday.errors import SettingError
from oneday.objectives import find_objective
from oneday.packed_dataset import PackedDataset
from oneday.preparation import prepare_data, tokenize_shard
from oneday.program import run_program
from oneday.recipe import parse_recipe
from oneday.throughput import set_threads

logger = logging.getLogger("oneday.prepare_data")


def main() -> None:
    """Fill the cache and say what is in it."""
    _, data_args, args, part, executor = parse_recipe(
        (ModelArguments, DataArguments, BudgetTrainingArguments, ShardArguments, ExecutorArguments),
        description="Prepare a recipe's text without training; no budget counts this.",
        example="python scripts/prepare_data.py recipes/quickstart/bert.yaml --dataset_name 'texts/*.parquet'",
        default_recipe="recipes/quickstart/bert.yaml",
    )
    set_threads(args.num_threads)
    kind = find_objective(args.objective).kind
    if part.shard is not None and executor.executor is not None:
        raise SettingError(f"The setting shard is {part.shard} and executor {executor.executor}; keep one of them.")
    if part.shard is not None:
        print(f"part        {tokenize_shard(data_args, kind, part)}")
        return
    if executor.executor is not None:
        from oneday.datatrove_tasks import run_tasks  # an optional package

        jobs = run_tasks(data_args, kind, executor)
        if jobs:
            print(
                f"submitted   Slurm jobs {' and '.join(jobs)}; when they are done this command says what is prepared"
            )
            return
    data = prepare_data(data_args, kind, args.shuffle_seed)
    print(f"corpus      {data.corpus.name} {data.corpus.corpus_hash}")
    print(f"tokenizer   {len(data.tokenizer):,} tokens, {100 * data.unknown_rate:.3f} % [UNK] in the held-out text")
    for name, rows in (("train", data.train), ("held out", data.validation)):
        if isinstance(rows, PackedDataset):
            print(
                f"{name:12}{rows.index.num_documents:,} documents, {rows.num_bytes_text / 1e6:,.1f} MB, "
                f"{rows.num_tokens:,} tokens in {len(rows):,} rows of {rows.row_length}, "
                f"{100 * rows.index.packing_efficiency:.2f} % full"
            )
        else:
            print(f"{name:12}streamed")
    print(f"seconds     {data.seconds:.1f}")


if __name__ == "__main__":
    run_program(main)
