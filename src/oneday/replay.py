"""Doing again, step by step, what a run did with its clock: a wall-clock result becomes one that can be repeated.

Where a run stood when it planned a step (progress, and with it batch, row length and mask rate) and when it took it
(learning rate) depends on how fast the machine was. Both stand in metrics.jsonl; a replay reads them from there
instead of its own clock, and gives the same weights on hardware that computes the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from oneday import run_directory as rundir
from oneday.arguments import BudgetTrainingArguments
from oneday.budget import Budget
from oneday.budget_clock import BudgetClock, open_meter
from oneday.errors import SettingError
from oneday.loader import StepPlan
from oneday.recipe import read_yaml

ATTEMPTS = ("step", "skip")


@dataclass(frozen=True)
class Attempt:
    """One step of the run that is repeated, skipped ones included.

    Attributes:
        plan: Its size, and the progress when it was planned.
        lr_progress: Progress that its learning rate was of.
        is_saved: A checkpoint was written after it.
    """

    plan: StepPlan
    lr_progress: float
    is_saved: bool


def read_script(run_dir: str | Path) -> list[Attempt]:
    """Every step that led to the weights of a run, and those that a rollback threw away.

    Raises:
        SettingError: When the directory holds no finished run, or one of a version that did not write what is needed.
    """
    events = rundir.read_metrics(run_dir, undone_by_rollback=True)
    if not events or events[-1]["event"] != "end":
        raise SettingError(f"The setting replay is {run_dir}, which holds no finished run; name the directory of one.")
    steps = [event for event in events if event["event"] in ATTEMPTS]
    if [event.get("taken") for event in steps] != list(range(1, len(steps) + 1)):
        raise SettingError(f"The metrics.jsonl of the run in {run_dir} lacks steps: it cannot be replayed.")
    saved = {event["taken"] for event in events if event["event"] == "checkpoint"}
    try:
        return [
            Attempt(
                StepPlan(event["num_rows"], event["micro_rows"], event["plan_progress"], event["row_length"]),
                event["lr_progress"],
                event["taken"] in saved,
            )
            for event in steps
        ]
    except KeyError:
        raise SettingError(
            f"The run in {run_dir} is of a version that did not write all of its steps; run it again first."
        ) from None


def read_replayed_settings(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run that is to be repeated, with those that do not touch the training from here.

    Args:
        given: Those that the command line, or a recipe that it names, sets; `replay` names the run directory.

    Raises:
        SettingError: When the directory holds no run, or a given setting would make this another one.
    """
    path = Path(given["replay"]) / rundir.RECIPE
    if not path.is_file():
        raise SettingError(f"The setting replay is {given['replay']}, which holds no run; name a run directory.")
    recorded = read_yaml(str(path))
    may_change = rundir.FREE_SETTINGS - {"micro_batch_tokens", "extend"}
    places = {name: value for name, value in given.items() if name in rundir.PLACES}
    for name, value in given.items():
        if name in may_change | rundir.PLACES | {"replay"} or (name in recorded and value == recorded[name]):
            continue
        had = f"has {recorded[name]!r}" if name in recorded else "does not set it"
        raise SettingError(
            f"{name} is {value!r} and the run in {given['replay']}, which is repeated, {had}; "
            f"leave {name} out, or train without replay."
        )
    if given.get("output_dir") is None:
        raise SettingError(f"The run in {given['replay']} is repeated in a directory of its own; set output_dir.")
    free = {name: value for name, value in given.items() if name in may_change and value is not None}
    return {**recorded, **free, **places, "replay": given["replay"], "extend": False}


@dataclass
class ReplayClock(BudgetClock):
    """A clock whose progress is another run's, attempt by attempt; its seconds are its own.

    Attributes:
        script: What the other run did.
    """

    overrun_words: ClassVar[str] = "a replay takes the time it takes"
    script: list[Attempt] = field(default_factory=list)

    def current(self) -> Attempt:
        """What the other run did at this place; after its end, its last step."""
        return self.script[min(self.steps_taken, len(self.script) - 1)]

    def previous(self) -> Attempt:
        """What the other run did in the step just taken."""
        return self.script[max(0, self.steps_taken - 1)]

    @property
    def progress(self) -> float:
        """Progress of the other run when it planned this step; 1 after its last."""
        return self.current().plan.progress if self.steps_taken < len(self.script) else 1.0

    def state_dict(self) -> dict[str, Any]:
        """As the parent's, with the other run's progress."""
        return super().state_dict() | {"progress": self.progress}

    def step_progress(self, tokens: int, flops: float) -> float:
        """Progress that the other run's learning rate was of."""
        return self.current().lr_progress

    def fits(self, tokens: int, flops: float) -> bool:
        """Whether the other run took another step."""
        return self.steps_taken < len(self.script)

    def fits_seconds(self, seconds: float) -> bool:
        """A replay takes the time it takes."""
        return True


def build_clock(args: BudgetTrainingArguments) -> BudgetClock:
    """The clock of a run, or of one that repeats another.

    Raises:
        SettingError: When the budget cannot be measured, or the run to be repeated cannot be read.
    """
    budget = Budget.from_arguments(args)
    if args.replay:
        return ReplayClock(budget, script=read_script(args.replay))
    return BudgetClock(budget, meter=open_meter(budget, args.device, args.world_size))
