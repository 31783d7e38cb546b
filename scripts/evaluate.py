"""Evaluate a checkpoint without training: zero-shot tasks, perplexity and bits per byte."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from oneday import run_directory as rundir
from oneday.classification import hash_architecture, hash_weights
from oneday.durable_files import make_folder
from oneday.errors import SettingError
from oneday.model_card import refresh_card
from oneday.program import run_program
from oneday.recipe import parse_recipe
from oneday.scoring import load_scorer
from oneday.signals import resumable
from oneday.throughput import describe_environment, keep_freed_memory, set_threads
from oneday.zero_shot_results import EvaluateArguments, format_zero_shot, run_evaluation

DESCRIPTION = (
    "Score zero-shot tasks with a causal model (log-likelihood) or a masked one (pseudo-log-likelihood), and measure "
    "perplexity and bits per byte on any text."
)
EXAMPLE = (
    "python scripts/evaluate.py --model_name_or_path runs/quickstart-gpt --task_names blimp,piqa --task_data_dir DIR "
    "--text_name 'held_out/*.txt'"
)


def main() -> None:
    """Read the settings, score, print the table and write the file."""
    (args,) = parse_recipe((EvaluateArguments,), description=DESCRIPTION, example=EXAMPLE)
    set_threads(args.num_threads)
    keep_freed_memory()
    folder = find_output_dir(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scorer = load_scorer(args.model_name_or_path, args.batch_tokens, device, args.bf16)
    facts = {
        "model": Path(args.model_name_or_path).name,
        "kind": scorer.kind,
        "weights_hash": hash_weights(scorer.model.state_dict()),
        "architecture_hash": hash_architecture(scorer.model.config, scorer.tokenizer),
    }
    with resumable():
        results = run_evaluation(scorer, args, facts, describe_environment(device), folder / rundir.ZERO_SHOT_RESULTS)
    sys.stdout.write(f"\n{format_zero_shot(results)}\n")
    refresh_card(folder)
    sys.stdout.write(f"\nwritten to {folder / rundir.ZERO_SHOT_RESULTS}\n")


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
