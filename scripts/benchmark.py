"""Measure a recipe: its throughput, its curve against stock's, and what single changes do."""

from __future__ import annotations

import sys

from oneday.assembly import CLASSES
from oneday.benchmarks.ablation import run_ablation
from oneday.benchmarks.arguments import (
    AblationArguments,
    KeepArguments,
    RecordArguments,
    SeedArguments,
    ThroughputArguments,
    VersusStockArguments,
)
from oneday.benchmarks.finetuning import make_finetuning_plan, run_finetuning
from oneday.benchmarks.planning import make_plan
from oneday.benchmarks.throughput import run_throughput
from oneday.benchmarks.versus_stock import run_versus_stock
from oneday.errors import SettingError
from oneday.glue_protocol import FinetuneArguments
from oneday.program import run_program
from oneday.recipe import build_arguments, fields_of, format_help, resolve_settings, split_command_line, split_mode
from oneday.signals import resumable

DESCRIPTION = (
    "Measure a recipe in one of four modes, named first: throughput, versus-stock, ablate, finetuning (against the "
    "Hub's run_glue.py). Every run is a process of its own, one after the other; finished ones are kept and "
    "used again. Other settings are the recipe's."
)
PRETRAINING = (CLASSES, make_plan, "recipes/quickstart/bert.yaml")
FINETUNING = ((FinetuneArguments,), make_finetuning_plan, "recipes/glue/finetune.yaml")
# What runs, its own settings; those of the recipe, what makes a plan of it, and the recipe where none is named.
MODES = {
    "throughput": (run_throughput, (ThroughputArguments,), *PRETRAINING),
    "versus-stock": (run_versus_stock, (VersusStockArguments, SeedArguments, KeepArguments), *PRETRAINING),
    "ablate": (run_ablation, (AblationArguments, SeedArguments, KeepArguments), *PRETRAINING),
    "finetuning": (run_finetuning, (), *FINETUNING),
}
EXAMPLES = {
    "throughput": "--grid optim=muon,adamw --grid micro_batch_tokens=2048,4096",
    "versus-stock": "--budget_minutes 10 --seeds 1,2,3",
    "ablate": "--change muon_learning_rate=1e-2 --change lr_shape=linear,warmup_fraction=0.1",
    "finetuning": "--model_name_or_path runs/quickstart-bert --task_names rte,mrpc,cola --num_seeds 3",
}


def format_example(mode: str) -> str:
    """A command that works."""
    return f"python scripts/benchmark.py {mode} {MODES[mode][-1]} {EXAMPLES[mode]}"


def main() -> None:
    """Run one mode and print its table."""
    mode, argv = split_mode(tuple(MODES))
    if mode is None:
        own = (
            ThroughputArguments,
            VersusStockArguments,
            AblationArguments,
            SeedArguments,
            KeepArguments,
            RecordArguments,
        )
        sys.stdout.write(format_help(own, DESCRIPTION, format_example("versus-stock")))
        return
    run, mode_classes, recipe_classes, plan_recipe, default_recipe = MODES[mode]
    own = (*mode_classes, RecordArguments)
    settings = resolve_settings((*own, *recipe_classes), argv, DESCRIPTION, format_example(mode), default_recipe)
    recipe, overrides = split_command_line(argv)
    if SeedArguments in mode_classes and "seed" in overrides:
        raise SettingError(f"The setting seed is for one run, and {mode} has several; set seeds, say 1,2,3.")
    *mode_args, record_args = build_arguments(own, settings)
    of_recipe = {key: value for key, value in settings.items() if key not in fields_of(own)}
    with resumable():
        plan = plan_recipe(recipe or default_recipe, of_recipe, record_args)
        print(run(plan, *mode_args))


if __name__ == "__main__":
    run_program(main)
