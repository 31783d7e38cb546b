"""A budget planned before it is spent: what each model would see and cost, which to take, and a recipe for it."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
import yaml

from oneday.arguments import BudgetTrainingArguments, SettingError, setting
from oneday.assembly import CLASSES, check_settings, prepare_objective
from oneday.benchmarks.arguments import check_positive
from oneday.budget import JOULES_PER_KWH, SECONDS_PER_HOUR, Budget
from oneday.cards import Card, find_card
from oneday.durable_files import write_whole
from oneday.ladder import BENCHMARK_DIR, LADDER_DIR, Family, FamilyLaw, fit_family, read_records
from oneday.modeling import check_config_file
from oneday.objectives import find_objective
from oneday.probing import (
    Material,
    Pace,
    Probe,
    choose_probe_tokens,
    make_stand_in,
    measure_model,
    measure_pace,
    optimizer_pair,
)
from oneday.recipe import Settings, build_arguments, complete_settings, read_layers
from oneday.scaling_law import Prediction
from oneday.throughput import has_fast_bf16, measure_peak_flops

logger = logging.getLogger(__name__)

# What is left of the memory for the largest layer's own work, the optimizer's and the allocator's gaps.
USABLE_MEMORY = 0.8
# Up to four passes over a text are nearly as good as new text (Muennighoff et al. 2023, arXiv 2305.16264).
MAX_EPOCHS = 4.0
# Where no law says better: Hoffmann et al. 2022 (arXiv 2203.15556) found the best size at about this many.
TOKENS_PER_PARAMETER = 20.0
# A model that even at the machine's peak would see fewer tokens than parameters is not probed.
LEAST_TOKENS_PER_PARAMETER = 1.0


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
    ladder_dirs: list[str] = setting([LADDER_DIR, BENCHMARK_DIR], "Records that the scaling law is fitted on.")
    plan_recipe: str = setting("runs/plan.yaml", "Where the recipe of the chosen model is written.")

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        for name in ("probe_seconds", "gpu_memory_gb", "mfu"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        if self.mfu > 1:
            raise SettingError(f"The setting mfu is {self.mfu:g}; it is a fraction of the peak, at most 1.")


@dataclass(frozen=True)
class Machine:
    """What the budget is spent on.

    Attributes:
        name: In words.
        memory_bytes: Of the GPU, or of the machine where there is none.
        peak_flops: Measured here, or from a data sheet.
        watts: Power, as far as it is known before probing.
        card: The card planned for; None: this machine.
    """

    name: str
    memory_bytes: float
    peak_flops: float
    watts: float | None
    card: Card | None


@dataclass(frozen=True)
class Row:
    """One model in the budget.

    Attributes:
        model_config: Its file.
        probe: Its sizes.
        tokens: That the budget holds.
        hours: That it takes.
        epochs: Passes over the text; None: a stream.
        micro_batch_tokens: The largest that fits; 0: none does.
        optim: The recipe's optimizer, or its 8-bit form where only that fits.
        prediction: Of the held-out loss; None: no law.
        usd: Cost; None: no price was given.
        kwh: Energy; None: no power is known.
    """

    model_config: str
    probe: Probe
    tokens: float
    hours: float
    epochs: float | None
    micro_batch_tokens: int
    optim: str
    prediction: Prediction | None
    usd: float | None
    kwh: float | None


@dataclass(frozen=True)
class BudgetPlan:
    """All that the table shows.

    Attributes:
        budget: What may be spent.
        machine: On what.
        rows: One a model, smallest first.
        best: Place of the one to take.
        left_out: Names of models that are too large for the budget.
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
    budget, machine = check_settings(model_args, args), find_machine(args, plan_args)
    check_writable(plan_args.plan_recipe)
    models = plan_args.models or find_relatives(settings["model_config"])
    family = Family.of_settings(settings, read_model_type(settings["model_config"]))
    with tempfile.TemporaryDirectory(prefix="oneday-plan-") as folder:
        material = find_material(settings, Path(folder))
        held_out = material.validation.index.key
        fitted = fit_family(read_records(plan_args.ladder_dirs), family, held_out)
        sizes = {model: measure_model(material, {**settings, "model_config": model}) for model in models}
        kept = [model for model in sizes if is_within_reach(sizes[model], budget, machine)]
        kept = sorted(kept, key=lambda model: sizes[model].flops_per_token)
        if not kept:
            raise SettingError(
                f"The budget ({budget.describe()}) shows no model a token for each parameter; raise it, or name "
                "smaller ones in models."
            )
        paces = find_paces(material, settings, {model: sizes[model] for model in kept}, machine, plan_args)
    rows = [
        make_row(model, sizes[model], paces[model], budget, machine, settings, material.num_tokens, fitted)
        for model in kept
    ]
    best = choose_row(rows)
    recipe = write_recipe(recipe_path, given, rows[best], plan_args.plan_recipe)
    left_out = [Path(model).stem for model in models if model not in kept]
    is_own_text = fitted is not None and fitted.held_out == held_out
    mfu = plan_args.mfu if machine.card else None
    return BudgetPlan(budget, machine, rows, best, left_out, fitted, family, is_own_text, mfu, recipe)


def find_machine(args: BudgetTrainingArguments, plan_args: PlanArguments) -> Machine:
    """The card asked for, this machine's GPU, or this machine."""
    given = plan_args.gpu_memory_gb * 1e9 if plan_args.gpu_memory_gb else None
    if plan_args.for_ is not None:
        card = find_card(plan_args.for_)
        watts = args.stated_watts or card.watts
        return Machine(card.name, given or card.memory_gb * 1e9, card.peak_flops, watts, card)
    bf16 = has_fast_bf16(args.device) if args.use_bf16 is None else args.use_bf16
    peak = measure_peak_flops(args.device, bf16)
    if args.device.type == "cuda":
        properties = torch.cuda.get_device_properties(args.device)
        return Machine(properties.name, given or properties.total_memory, peak, args.stated_watts, None)
    name = f"this machine, {torch.get_num_threads()} threads"
    return Machine(name, given or psutil.virtual_memory().total, peak, args.stated_watts, None)


def read_model_type(model_config: str) -> str:
    """`model_type` of a config file."""
    return yaml.safe_load(check_config_file(model_config).read_text(encoding="utf-8"))["model_type"]


def find_relatives(model_config: str) -> list[str]:
    """The config files of a recipe's architecture beside its own; baselines with dropout are for benchmarks alone."""
    file, kind = check_config_file(model_config), read_model_type(model_config)
    beside = [path for path in sorted(file.parent.glob("*.json")) if not path.name.startswith("baseline-")]
    return [str(path) for path in beside if path == file or read_model_type(str(path)) == kind]


def find_material(settings: Settings, folder: Path) -> Material:
    """The recipe's text, prepared as the run will take it from the cache; for a stream, random words."""
    _, data_args, args = build_arguments(CLASSES, settings)
    if data_args.streaming:
        return make_stand_in(find_objective(args.objective), settings, folder)
    objective, data = prepare_objective(data_args, args)
    return Material(objective, data.tokenizer, data.train, data.validation, data.train.num_tokens)


def is_within_reach(probe: Probe, budget: Budget, machine: Machine) -> bool:
    """Whether the budget could show a model as many tokens as it has parameters, at the peak."""
    fastest = Pace(probe.flops_per_token / machine.peak_flops, 0.0)
    tokens = count_tokens(probe, fastest, budget, machine.watts, 1.0)
    return tokens >= LEAST_TOKENS_PER_PARAMETER * probe.num_parameters


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
    compiles = bool(settings["torch_compile"])
    seconds = plan_args.probe_seconds / (len(sizes) + compiles)
    paces = {}
    for model, probe in sizes.items():
        logger.info("Probing %s for %.0f s.", Path(model).stem, seconds)
        step = probing_settings(settings, model, probe, machine)
        paces[model] = measure_pace(material, {**step, "torch_compile": False, "embedding_init": "random"}, seconds)
    if compiles or settings["embedding_init"] != "random":
        compiled = measure_pace(material, probing_settings(settings, own, sizes[own], machine), seconds)
        gain = compiled.seconds_per_token / paces[own].seconds_per_token if compiles else 1.0
        for model, pace in paces.items():
            faster = replace(pace, seconds_per_token=gain * pace.seconds_per_token)
            paces[model] = replace(faster, fixed_seconds=compiled.fixed_seconds)
    return paces


def probing_settings(settings: Settings, model: str, probe: Probe, machine: Machine) -> Settings:
    """The recipe with one model, and a step small enough to be measured."""
    row = settings["max_seq_length"]
    tokens = choose_probe_tokens(probe.flops_per_token, machine.peak_flops, settings["micro_batch_tokens"], row)
    return {**settings, "model_config": model, "batch_size_tokens": tokens, "micro_batch_tokens": tokens}


def count_tokens(probe: Probe, pace: Pace, budget: Budget, watts: float | None, batch_tokens: float) -> float:
    """Tokens that the nearest limit of a budget leaves."""
    counts = [budget.tokens, budget.flops and budget.flops / probe.flops_per_token]
    counts.append(budget.steps and budget.steps * batch_tokens)
    seconds = budget.clock_limit_seconds
    if budget.needs_meter and watts:
        seconds = min(seconds or float("inf"), budget.kwh * JOULES_PER_KWH / watts)
    if seconds is not None:
        counts.append(max(0.0, seconds - pace.fixed_seconds) * pace.tokens_per_second(batch_tokens))
    known = [count for count in counts if count is not None]
    if not known:
        raise SettingError("budget_kwh is the only limit and no power is known here; set stated_watts.")
    return min(known)


def make_row(
    model: str,
    probe: Probe,
    pace: Pace,
    budget: Budget,
    machine: Machine,
    settings: Settings,
    num_tokens: int | None,
    fitted: FamilyLaw | None,
) -> Row:
    """What one model makes of the budget."""
    batch, watts = settings["batch_size_tokens"], machine.watts or pace.watts
    tokens = count_tokens(probe, pace, budget, watts, batch)
    hours = (tokens / pace.tokens_per_second(batch) + pace.fixed_seconds) / SECONDS_PER_HOUR
    names = [settings["optim"], *[name for name in optimizer_pair(settings["optim"]) if name]]
    fits = {name: largest_micro_batch(probe, name, machine, settings) for name in names}
    optim = next((name for name in names if fits[name]), settings["optim"])
    return Row(
        model_config=model,
        probe=probe,
        tokens=tokens,
        hours=hours,
        epochs=None if num_tokens is None else tokens / num_tokens,
        micro_batch_tokens=fits[optim],
        optim=optim,
        prediction=fitted.law.predict(probe.num_parameters_without_embeddings, tokens) if fitted else None,
        usd=hours * budget.usd_per_hour if budget.usd_per_hour else None,
        kwh=hours * watts / 1000 if watts else None,
    )


def memory_bytes(probe: Probe, optim: str, micro_batch_tokens: float) -> float:
    """Weights, gradients, optimizer state and activations."""
    return probe.model_bytes + probe.state_bytes[optim] + probe.activation_bytes * micro_batch_tokens


def largest_micro_batch(probe: Probe, optim: str, machine: Machine, settings: Settings) -> int:
    """Tokens of the largest micro-batch that divides the batch and fits; on a CPU not above the recipe's; 0: none.

    A GPU is busier with a larger one, a CPU is not.
    """
    row = settings["max_seq_length"]
    is_gpu = machine.card is not None or torch.cuda.is_available()
    rows = max(1, settings["batch_size_tokens"] // row)
    for count in sorted((n for n in range(1, rows + 1) if rows % n == 0), reverse=True):
        allowed = is_gpu or count * row <= settings["micro_batch_tokens"]
        if allowed and memory_bytes(probe, optim, count * row) <= USABLE_MEMORY * machine.memory_bytes:
            return count * row
    return 0


def choose_row(rows: Sequence[Row]) -> int:
    """Place of the model to take: the lowest predicted loss; without a law the largest that sees its share of tokens.

    Raises:
        SettingError: When none fits.
    """
    fitting = [place for place, row in enumerate(rows) if row.micro_batch_tokens]
    if not fitting:
        raise SettingError("No model fits into the memory; name smaller ones in models, or lower max_seq_length.")
    if rows[0].prediction is not None:
        return min(fitting, key=lambda place: rows[place].prediction.loss)
    fed = [p for p in fitting if rows[p].tokens >= TOKENS_PER_PARAMETER * rows[p].probe.num_parameters]
    return max(fed or fitting[:1], key=lambda place: rows[place].probe.flops_per_token)


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
    chosen = {
        "model_config": row.model_config,
        "optim": row.optim,
        "micro_batch_tokens": row.micro_batch_tokens,
        "output_dir": f"runs/{path.stem}",
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


def check_writable(target: str) -> None:
    """Raise SettingError, before anything is measured, when the recipe cannot be written."""
    folder = Path(target).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK) and not Path(target).is_dir() else "not a file to write"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason is not None:
        raise SettingError(f"The setting plan_recipe is {target!r}, which cannot be written ({reason}); name another.")
