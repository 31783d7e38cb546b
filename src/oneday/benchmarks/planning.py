"""Jobs: from a recipe's settings to the runs of a benchmark, each with all that decides its result."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from oneday.assembly import CLASSES, check_settings, prepare_objective
from oneday.benchmarks.arguments import KeepArguments, RecordArguments
from oneday.benchmarks.heldout import name_measure
from oneday.benchmarks.ours import run_ours
from oneday.benchmarks.records import Job, RecordStore, hash_source, normalise
from oneday.benchmarks.stock import run_stock
from oneday.budget import Budget
from oneday.durable_files import make_folder
from oneday.errors import SettingError
from oneday.evaluation import hash_evaluation
from oneday.modeling import check_config_file
from oneday.recipe import (
    SAME_KIND,
    Settings,
    build_arguments,
    check_layer,
    coerce,
    complete_settings,
    fields_of,
    read_value,
    refused_settings,
)
from oneday.step_timer import QUIET
from oneday.throughput import describe_environment, measure_peak_flops, usable_cores

# What a recipe sets for its own model, and a stock one may not have.
OF_OUR_MODEL = ("attention_init", "position_encoding")
# Settings that change which machine a run sees.
OF_THE_MACHINE = ("num_threads", "bf16", "use_cpu")
# Characters of a label in a file's name.
LONGEST_LABEL = 100
# Settings that decide nothing, and those that stand in the record as what they give: text, tokenizer, model.
NOT_RECORDED = {
    "output_dir", "cache_dir", "report_to", "disable_tqdm", "run_name", "log_level", "logging_steps", "seed",
    "dataset_name", "validation_name", "tokenizer_name", "model_config",
}  # fmt: skip


@dataclass(frozen=True)
class Text:
    """What settings are trained and measured on: two runs compare where `held_out` and `masks` are the same.

    Attributes:
        fingerprint: Of the text under its tokenizer.
        held_out: Key of the packed held-out rows.
        masks: Of a batch of them as it is scored: what is hidden, what is to be predicted, how the terms are weighed.
        corpus: Its public name.
        kind: `encoder` or `decoder`.
        measure: Name of the held-out loss.
        vocab_size: Ids of the tokenizer.
    """

    fingerprint: str
    held_out: str
    masks: str
    corpus: str
    kind: str
    measure: str
    vocab_size: int


@dataclass(frozen=True)
class Plan:
    """A recipe to be benchmarked.

    Attributes:
        name: Of the recipe, for files: `quickstart-bert`.
        settings: Every setting of it.
        store: Where its records are.
        keep_runs: Where run directories of our side are kept; None: nowhere.
    """

    name: str
    settings: Settings
    store: RecordStore
    keep_runs: Path | None = None

    def keeping(self, args: KeepArguments) -> Plan:
        """The same plan, with our side's run directories kept where the settings say.

        Raises:
            SettingError: When nothing can be written there.
        """
        if not args.keep_runs:
            return self
        folder = Path(args.keep_runs)
        make_folder(folder, "keep_runs")
        return replace(self, keep_runs=folder)

    @functools.cached_property
    def budget(self) -> Budget:
        """What the recipe may spend."""
        return read_budget(self.settings)

    @functools.cached_property
    def text(self) -> Text:
        """What the recipe is trained on."""
        return read_text(self.settings)

    def our_job(
        self,
        kind: str,
        label: str,
        seed: int,
        num_points: int,
        changes: Settings | None = None,
        text: Text | None = None,
    ) -> Job:
        """A run of the recipe, with changes (on `text`, where they change that), under one seed."""
        recipe = {**merge_changes(self.settings, changes or {}), **QUIET, "seed": seed}
        budget, text = read_budget(recipe), text or self.text
        details = {
            "recipe": self.name,
            "change": label,
            "budget": budget.limits,
            "budget_seconds": budget.clock_limit_seconds,
            "num_points": num_points,
            "seed": seed,
            "learning_rate": recipe["learning_rate"],
            "measure": text.measure,
        }
        name = "-".join(filter(None, [kind, self.name, slug(label), name_budget(budget), f"seed{seed}"]))
        settings = {
            **describe_settings(recipe),
            **describe_text(text),
            # Of a tokenizer that is given the setting says nothing.
            **({"vocab_size": text.vocab_size} if recipe.get("tokenizer_name") is not None else {}),
            "num_points": num_points,
            "seed": seed,
        }
        run_dir = None if self.keep_runs is None else self.keep_runs / name
        run = functools.partial(run_ours, run_dir=run_dir)
        return Job(kind, name, run, recipe, details, normalise(settings), find_machine_changes(self.settings, recipe))

    def stock_job(
        self,
        baseline: str,
        config: str,
        rows: int,
        learning_rate: float,
        seed: int,
        budget_seconds: float,
        num_points: int,
    ) -> Job:
        """A run of a stock model, a screen where it has one point.

        Of the recipe only the text counts, so that its records outlive changes of it.
        """
        details = {
            "recipe": self.name,
            "baseline": baseline,
            "model_config": Path(config).name,
            "learning_rate": learning_rate,
            "rows": rows,
            "budget_seconds": budget_seconds,
            "num_points": num_points,
            "seed": seed,
            "measure": self.text.measure,
        }
        settings = {
            **{key: details[key] for key in ("learning_rate", "rows", "budget_seconds", "num_points", "seed")},
            **{key: self.settings[key] for key in ("max_seq_length", "objective", "bf16")},
            **describe_text(self.text),
            "model": read_model(config),
            "method": hash_source("benchmarks/stock.py", "benchmarks/heldout.py"),
        }
        budget = name_budget(Budget(seconds=budget_seconds))
        kind = "screen" if num_points == 1 else "stock"
        name = f"{kind}-{self.name}-{baseline}-{rows}rows-lr{learning_rate:g}-{budget}-seed{seed}"
        recipe = {**self.settings, **dict.fromkeys(OF_OUR_MODEL), "model_config": config, "seed": seed}
        return Job("stock", name, run_stock, recipe, details, normalise(settings))


def make_plan(recipe_path: str, settings: Settings, record_args: RecordArguments) -> Plan:
    """The plan for a recipe on this machine.

    Args:
        recipe_path: Its file.
        settings: What it and the command line set.
        record_args: Where records are.

    Raises:
        SettingError: When a setting cannot work.
    """
    complete = complete_settings(CLASSES, settings)
    model_args, _, args = build_arguments(CLASSES, complete)
    check_settings(model_args, args)
    path = Path(recipe_path)
    store = RecordStore(
        Path(record_args.records_dir),
        describe_environment(args.device),
        record_args.reuse_ours,
        measure_peak_flops(args.device, args.computes_in_bf16),
    )
    return Plan("-".join(filter(None, [path.parent.name, path.stem])), complete, store)


def find_machine_changes(settings: Settings, changed: Settings) -> dict[str, Any]:
    """What of this machine is another for changed settings: parts of its description, and `peak_flops`."""
    names = [name for name in OF_THE_MACHINE if settings.get(name) != changed.get(name)]
    if not names:
        return {}
    args = build_arguments(CLASSES, changed)[2]
    environment = describe_environment(args.device)
    if "num_threads" in names:  # the peak of so many is not measured here
        return environment | {"threads": changed["num_threads"] or usable_cores(), "peak_flops": None}
    return environment | {"peak_flops": measure_peak_flops(args.device, args.computes_in_bf16)}


def merge_changes(settings: Settings, changes: Settings) -> Settings:
    """Settings with changes; of settings that are one (budget_hours and budget_minutes) the changed one counts."""
    replaced = {name for names in SAME_KIND if any(changes.get(n) is not None for n in names) for name in names}
    return {**settings, **dict.fromkeys(replaced & settings.keys()), **changes}


def read_budget(settings: Settings) -> Budget:
    """What settings may spend."""
    return Budget.from_arguments(build_arguments(CLASSES, settings)[2])


def read_text(settings: Settings) -> Text:
    """Prepare the text that settings ask for, and name it."""
    _, data_args, args = build_arguments(CLASSES, settings)
    objective, data = prepare_objective(data_args, args)
    return Text(
        fingerprint=data.fingerprint,
        held_out=data.validation.index.key,
        masks=hash_evaluation(objective, data.validation, name_measure(objective)),
        corpus=data.corpus.name,
        kind=objective.kind,
        measure=name_measure(objective),
        vocab_size=len(data.tokenizer),
    )


def describe_text(text: Text) -> Settings:
    """What a record says of its text."""
    return {"corpus": text.corpus, "corpus_hash": text.fingerprint, "held_out": text.held_out, "masks": text.masks}


def describe_settings(settings: Settings) -> Settings:
    """What decides a run of ours, with no path in it: the model as its config says it, the rest as it is set."""
    kept = {key: value for key, value in settings.items() if key not in NOT_RECORDED}
    return {**kept, "model": read_model(settings["model_config"])}


def read_model(config: str) -> Settings:
    """A config file's content."""
    return json.loads(check_config_file(config).read_text(encoding="utf-8"))


def read_changes(text: str, place: str) -> Settings:
    """`lr_shape=linear,warmup_fraction=0.1` -> settings; a comma without a name after it belongs to the value.

    Raises:
        SettingError: On an unknown setting or a value of the wrong type.
    """
    changes: dict[str, str] = {}
    for piece in text.split(","):
        name, equals, value = piece.partition("=")
        if equals:
            name = name.strip()
            changes[name] = value
        elif changes:
            changes[list(changes)[-1]] += f",{piece}"
        else:
            raise SettingError(f"The setting {place} is {text!r}; write NAME=VALUE.")
    return {name: read_setting(name, value, f"--{place}") for name, value in changes.items()}


def read_setting(name: str, text: str, place: str) -> Any:
    """One value of a recipe's setting, as the command line gives it."""
    known = fields_of(CLASSES)
    check_layer(place, {name: text}, known, refused_settings(CLASSES))
    return coerce(name, read_value(text.strip()), known[name])


def name_budget(budget: Budget) -> str:
    """A budget in a file's name: `600s`, `1e+06tokens`."""
    return "-".join(f"{limit:g}{'s' if kind == 'seconds' else kind}" for kind, limit in budget.limits.items())


def slug(label: str) -> str:
    """A label with only what every file system takes; the end of a long one is a hash of it."""
    name = re.sub(r"[^\w.=+-]+", "_", label).strip("_")
    if len(name) <= LONGEST_LABEL:
        return name
    return f"{name[:LONGEST_LABEL]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
