"""versus-stock: held-out curves of a recipe and of stock models at the same wall clock, and the time to match."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from statistics import median
from typing import Any

from transformers import AutoConfig

from oneday.arguments import SettingError
from oneday.benchmarks.arguments import KeepArguments, SeedArguments, VersusStockArguments
from oneday.benchmarks.picture import draw_versus_stock
from oneday.benchmarks.planning import Plan
from oneday.benchmarks.records import Job, Record, write_summary
from oneday.comparison import Match, time_to_match
from oneday.modeling import check_config_file
from oneday.objectives import OBJECTIVES, find_objective

logger = logging.getLogger(__name__)

# Stock models of about 6 M parameters; for a recipe of another size name config files.
CONFIGS = {
    "bert": "model_configs/baseline-bert.json",
    "modernbert": "model_configs/baseline-modernbert.json",
    "gpt2": "model_configs/baseline-gpt2.json",
    "llama": "model_configs/baseline-llama.json",
}
# Held-out losses of short runs that differ by less are of one quality.
TIE_NATS = 0.02
DEFAULT_BASELINES = {"encoder": ["bert", "modernbert"], "decoder": ["gpt2", "llama"]}


def median_match(matches: Sequence[Match]) -> Match:
    """The median over seeds, of an even number the lower of the two in the middle; not reached counts as lowest."""
    ranked = sorted(matches, key=lambda match: match.ratio or 0.0)
    return ranked[(len(ranked) - 1) // 2]


def run_versus_stock(
    plan: Plan, args: VersusStockArguments, seed_args: SeedArguments, keep_args: KeepArguments
) -> str:
    """Run what is missing of both sides in turn, write summary and picture; returns the table.

    Raises:
        SettingError: When the recipe has no wall-clock budget alone, or a run fails.
    """
    plan, budget_seconds = plan.keeping(keep_args), check_budget(plan)
    baselines = find_baselines(plan, args)
    jobs = {"ours": [plan.our_job("ours", "", seed, args.num_points) for seed in seed_args.seeds]}
    for name, config in baselines.items():
        chosen = choose_batch_and_rate(plan, args, name, config, seed_args.seeds[0])
        if chosen is not None:
            facts = (budget_seconds, args.num_points)
            jobs[name] = [plan.stock_job(name, config, *chosen, seed, *facts) for seed in seed_args.seeds]
    sides = gather(plan, args, jobs)
    rows = [describe_side(name, records, sides.get("ours")) for name, records in sides.items()]
    records = [record for group in sides.values() for record in group]
    folder = plan.store.folder
    write_summary(
        folder / f"versus_stock-{plan.name}.json", rows, records, plan.store.environment,
        benchmark="versus-stock", recipe=plan.name, budget_seconds=budget_seconds, measure=plan.text.measure,
    )  # fmt: skip
    picture = folder / f"versus_stock-{plan.name}.png"
    draw_versus_stock(picture, sides, plan.text.measure, budget_seconds)
    return format_table(plan, rows, records, budget_seconds)


def check_budget(plan: Plan) -> float:
    """The wall-clock budget in seconds.

    Raises:
        SettingError: When there is none, or another limit could end our side before stock's.
    """
    limits, seconds = plan.budget.limits, plan.budget.clock_limit_seconds
    others = [kind for kind in limits if kind in ("tokens", "flops", "steps")]
    if seconds is None or others:
        given = ", ".join(f"budget_{kind}" for kind in limits)
        raise SettingError(
            f"versus-stock compares at one wall clock, but the recipe is limited by {given}; set budget_minutes and "
            "the others to null."
        )
    return seconds


def find_baselines(plan: Plan, args: VersusStockArguments) -> dict[str, str]:
    """Name -> config file of each baseline.

    Raises:
        SettingError: On an unknown name or a file that cannot be used.
    """
    objective = find_objective(plan.settings["objective"])
    if not objective.has_stock_loss:
        names = ", ".join(name for name, each in OBJECTIVES.items() if each.has_stock_loss)
        raise SettingError(
            f"versus-stock compares with stock losses, and objective {objective.name} has its own; set it to one of "
            f"{names}."
        )
    found = {}
    for name in args.baselines or DEFAULT_BASELINES[plan.text.kind]:
        if name.endswith(".json"):
            found[check_config_file(name).stem] = name
        elif name in CONFIGS:
            found[name] = CONFIGS[name]
        else:
            raise SettingError(
                f"The setting baselines has {name!r}; it must be one of {', '.join(CONFIGS)}, or a config JSON."
            )
    auto_class = objective.auto_class
    for name, config in found.items():
        if type(AutoConfig.from_pretrained(str(check_config_file(config)))) not in auto_class._model_mapping:
            raise SettingError(
                f"The setting baselines has {name!r}, which has no {auto_class.__name__}; leave it out."
            )
    return found


def choose_batch_and_rate(
    plan: Plan, args: VersusStockArguments, name: str, config: str, seed: int
) -> tuple[int, float] | None:
    """The best (rows, learning rate) in short runs, the only one without a run; None: stock is not to be run."""
    grid = list(itertools.product(args.stock_rows, args.learning_rates))
    if len(grid) == 1:
        return grid[0]
    jobs = [plan.stock_job(name, config, *point, seed, 60 * args.screen_minutes, 1) for point in grid]
    if "stock" in args.sides:
        records = list(plan.store.obtain(jobs).values())
    else:
        records = [record for record in map(plan.store.find, jobs) if record is not None]
        if len(records) < len(jobs):
            return None
    best = choose_best(records)
    shown = ", ".join(f"{r['rows']} x {r['learning_rate']:g}: {r['final'][r['measure']]:.4f}" for r in records)
    logger.info("Stock %s: %d rows at %g are the best of %s.", name, best["rows"], best["learning_rate"], shown)
    return best["rows"], best["learning_rate"]


def choose_best(records: Sequence[Record]) -> Record:
    """The lowest loss; among those as good within the noise of a seed the smallest batch, as the examples have it.

    In short runs a stock BERT leaves the distribution of single words under no setting: then more steps are the better
    guess for a longer one.
    """
    losses = [record["final"][record["measure"]] for record in records]
    equals = [record for record, loss in zip(records, losses) if loss <= min(losses) + TIE_NATS]
    return min(equals, key=lambda record: (record["rows"], record["final"][record["measure"]]))


def gather(plan: Plan, args: VersusStockArguments, jobs: dict[str, list[Job]]) -> dict[str, list[Record]]:
    """Records by side: those asked for are run where missing, in turn; of the others what stands is taken."""
    wanted = {side: ("ours" if side == "ours" else "stock") in args.sides for side in jobs}
    in_turn = [job for turn in zip(*jobs.values()) for job, side in zip(turn, jobs) if wanted[side]]
    records = plan.store.obtain(in_turn)
    sides = {}
    for side, group in jobs.items():
        found = [records[job.name] if wanted[side] else plan.store.find(job) for job in group]
        if all(record is not None for record in found):
            sides[side] = found
    return sides


def describe_side(name: str, records: list[Record], ours: list[Record] | None) -> dict[str, Any]:
    """One row of the table; times to match are of the same seed's two runs."""
    measure = records[0]["measure"]
    row = {
        "side": name,
        "learning_rate": records[0]["learning_rate"],
        "rows": records[0].get("rows"),
        "num_parameters": records[0]["num_parameters"],
        "seeds": [record["seed"] for record in records],
        **{
            key: median(record[key] for record in records)
            for key in ("tokens_per_second", "mfu", "peak_memory_bytes", "clock_seconds", "tokens", "steps")
        },
        "final_losses": [record["final"][measure] for record in records],
        "final_loss": median(record["final"][measure] for record in records),
    }
    if "bits_per_byte" in records[0]["final"]:
        row["bits_per_byte"] = median(record["final"]["bits_per_byte"] for record in records)
    if name != "ours" and ours:
        matches = [
            time_to_match(our["curve"], stock["final"][measure], stock["final"]["clock_seconds"], measure)
            for our, stock in zip(ours, records)
        ]
        row["times_to_match"] = [str(match) for match in matches]
        row["time_to_match"] = str(median_match(matches))
        row["tokens_per_second_ratio"] = median(our["tokens_per_second"] for our in ours) / row["tokens_per_second"]
    return row


def format_table(plan: Plan, rows: list[dict[str, Any]], records: list[Record], budget_seconds: float) -> str:
    """The rows in 80 columns."""
    lines = [
        f"{plan.name[:44]}: {budget_seconds / 60:g} minutes of wall clock a run",
        f"text: {plan.text.corpus[:72]}",
        f"{'side':14}{'parameters':>11}{'tokens/s':>10}{'MFU':>8}{'loss':>8}{'time to match':>15}{'tokens/s':>12}",
        f"{'':14}{'':>11}{'':>10}{'':>8}{'':>8}{'':>15}{'ours/stock':>12}",
        "-" * 78,
    ]
    for row in rows:
        ratio = row.get("tokens_per_second_ratio")
        lines.append(
            f"{row['side'][:14]:14}{row['num_parameters'] / 1e6:>9.2f} M{row['tokens_per_second']:>10,.0f}"
            f"{row['mfu']:>8.1%}{row['final_loss']:>8.3f}{row.get('time_to_match', ''):>15}"
            + (f"{ratio:>10.2f} x" if ratio else "")
        )
        losses = " ".join(f"{loss:.3f}" for loss in row["final_losses"])
        batch = f"{row['rows']} rows, " if row["rows"] else ""
        lines.append(f"  {batch}learning rate {row['learning_rate']:g}, {row['clock_seconds']:.0f} s; seeds: {losses}")
    environment = records[0]["environment"] if records else plan.store.environment
    lines += [
        "-" * 78,
        f"loss: {plan.text.measure}, nats a predicted token, median of seeds {shown_seeds(rows)}",
        "time to match: stock's time over the time at which ours passes its final loss",
        f"{environment['device'][:56]}, {environment['threads']} threads",
    ]
    return "\n".join(lines)


def shown_seeds(rows: list[dict[str, Any]]) -> str:
    """`1, 2, 3`, or nothing without rows."""
    return ", ".join(map(str, rows[0]["seeds"])) if rows else "(none)"
