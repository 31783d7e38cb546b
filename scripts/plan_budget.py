"""Plan a budget before spending it: a table of models, the one to take, and its recipe."""

from __future__ import annotations

import textwrap
from pathlib import Path

from oneday.assembly import CLASSES
from oneday.errors import SettingError
from oneday.ladder import RECORD_DIRS, LadderArguments, family_of, fit_family, format_law, read_records, run_ladder
from oneday.plan_table import format_plan
from oneday.planning import PlanArguments, plan_budget
from oneday.program import run_program
from oneday.recipe import build_arguments, fields_of, resolve_settings, split_command_line, split_mode
from oneday.signals import resumable

DESCRIPTION = (
    "Probe this machine for about half a minute and show what each model would make of the budget; write a recipe of "
    "the one to take. `ladder` as the first word runs what the predicted loss stands on: the recipe at several sizes "
    "and budgets; `fit` only fits the law on the records that are there."
)
DEFAULT_RECIPE = "recipes/quickstart/bert.yaml"
EXAMPLE = "python scripts/plan_budget.py recipes/bert-cpu/pretrain_10m.yaml --budget_hours 2 --usd_per_hour 0.4"
LADDER_EXAMPLE = "python scripts/plan_budget.py ladder recipes/bert-cpu/pretrain_10m.yaml --tokens 1e6,2e6,4e6"


def main() -> None:
    """Plan, run the ladder, or fit."""
    mode, argv = split_mode(("plan", "ladder", "fit"), default="plan")
    own = PlanArguments if mode == "plan" else LadderArguments
    example = EXAMPLE if mode == "plan" else LADDER_EXAMPLE
    settings = resolve_settings((own, *CLASSES), argv, DESCRIPTION, example, DEFAULT_RECIPE)
    recipe = split_command_line(argv)[0] or DEFAULT_RECIPE
    (args,) = build_arguments((own,), settings)
    of_recipe = {key: value for key, value in settings.items() if key not in fields_of((own,))}
    if mode == "plan":
        print(format_plan(plan_budget(recipe, of_recipe, args)))
        return
    if mode == "ladder":
        with resumable():
            run_ladder(recipe, of_recipe, args)
    is_default = Path(args.records_dir) == Path(RECORD_DIRS[-1])
    records = read_records(RECORD_DIRS if is_default else [args.records_dir])
    if not records:
        raise SettingError(f"There is no record of a run in records_dir {args.records_dir}; name another.")
    for family in dict.fromkeys(family_of(record) for record in records):
        fitted = fit_family(records, family)
        print(format_law(fitted, family) if fitted else textwrap.fill(f"{family}: too few runs for a law", 80))


if __name__ == "__main__":
    run_program(main)
