"""A budget planned before it is spent: what each model would see and cost, which to take, and a recipe for it."""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from oneday.arguments import setting
from oneday.assembly import CLASSES, check_settings, prepare_objective
from oneday.budget import Budget
from oneday.compilation import decide_compiling
from oneday.corpus_names import list_hub_ids
from oneday.durable_files import read_json, write_whole
from oneday.errors import SettingError, check_positive
from oneday.ladder import RECORD_DIRS, Family, FamilyLaw, fit_family, read_records
from oneday.machines import Machine, find_machine
from oneday.modeling import check_config_file
from oneday.objectives import find_objective
from oneday.plan_rows import Row, choose_row, is_within_reach, make_row
from oneday.probing import (
    Material,
    Pace,
    Probe,
    choose_probe_tokens,
    count_flops,
    make_stand_in,
    measure_fixed_seconds,
    measure_model,
    measure_pace,
)
from oneday.recipe import Settings, build_arguments, complete_settings, read_layers, read_yaml
from oneday.run_directory import RECIPE

logger = logging.getLogger(__name__)


@dataclass
class PlanArguments:
    """What is planned."""

    models: list[str] | None = setting(
        None, "Config JSONs to choose from, comma-separated; empty: those beside the recipe's of its architecture."
    )
    probe_seconds: float = setting(30.0, "Seconds of training steps measured, over all models; the data come before.")
    gpu_memory_gb: float | None = setting(
        None, "Memory to plan for, in gigabytes of 10^9 bytes; empty: what this machine (or --for's card) has."
    )
    for_: str | None = setting(
        None, "Plan for a card that is not here, say 'RTX 4090': its data sheet's peak at --mfu, an estimate."
    )
    mfu: float = setting(0.35, "With --for, the fraction of the card's peak that training is taken to reach.")
    ladder_dirs: list[str] = setting(RECORD_DIRS, "Records that the scaling law is fitted on.")
    plan_recipe: str = setting("runs/plan.yaml", "Where the recipe of the chosen model is written.")

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        for name in ("probe_seconds", "gpu_memory_gb", "mfu"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        if self.mfu > 1:
            raise SettingError(f"The setting mfu is {self.mfu:g}; it is a fraction of the peak, at most 1.")


@dataclass(frozen=True)
class BudgetPlan:
    """All that the table shows.

    Attributes:
        budget: What may be spent.
        machine: On what.
        rows: One a model, smallest first.
        best: Place of the one to take.
        left_out: Names of models that are too large for the budget.
        unfit: Names of models that cannot take the recipe: too few positions for its rows, say.
        fitted: The law; None: there is none for this family.
        family: Whose law it is.
        is_own_text: Whether the law's text is the plan's.
        mfu: Stated, for a card that is not here.
        recipe: File written.
    """

    budget: Budget
    machine: Machine
    rows: list[Row]
    best: int
    left_out: list[str]
    unfit: list[str]
    fitted: FamilyLaw | None
    family: Family
    is_own_text: bool
    mfu: float | None
    recipe: Path


def plan_budget(recipe_path: str, given: Settings, plan_args: PlanArguments) -> BudgetPlan:
    """Probe the models, choose one, write its recipe.

    Args:
        recipe_path: The recipe planned with.
        given: What it and the command line set.
        plan_args: How to plan.

    Raises:
        SettingError: When a setting cannot work, or no model fits.
    """
    settings = complete_settings(CLASSES, given)
    model_args, _, args = build_arguments(CLASSES, settings)
    settings["torch_compile"] = decide_compiling(args, find_objective(args.objective).is_packed)
    budget, machine = check_settings(model_args, args), find_machine(args, plan_args.for_, plan_args.gpu_memory_gb)
    check_writable(plan_args.plan_recipe, recipe_path)
    models = list_models(plan_args.models, settings["model_config"])
    with tempfile.TemporaryDirectory(prefix="oneday-plan-") as folder:
        material = find_material(settings, Path(folder))
        held_out = material.validation.index.key
        # Of a tokenizer that is given the setting says nothing.
        size = settings["vocab_size"] if settings["tokenizer_name"] is None else len(material.tokenizer)
        family = Family.of_settings({**settings, "vocab_size": size}, read_model_type(settings["model_config"]))
        fitted = fit_family(read_records(plan_args.ladder_dirs), family, held_out)
        needed = models if plan_args.models else [settings["model_config"]]
        counts, unfit = count_flops_of_all(material, settings, models, needed)
        kept = [model for model in counts if is_within_reach(*counts[model], budget, machine)]
        kept = sorted(kept, key=lambda model: counts[model][1])
        if not kept:
            raise SettingError(
                f"The budget ({budget.describe()}) shows no model a token for each parameter; raise it, or name "
                "smaller ones in models."
            )
        sizes = {model: measure_model(material, {**settings, "model_config": model}) for model in kept}
        paces = find_paces(material, settings, sizes, machine, plan_args)
    rows = []
    for model in kept:
        law = fitted.law if fitted and read_model_type(model) == family.model_type else None
        rows.append(make_row(model, sizes[model], paces[model], budget, machine, settings, material.num_tokens, law))
    if not any(row.tokens for row in rows):
        seconds = min(paces[model].fixed_seconds for model in kept)
        raise SettingError(
            f"The budget ({budget.describe()}) ends before the first step: counting words and compiling take "
            f"{seconds:.0f} s; raise it, or set embedding_init to random and torch_compile to false."
        )
    best = choose_row(rows, settings["model_config"])
    recipe = write_recipe(recipe_path, given, rows[best], plan_args.plan_recipe)
    left_out = [Path(model).stem for model in counts if model not in kept]
    is_own_text = fitted is not None and fitted.held_out == held_out
    mfu = plan_args.mfu if machine.card else None
    return BudgetPlan(budget, machine, rows, best, left_out, unfit, fitted, family, is_own_text, mfu, recipe)


def count_flops_of_all(
    material: Material, settings: Settings, models: list[str], needed: list[str]
) -> tuple[dict[str, tuple[int, float]], list[str]]:
    """(parameters, FLOPs per token) of the models that can take the recipe, and the names of those that cannot.

    Raises:
        SettingError: When one that was asked for cannot.
    """
    counts, unfit = {}, []
    for model in models:
        try:
            counts[model] = count_flops(material, {**settings, "model_config": model})
        except SettingError:  # too few positions for the rows, say
            if model in needed:
                raise
            unfit.append(Path(model).stem)
    return counts, unfit


def read_model_type(model_config: str) -> str:
    """`model_type` of a config file."""
    return yaml.safe_load(check_config_file(model_config).read_text(encoding="utf-8"))["model_type"]


def list_models(models: list[str] | None, own: str) -> list[str]:
    """The models to choose from; the recipe's own is named as the recipe names it, however it is spelled here."""
    named, own_file = models or [own, *find_relatives(own)], check_config_file(own).resolve()
    others = [model for model in named if check_config_file(model).resolve() != own_file]
    return others if len(others) == len(named) else [own, *others]


def find_relatives(model_config: str) -> list[str]:
    """The config files of a recipe's architecture beside its own; the baselines are for benchmarks alone."""
    folder, kind = check_config_file(model_config).parent, read_model_type(model_config)
    beside = [path for path in sorted(folder.glob("*.json")) if not path.name.startswith("baseline-")]
    return [str(path) for path in beside if has_model_type(path, kind)]


def has_model_type(path: Path, kind: str) -> bool:
    """Whether a JSON file is the config of a model of this kind; any other file may lie beside one."""
    content = read_json(path)
    return isinstance(content, dict) and content.get("model_type") == kind


def find_material(settings: Settings, folder: Path) -> Material:
    """The recipe's text, prepared as the run will take it from the cache; for a stream, random words."""
    _, data_args, args = build_arguments(CLASSES, settings)
    if data_args.streaming and list_hub_ids(data_args.dataset_name):
        return make_stand_in(find_objective(args.objective), settings, folder)
    objective, data = prepare_objective(data_args, args)
    return Material(objective, data.tokenizer, data.train, data.validation, data.train.num_tokens)


def find_paces(
    material: Material, settings: Settings, sizes: dict[str, Probe], machine: Machine, plan_args: PlanArguments
) -> dict[str, Pace]:
    """The pace of each model: measured here, or what the stated MFU makes of a card's peak.

    Compiling each would take longer than all the steps: the recipe's own model (or the first) is measured with and
    without, and what it gains stands for the others.
    """
    if machine.card is not None:
        rate = machine.peak_flops * plan_args.mfu
        return {model: Pace(probe.flops_per_token / rate, 0.0) for model, probe in sizes.items()}
    own = settings["model_config"] if settings["model_config"] in sizes else next(iter(sizes))
    compiles = settings["torch_compile"]
    seconds = plan_args.probe_seconds / (len(sizes) + compiles)
    paces = {}
    for model, probe in sizes.items():
        logger.info("Probing %s for %.0f s.", Path(model).stem, seconds)
        step = probing_settings(settings, model, probe, machine)
        paces[model] = measure_pace(material, {**step, "torch_compile": False, "embedding_init": "random"}, seconds)
    step, gain, fixed = probing_settings(settings, own, sizes[own], machine), 1.0, 0.0
    if compiles:
        compiled = measure_pace(material, step, seconds)
        gain, fixed = compiled.seconds_per_token / paces[own].seconds_per_token, compiled.fixed_seconds
    elif settings["embedding_init"] != "random":
        fixed = measure_fixed_seconds(material, step)
    return {
        model: replace(pace, seconds_per_token=gain * pace.seconds_per_token, fixed_seconds=pace.fixed_seconds + fixed)
        for model, pace in paces.items()
    }


def probing_settings(settings: Settings, model: str, probe: Probe, machine: Machine) -> Settings:
    """The recipe with one model, and a step small enough to be measured."""
    row = settings["max_seq_length"]
    tokens = choose_probe_tokens(probe.flops_per_token, machine.peak_flops, settings["micro_batch_tokens"], row)
    return {**settings, "model_config": model, "batch_size_tokens": tokens, "micro_batch_tokens": tokens}


def write_recipe(recipe_path: str, given: Settings, row: Row, target: str) -> Path:
    """Write a recipe that extends the given one; where that extends another itself, its lines are repeated.

    Args:
        recipe_path: The given recipe.
        given: What it and the command line set.
        row: The chosen model.
        target: The file to write.
    """
    path = Path(target)
    layers = read_layers(recipe_path)
    below = layers[0][1]
    # The recipe's own directory is for the run of another model; one given beside it is for this.
    of_recipe = [layer.get("output_dir") for _, layer in layers]
    is_given = given.get("output_dir") not in (None, *of_recipe)
    chosen = {
        "model_config": row.model_config,
        "optim": row.optim,
        "micro_batch_tokens": row.micro_batch_tokens,
        "output_dir": given["output_dir"] if is_given else f"runs/{path.stem}",
    }
    settings = {**given, **chosen}
    build_arguments(CLASSES, settings)
    lines = {key: value for key, value in settings.items() if key not in below or below[key] != value}
    lines |= {key: None for key in below if key not in settings}
    parent = os.path.relpath(layers[0][0], path.parent)
    text = yaml.safe_dump({"extends": parent, **lines}, sort_keys=False)
    head = (
        f"# Planned with {Path(recipe_path).parent.name}/{Path(recipe_path).name}, for CPU or GPU as it was probed.\n"
    )
    write_whole(path, head + text)
    return path


def check_writable(target: str, recipe_path: str) -> None:
    """See, before anything is measured, that the recipe can be written, over none that it is made from or that has a
    run, which goes on with it.

    Raises:
        SettingError: When it cannot.
    """
    if Path(target).resolve() in [Path(file).resolve() for file, _ in read_layers(recipe_path)]:
        raise SettingError(
            f"The setting plan_recipe is {target!r}, which the plan is made from and would overwrite; name another."
        )
    run_dir = read_yaml(target).get("output_dir") if Path(target).is_file() else None
    if run_dir and (Path(run_dir) / RECIPE).is_file():
        raise SettingError(
            f"The setting plan_recipe is {target!r}, the recipe of the run in {run_dir}; name another, say "
            "runs/plan-2.yaml."
        )
    folder = Path(target).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK) and not Path(target).is_dir() else "not a file to write"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason is not None:
        raise SettingError(f"The setting plan_recipe is {target!r}, which cannot be written ({reason}); name another.")
