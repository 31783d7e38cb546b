"""What has been spent of a budget. Knows nothing of training.

Every kind of budget drives one number, `progress`, from 0 at the first step to 1 at the last.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch

from oneday.budget import JOULES_PER_KWH, SECONDS_PER_HOUR, Budget
from oneday.durable_files import write_json
from oneday.energy import EnergyMeter, open_energy_meter
from oneday.errors import SettingError

# Where the seconds of a run go; `lost` is work done again, starting again and skipped steps; `other` is what no
# entry before it claims.
LEDGER = ("initialization", "compilation", "steps", "data", "evaluation", "checkpoints", "lost", "other")


@dataclass
class BudgetClock:
    """What has been spent. Reads a monotonic clock, so setting the system's clock does no harm.

    Attributes:
        budget: The limits.
        now: Returns seconds on a monotonic clock.
        carried_seconds: Budget seconds that earlier processes of this run spent.
        reserve_seconds: Kept for the final evaluation and save; may be re-estimated at any time.
        origin: Spent, of each kind, where progress is 0: before it the run was initialised and compiled.
        meter: Reads the energy used; None where it is reckoned from a stated power.
        carried_kwh: Metered energy that earlier processes of this run used.
        discarded_seconds: Spent on a cool-down that an extension threw away; not part of this budget.
        restart_at: Steps taken at which an extension starts progress at 0 again.
        steps: Steps that are in the weights.
        skipped_steps: Steps that were not taken because their numbers were not finite.
        steps_taken: All of them, those that a rollback threw away included.
        overrun_words: What is said where more than the limit was spent.
    """

    overrun_words: ClassVar[str] = "more than was set"
    budget: Budget
    now: Callable[[], float] = time.monotonic
    carried_seconds: float = 0.0
    reserve_seconds: float = 0.0
    origin: dict[str, float] = field(default_factory=dict)
    meter: EnergyMeter | None = None
    carried_kwh: float = 0.0
    discarded_seconds: float = 0.0
    restart_at: int | None = None
    tokens: int = 0
    flops: float = 0.0
    steps: int = 0
    skipped_steps: int = 0
    steps_taken: int = 0
    ledger: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LEDGER, 0.0))
    _started: float | None = None
    _stopped: float | None = None
    _paused: float | None = None
    _metered_from: float = 0.0
    _held_joules: float | None = None  # what the meter read when the clock stopped or paused
    _progress: float = 0.0
    _step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=20))

    def start(self, since: float | None = None) -> None:
        """Start counting: now, or at the reading `since` (a resumed process counts its start-up)."""
        if self._started is None:
            self._started = self.now() if since is None else since
            self._metered_from = self.meter.read() if self.meter is not None else 0.0

    def start_progress(self) -> None:
        """Progress is 0 now: what has been spent so far prepared the first step, or was an earlier run's."""
        self.origin, self._progress = self.spent(), 0.0

    def stop(self) -> None:
        """Stop counting: the final model is on disk and scored."""
        self._stopped, self._held_joules = self.now(), self.meter.read() if self.meter is not None else None

    @property
    def elapsed_seconds(self) -> float:
        """Budget seconds spent so far, earlier processes included."""
        if self._started is None:
            return self.carried_seconds
        end = next((moment for moment in (self._stopped, self._paused) if moment is not None), None)
        return self.carried_seconds + (self.now() if end is None else end) - self._started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing counts inside, and `elapsed_seconds` stands still: for measuring that is no part of the run."""
        if self._started is None or self._stopped is not None or self._paused is not None:
            yield
            return
        self._paused, self._held_joules = self.now(), self.meter.read() if self.meter is not None else None
        try:
            yield
        finally:
            assert self._stopped is None, "a clock is not stopped while it is paused"
            self._started += self.now() - self._paused
            self._metered_from += self.meter.read() - self._held_joules if self.meter is not None else 0.0
            self._paused = self._held_joules = None

    def count_step(self, tokens: int, flops: float, seconds: float) -> None:
        """Count one optimizer step: its tokens (padding not counted), executed FLOPs and wall seconds."""
        self.tokens += tokens
        self.flops += flops
        self.steps += 1
        self.steps_taken += 1
        self.ledger["steps"] += seconds
        self._step_seconds.append(seconds)

    def count_skip(self, seconds: float) -> None:
        """Count a step that was taken but left the weights alone: its time is spent, nothing else is."""
        self.skipped_steps += 1
        self.steps_taken += 1
        self.ledger["lost"] += seconds
        self._step_seconds.append(seconds)

    @contextmanager
    def account(self, entry: str) -> Iterator[None]:
        """Book the seconds spent inside under one entry of the ledger."""
        begun = self.now()
        try:
            yield
        finally:
            if self._started is not None and self._stopped is None and self._paused is None:
                self.ledger[entry] += self.now() - begun

    @property
    def expected_step_seconds(self) -> float:
        """What the next step will probably take: the median of the last twenty."""
        return median(self._step_seconds) if self._step_seconds else 0.0

    @property
    def metered_kwh(self) -> float:
        """Energy used so far by the meter, earlier processes included."""
        if self.meter is None or self._started is None:
            return self.carried_kwh
        joules = self.meter.read() if self._held_joules is None else self._held_joules
        return self.carried_kwh + (joules - self._metered_from) / JOULES_PER_KWH

    @property
    def kwh_per_second(self) -> float:
        """Mean metered power of this run, in kilowatt-hours a second."""
        return self.metered_kwh / self.elapsed_seconds if self.elapsed_seconds > 0 else 0.0

    def fractions(
        self, more_tokens: float = 0, more_flops: float = 0, more_steps: float = 0, more_seconds: float | None = None
    ) -> dict[str, float]:
        """Fraction of each kind used since the origin once `more` is added; of time and energy less the reserve.

        `more_seconds` None: as many as the steps will probably take.
        """
        spent = {
            "tokens": self.tokens + more_tokens,
            "flops": self.flops + more_flops,
            "steps": self.steps + more_steps,
        }
        limits = {kind: limit for kind, limit in self.budget.limits.items() if kind in spent}
        more_seconds = more_steps * self.expected_step_seconds if more_seconds is None else more_seconds
        if self.budget.clock_limit_seconds is not None:
            spent["seconds"] = self.elapsed_seconds + more_seconds
            limits["seconds"] = self.budget.clock_limit_seconds - self.reserve_seconds
        if self.budget.needs_meter:
            spent["kwh"] = self.metered_kwh + more_seconds * self.kwh_per_second
            limits["kwh"] = self.budget.kwh - self.reserve_seconds * self.kwh_per_second
        return {
            kind: (spent[kind] - self.origin.get(kind, 0.0)) / max(limit - self.origin.get(kind, 0.0), 1e-9)
            for kind, limit in limits.items()
        }

    def step_progress(self, tokens: int, flops: float) -> float:
        """Progress at the middle of the step about to be taken, never below an earlier reading.

        Args:
            tokens: Tokens of the coming step.
            flops: FLOPs of the coming step.
        """
        reached = max(self.fractions(tokens / 2, flops / 2, 0.5).values())
        self._progress = min(1.0, max(self._progress, reached))
        return self._progress

    @property
    def progress(self) -> float:
        """Fraction of the budget spent, in [0, 1], never below an earlier reading."""
        self._progress = min(1.0, max(self._progress, *self.fractions().values()))
        return self._progress

    def progress_after(self, tokens: int, flops: float, begun: float) -> float:
        """What `progress` will probably be, of counts certainly, when a step of this size, begun then, is counted."""
        left = max(0.0, self.expected_step_seconds - (self.now() - begun))
        return min(1.0, max(self._progress, *self.fractions(tokens, flops, 1, left).values()))

    def fits(self, tokens: int, flops: float) -> bool:
        """Whether one more step of this size ends inside every limit, even if it is one of the slow ones."""
        counts_fit = all(fraction <= 1.0 + 1e-9 for fraction in self.fractions(tokens, flops, 1).values())
        return counts_fit and self.fits_seconds(self.slow_step_seconds)

    def fits_seconds(self, seconds: float) -> bool:
        """Whether this much more time leaves the reserve whole."""
        limit, needed = self.budget.clock_limit_seconds, seconds + self.reserve_seconds
        if self.budget.needs_meter and self.metered_kwh + needed * self.kwh_per_second > self.budget.kwh:
            return False
        return limit is None or self.elapsed_seconds + needed <= limit

    @property
    def slow_step_seconds(self) -> float:
        """The second slowest of the last twenty steps: one outlier does not end a run early."""
        return sorted(self._step_seconds)[-2:][0] if self._step_seconds else 0.0

    def spent(self) -> dict[str, float]:
        """What has been used, of each kind."""
        hours = self.elapsed_seconds / SECONDS_PER_HOUR
        spent = {"seconds": self.elapsed_seconds, "tokens": self.tokens, "flops": self.flops, "steps": self.steps}
        if self.budget.usd_per_hour:
            spent["usd"] = hours * self.budget.usd_per_hour
        if self.budget.stated_watts:
            spent["kwh"] = hours * self.budget.stated_watts / 1000
        elif self.meter is not None or self.carried_kwh:
            spent["kwh"] = self.metered_kwh
        return spent

    @property
    def energy_source(self) -> str | None:
        """Where the kilowatt-hours come from, in words; None: they are not known."""
        if self.budget.stated_watts:
            return f"stated power, {self.budget.stated_watts:g} W"
        return self.meter.source if self.meter is not None else None

    @property
    def train_seconds(self) -> float:
        """Seconds of training: the steps and the waits for their data."""
        return self.ledger["steps"] + self.ledger["data"]

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of training."""
        return self.tokens / self.train_seconds if self.train_seconds else 0.0

    def used_fraction(self) -> float:
        """Fraction used of the limit that is nearest, the clock's taken without the reserve."""
        spent = {"kwh": 0.0, **self.spent()}  # a replay meters nothing
        return max(spent[kind] / limit for kind, limit in self.budget.limits.items())

    def balanced_ledger(self) -> dict[str, float]:
        """The ledger with `other` set so that its entries add up to the seconds spent."""
        booked = sum(seconds for entry, seconds in self.ledger.items() if entry != "other")
        return {**self.ledger, "other": max(0.0, self.elapsed_seconds - booked)}

    def describe_spending(self) -> str:
        """`98.4 % of 300 s spent: 265 s in steps, 19 s in compilation, ...`, the largest first; says an overrun."""
        ledger = sorted(self.balanced_ledger().items(), key=lambda entry: -entry[1])
        used, limits = self.used_fraction(), self.budget.describe()
        share = f"{100 * used:.1f} % of {limits} spent" + (f" ({self.overrun_words})" if used > 1.0005 else "")
        return f"{share}: " + ", ".join(f"{seconds:.1f} s in {entry}" for entry, seconds in ledger if seconds >= 0.05)

    def state_dict(self) -> dict[str, Any]:
        """All that a later process needs to go on counting."""
        return {
            "limits": self.budget.limits,
            "elapsed_seconds": self.elapsed_seconds,
            "tokens": self.tokens,
            "flops": self.flops,
            "steps": self.steps,
            "progress": self._progress,
            "reserve_seconds": self.reserve_seconds,
            "metered_kwh": self.metered_kwh,
            "skipped_steps": self.skipped_steps,
            "steps_taken": self.steps_taken,
            "origin": dict(self.origin),
            "ledger": dict(self.ledger),
            "step_seconds": list(self._step_seconds),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`; the seconds spent since then by a killed process are added as `lost`."""
        lost = max(0.0, self.carried_seconds - state["elapsed_seconds"])
        self.carried_seconds = max(self.carried_seconds, state["elapsed_seconds"])
        self.tokens, self.flops, self.steps = state["tokens"], state["flops"], state["steps"]
        # Under another budget (`extend`) progress is what has been spent of that.
        self._progress = state["progress"] if state["limits"] == self.budget.limits else 0.0
        self.reserve_seconds = state["reserve_seconds"]
        self.origin, self.skipped_steps = dict(state["origin"]), state["skipped_steps"]
        self.steps_taken = state["steps_taken"]
        self.carried_kwh = max(self.carried_kwh, state["metered_kwh"])
        self.ledger.update(state["ledger"])
        self.ledger["lost"] += lost
        self._step_seconds.extend(state.get("step_seconds", ()))  # or the first step would look as if it took no time

    def rewind(self, state: dict[str, Any]) -> None:
        """Count tokens, FLOPs and steps from a checkpoint's `state_dict` again; time and progress go on.

        The seconds of the steps since then were lost.
        """
        self.tokens, self.flops, self.steps = state["tokens"], state["flops"], state["steps"]
        for entry in ("steps", "data"):
            self.ledger["lost"] += self.ledger[entry] - state["ledger"][entry]
            self.ledger[entry] = state["ledger"][entry]

    def load_carried(self, report: dict[str, Any]) -> None:
        """Time and energy of earlier processes, from what `write` wrote last; {}: none."""
        spent = report.get("spent", {})
        self.carried_seconds, self.carried_kwh = spent.get("seconds", 0.0), spent.get("kwh", 0.0)
        self.discarded_seconds = report.get("discarded_seconds", 0.0)
        self.restart_at = report.get("restart_at")

    def load_report(self, report: dict[str, Any]) -> None:
        """Go on from what `write` wrote, with nothing lost since."""
        self.load_carried(report)
        spent = report["spent"]
        self.tokens, self.flops, self.steps = spent["tokens"], spent["flops"], spent["steps"]
        self.skipped_steps = report["skipped_steps"]
        self.steps_taken = report.get("steps_taken", self.steps + self.skipped_steps)
        self.ledger.update(report["ledger_seconds"])

    def write(self, path: str | Path, status: str, is_durable: bool = True, **facts: Any) -> None:
        """Write limit, spent, ledger and further facts as `budget.json`, whole or not at all."""
        report = {
            "status": status,
            "limit": self.budget.limits,
            "spent": self.spent(),
            "used_fraction": self.used_fraction(),
            "skipped_steps": self.skipped_steps,
            "steps_taken": self.steps_taken,
            "discarded_seconds": self.discarded_seconds,
            "restart_at": self.restart_at,
            "energy_source": self.energy_source,
            "ledger_seconds": self.balanced_ledger(),
            **facts,
        }
        write_json(path, report, is_durable)


def open_meter(budget: Budget, device: torch.device, num_processes: int = 1) -> EnergyMeter | None:
    """The energy counters of this machine, unless a power is stated; None: none can be read.

    Several processes have none: their devices may be of several machines, and the counters of one CPU would be added
    once a process.

    Raises:
        SettingError: When energy is limited and cannot be measured.
    """
    meter = None if budget.stated_watts or num_processes > 1 else open_energy_meter(device)
    if budget.needs_meter and meter is None:
        reason = "no energy counter can be read here" if num_processes == 1 else "several processes read no counter"
        raise SettingError(
            f"budget_kwh is {budget.kwh:g}, but {reason}; set stated_watts, the power of all machines in watts."
        )
    return meter
