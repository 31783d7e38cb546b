"""throughput: tokens per second, MFU, memory and optimizer state over a grid of settings, in real training steps."""

from __future__ import annotations

import itertools
import tempfile
import textwrap
from statistics import median
from typing import Any

from oneday.assembly import CLASSES, assemble_trainer, check_settings
from oneday.benchmarks.arguments import ThroughputArguments
from oneday.benchmarks.planning import (
    Plan,
    describe_settings,
    describe_text,
    find_machine_changes,
    read_setting,
    slug,
)
from oneday.benchmarks.records import Job, Record, normalise, write_summary
from oneday.errors import SettingError
from oneday.modeling import count_parameters
from oneday.objectives import COMPANION
from oneday.optimizers import count_state_bytes
from oneday.recipe import Settings, build_arguments
from oneday.step_timer import ENDLESS, QUIET, StepTimer
from oneday.throughput import describe_environment, measure_peak_again, peak_memory_bytes

DEFAULT_GRID = (
    "optim=muon,muon_8bit,adamw,adamw_8bit", "packing_strategy=best_fit,padded", "torch_compile=false,true",
)  # fmt: skip


def measure_throughput(job: Job) -> Record:
    """Train at one point of the grid; for a fresh process.

    Args:
        job: `details` holds `measure_seconds`.

    Raises:
        SettingError: When the point cannot run.
    """
    with tempfile.TemporaryDirectory(prefix="oneday-benchmark-") as folder:
        model_args, data_args, args = build_arguments(CLASSES, {**job.recipe, "output_dir": folder})
        check_settings(model_args, args)
        trainer, data = assemble_trainer(model_args, data_args, args)
        timer = StepTimer(trainer, job.details["measure_seconds"])
        trainer.add_callback(timer)
        trainer.signals = []
        trainer.train()
        if trainer.failure is not None:
            raise trainer.failure
        if trainer.micro_batch_limit is not None:
            raise SettingError(
                f"the memory does not hold a micro-batch of {args.micro_batch_tokens} tokens; "
                f"it held {trainer.micro_batch_limit}."
            )
        plan, row_length = trainer.step_record.plan, data.train.row_length
        memory = peak_memory_bytes(args.device)  # before the products, which take their own
        peak_flops = measure_peak_again(trainer.peak_flops, args.device, trainer.bf16)
        seconds = sum(step["step"] for step in timer.steps)
        return {
            "tokens_per_second": timer.tokens / seconds,
            "flops_per_second": timer.flops / seconds,
            "mfu": timer.flops / seconds / peak_flops,
            "peak_flops_measured": peak_flops,
            "precision": trainer.describe_precision(),
            "num_steps": len(timer.steps),
            "batch_size_tokens": plan.num_rows * row_length,
            "micro_batch_tokens": plan.micro_rows * row_length,
            "step_seconds": {key: median(step[key] for step in timer.steps) for key in timer.steps[0]},
            "compile_seconds": measure_compile_seconds(timer) if args.use_compile else None,
            "peak_memory_bytes": memory,
            "optimizer_state_bytes": count_state_bytes(trainer.composite.optimizers),
            "packing_efficiency": data.train.packing_efficiency,
            "num_parameters": count_parameters(trainer.model, COMPANION)[0],
            "environment": describe_environment(args.device),
        }


def measure_compile_seconds(timer: StepTimer) -> float:
    """What the warm-up steps took beyond as many ordinary ones."""
    ordinary = median(step["step"] for step in timer.steps)
    return max(0.0, sum(timer.warmup) - len(timer.warmup) * ordinary)


def run_throughput(plan: Plan, args: ThroughputArguments) -> str:
    """Measure every point of the grid in a process of its own and write the summary; returns the table.

    Raises:
        SettingError: When the grid names no setting; a point that cannot run is a row instead.
    """
    points = expand_grid(args.grid or [*DEFAULT_GRID, halve_micro_batch(plan.settings)])
    jobs = [make_job(plan, point, args.measure_seconds) for point in points]
    reasons: dict[str, str] = {}
    found = plan.store.obtain(jobs, reasons)
    records = list(found.values())
    rows = [
        {"point": point, **({"reason": reasons[job.name]} if job.name in reasons else pick_figures(found[job.name]))}
        for point, job in zip(points, jobs)
    ]
    write_summary(
        plan.store.folder / f"throughput-{plan.name}.json", rows, records, plan.store.environment,
        benchmark="throughput", recipe=plan.name,
    )  # fmt: skip
    return format_table(plan, rows, records)


def pick_figures(record: Record) -> dict[str, Any]:
    """What the table shows of a record."""
    names = ("tokens_per_second", "mfu", "step_seconds", "compile_seconds", "peak_memory_bytes", "micro_batch_tokens")
    return {name: record[name] for name in (*names, "optimizer_state_bytes")}


def halve_micro_batch(settings: Settings) -> str:
    """The axis of the recipe's micro-batch and half of it, in whole rows."""
    tokens = min(settings["micro_batch_tokens"], settings["batch_size_tokens"])
    row = settings["max_seq_length"]
    return f"micro_batch_tokens={','.join(str(size) for size in sorted({max(row, tokens // 2), tokens}))}"


def expand_grid(grid: tuple[str, ...] | list[str]) -> list[Settings]:
    """`["optim=muon,adamw", "torch_compile=false"]` -> the settings of each combination.

    Raises:
        SettingError: On an unknown setting, one named twice, or a value of the wrong type.
    """
    axes: dict[str, list[Any]] = {}
    for text in grid:
        name, equals, values = text.partition("=")
        name = name.strip()
        if not equals or not values or name in axes:
            raise SettingError(f"The setting grid is {text!r}; write NAME=VALUE,VALUE ..., each name once.")
        axes[name] = [read_setting(name, value, "--grid") for value in values.split(",")]
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def make_job(plan: Plan, point: Settings, measure_seconds: float) -> Job:
    """The run of one point."""
    recipe = {**plan.settings, **QUIET, **ENDLESS, **point}
    label = ",".join(f"{name}={value}" for name, value in point.items())
    details = {"recipe": plan.name, "point": point, "measure_seconds": measure_seconds, "seed": recipe["seed"]}
    text = {key: value for key, value in describe_text(plan.text).items() if key != "held_out"}
    settings = {**describe_settings(recipe), **text, "seed": recipe["seed"], "measure_seconds": measure_seconds}
    name, machine = f"throughput-{plan.name}-{slug(label)}", find_machine_changes(plan.settings, recipe)
    return Job("throughput", name, measure_throughput, recipe, details, normalise(settings), machine)


def format_table(plan: Plan, rows: list[dict[str, Any]], records: list[Record]) -> str:
    """The rows in 80 columns; a point that cannot run gives its reason."""
    lines = [
        f"{plan.name[:30]}: training steps on {plan.store.environment['device'][:30]}",
        f"{'tokens/s':>10}{'MFU':>7}{'data':>8}{'fwd+bwd':>9}{'optim.':>8}{'step':>8}{'compile':>9}{'memory':>10}"
        f"{'state':>9}",
        f"{'':>10}{'':>7}{'ms':>8}{'ms':>9}{'ms':>8}{'ms':>8}{'s':>9}{'MB':>10}{'MB':>9}",
        "-" * 80,
    ]
    for row in rows:
        label = ", ".join(f"{name}={str(value).lower()}" for name, value in row["point"].items())
        lines += textwrap.wrap(label, 80)
        if "reason" in row:
            lines += textwrap.wrap(f"cannot run: {row['reason']}", 78, initial_indent="  ", subsequent_indent="  ")
            continue
        ran, asked = row["micro_batch_tokens"], row["point"].get("micro_batch_tokens")
        if asked is not None and ran != asked:
            lines.append(f"  ran in micro-batches of {ran} tokens")
        steps, compiling = row["step_seconds"], row["compile_seconds"]
        parts = [f"{1000 * steps[key]:.1f}" for key in ("data", "forward_backward", "optimizer", "step")]
        lines.append(
            f"{row['tokens_per_second']:>10,.0f}{row['mfu']:>7.1%}{parts[0]:>8}{parts[1]:>9}{parts[2]:>8}{parts[3]:>8}"
            f"{'' if compiling is None else f'{compiling:.1f}':>9}{row['peak_memory_bytes'] / 1e6:>10,.0f}"
            f"{row['optimizer_state_bytes'] / 1e6:>9,.1f}"
        )
    lines.append("-" * 80)
    if records:
        lines.append("MFU: of the best matrix product beside each point's own steps,")
        lines += textwrap.wrap(f"{describe_peaks(records)};", 80)
        lines.append(f"{plan.store.environment['threads']} threads; medians a step, warm-up and compilation left out.")
    return "\n".join(lines)


def describe_peaks(records: list[Record]) -> str:
    """The range of the points' measured peaks, in each precision: `0.910 to 0.930 TFLOP/s in float32`."""
    peaks: dict[str, list[float]] = {}
    for record in records:
        peaks.setdefault(record["precision"].split()[0].rstrip(","), []).append(record["peak_flops_measured"] / 1e12)
    ends = {kind: dict.fromkeys((f"{min(own):.3f}", f"{max(own):.3f}")) for kind, own in peaks.items()}
    return ", ".join(f"{' to '.join(shown)} TFLOP/s in {kind}" for kind, shown in ends.items())
