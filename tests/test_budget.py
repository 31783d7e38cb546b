"""Budgets and their clock, on a clock that the test moves."""

from __future__ import annotations

import json
import random
import time

import pytest

from oneday.arguments import BudgetTrainingArguments
from oneday.budget import Budget
from oneday.budget_clock import BudgetClock
from oneday.durable_files import read_json
from oneday.errors import SettingError
from oneday.throughput import process_age_seconds


class FakeTime:
    """A monotonic clock in the test's hands."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def budget_of(tmp_path, **settings) -> Budget:
    return Budget.from_arguments(BudgetTrainingArguments(output_dir=str(tmp_path), **settings))


def test_units(tmp_path):
    assert budget_of(tmp_path, budget_hours=2.0).seconds == 7200
    assert budget_of(tmp_path, budget_minutes=3.0).seconds == 180
    assert budget_of(tmp_path, budget_usd=10.0, usd_per_hour=0.4).clock_limit_seconds == pytest.approx(25 * 3600)
    assert budget_of(tmp_path, budget_kwh=0.3, stated_watts=150.0).clock_limit_seconds == pytest.approx(2 * 3600)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "No budget"),
        ({"budget_minutes": 0.0}, "budget_minutes is 0"),
        ({"budget_tokens": -5.0}, "budget_tokens is -5"),
        ({"budget_minutes": float("nan")}, "budget_minutes is nan"),
        ({"budget_usd": 1.0}, "usd_per_hour"),
        ({"budget_kwh": 1.0, "stated_watts": 0.0}, "stated_watts is 0"),
        ({"stated_watts": -1.0, "budget_steps": 5}, "stated_watts is -1"),
    ],
)
def test_bad_budgets_are_refused(tmp_path, settings, words):
    with pytest.raises(SettingError, match=words):
        budget_of(tmp_path, **settings)


def test_first_budget_used_up_decides():
    clock = BudgetClock(Budget(tokens=1000, steps=5), now=FakeTime())
    clock.start()
    for _ in range(4):
        assert clock.fits(100, 0)
        clock.count_step(100, 0, 1.0)
    assert clock.progress == pytest.approx(0.8)
    assert clock.fits(100, 0)
    clock.count_step(100, 0, 1.0)
    assert not clock.fits(100, 0), "five steps are used up although 500 tokens are left"


def test_token_budget_is_never_exceeded():
    clock = BudgetClock(Budget(tokens=1000), now=FakeTime())
    clock.start()
    while clock.fits(300, 0):
        clock.count_step(300, 0, 1.0)
    assert clock.tokens == 900


@pytest.mark.parametrize("seed", range(5))
def test_wall_clock_ends_inside_with_jumping_steps(seed):
    """Step times vary fourfold; evaluations and checkpoints come in between; the reserve changes on the way."""
    generator, time = random.Random(seed), FakeTime()
    clock = BudgetClock(Budget(seconds=600.0), now=time, reserve_seconds=5.0)
    clock.start()
    last = 0.0
    while clock.fits(1, 1):
        before = time.seconds
        assert clock.step_progress(1, 1) >= last
        time.seconds += generator.uniform(0.25, 1.0)
        clock.count_step(1, 1, time.seconds - before)
        if generator.random() < 0.02 and clock.fits_seconds(3.0):
            with clock.account("evaluation"):
                time.seconds += 3.0
            clock.reserve_seconds = generator.uniform(4.0, 5.0)
        assert clock.progress >= last
        last = clock.progress
    time.seconds += clock.reserve_seconds
    clock.stop()
    assert 0.99 * 600 <= clock.elapsed_seconds <= 600
    assert sum(clock.balanced_ledger().values()) == pytest.approx(clock.elapsed_seconds, rel=0.01)


def test_progress_never_falls_when_the_reserve_shrinks():
    time = FakeTime()
    clock = BudgetClock(Budget(seconds=100.0), now=time, reserve_seconds=50.0)
    clock.start()
    time.seconds += 25
    high = clock.progress
    clock.reserve_seconds = 0.0
    assert high == pytest.approx(0.5)
    assert clock.progress == high


def test_step_progress_is_read_at_the_middle_of_the_step():
    clock = BudgetClock(Budget(tokens=1000), now=FakeTime())
    assert clock.step_progress(100, 0) == pytest.approx(0.05)


@pytest.mark.parametrize("passed", [0.1, 1.0, 1.5])
def test_progress_after_a_step_counts_what_is_left_of_it(passed):
    """The step began `passed` seconds ago and takes as long as those before it, one second, or as long as it took."""
    now = FakeTime()
    clock = BudgetClock(Budget(seconds=100, tokens=10**9), now=now)
    clock.start()
    for _ in range(3):
        now.seconds += 1.0
        clock.count_step(500, 0, 1.0)
    begun = now.seconds
    now.seconds += passed
    assert clock.progress_after(500, 0, begun) == pytest.approx((3 + max(1.0, passed)) / 100)
    assert clock.progress == pytest.approx((3 + passed) / 100), "asking moves nothing"
    of_tokens = BudgetClock(Budget(tokens=4000), now=now)
    of_tokens.start()
    ahead = of_tokens.progress_after(500, 0, begun)
    of_tokens.count_step(500, 0, 1.0)
    assert of_tokens.progress == ahead == 0.125


def test_progress_starts_after_the_preparation_and_still_ends_with_the_budget():
    now = FakeTime()
    clock = BudgetClock(Budget(seconds=100), now=now, reserve_seconds=10)
    clock.start()
    now.seconds += 30
    assert clock.progress == pytest.approx(1 / 3)
    clock.start_progress()
    assert clock.progress == 0.0
    now.seconds += 30
    assert clock.progress == pytest.approx(0.5)
    again = BudgetClock(Budget(seconds=100), now=now)
    again.load_state_dict(clock.state_dict())
    assert again.origin["seconds"] == 30 and again.progress == pytest.approx(0.5)
    assert clock.fits_seconds(29.9) and not clock.fits_seconds(30.1)


def test_a_resumed_process_knows_what_a_step_takes():
    """600 s, steps of 20 s, 5 s kept for the end: at 580 s no other step fits, whatever process asks."""
    clock = BudgetClock(Budget(seconds=600.0), now=lambda: now[0], reserve_seconds=5.0)
    now = [0.0]
    clock.start()
    for _ in range(29):
        now[0] += 20.0
        clock.count_step(100, 1.0, 20.0)
    assert not clock.fits(100, 1.0)
    resumed = BudgetClock(Budget(seconds=600.0), now=lambda: now[0])
    resumed.load_state_dict(json.loads(json.dumps(clock.state_dict())))
    assert resumed.slow_step_seconds == 20.0 and not resumed.fits(100, 1.0)


def test_a_pause_costs_nothing():
    time = FakeTime()
    clock = BudgetClock(Budget(seconds=100.0), now=time)
    with clock.paused():
        time.seconds += 7
    clock.start()
    time.seconds += 20
    with clock.paused():
        time.seconds += 50
        assert clock.elapsed_seconds == pytest.approx(20), "it stands still inside"
        with clock.paused():
            time.seconds += 5
    time.seconds += 5
    assert clock.elapsed_seconds == pytest.approx(25)
    assert clock.progress == pytest.approx(0.25)
    with pytest.raises(RuntimeError), clock.paused():
        time.seconds += 1000
        raise RuntimeError
    assert clock.elapsed_seconds == pytest.approx(25), "an error inside does not leave it standing or counted"
    time.seconds += 5
    clock.stop()
    with clock.paused():
        time.seconds += 9
    assert clock.elapsed_seconds == pytest.approx(30)


def test_a_killed_process_is_charged_and_idle_time_is_not(tmp_path):
    time = FakeTime()
    first = BudgetClock(Budget(seconds=100.0), now=time)
    first.start()
    time.seconds += 10
    first.count_step(7, 1.0, 10.0)
    checkpoint = first.state_dict()
    time.seconds += 20
    first.write(tmp_path / "budget.json", "running")
    time.seconds += 5000

    second = BudgetClock(
        Budget(seconds=100.0), now=time, carried_seconds=read_json(tmp_path / "budget.json")["spent"]["seconds"]
    )
    second.load_state_dict(checkpoint)
    second.start()
    assert second.elapsed_seconds == pytest.approx(30)
    assert (second.tokens, second.steps) == (7, 1)
    assert second.ledger["lost"] == pytest.approx(20)
    assert second.progress == pytest.approx(0.3)


def test_budget_json_says_limit_spent_and_ledger(tmp_path):
    time = FakeTime()
    clock = BudgetClock(Budget(seconds=100.0, usd=1.0, usd_per_hour=36.0), now=time)
    clock.start()
    time.seconds += 50
    clock.count_step(8, 2.0, 40.0)
    clock.write(tmp_path / "budget.json", "finished")
    report = json.loads((tmp_path / "budget.json").read_text())
    assert report["limit"] == {"seconds": 100.0, "usd": 1.0}
    assert report["spent"]["usd"] == pytest.approx(0.5)
    assert report["ledger_seconds"]["other"] == pytest.approx(10)
    assert report["used_fraction"] == pytest.approx(0.5)
    assert clock.describe_spending() == "50.0 % of 100 s, 1 USD spent: 40.0 s in steps, 10.0 s in other"
    time.seconds += 60
    clock.stop()
    assert clock.describe_spending().startswith("110.0 % of 100 s, 1 USD spent (more than was set): 70.0 s in other")
    assert [path.name for path in tmp_path.iterdir()] == ["budget.json"]


def test_setting_the_system_clock_does_no_harm(monkeypatch):
    clock = BudgetClock(Budget(seconds=100.0))
    clock.start()
    age = process_age_seconds()
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert 0 <= clock.elapsed_seconds < 5
    assert 0 < age <= process_age_seconds() < age + 5


def test_skipped_steps_cost_time_and_count_for_nothing_else():
    now = FakeTime()
    clock = BudgetClock(Budget(tokens=1000), now=now)
    clock.start()
    clock.count_step(100, 5.0, 1.0)
    now.seconds += 2
    clock.count_skip(2.0)
    assert (clock.tokens, clock.steps, clock.skipped_steps, clock.steps_taken) == (100, 1, 1, 2)
    assert clock.ledger["lost"] == 2.0
    clock.ledger["data"] = 0.5
    clock.rewind({"tokens": 0, "flops": 0.0, "steps": 0, "ledger": {"steps": 0.0, "data": 0.25}})
    assert (clock.ledger["steps"], clock.ledger["data"], clock.ledger["lost"]) == (0.0, 0.25, 3.25)
    assert (clock.tokens, clock.steps, clock.steps_taken) == (0, 0, 2)
    assert clock.progress == 0.0
    clock.count_step(300, 5.0, 1.0)
    assert clock.progress == pytest.approx(0.3)
    clock.rewind({"tokens": 100, "flops": 0.0, "steps": 1, "ledger": {"steps": 0.5, "data": 0.25}})
    assert clock.progress == pytest.approx(0.3), "progress never falls"
