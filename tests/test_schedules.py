"""Shapes over the budget against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from oneday.errors import SettingError
from oneday.schedules import LR_SHAPES, choose_row_length, find_plateau_end, interpolate, learning_rate_multiplier


@pytest.mark.parametrize("name", LR_SHAPES)
def test_every_shape_stays_in_0_to_1_and_decays_to_zero(name):
    shape = learning_rate_multiplier(name, 0.1, 0.4)
    values = [shape(step / 1000) for step in range(1001)]
    assert all(0.0 <= value <= 1.0 for value in values)
    assert max(values) == pytest.approx(1.0, abs=2e-3)
    if name != "constant":
        assert values[-1] == 0.0
        assert shape(1.5) == 0.0


@pytest.mark.parametrize(
    ("name", "progress", "expected"),
    [
        ("trapezoid", 0.05, 0.5),
        ("trapezoid", 0.5, 1.0),
        ("trapezoid", 0.8, 0.5),
        ("one_minus_sqrt", 0.7, 1 - math.sqrt(0.25)),
        ("linear", 0.55, 0.5),
        ("cosine", 0.55, 0.5),
        ("triangle", 0.0, 0.25),
        ("triangle", 0.3, 0.625),
        ("triangle", 0.6, 1.0),
        ("triangle", 0.8, 0.5),
        ("constant", 0.99, 1.0),
    ],
)
def test_values(name, progress, expected):
    assert learning_rate_multiplier(name, 0.1, 0.4)(progress) == pytest.approx(expected)


def test_no_warmup_and_no_decay():
    assert learning_rate_multiplier("trapezoid", 0.0, 0.0)(0.0) == 1.0
    assert learning_rate_multiplier("trapezoid", 0.0, 0.0)(0.999) == 1.0


def test_interpolate():
    assert interpolate(None, 8.0, 0.0) == 8.0
    assert interpolate(4.0, 8.0, 0.3, until=0.6) == pytest.approx(6.0)
    assert interpolate(4.0, 8.0, 0.9, until=0.6) == 8.0


@pytest.mark.parametrize(
    ("settings", "words"), [(("zigzag", 0.1, 0.4), "zigzag"), (("linear", 1.2, 0.4), "warmup_fraction is 1.2")]
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(SettingError, match=words):
        learning_rate_multiplier(*settings)


@pytest.mark.parametrize(("start", "end"), [(128, 1024), (64, 192), (96, 96), (None, 512)])
def test_row_lengths_only_grow_and_divide_the_last(start, end):
    lengths = [choose_row_length(start, end, step / 100, 0.6) for step in range(101)]
    assert lengths == sorted(lengths) and lengths[0] == (start or end) and set(lengths[60:]) == {end}
    assert all(end % length == 0 for length in lengths)


def test_the_plateau_ends_where_the_rate_begins_to_fall():
    for shape in LR_SHAPES:
        end = find_plateau_end(shape, 0.3)
        multiplier = learning_rate_multiplier(shape, 0.1, 0.3)
        assert all(multiplier(step / 100) == 1.0 for step in range(10, int(100 * end)))
        assert end == 1.0 or multiplier(max(end, 0.1) + 0.05) != 1.0
