"""This machine, and cards by their data sheets."""

from __future__ import annotations

import pytest

from oneday.errors import SettingError
from oneday.machines import find_card


def test_cards_are_found_by_words():
    assert find_card("rtx4090").name == "RTX 4090"
    assert find_card("2080").peak_flops == pytest.approx(13.4e12, rel=0.01), "it has no bfloat16: float32"
    assert find_card("h100").name == "H100"
    assert find_card("3090").peak_flops == pytest.approx(71e12, rel=0.01)
    assert find_card("a100-80gb").memory_gb == 80
    with pytest.raises(SettingError, match="RTX 5000.*RTX 2080 Ti"):
        find_card("RTX 5000")
