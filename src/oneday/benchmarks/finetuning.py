"""finetuning: our protocol against the Hub's example way, run_glue.py: one process a task and seed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml

from oneday.benchmarks.arguments import RecordArguments
from oneday.benchmarks.planning import slug
from oneday.benchmarks.records import Job, Record, RecordStore, hash_source, normalise, write_summary
from oneday.classification import hash_rows, load_checkpoint
from oneday.errors import SettingError
from oneday.glue import find_task
from oneday.glue_protocol import (
    CRAMMING,
    RUN_SETTINGS,
    FinetuneArguments,
    check_arguments,
    choose_bf16,
    choose_device,
    complete_arguments,
)
from oneday.glue_results import METRIC_TITLES
from oneday.recipe import Settings, build_arguments
from oneday.run_directory import GLUE_RESULTS
from oneday.task_data import load_task
from oneday.throughput import describe_environment, measure_peak_flops, set_threads

PROGRAM = Path(__file__).parents[3] / "scripts" / "finetune.py"
# What the example has not, beside protocols that train otherwise.
OURS_ALONE = ("peft", "task_file", "random_baseline", "save_models", "write_submission")


@dataclass(frozen=True)
class FinetuningPlan:
    """What both sides fine-tune.

    Attributes:
        name: For files: of the recipe and of the checkpoint's directory.
        args: The settings, complete.
        task_names: Expanded.
        facts: Hashes of the weights and of each task's rows.
        store: Where the records are.
    """

    name: str
    args: FinetuneArguments
    task_names: list[str]
    facts: Settings
    store: RecordStore

    @property
    def seeds(self) -> range:
        """Of both sides."""
        return range(self.args.seed, self.args.seed + self.args.num_seeds)

    def our_job(self, turn: int) -> Job:
        """All tasks and seeds by one command."""
        names = ("num_seeds", "seed", "num_threads", "num_processes", "per_device_eval_batch_size")
        return self.make_job(
            "ours", f"turn{turn}", run_our_program, {}, {name: getattr(self.args, name) for name in names}
        )

    def stock_job(self, task: str, seed: int) -> Job:
        """One task and seed."""
        method = hash_source("benchmarks/stock_glue.py", "glue.py", "task_data.py")
        settings = {"num_threads": self.args.num_threads, "method": method}
        settings["rows"] = {task: self.facts["rows"][task]}
        return self.make_job(
            "stock", f"{task}-seed{seed}", run_stock_program, {"task_name": task, "seed": seed}, settings
        )

    def make_job(self, kind: str, label: str, run: Any, own: Settings, settings: Settings) -> Job:
        """A job; its record names neither the checkpoint's place nor the data's."""
        args = dataclasses.asdict(self.args) | {"bf16": choose_bf16(self.args)}
        recipe = args | {"task_names": self.task_names, "output_dir": None} | own
        decisive = {name: args[name] for name in (*RUN_SETTINGS, "bf16", "use_cpu")} | self.facts
        details = {"model": Path(self.args.model_name_or_path).name, "seed": own.get("seed", self.args.seed), **own}
        name = "-".join(filter(None, [kind, "finetuning", self.name, label]))
        return Job(kind, name, run, recipe, details, normalise(decisive | own | settings))


def make_finetuning_plan(recipe_path: str, settings: Settings, record_args: RecordArguments) -> FinetuningPlan:
    """The plan for a recipe of fine-tuning on this machine.

    Raises:
        SettingError: When a setting cannot work, or one is of our side alone.
    """
    (args,) = build_arguments((FinetuneArguments,), settings)
    args = complete_arguments(args)
    args = args if args.output_dir else dataclasses.replace(args, output_dir="unused")
    names = check_arguments(args)
    foreign = [name for name in OURS_ALONE if getattr(args, name)]
    if foreign or args.protocol != CRAMMING:
        setting = foreign[0] if foreign else "protocol"
        raise SettingError(
            f"finetuning compares with an example that has no {setting} {getattr(args, setting)!r}; leave it out."
        )
    set_threads(args.num_threads)
    weights = load_checkpoint(args.model_name_or_path).weights_hash
    rows = {name: hash_rows(load_task(name, args.task_data_dir, args.cache_dir)) for name in names}
    device, path = choose_device(args), Path(recipe_path)
    peak_flops = measure_peak_flops(device, choose_bf16(args))
    folder = Path(record_args.records_dir)
    store = RecordStore(folder, describe_environment(device), record_args.reuse_ours, peak_flops)
    name = "-".join(filter(None, [path.parent.name, path.stem, slug(Path(args.model_name_or_path).name)]))
    return FinetuningPlan(name, args, names, {"weights_hash": weights, "rows": rows}, store)


def run_our_program(job: Job) -> Record:
    """The command of scripts/finetune.py, timed from its start to its end."""
    with tempfile.TemporaryDirectory(prefix="oneday-benchmark-") as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({**job.recipe, "output_dir": folder}), encoding="utf-8")
        seconds = time_command([str(PROGRAM), str(recipe)])
        results = json.loads((Path(folder) / GLUE_RESULTS).read_text(encoding="utf-8"))
    scores = {number: task["scores"] for number, task in results["tasks"].items()}
    facts = {"seconds": seconds, "scores": scores, "threads_a_run": max(results["threads"])}
    return facts | measure_machine(job)


def run_stock_program(job: Job) -> Record:
    """The example's process for one task and seed, timed from its start to its end."""
    with tempfile.TemporaryDirectory(prefix="oneday-benchmark-") as folder:
        source, target = Path(folder) / "settings.json", Path(folder) / "result.json"
        source.write_text(json.dumps(job.recipe), encoding="utf-8")
        seconds = time_command(["-m", "oneday.benchmarks.stock_glue", str(source), str(target)])
        result = json.loads(target.read_text(encoding="utf-8"))
    scores = {number: [found[find_metric(number)]] for number, found in result["scores"].items()}
    facts = {"seconds": seconds, "scores": scores, "threads_a_run": result["threads"]}
    return facts | {"phase_seconds": result["phase_seconds"]} | measure_machine(job)


def time_command(words: list[str]) -> float:
    """Seconds of a Python command.

    Raises:
        SettingError: When it fails, with its last line.
    """
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise SettingError(f"{' '.join(Path(word).name for word in words[:2])} failed: {reason}")
    return time.perf_counter() - begun


def measure_machine(job: Job) -> Record:
    """Hardware, versions and commit, and the measured peak beside the run."""
    (args,) = build_arguments((FinetuneArguments,), job.recipe)
    set_threads(args.num_threads)
    device = choose_device(args)
    peak_flops = measure_peak_flops(device, choose_bf16(args))
    return {"peak_flops_measured": peak_flops, "environment": describe_environment(device)}


def run_finetuning(plan: FinetuningPlan) -> str:
    """Run what is missing of both sides, one process after the other, and write the summary; returns the table.

    The sides take turns, for a machine's pace may change within the hour: all of ours, then a seed of the example.

    Raises:
        SettingError: When a run fails.
    """
    turns = [
        (plan.our_job(turn), [plan.stock_job(task, seed) for task in plan.task_names])
        for turn, seed in enumerate(plan.seeds, 1)
    ]
    found = plan.store.obtain([job for ours, stock in turns for job in (ours, *stock)])
    records = [(found[ours.name], [found[job.name] for job in stock]) for ours, stock in turns]
    # Every turn of ours has all seeds, whose scores are the same each time.
    sides = {"ours": [ours for ours, _ in records[:1]], "stock": [record for _, stock in records for record in stock]}
    rows = [describe_number(number, sides) for number in records[0][0]["scores"]]
    seconds, ratios = compare_seconds(records)
    write_summary(
        plan.store.folder / f"finetuning-{plan.name}.json", rows, list(found.values()), plan.store.environment,
        benchmark="finetuning", model=turns[0][0].details["model"], seconds=seconds,
        seconds_ratio=seconds["stock"] / seconds["ours"], turn_ratios=ratios,
    )  # fmt: skip
    return format_table(plan, rows, sides, seconds, ratios)


def compare_seconds(turns: list[tuple[Record, list[Record]]]) -> tuple[dict[str, float], list[float]]:
    """Wall clock of both sides for everything (the mean of ours, the sum of stock's), and each turn's own ratio.

    The example keeps what it has tokenised for the seeds that follow: counted in the first turn only, and not in the
    turns' ratios.
    """
    ours = [record["seconds"] for record, _ in turns]
    tokenising = [sum(record["phase_seconds"]["tokenise"] for record in stock) for _, stock in turns]
    stock = [sum(record["seconds"] for record in group) - spent for (_, group), spent in zip(turns, tokenising)]
    ratios = [len(turns) * theirs / own for own, theirs in zip(ours, stock)]
    return {"ours": fmean(ours), "stock": sum(stock) + tokenising[0]}, ratios


def describe_number(number: str, sides: dict[str, list[Record]]) -> dict[str, Any]:
    """One row of the table: both sides' scores by seed, and their medians."""
    scores = {
        side: [score for record in group for score in record["scores"].get(number, [])]
        for side, group in sides.items()
    }
    medians = {side: median(values) for side, values in scores.items()}
    return {"number": number, "metric": find_metric(number), "scores": scores, "medians": medians}


def find_metric(number: str) -> str:
    """The main metric of a number: `mnli_matched` is of `mnli`."""
    return find_task("mnli" if number.startswith("mnli_") else number).main_metric


def format_table(
    plan: FinetuningPlan,
    rows: list[dict[str, Any]],
    sides: dict[str, list[Record]],
    seconds: dict[str, float],
    ratios: list[float],
) -> str:
    """The rows (scores x 100) in 80 columns."""
    args = plan.args
    lines = [
        f"{plan.name[:40]}: {len(plan.task_names)} x {args.num_seeds} runs (tasks x seeds)",
        f"{args.num_train_epochs:g} epoch{'s' * (args.num_train_epochs != 1)}, batch "
        f"{args.per_device_train_batch_size}, learning rate {args.learning_rate:g}",
        f"{'task':17}{'metric':10}{'ours [min..max]':>25}{'run_glue.py [min..max]':>26}",
        "-" * 78,
    ]
    for row in rows:
        shown = [format_spread(row["scores"][side]) for side in ("ours", "stock")]
        lines.append(f"{row['number'][:16]:17}{METRIC_TITLES[row['metric']]:10}{shown[0]:>25}{shown[1]:>26}")
    ratio = f"{seconds['stock'] / seconds['ours']:.2f} x"
    threads = [group[0]["threads_a_run"] for group in sides.values()]
    lines += [
        "-" * 78,
        f"{'seconds of wall clock':27}{seconds['ours']:>25,.1f}{seconds['stock']:>26,.1f}",
        f"{'threads of a run':27}{threads[0]:>25}{threads[1]:>26}",
        f"ours is {ratio} as fast, starting the processes and reading the data included",
        f"by turns, ours run in each: {', '.join(f'{value:.2f}' for value in ratios)}",
        f"run_glue.py pads every row to {args.max_seq_length} tokens, as it does by default",
        f"{plan.store.environment['device'][:50]}, {plan.store.environment['cores']} cores",
    ]
    return "\n".join(lines)


def format_spread(scores: list[float]) -> str:
    """`56.1 [53.2..58.0]`"""
    return f"{100 * median(scores):.1f} [{100 * min(scores):.1f}..{100 * max(scores):.1f}]"
