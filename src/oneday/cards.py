"""Graphics cards that a budget can be planned for without having one: peak, memory, power, from their data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

from oneday.arguments import SettingError

SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class Card:
    """One kind of GPU.

    Attributes:
        name: As its maker sells it.
        peak_exaflop_per_day: Dense 16-bit matrix products with 32-bit sums, in 10^18 operations a day.
        memory_gb: Memory, in gigabytes of 10^9 bytes.
        watts: Board power.
    """

    name: str
    peak_exaflop_per_day: float
    memory_gb: float
    watts: float

    @property
    def peak_flops(self) -> float:
        """Peak in FLOPs a second."""
        return self.peak_exaflop_per_day * 1e18 / SECONDS_PER_DAY


CARDS = (
    Card("RTX 2080 Ti", 4.6, 11, 250),
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
