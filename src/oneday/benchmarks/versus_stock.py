"""versus-stock: held-out curves of a recipe and of stock models at the same wall clock, and the time to match."""

from __future__ import annotations

import itertools
import logging
import math
import textwrap
from collections.abc import Sequence
from statistics import median
from typing import Any

from transformers import AutoConfig

from oneday.benchmarks.arguments import KeepArguments, SeedArguments, VersusStockArguments
from oneday.benchmarks.picture import draw_versus_stock
from oneday.benchmarks.planning import Plan
from oneday.benchmarks.records import Job, Record, write_summary
from oneday.comparison import Match, time_to_match
from oneday.corpus_names import list_hub_ids
from oneday.errors import SettingError
from oneday.modeling import check_config_file, count_parameters, read_skeleton
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
# Relative difference of the parameters of two models of one size.
SAME_SIZE = 0.15
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
    check_screens(args, budget_seconds)
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
        SettingError: When there is none, another limit could end our side before stock's, or the text is a stream.
    """
    if plan.settings["streaming"] and list_hub_ids(plan.settings["dataset_name"]):
        raise SettingError(
            "streaming is True, and versus-stock cuts the whole text into stock's rows; set it to false, and "
            "dataset_name to as much text as there is room for."
        )
    limits, seconds = plan.budget.limits, plan.budget.clock_limit_seconds
    others = [kind for kind in limits if kind in ("tokens", "flops", "steps")]
    if seconds is None or others:
        given = ", ".join(f"budget_{kind}" for kind in limits)
        raise SettingError(
            f"versus-stock compares at one wall clock, but the recipe is limited by {given}; set budget_minutes and "
            "the others to null."
        )
    return seconds


def check_screens(args: VersusStockArguments, budget_seconds: float) -> None:
    """Raise SettingError where the short runs that choose for stock would not be short."""
    num_points = len(args.stock_rows) * len(args.learning_rates)
    if num_points > 1 and not 60 * args.screen_minutes < budget_seconds:
        raise SettingError(
            f"The setting screen_minutes is {args.screen_minutes:g}, and the budget {budget_seconds / 60:g} minutes; "
            "set it lower, or give one of learning_rates and of stock_rows."
        )


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
        if not name.endswith(".json") and name not in CONFIGS:
            raise SettingError(
                f"The setting baselines has {name!r}; it must be one of {', '.join(CONFIGS)}, or a config JSON."
            )
        config = CONFIGS.get(name, name)
        label = name if name in CONFIGS else check_config_file(config).stem
        if label == "ours" or label in found:
            raise SettingError(
                f"The setting baselines has {name!r}, and {label} is taken; give the file another name."
            )
        found[label] = config
    auto_class = objective.auto_class
    for name, config in found.items():
        if type(AutoConfig.from_pretrained(str(check_config_file(config)))) not in auto_class._model_mapping:
            raise SettingError(
                f"The setting baselines has {name!r}, which has no {auto_class.__name__}; leave it out."
            )
    check_sizes(plan, found, is_chosen=args.baselines is not None)
    return found


def check_sizes(plan: Plan, baselines: dict[str, str], is_chosen: bool) -> None:
    """Say where a stock model is not of the recipe's size; not chosen by name, it is refused."""
    vocab_size = None if plan.settings["tokenizer_name"] else plan.settings["vocab_size"]
    own = count_parameters(read_skeleton(plan.settings["model_config"], vocab_size))[0]
    for name, config in baselines.items():
        size = count_parameters(read_skeleton(config, vocab_size))[0]
        if abs(size / own - 1) <= SAME_SIZE:
            continue
        shown = f"stock {name} has {size / 1e6:.1f} M parameters and the recipe's model {own / 1e6:.1f} M"
        if not is_chosen:
            raise SettingError(f"The setting baselines is empty, and {shown}; name config JSONs of its size.")
        logger.warning("Not of one size: %s.", shown)


def choose_batch_and_rate(
    plan: Plan, args: VersusStockArguments, name: str, config: str, seed: int
) -> tuple[int, float] | None:
    """The best (rows, learning rate) in short runs, the only one without a run; None: stock is not to be run."""
    grid = list(itertools.product(args.stock_rows, args.learning_rates))
    if len(grid) == 1:
        return grid[0]
    jobs = [plan.stock_job(name, config, *point, seed, 60 * args.screen_minutes, 1) for point in grid]
    if "stock" in args.sides:
        reasons: dict[str, str] = {}
        records = list(plan.store.obtain(jobs, reasons).values())
        for job_name, reason in reasons.items():
            logger.warning("%s failed: %s", job_name, reason)
    else:
        found = {job.name: plan.store.find(job) for job in jobs}
        missing = [job_name for job_name, record in found.items() if record is None]
        if missing:
            logger.warning("%s is left out: no record of %s stands.", name, ", ".join(missing))
            return None
        records = list(found.values())
    best = choose_best(records)
    shown = ", ".join(f"{r['rows']} x {r['learning_rate']:g}: {r['final'][r['measure']]:.4f}" for r in records)
    logger.info("Stock %s: %d rows at %g are the best of %s.", name, best["rows"], best["learning_rate"], shown)
    return best["rows"], best["learning_rate"]


def choose_best(records: Sequence[Record]) -> Record:
    """The lowest loss; among those as good within the noise of a seed the smallest batch, as the examples have it.

    In short runs a stock BERT leaves the distribution of single words under no setting: then more steps are the better
    guess for a longer one.

    Raises:
        SettingError: When no loss is finite.
    """

    def loss_of(record: Record) -> float:
        return record["final"][record["measure"]]

    finite = [record for record in records if math.isfinite(loss_of(record))]
    if not finite:
        raise SettingError("Stock came to no finite loss in any short run; lower learning_rates or stock_rows.")
    least = min(map(loss_of, finite))
    equals = [record for record in finite if loss_of(record) <= least + TIE_NATS]
    return min(equals, key=lambda record: (record["rows"], loss_of(record)))


def gather(plan: Plan, args: VersusStockArguments, jobs: dict[str, list[Job]]) -> dict[str, list[Record]]:
    """Records by side: those asked for are run where missing, in turn; of the others what stands is taken."""
    wanted = {side: ("ours" if side == "ours" else "stock") in args.sides for side in jobs}
    in_turn = [job for turn in zip(*jobs.values()) for job, side in zip(turn, jobs) if wanted[side]]
    records = plan.store.obtain(in_turn)
    sides = {}
    for side, group in jobs.items():
        found = [records[job.name] if wanted[side] else plan.store.find(job) for job in group]
        missing = [job.name for job, record in zip(group, found) if record is None]
        if missing:
            logger.warning("%s is shown without what has no record that stands: %s.", side, ", ".join(missing))
        if len(missing) < len(group):
            sides[side] = [record for record in found if record is not None]
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
        "seconds": [record["clock_seconds"] for record in records],
        "final_losses": [record["final"][measure] for record in records],
        "final_loss": median(record["final"][measure] for record in records),
    }
    if "bits_per_byte" in records[0]["final"]:
        row["bits_per_byte"] = median(record["final"]["bits_per_byte"] for record in records)
    if name != "ours" and ours:
        curves = {our["seed"]: our["curve"] for our in ours}
        matches = [
            time_to_match(curves[stock["seed"]], stock["final"][measure], stock["final"]["clock_seconds"], measure)
            for stock in records
            if stock["seed"] in curves
        ]
        if matches:
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
        batch = f"{row['rows']} rows, " if row["rows"] else ""
        parts = zip(row["seeds"], row["final_losses"], row["seconds"])
        runs = [f"{seed}: {loss:.3f} in {seconds:.0f} s" for seed, loss, seconds in parts]
        text = f"{batch}learning rate {row['learning_rate']:g}; by seeds {', '.join(runs)}"
        lines += textwrap.wrap(text, 78, initial_indent="  ", subsequent_indent="  ")
    environment = records[0]["environment"] if records else plan.store.environment
    lines += [
        "-" * 78,
        f"loss: {plan.text.measure}, nats a predicted token, median of the seeds",
        "time to match: stock's time over the time at which ours passes its final loss",
        f"{environment['device'][:56]}, {environment['threads']} threads",
        *describe_pace(records),
    ]
    return "\n".join(lines)


def describe_pace(records: list[Record]) -> list[str]:
    """A line that shows whether the machine was as fast for all runs."""
    peaks = [record["peak_flops_measured"] / 1e12 for record in records]
    return [f"its matrix product beside the runs: {min(peaks):.3g} to {max(peaks):.3g} TFLOP/s"] if peaks else []
