"""Pretrain a BERT- or GPT-style model inside a budget."""

from __future__ import annotations

import functools
from contextlib import ExitStack

from oneday.assembly import CLASSES, assemble_trainer, check_settings
from oneday.model_card import write_reports
from oneday.opening import open_run, pin_sources, say_finished
from oneday.pretraining import perform_run
from oneday.program import run_program
from oneday.recipe import build_arguments, complete_settings, resolve_settings
from oneday.replay import read_replayed_settings
from oneday.run_directory import inspect_run
from oneday.signals import INTERRUPTED, end_undisturbed, end_with_launcher, leave_on_signals

DESCRIPTION = "Pretrain from scratch until a budget is used up. The same command goes on with an interrupted run."
EXAMPLE = "accelerate launch scripts/pretrain.py recipes/quickstart/bert.yaml --budget_minutes 10"
DEFAULT_RECIPE = "recipes/quickstart/bert.yaml"


def main() -> int:
    """Assemble the parts and run; 0 when done, 75 when interrupted with a checkpoint."""
    settings = complete_settings(CLASSES, resolve_settings(CLASSES, None, DESCRIPTION, EXAMPLE, DEFAULT_RECIPE))
    if settings["replay"]:
        settings = read_replayed_settings(resolve_settings(CLASSES))
    model_args, data_args, args = build_arguments(CLASSES, settings)
    settings["output_dir"] = args.output_dir  # ~ is resolved there
    budget = check_settings(model_args, args)
    if inspect_run(args.output_dir, settings) == "finished":
        say_finished(args, settings)
        return 0
    code = 0
    with ExitStack() as held:
        held.enter_context(leave_on_signals(INTERRUPTED))
        end_with_launcher()
        pin_sources(args)
        trainer, data = assemble_trainer(model_args, data_args, args)
        fingerprints = data.fingerprint, trainer.model_fingerprint
        state = trainer.ranks.lead(lambda: open_run(held, settings, budget, *fingerprints))
        if state == "finished":
            say_finished(args, settings)
        else:
            code = perform_run(trainer, state, functools.partial(write_reports, trainer, data, model_args, data_args))
    if not trainer.ranks.is_first:
        end_undisturbed()
    trainer.ranks.close()
    return code


if __name__ == "__main__":
    run_program(main)
