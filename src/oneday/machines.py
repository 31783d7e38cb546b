"""What a budget is spent on: this machine, or a graphics card that is not here, from its data sheet."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from oneday.arguments import BudgetTrainingArguments
from oneday.errors import SettingError
from oneday.throughput import measure_peak_flops, total_memory_bytes

SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class Card:
    """One kind of GPU.

    Attributes:
        name: As its maker sells it.
        peak_exaflop_per_day: Dense bfloat16 matrix products with 32-bit sums, in 10^18 operations a day; of a card
            without bfloat16, on which training is in float32, float32 products.
        memory_gb: Memory, in gigabytes of 10^9 bytes.
        watts: Board power.
    """

    name: str
    peak_exaflop_per_day: float
    memory_gb: float
    watts: float

    @property
    def peak_flops(self) -> float:
        """Peak in FLOPs per second."""
        return self.peak_exaflop_per_day * 1e18 / SECONDS_PER_DAY


CARDS = (
    Card("RTX 2080 Ti", 1.16, 11, 250),
    Card("RTX 3090", 6.1, 24, 350),
    Card("RTX A6000", 13.4, 48, 300),
    Card("RTX 4090", 14.3, 24, 450),
    Card("A100 40GB", 27.0, 40, 400),
    Card("A100 80GB", 27.0, 80, 400),
    Card("H100", 85.5, 80, 700),
    Card("H200", 85.5, 141, 700),
)


def find_card(name: str) -> Card:
    """The first card whose name holds every word of `name`.

    >>> find_card("rtx4090").name
    'RTX 4090'

    Raises:
        SettingError: When there is none.
    """
    words = re.findall(r"[a-z]+|\d+", name.lower())
    for card in CARDS:
        if words and set(words) <= set(re.findall(r"[a-z]+|\d+", card.name.lower())):
            return card
    known = ", ".join(card.name for card in CARDS)
    raise SettingError(f"The setting for is {name!r}, which is none of the cards in the table: {known}.")


@dataclass(frozen=True)
class Machine:
    """What the budget is spent on.

    Attributes:
        name: In words.
        memory_bytes: Of the GPU, or of the machine where there is none.
        peak_flops: Measured here, or from a data sheet.
        watts: Power, as far as it is known before probing.
        card: The card planned for; None: this machine.
    """

    name: str
    memory_bytes: float
    peak_flops: float
    watts: float | None
    card: Card | None


def find_machine(args: BudgetTrainingArguments, card_name: str | None, memory_gb: float | None) -> Machine:
    """The card asked for, this machine's GPU, or this machine.

    Args:
        args: Settings of training; `stated_watts` takes the place of a card's power.
        card_name: To plan for; None: what is here.
        memory_gb: To plan for, in gigabytes of 10^9 bytes; None: what it has.

    Raises:
        SettingError: When the card is not known, or its peak is not that of the settings.
    """
    given = memory_gb * 1e9 if memory_gb else None
    if card_name is not None:
        card = find_card(card_name)
        if args.use_bf16 is False:
            raise SettingError(
                "The peaks known of cards are of bf16, and bf16 is false; leave one of for and bf16 out."
            )
        watts = args.stated_watts or card.watts
        return Machine(card.name, given or card.memory_gb * 1e9, card.peak_flops, watts, card)
    peak = measure_peak_flops(args.device, args.computes_in_bf16)
    if args.device.type == "cuda":
        properties = torch.cuda.get_device_properties(args.device)
        return Machine(properties.name, given or properties.total_memory, peak, args.stated_watts, None)
    name = f"this machine, {torch.get_num_threads()} threads"
    return Machine(name, given or total_memory_bytes(), peak, args.stated_watts, None)
