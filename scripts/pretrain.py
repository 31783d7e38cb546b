"""Pretrain a BERT- or GPT-style model inside a budget."""

from __future__ import annotations

import functools
import logging
from contextlib import ExitStack
from pathlib import Path

from oneday import hub_texts
from oneday.arguments import BudgetTrainingArguments, SettingError
from oneday.assembly import CLASSES, assemble_trainer, check_settings
from oneday.budget import Budget
from oneday.callbacks import leave_on_signals
from oneday.durable_files import write_json
from oneday.extension import extend_run
from oneday.hub import fetch_run, fetch_sources
from oneday.model_card import refresh_card, write_reports
from oneday.pretraining import make_pusher, perform_run
from oneday.recipe import (
    Settings,
    build_arguments,
    complete_settings,
    is_first_process,
    resolve_settings,
    run_program,
)
from oneday.replay import read_replayed_settings
from oneday.run_directory import (
    RECIPE,
    SOURCES,
    create_run,
    discard_run,
    inspect_run,
    lock_run,
    read_json,
    refresh_recipe,
)
from oneday.signals import INTERRUPTED

DESCRIPTION = "Pretrain from scratch until a budget is used up. The same command goes on with an interrupted run."
EXAMPLE = "accelerate launch scripts/pretrain.py recipes/quickstart/bert.yaml --budget_minutes 10"
DEFAULT_RECIPE = "recipes/quickstart/bert.yaml"

logger = logging.getLogger("oneday.pretrain")


def main() -> int:
    """Assemble the parts and run; 0 when done, 75 when interrupted with a checkpoint."""
    settings = complete_settings(CLASSES, resolve_settings(CLASSES, None, DESCRIPTION, EXAMPLE, DEFAULT_RECIPE))
    if settings["replay"]:
        settings = read_replayed_settings(resolve_settings(CLASSES))
    model_args, data_args, args = build_arguments(CLASSES, settings)
    settings["output_dir"] = args.output_dir  # ~ is resolved there
    budget = check_settings(model_args, args)
    if inspect_run(args.output_dir, settings) == "finished":
        return say_finished(args, settings)
    with ExitStack() as held:
        held.enter_context(leave_on_signals(INTERRUPTED))
        pin_sources(args)
        trainer, data = assemble_trainer(model_args, data_args, args)
        state = trainer.ranks.lead(
            lambda: open_run(held, settings, budget, data.fingerprint, trainer.model_fingerprint)
        )
        if state == "finished":
            code = say_finished(args, settings)
        else:
            code = perform_run(trainer, state, functools.partial(write_reports, trainer, data, model_args, data_args))
    trainer.ranks.close()
    return code


def pin_sources(args: BudgetTrainingArguments) -> None:
    """Data sets of the Hub are read at the commits with which the run began, here or elsewhere, or the one that is
    repeated."""
    folders = filter(None, (args.output_dir, args.replay))
    sources = next(filter(None, (read_json(Path(folder) / SOURCES) for folder in folders)), {})
    if not sources and args.resume_from_hub:
        sources = fetch_sources(args.resume_from_hub)
    hub_texts.REVISIONS.update(sources)


def open_run(held: ExitStack, settings: Settings, budget: Budget, data: str, model: str) -> str:
    """Lock the run directory until `held` is closed; what is in it, as `inspect_run` says, ready to go on."""
    folder = settings["output_dir"]
    held.enter_context(lock_run(folder))
    state = inspect_run(folder, settings)  # another process may have ended it meanwhile
    if state == "new" and settings["resume_from_hub"]:
        try:
            fetch_run(settings["resume_from_hub"], folder, settings)
        except SettingError:
            discard_run(folder)
            raise
        state = "resumed"
    if not (Path(folder) / RECIPE).exists():
        create_run(folder, settings)
    elif state == "extended":
        extend_run(folder, settings, budget, data, model)
    elif state == "resumed":
        refresh_recipe(folder, settings)
    if state == "new" and hub_texts.REVISIONS:
        write_json(Path(folder) / SOURCES, hub_texts.REVISIONS)
    return state


def say_finished(args: BudgetTrainingArguments, settings: Settings) -> int:
    """There is nothing to train; a push that was cut off is done again, with what the card is to say now."""
    advice = "name another output_dir to train again"
    if args.extend:
        advice = "to extend it set a larger budget than it had"
    logger.info("The run in %s is finished; %s.", args.output_dir, advice)
    if args.is_pushed and is_first_process():
        refresh_recipe(args.output_dir, {"hub_license": settings["hub_license"]})
        refresh_card(args.output_dir)
        make_pusher(args).push_final()
    return 0


if __name__ == "__main__":
    run_program(main)
