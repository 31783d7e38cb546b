"""Evaluate a checkpoint without training: zero-shot tasks, perplexity and bits a byte."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch

from oneday import run_directory as rundir
from oneday.arguments import SettingError
from oneday.classification import hash_weights
from oneday.durable_files import make_folder, write_json
from oneday.model_card import refresh_card
from oneday.recipe import parse_recipe, run_program
from oneday.scoring import load_scorer
from oneday.throughput import describe_environment, keep_freed_memory, set_threads
from oneday.zero_shot_results import (
    RESULTS_FILE,
    EvaluateArguments,
    format_zero_shot,
    keep_earlier,
    read_texts,
    run_tasks,
)

DESCRIPTION = (
    "Score zero-shot tasks with a causal model (log-likelihood) or a masked one (pseudo-log-likelihood), and measure "
    "perplexity and bits a byte on any text."
)
EXAMPLE = (
    "python scripts/evaluate.py --model_name_or_path runs/quickstart-gpt --task_names blimp,piqa --task_data_dir DIR "
    "--text_name 'held_out/*.txt'"
)

logger = logging.getLogger("oneday.evaluate")


def main() -> None:
    """Read the settings, score, print the table and write the file."""
    (args,) = parse_recipe((EvaluateArguments,), description=DESCRIPTION, example=EXAMPLE)
    set_threads(args.num_threads)
    keep_freed_memory()
    folder = find_output_dir(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = None if args.text_name is None else read_texts(args)
    scorer = load_scorer(args.model_name_or_path, args.batch_tokens, device)
    results = {
        "model": Path(args.model_name_or_path).name,
        "kind": scorer.kind,
        "weights_hash": hash_weights(scorer.model.state_dict()),
        "tasks": run_tasks(scorer, args, logger.info),
        "environment": describe_environment(device),
    }
    if text is not None:
        name, documents = text
        read = {"name": name, "dataset_split": args.dataset_split, "max_examples": args.max_examples}
        results["text"] = {**read, **scorer.score_texts(documents)}
    results = keep_earlier(results, rundir.read_json(folder / RESULTS_FILE))
    sys.stdout.write(f"\n{format_zero_shot(results)}\n")
    write_json(folder / RESULTS_FILE, results)
    refresh_card(folder)
    sys.stdout.write(f"\nwritten to {folder / RESULTS_FILE}\n")


def find_output_dir(args: EvaluateArguments) -> Path:
    """Where the results go.

    Raises:
        SettingError: When the checkpoint is no directory and none is named, it is another model's, whose card shows
            what lies there, or it cannot be made.
    """
    model = Path(args.model_name_or_path)
    if args.output_dir is None and not model.is_dir():
        raise SettingError(f"model_name_or_path {model} is no directory here; set output_dir.")
    folder = Path(args.output_dir or model)
    is_other = folder.resolve() != model.resolve()
    if is_other and any((folder / name).exists() for name in (rundir.RECIPE, "config.json")):
        raise SettingError(f"The output_dir {folder} holds another model than {model}; name another directory.")
    make_folder(folder, "output_dir")
    return folder


if __name__ == "__main__":
    run_program(main)
