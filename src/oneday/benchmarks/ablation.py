"""ablate: a recipe and one change at a time, all seeds; the difference with its standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from oneday.benchmarks.arguments import AblationArguments, KeepArguments, SeedArguments
from oneday.benchmarks.planning import Plan, Text, merge_changes, read_budget, read_changes, read_text
from oneday.benchmarks.records import Record, write_summary
from oneday.errors import SettingError
from oneday.modeling import check_config_file
from oneday.step_timer import QUIET

BASE = "base"
# A verdict needs 0 to be outside this confidence interval (Student's t) of the mean difference, over this many seeds.
CONFIDENCE, VERDICT_SEEDS = 0.95, 3


def paired_difference(base: Sequence[float], changed: Sequence[float]) -> tuple[float, float]:
    """(mean difference, its standard error) of values paired by seed; the error of a single pair is NaN.

    >>> paired_difference([4.0, 4.0, 4.0], [3.0, 2.0, 1.0])
    (-2.0, 0.5773502691896258)
    """
    differences = [after - before for before, after in zip(base, changed, strict=True)]
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return fmean(differences), error


def run_ablation(plan: Plan, args: AblationArguments, seed_args: SeedArguments, keep_args: KeepArguments) -> str:
    """Run what is missing, seed by seed, and write the summary; returns the table.

    Raises:
        SettingError: When no change is given, one cannot work, or a run fails.
    """
    if not args.change:
        raise SettingError("No change is given; add --change NAME=VALUE, once for each change.")
    plan = plan.keeping(keep_args)
    changes = {BASE: {}, **{text.replace(" ", ""): read_changes(text, "change") for text in args.change}}
    for label, change in changes.items():
        check_change(plan, label, change)
    texts = {label: plan.text if not change else read_changed_text(plan, change) for label, change in changes.items()}
    for label, text in texts.items():
        if text.measure != plan.text.measure:
            raise SettingError(
                f"The change {label} is measured by {text.measure}, the recipe by {plan.text.measure}; leave it out."
            )
    jobs = {
        label: [plan.our_job("ablation", label, seed, 1, change, texts[label]) for seed in seed_args.seeds]
        for label, change in changes.items()
    }
    records = plan.store.obtain([job for turn in zip(*jobs.values()) for job in turn])
    groups = {label: [records[job.name] for job in group] for label, group in jobs.items()}
    rows = [
        describe_change(label, group, groups[BASE], name_obstacle(texts[label], plan.text))
        for label, group in groups.items()
    ]
    write_summary(
        plan.store.folder / f"ablation-{plan.name}.json", rows, list(records.values()), plan.store.environment,
        benchmark="ablate", recipe=plan.name, budget=plan.budget.limits, measure=plan.text.measure,
    )  # fmt: skip
    return format_table(plan, rows, seed_args.seeds)


def check_change(plan: Plan, label: str, change: dict[str, Any]) -> None:
    """Raise SettingError where a change is void, or of what all runs have in common."""
    own = sorted(change.keys() & ({"seed"} | QUIET.keys()))
    if own:
        raise SettingError(f"The change {label} sets {own[0]}, which the benchmark sets itself; leave it out.")
    changed = merge_changes(plan.settings, change)
    if change and changed == plan.settings:
        raise SettingError(f"The change {label} is what the recipe has; leave it out.")
    budget = read_budget(changed)
    if budget.limits != plan.budget.limits:
        raise SettingError(
            f"The change {label} is of the budget ({budget.describe()} for {plan.budget.describe()}), which all runs "
            "share; leave it out."
        )


def read_changed_text(plan: Plan, change: dict[str, Any]) -> Text:
    """The text of a changed recipe; also says early what cannot work about the change."""
    settings = {**plan.settings, **change}
    check_config_file(settings["model_config"])
    return read_text(settings)


def name_obstacle(text: Text, base: Text) -> str:
    """Why losses on two texts do not compare; empty where they do."""
    if text.held_out != base.held_out:
        return "other text"
    return "" if text.masks == base.masks else "other loss"


def describe_change(label: str, group: list[Record], base: list[Record], obstacle: str) -> dict[str, Any]:
    """One row of the table; without a difference where something is in its way."""
    measure = group[0]["measure"]
    losses, base_losses = ([record["final"][measure] for record in records] for records in (group, base))
    difference, error = paired_difference(base_losses, losses)
    rates = [fmean(record["tokens_per_second"] for record in records) for records in (group, base)]
    row = {
        "change": label,
        "losses": losses,
        "mean_loss": fmean(losses),
        "tokens_per_second": rates[0],
        "tokens_per_second_ratio": rates[0] / rates[1],
    }
    if label != BASE:
        row |= {
            "difference": None if obstacle else difference,
            "standard_error": error if not obstacle and math.isfinite(error) else None,
            "verdict": obstacle or find_verdict(difference, error, len(losses)),
        }
    return row


def find_verdict(difference: float, error: float, num_seeds: int) -> str:
    """`better` or `worse` only where the difference stands out of its error: at three seeds 4.3 times."""
    if num_seeds < VERDICT_SEEDS:
        return f"needs {VERDICT_SEEDS} seeds"
    if not abs(difference) > stats.t.ppf((1 + CONFIDENCE) / 2, num_seeds - 1) * error:
        return "not clear"
    return "better" if difference < 0 else "worse"


def format_table(plan: Plan, rows: list[dict[str, Any]], seeds: list[int]) -> str:
    """The rows in 80 columns."""
    lines = [
        f"{plan.name[:50]}: one change at a time",
        f"{plan.budget.describe()} a run, seeds {', '.join(map(str, seeds))}",
        f"{'change':22}{'mean loss':>10}{'difference':>11}{'std. error':>11}{'tokens/s':>9}  verdict",
        "-" * 80,
    ]
    for row in rows:
        label = row["change"]
        if len(label) > 21:
            lines.append(label[:80])
            label = ""
        difference, error = row.get("difference"), row.get("standard_error")
        lines.append(
            f"{label:22}{row['mean_loss']:>10.4f}{'' if difference is None else f'{difference:+.4f}':>11}"
            f"{'' if error is None else f'{error:.4f}':>11}{row['tokens_per_second_ratio']:>7.2f} x"
            f"  {row.get('verdict', '')}".rstrip()
        )
    lines += [
        "-" * 80,
        f"loss: {plan.text.measure}, nats a predicted token; differences: same seed's runs.",
        f"A verdict: where 0 is outside the {CONFIDENCE:.0%} interval. tokens/s: over the base's.",
    ]
    return "\n".join(lines)
