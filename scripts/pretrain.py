"""Pretrain a BERT- or GPT-style model inside a budget."""

from __future__ import annotations

import logging

import torch

from oneday.arguments import SettingError
from oneday.assembly import CLASSES, assemble_trainer, check_settings
from oneday.extension import extend_run
from oneday.model_card import write_reports
from oneday.recipe import build_arguments, complete_settings, resolve_settings, run_program
from oneday.replay import read_replayed_settings
from oneday.run_directory import create_run, discard_run, inspect_run, lock_run

DESCRIPTION = "Pretrain a language model from scratch until a budget is used up. Times in hours or minutes as named."
EXAMPLE = "accelerate launch scripts/pretrain.py recipes/quickstart/bert.yaml --budget_minutes 10"
DEFAULT_RECIPE = "recipes/quickstart/bert.yaml"
INTERRUPTED = 75

logger = logging.getLogger("oneday.pretrain")


def main() -> int:
    """Assemble the parts and run; 0 when done, 75 when interrupted with a checkpoint."""
    settings = complete_settings(CLASSES, resolve_settings(CLASSES, None, DESCRIPTION, EXAMPLE, DEFAULT_RECIPE))
    if settings["replay"]:
        settings = read_replayed_settings(settings)
    model_args, data_args, args = build_arguments(CLASSES, settings)
    budget = check_settings(model_args, args)
    state = inspect_run(args.output_dir, settings)
    if state == "finished":
        logger.info("The run in %s is finished; name another output_dir to train again.", args.output_dir)
        return 0
    trainer, data = assemble_trainer(model_args, data_args, args)
    if state == "new":
        create_run(args.output_dir, settings)
    elif state == "extended":
        extend_run(args.output_dir, settings, budget)
    with lock_run(args.output_dir):
        try:
            metrics = trainer.run(resume=state != "new")
        except (SettingError, torch.OutOfMemoryError) as error:
            if state == "new" and trainer.clock.steps == 0:
                discard_run(args.output_dir)
            if isinstance(error, torch.OutOfMemoryError):
                raise SettingError(
                    f"The GPU's memory does not hold micro_batch_tokens of {args.micro_batch_tokens}; lower it."
                ) from None
            raise
    if trainer.status == "interrupted":
        logger.info("Interrupted with a checkpoint in %s; run the same command again to go on.", args.output_dir)
        return INTERRUPTED
    write_reports(trainer, data, model_args, data_args, metrics)
    return 0


if __name__ == "__main__":
    run_program(main)
