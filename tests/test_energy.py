"""Energy counters, on files that look like the kernel's, and a budget of energy."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from oneday.budget import Budget
from oneday.budget_clock import BudgetClock, open_meter
from oneday.durable_files import read_json
from oneday.energy import EnergyMeter, open_cpu_counters
from oneday.errors import SettingError
from oneday.evaluation import sum_part


def write_counter(root, number, name, microjoules):
    folder = root / f"intel-rapl:{number}"
    folder.mkdir(exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text("1000000\n")


def test_packages_are_added_up_and_wrap_around(tmp_path):
    write_counter(tmp_path, 0, "package-0", 400_000)
    write_counter(tmp_path, 1, "package-1", 0)
    write_counter(tmp_path, 2, "psys", 5)
    (tmp_path / "intel-rapl:3").mkdir()
    counters = open_cpu_counters(tmp_path)
    assert len(counters) == 2
    write_counter(tmp_path, 0, "package-0", 900_000)
    write_counter(tmp_path, 1, "package-1", 250_000)
    assert sum(counter.joules() for counter in counters) == pytest.approx(0.75)
    write_counter(tmp_path, 0, "package-0", 100_000)
    assert sum(counter.joules() for counter in counters) == pytest.approx(0.95)


def test_no_counters_no_meter(tmp_path, monkeypatch):
    assert open_cpu_counters(tmp_path) == []
    monkeypatch.setattr("oneday.budget_clock.open_energy_meter", lambda device: None)
    with pytest.raises(SettingError, match="budget_kwh is 0.5, but no energy counter can be read here; set stated_w"):
        open_meter(Budget(kwh=0.5), torch.device("cpu"))
    assert open_meter(Budget(kwh=0.5, stated_watts=100), torch.device("cpu")) is None
    assert open_meter(Budget(tokens=5), torch.device("cpu")) is None


class Machine:
    """A clock and the energy that its machine has taken."""

    seconds = used = 0.0

    def run(self, seconds, watts):
        self.seconds, self.used = self.seconds + seconds, self.used + seconds * watts

    def joules(self):
        return self.used


def test_metered_energy_ends_the_run_inside_the_budget():
    """The machine draws 100 W, then 300 W: time would not have told."""
    machine = Machine()
    meter = EnergyMeter("test counter", [machine])
    clock = BudgetClock(Budget(kwh=0.01), now=lambda: machine.seconds, meter=meter, reserve_seconds=4.0)
    clock.start()
    last = 0.0
    while clock.fits(1, 1):
        machine.run(1.0, 100 if machine.seconds < 100 else 300)
        clock.count_step(1, 1, 1.0)
        assert clock.progress >= last
        last = clock.progress
    machine.run(4.0, 300)
    clock.stop()
    assert 0.95 * 36_000 < machine.used <= 1.04 * 36_000
    assert last > 0.97
    assert clock.spent()["kwh"] == pytest.approx(machine.used / 3.6e6)
    assert clock.energy_source == "test counter"


def test_metered_energy_keeps_a_reserve_for_the_end_and_can_be_replayed(make_trainer, monkeypatch):
    """The reserve stands before the first step; where a run is done again nothing is metered."""
    begun, delay = time.monotonic(), 0.02
    counter = SimpleNamespace(joules=lambda: 1000 * (time.monotonic() - begun))
    monkeypatch.setattr("oneday.budget_clock.open_energy_meter", lambda device: EnergyMeter("test counter", [counter]))

    def score_slowly(*args):
        time.sleep(delay)
        return sum_part(*args)

    monkeypatch.setattr("oneday.evaluation.sum_part", score_slowly)
    first = make_trainer("bert", "first", budget_kwh=6000 / 3.6e6)
    reserves = []
    first.add_callback(AtBegin(lambda: reserves.append(first.clock.reserve_seconds)))
    first.run()
    num_parts = -(-len(first.eval_dataset) // (first.eval_batch_tokens // first.eval_dataset.row_length))
    assert reserves[0] >= 1.25 * num_parts * delay
    again = make_trainer("bert", "again", budget_kwh=6000 / 3.6e6, replay=first.args.output_dir)
    again.run()
    assert again.clock.steps == first.clock.steps


def test_energy_is_not_charged_while_the_clock_is_paused():
    machine = Machine()
    clock = BudgetClock(Budget(kwh=0.01), now=lambda: machine.seconds, meter=EnergyMeter("test counter", [machine]))
    clock.start()
    machine.run(2.0, 100)
    with clock.paused():
        machine.run(50.0, 300)
        assert clock.metered_kwh * 3.6e6 == pytest.approx(200.0), "what a heartbeat writes meanwhile"
    machine.run(1.0, 100)
    assert (clock.elapsed_seconds, clock.metered_kwh * 3.6e6) == (pytest.approx(3.0), pytest.approx(300.0))
    clock.stop()
    machine.run(50.0, 300)  # the reports
    assert (clock.elapsed_seconds, clock.metered_kwh * 3.6e6) == (pytest.approx(3.0), pytest.approx(300.0))


class AtBegin(TrainerCallback):
    """Calls something before the first step."""

    def __init__(self, call):
        self.call = call

    def on_train_begin(self, args, state, control, **kwargs):
        self.call()


def test_energy_of_a_killed_process_counts(tmp_path):
    """As far as its last heartbeat; what a checkpoint before it knew is less."""
    machine = Machine()

    def make():
        meter = EnergyMeter("test counter", [machine])
        return BudgetClock(Budget(kwh=1.0), now=lambda: machine.seconds, meter=meter)

    first = make()
    first.start()
    machine.run(900, 400)
    state = first.state_dict()
    machine.run(900, 600)
    first.write(tmp_path / "budget.json", "running")
    second = make()
    second.load_carried(read_json(tmp_path / "budget.json"))
    second.start()
    second.load_state_dict(state)
    machine.run(3600, 100)
    assert second.spent()["kwh"] == pytest.approx(0.35)
    assert second.used_fraction() == pytest.approx(0.35)


def test_two_threads_read_one_counter(tmp_path):
    write_counter(tmp_path, 0, "package-0", 0)
    meter = EnergyMeter("test counter", open_cpu_counters(tmp_path))
    ended = threading.Event()

    def read_on():
        while not ended.is_set():
            meter.read()

    thread = threading.Thread(target=read_on)
    thread.start()
    for microjoules in range(0, 400_000, 100):
        path = tmp_path / "intel-rapl:0" / "energy_uj"
        aside = path.with_name("aside")
        aside.write_text(f"{microjoules}\n")
        aside.replace(path)
        meter.read()
    ended.set()
    thread.join()
    assert meter.read() == pytest.approx(0.3999)
