"""What is predicted and how it is scored. One class an objective and one entry in OBJECTIVES."""

from __future__ import annotations

from oneday.errors import SettingError
from oneday.objectives.base import COMPANION, EVALUATION_SEED, STANDARD_MLM_PROBABILITY, Objective
from oneday.objectives.language_modeling import CausalLanguageModeling, MaskedLanguageModeling, WordOrder
from oneday.objectives.permutation import PermutedLanguageModeling
from oneday.objectives.replaced_tokens import ReplacedTokenDetection
from oneday.objectives.selection import SelectedPositions
from oneday.objectives.sentence_pairs import MaskedWithNextSentence

__all__ = [
    "COMPANION",
    "EVALUATION_SEED",
    "OBJECTIVES",
    "STANDARD_MLM_PROBABILITY",
    "Objective",
    "SelectedPositions",
    "find_objective",
]

OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective
    for objective in (
        MaskedLanguageModeling,
        CausalLanguageModeling,
        MaskedWithNextSentence,
        PermutedLanguageModeling,
        WordOrder,
        ReplacedTokenDetection,
    )
}


def find_objective(name: str) -> type[Objective]:
    """The objective class of that name.

    Raises:
        SettingError: When there is none.
    """
    if name not in OBJECTIVES:
        raise SettingError(f"The setting objective is {name!r}; it must be one of {', '.join(OBJECTIVES)}.")
    return OBJECTIVES[name]
