"""What may be spent. Knows the settings, and nothing of training.

Wall clock, money and energy at a stated power are one clock read in different units; tokens, FLOPs, steps and metered
energy are counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from oneday.arguments import BudgetTrainingArguments
from oneday.errors import SettingError, check_positive

JOULES_PER_KWH = 3.6e6
SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class Budget:
    """Limits of a run; None is no limit. The first one used up ends the run.

    Attributes:
        seconds: Wall clock from the first training step, or what prepares it (counted embeddings, compiling), to the
            final model on disk and scored.
        tokens: Tokens trained on, padding not counted.
        flops: Floating-point operations executed, forward and backward.
        steps: Optimizer steps.
        usd: US dollars, at `usd_per_hour`.
        kwh: Kilowatt-hours: metered, or at `stated_watts` where that is given.
        usd_per_hour: Price of the machine.
        stated_watts: Power that energy is reckoned by; None: it is metered.
    """

    seconds: float | None = None
    tokens: float | None = None
    flops: float | None = None
    steps: float | None = None
    usd: float | None = None
    kwh: float | None = None
    usd_per_hour: float | None = None
    stated_watts: float | None = None

    @classmethod
    def from_arguments(cls, args: BudgetTrainingArguments) -> Budget:
        """The budget that the settings state.

        Raises:
            SettingError: When none is stated, one is not positive, or a price is missing.
        """
        names = ("hours", "minutes", "tokens", "flops", "steps", "usd", "kwh")
        given = {name: getattr(args, f"budget_{name}") for name in names}
        for name, value in given.items():
            check_positive(f"budget_{name}", value)
        if all(value is None for value in given.values()):
            raise SettingError("No budget is set; set one of " + ", ".join(f"budget_{name}" for name in names) + ".")
        if given["usd"] is not None and args.usd_per_hour is None:
            raise SettingError(f"The setting budget_usd is {given['usd']:g} and usd_per_hour is empty; set the price.")
        minutes = given["hours"] * 60 if given["hours"] is not None else given["minutes"]
        return cls(
            seconds=None if minutes is None else minutes * 60,
            **{name: given[name] for name in ("tokens", "flops", "steps", "usd", "kwh")},
            usd_per_hour=args.usd_per_hour,
            stated_watts=args.stated_watts,
        )

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by kind."""
        kinds = ("seconds", "tokens", "flops", "steps", "usd", "kwh")
        return {kind: float(getattr(self, kind)) for kind in kinds if getattr(self, kind) is not None}

    @property
    def needs_meter(self) -> bool:
        """Whether energy is limited and no power is stated."""
        return self.kwh is not None and not self.stated_watts

    @property
    def is_timed(self) -> bool:
        """Whether what is spent grows with time, so that the end must be kept a reserve."""
        return self.clock_limit_seconds is not None or self.needs_meter

    @property
    def clock_limit_seconds(self) -> float | None:
        """The wall-clock limit that time, money and energy together set, in seconds."""
        limits = [self.seconds]
        if self.usd is not None:
            limits.append(self.usd / self.usd_per_hour * SECONDS_PER_HOUR)
        if self.kwh is not None and self.stated_watts:
            limits.append(self.kwh * JOULES_PER_KWH / self.stated_watts)
        return min((limit for limit in limits if limit is not None), default=None)

    def describe(self) -> str:
        """The limits in words: `300 s, 1,000,000 tokens`."""
        units = {"seconds": "s", "usd": "USD", "kwh": "kWh"}
        return ", ".join(f"{format_amount(limit)} {units.get(kind, kind)}" for kind, limit in self.limits.items())


def format_amount(amount: float) -> str:
    """`1,000,000`, `0.25`, `3e+17`."""
    return f"{amount:,.0f}" if 1000 <= amount < 1e15 else f"{amount:,.6g}"
