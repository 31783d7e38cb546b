"""The plan of a budget as a table of 80 columns."""

from __future__ import annotations

import textwrap
from pathlib import Path

from oneday.ladder import describe_range
from oneday.plan_rows import MAX_EPOCHS, TOKENS_PER_PARAMETER, USABLE_MEMORY, Row, memory_bytes
from oneday.planning import BudgetPlan
from oneday.probing import optimizer_pair
from oneday.scaling_law import Prediction

WIDTH = 80


def format_plan(plan: BudgetPlan) -> str:
    """The table, then what its figures stand on."""
    kind = "estimate for" if plan.machine.card else "measured on"
    lines = [
        f"{plan.budget.describe()}; {kind} {plan.machine.name}, {plan.machine.memory_bytes / 1e9:.0f} GB",
        f"{'':2}{'model':19}{'params':>7}{'tokens':>8}{'epochs':>7}{'loss (90 %)':>18}{'GB 32/8 bit':>12}{'micro':>7}",
        "-" * WIDTH,
    ]
    for place, row in enumerate(plan.rows):
        lines.append(format_row(row, is_best=place == plan.best))
    lines += ["-" * WIDTH, *format_costs(plan)]
    for note in make_notes(plan):
        lines += textwrap.wrap(note, WIDTH, subsequent_indent="  ")
    return "\n".join([*lines, f"recipe: {plan.recipe}"])


def format_row(row: Row, is_best: bool) -> str:
    """One model; `>` marks the one to take."""
    name = Path(row.model_config).stem
    epochs = "-" if row.epochs is None else f"{row.epochs:.2f}{'!' if row.epochs > MAX_EPOCHS else ''}"
    micro = f"{row.micro_batch_tokens}" if row.micro_batch_tokens else "none"
    return (
        f"{'> ' if is_best else '  '}{name[:19]:19}{shorten(row.probe.num_parameters):>7}{shorten(row.tokens):>8}"
        f"{epochs:>7}{format_loss(row.prediction):>18}{format_memory(row):>12}{micro:>7}"
    )


def shorten(count: float) -> str:
    """`6.3M`, `1.2B`."""
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def format_loss(prediction: Prediction | None) -> str:
    """`3.95 (3.90-4.01)`, with `?` where the law is asked outside its range."""
    if prediction is None:
        return "no law"
    mark = "?" if prediction.outside else ""
    return f"{prediction.loss:.2f} ({prediction.low:.2f}-{prediction.high:.2f}){mark}"


def format_memory(row: Row) -> str:
    """Gigabytes under the optimizer in 32 and in 8 bit, at the micro-batch."""
    names = optimizer_pair(row.optim)
    sizes = [
        "-" if name is None else f"{memory_bytes(row.probe, name, row.micro_batch_tokens) / 1e9:.2f}" for name in names
    ]
    return "/".join(sizes)


def format_costs(plan: BudgetPlan) -> list[str]:
    """A line a model with hours, optimizer state, money and energy."""
    lines = [f"{'':2}{'model':19}{'hours':>9}{'state MB 32/8 bit':>20}{'USD':>10}{'kWh':>10}", "-" * WIDTH]
    for row in plan.rows:
        states = [row.probe.state_bytes.get(name) for name in optimizer_pair(row.optim)]
        shown = "/".join("-" if size is None else f"{size / 1e6:.1f}" for size in states)
        usd = "-" if row.usd is None else f"{row.usd:.2f}"
        kwh = "-" if row.kwh is None else f"{row.kwh:.3f}"
        name = Path(row.model_config).stem
        lines.append(f"{'':2}{name[:19]:19}{row.hours:>9.2f}{shown:>20}{usd:>10}{kwh:>10}")
    return [*lines, "-" * WIDTH]


def make_notes(plan: BudgetPlan) -> list[str]:
    """What the reader must know of the figures, a sentence each."""
    best = plan.rows[plan.best]
    notes = []
    if plan.fitted is None:
        notes.append(f"loss: no scaling law is fitted for {plan.family}; the ladder mode makes one.")
    else:
        whose = "this text" if plan.is_own_text else f"{plan.fitted.corpus}, not of this text: compare models only"
        notes.append(f"loss: {plan.fitted.measure} of {whose}; law of {len(plan.fitted.law.points)} runs.")
        notes.append(describe_range(plan.fitted.law) + ".")
        if best.prediction is not None and best.prediction.outside:
            notes.append(f"warning: outside that range for the model to take: {best.prediction.outside}.")
    if any(row.prediction is None for row in plan.rows if row.micro_batch_tokens):  # as `choose_row` does
        notes.append(
            f">: the largest that fits and sees {TOKENS_PER_PARAMETER:g} tokens per parameter, else the recipe's own."
        )
    else:
        notes.append(">: the lowest loss, or the recipe's own model where its interval holds that.")
    if best.epochs is not None and best.epochs > MAX_EPOCHS:
        notes.append(f"warning: {best.epochs:.1f} passes over the text; past {MAX_EPOCHS:g} more text is worth more.")
    if best.epochs is None:
        notes.append("epochs: the text is a stream, its length is not known; steps were of random words.")
    if plan.mfu is not None:
        notes.append(
            f"estimate: {100 * plan.mfu:g} % of {plan.machine.peak_flops / 1e12:.0f} TFLOP/s (data sheet) is stated, "
            "nothing was measured on the card; memory is of the precision and the kernels here."
        )
    notes.append(f"micro: the largest micro-batch, in tokens, in {100 * USABLE_MEMORY:g} % of the memory.")
    if plan.left_out:
        notes.append(f"left out, fewer tokens than parameters even at the peak: {', '.join(plan.left_out)}.")
    if plan.unfit:
        notes.append(f"left out, made for other rows or positions than the recipe's: {', '.join(plan.unfit)}.")
    return notes
