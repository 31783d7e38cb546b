"""A run directory made ready: begun, gone on with, brought back from the Hub, extended."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

from oneday import hub_texts
from oneday.arguments import BudgetTrainingArguments
from oneday.budget import Budget
from oneday.durable_files import read_json
from oneday.errors import SettingError
from oneday.extension import extend_run
from oneday.hub import fetch_run, fetch_sources, refuse_older
from oneday.model_card import refresh_card
from oneday.pretraining import make_pusher
from oneday.program import is_first_process
from oneday.recipe import Settings
from oneday.run_directory import RECIPE, SOURCES, create_run, discard_run, inspect_run, lock_run, refresh_recipe

logger = logging.getLogger(__name__)


def pin_sources(args: BudgetTrainingArguments) -> None:
    """Data sets of the Hub are read at the commits with which the run began, here or elsewhere, or the one that is
    repeated."""
    folders = filter(None, (args.output_dir, args.replay))
    sources = next(filter(None, (read_json(Path(folder) / SOURCES) for folder in folders)), {})
    if not sources and args.resume_from_hub:
        sources = fetch_sources(args.resume_from_hub)
    hub_texts.REVISIONS.update(sources)


def open_run(
    held: ExitStack, settings: Settings, budget: Budget, data_fingerprint: str, model_fingerprint: str
) -> str:
    """Make a run directory ready, new or to go on with.

    Args:
        held: Keeps it locked until it is closed.
        settings: Every setting; `output_dir` is the directory.
        budget: What an extension may spend.
        data_fingerprint: Of the text and tokenizer at hand.
        model_fingerprint: Of the model config.

    Returns:
        `new`, `resumed`, `extended` or `finished`, as `inspect_run` says.

    Raises:
        SettingError: Another process has it, or it cannot be brought back, extended or written.
    """
    folder = settings["output_dir"]
    held.enter_context(lock_run(folder))
    state = inspect_run(folder, settings)  # another process may have ended it meanwhile
    if state == "new" and settings["resume_from_hub"]:
        try:
            fetch_run(settings["resume_from_hub"], folder, settings, data_fingerprint, model_fingerprint)
        except SettingError:
            discard_run(folder)
            raise
        state = "resumed"
    elif state == "resumed" and settings["resume_from_hub"]:
        refuse_older(settings["resume_from_hub"], folder)
    if not (Path(folder) / RECIPE).exists():
        create_run(folder, settings)
    elif state == "extended":
        extend_run(folder, settings, budget, data_fingerprint, model_fingerprint)
    elif state == "resumed":
        refresh_recipe(folder, settings)
    if state == "new":
        hub_texts.write_revisions(folder)
    return state


def say_finished(args: BudgetTrainingArguments, settings: Settings) -> None:
    """There is nothing to train; a push that was cut off is done again, with what the card is to say now."""
    advice = "name another output_dir to train again"
    if args.extend:
        advice = "to extend it set a larger budget than it had"
    logger.info("The run in %s is finished; %s.", args.output_dir, advice)
    if args.is_pushed and is_first_process():
        refresh_recipe(args.output_dir, {"hub_license": settings["hub_license"]})
        refresh_card(args.output_dir)
        make_pusher(args).push_final()
