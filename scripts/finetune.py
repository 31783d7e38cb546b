"""Fine-tune a checkpoint on GLUE-style tasks and print its scores."""

from __future__ import annotations

import sys
from pathlib import Path

from oneday.durable_files import read_json
from oneday.finetuning import run_protocol
from oneday.glue_protocol import FinetuneArguments, find_output_dir
from oneday.glue_results import compare_with_full, format_results
from oneday.model_card import refresh_card
from oneday.program import run_program
from oneday.recipe import parse_recipe
from oneday.run_directory import GLUE, GLUE_RESULTS
from oneday.signals import resumable

DESCRIPTION = (
    "Fine-tune a checkpoint on each task with several seeds and print the median scores. The defaults are the "
    "cramming protocol: one setting for all tasks, 5 epochs, 5 seeds. The same command again skips "
    "the runs that are done."
)
EXAMPLE = (
    "python scripts/finetune.py recipes/glue/finetune.yaml --model_name_or_path runs/quickstart-bert "
    "--task_names sst2,rte --task_data_dir DIR"
)


def main() -> None:
    """Read the settings, run the protocol, print the table."""
    (args,) = parse_recipe((FinetuneArguments,), description=DESCRIPTION, example=EXAMPLE)
    with resumable():
        results = run_protocol(args, may_start_processes=True)
    path = find_output_dir(args) / GLUE_RESULTS
    beside = compare_with_full(results, read_json(path.parent.parent / GLUE / GLUE_RESULTS))
    shown = "\n".join([format_results(results), *beside])
    sys.stdout.write(f"\n{shown}\n\nwritten to {path}\n")
    if path.parent == Path(args.model_name_or_path) / GLUE:  # whose scores the card shows
        refresh_card(args.model_name_or_path)


if __name__ == "__main__":
    run_program(main)
