"""One model in a budget, by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from planning_parts import MACHINE, PROBE, SETTINGS

from oneday.budget import Budget
from oneday.errors import SettingError
from oneday.machines import CARDS
from oneday.plan_rows import choose_row, count_tokens, largest_micro_batch, make_row, mean_batch_tokens, memory_bytes
from oneday.probing import Pace
from oneday.scaling_law import Prediction
from oneday.schedules import interpolate


def test_tokens_of_a_budget_by_hand():
    """4,096 tokens take 4,096 x 1e-4 + 0.1 s; of 60 s ten go to compiling."""
    pace = Pace(1e-4, 0.1, fixed_seconds=10.0)
    per_second = 4096 / (0.4096 + 0.1)
    assert count_tokens(PROBE, pace, Budget(seconds=60.0), None, 4096, 3000) == pytest.approx(50 * per_second)
    assert count_tokens(PROBE, pace, Budget(seconds=60.0, tokens=1000.0), None, 4096, 3000) == 1000
    assert count_tokens(PROBE, pace, Budget(flops=1e12), None, 4096, 3000) == pytest.approx(1e5)
    assert count_tokens(PROBE, pace, Budget(steps=3), None, 4096, 3000) == 3 * 3000
    usd = Budget(usd=1.0, usd_per_hour=60.0)
    assert count_tokens(PROBE, pace, usd, None, 4096, 3000) == pytest.approx(50 * per_second)
    assert count_tokens(PROBE, pace, Budget(kwh=0.01), 600.0, 4096, 3000) == pytest.approx(50 * per_second)
    with pytest.raises(SettingError, match="stated_watts"):
        count_tokens(PROBE, pace, Budget(kwh=0.01), None, 4096, 3000)
    with pytest.raises(SettingError, match="stated_watts"):
        count_tokens(PROBE, pace, Budget(kwh=0.01, seconds=60.0), None, 4096, 3000)


@pytest.mark.parametrize("start", [None, 1024])
def test_tokens_of_a_step_on_average_are_those_of_the_run(start):
    settings = {"batch_size_tokens_start": start, "batch_size_tokens": 4096, "batch_ramp_fraction": 0.6}
    run = [interpolate(start, 4096, step / 10_000, 0.6) for step in range(10_000)]
    assert mean_batch_tokens(settings) == pytest.approx(np.mean(run), rel=1e-3)


def test_the_largest_micro_batch_that_fits():
    """80 MB of 100 may be used: 50 of the model, 20 of the state in 8 bit, so 10 MB at 10 kB per token: 1,000."""
    assert largest_micro_batch(PROBE, "muon_8bit", MACHINE, SETTINGS) == 512, "divides the batch"
    assert largest_micro_batch(PROBE, "muon", MACHINE, SETTINGS) == 0
    assert memory_bytes(PROBE, "muon", 512) == 50e6 + 30e6 + 5.12e6
    roomy = dataclasses.replace(MACHINE, memory_bytes=1e9)
    assert largest_micro_batch(PROBE, "muon", roomy, {**SETTINGS, "batch_size_tokens": 8192}) == 4096
    assert largest_micro_batch(PROBE, "muon", roomy, {**SETTINGS, "max_seq_length": 8192}) == 8192, "a row goes alone"
    card = dataclasses.replace(roomy, card=CARDS[0])
    assert largest_micro_batch(PROBE, "muon", card, {**SETTINGS, "batch_size_tokens": 8192}) == 8192


def test_what_a_row_says_by_hand():
    budget = Budget(seconds=3600.0, usd_per_hour=0.5)
    row = make_row("m.json", PROBE, Pace(1e-4, 0.0), budget, MACHINE, SETTINGS, 9_000_000, None)
    assert (row.tokens, row.epochs, row.hours, row.usd, row.kwh) == pytest.approx((3.6e7, 4.0, 1.0, 0.5, 0.2))
    assert (row.optim, row.micro_batch_tokens, row.prediction) == ("muon_8bit", 512, None), "only 8 bit fits"


def test_the_choice():
    def row(size, tokens, loss=None, micro=128, low=None, name="m.json"):
        said = None if loss is None else Prediction(loss, low or loss, loss)
        probe = dataclasses.replace(PROBE, num_parameters=size, flops_per_token=6.0 * size)
        facts = {"probe": probe, "tokens": tokens, "prediction": said, "micro_batch_tokens": micro}
        return dataclasses.replace(base, **facts, model_config=name)

    def choose(*rows):
        return choose_row(rows, "own.json")

    base = make_row("m.json", PROBE, Pace(1e-4, 0.0), Budget(seconds=1.0), MACHINE, SETTINGS, None, None)
    assert choose(row(1e6, 3e7, 4.0), row(2e6, 2e7, 3.5), row(4e6, 1e7, 3.8)) == 1
    assert choose(row(1e6, 3e7, 4.0), row(2e6, 2e7, 3.5, micro=0), row(4e6, 1e7, 3.8)) == 2
    assert choose(row(1e6, 3e7, 3.5), row(2e6, 2e7, 3.6, low=3.4, name="own.json")) == 1, "not told apart"
    assert choose(row(1e6, 3e7, 3.5), row(2e6, 2e7, 3.6, low=3.55, name="own.json")) == 0
    assert choose(row(1e6, 9e7), row(2e6, 4e7), row(4e6, 1e7)) == 1, "the largest with 20 tokens per parameter"
    assert choose(row(1e6, 1e7), row(2e6, 1e7)) == 0
    assert choose(row(1e6, 1e7), row(2e6, 1e7, name="own.json")) == 1, "none sees its share"
    with pytest.raises(SettingError, match="No model fits"):
        choose(row(1e6, 1e7, micro=0))


def test_padding_is_no_token_of_a_plan():
    """Of rows that are a quarter full, a step of 4,096 places shows 1,024 tokens."""
    pace, budget = Pace(1e-4, 0.1), Budget(steps=10)
    roomy = dataclasses.replace(MACHINE, memory_bytes=1e9)
    full = make_row("a.json", PROBE, pace, budget, roomy, SETTINGS, 10_000, None)
    quarter = make_row(
        "a.json", dataclasses.replace(PROBE, token_share=0.25), pace, budget, roomy, SETTINGS, 10_000, None
    )
    assert (full.tokens, full.epochs, quarter.tokens, quarter.epochs) == (40_960, 4.096, 10_240, 1.024)
    assert quarter.hours == pytest.approx(10 * (1024e-4 + 0.1) / 3600)
