"""Settings chosen on training rows that are held out."""

from __future__ import annotations

import itertools
import json

import pytest
from classifiers import make_args, make_mrpc, make_texts, write_task
from datasets import Dataset

from oneday import tuning as tuning_protocol
from oneday.classification import PreparedTask, load_checkpoint
from oneday.errors import SettingError
from oneday.finetuning import prepare_task, run_protocol
from oneday.glue import find_task
from oneday.glue_protocol import FinetuneArguments
from oneday.tuning import choose_setting, hold_out, plan_trials, spread_grid


def test_tuned_settings_are_chosen_on_training_rows_and_recorded(bert, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning_protocol, "ENOUGH_HELD_OUT", 100)
    # A learning rate of next to nothing cannot be chosen over one that learns, whatever validation would say.
    write_task(tmp_path / "tasks", "sst2", make_texts(160), make_texts(60))
    write_task(tmp_path / "tasks", "mrpc", make_mrpc(250), make_mrpc(20))
    args = make_args(
        bert, tmp_path / "tasks", tmp_path, protocol="tuned", tuned_learning_rates=[1e-9, 3e-3], tuned_epochs=[6.0],
        task_names=["sst2", "mrpc"], random_baseline=True, seed=7,
    )  # fmt: skip
    tasks = run_protocol(args)["tasks"]
    for name, size, num_parts in (("sst2", 32, 4), ("mrpc", 50, 2)):
        for kind in ("pretrained", "random"):
            tuning = tasks[name]["tuning"][kind]
            assert tuning["chosen"] == {"learning_rate": 3e-3, "num_train_epochs": 6.0}
            assert tuning["num_held_out"] == size and tuning["seeds"] == [8 + part for part in range(num_parts)]
            assert [len(point["scores"]) for point in tuning["grid"]] == [num_parts] * 2
        tuning = tasks[name]["tuning"]["pretrained"]
        assert [point["score"] > 0.9 for point in tuning["grid"]] == [False, True] and tasks[name]["median"] > 0.9
    runs = [json.loads(line) for line in (tmp_path / "out" / "glue_runs.jsonl").read_text().splitlines()]
    # Every trial's score stands in the record of its own task and weights, in its own place.
    for name, kind in itertools.product(tasks, ("pretrained", "random")):
        mine = [run for run in runs if (run["task"], run["weights"]) == (name, kind) and run["seed"] > 7]
        found = [score for point in tasks[name]["tuning"][kind]["grid"] for score in point["scores"]]
        assert found == [run["scores"][name][tasks[name]["metric"]] for run in mine]
    assert len(runs) == 2 * 2 * (4 + 2) + 4 and [run["seed"] for run in runs[-4:]] == [7] * 4
    settings = json.loads((tmp_path / "out" / "glue_results.json").read_text())["settings"]
    assert settings["tuned_learning_rates"] == [1e-9, 3e-3] and settings["learning_rate"] is None


def test_too_few_rows_to_choose_by_are_refused_before_anything_is_written(bert, data_dir, tmp_path):
    args = make_args(bert, data_dir, tmp_path, protocol="tuned", max_train_examples=9)
    with pytest.raises(SettingError, match="sst2 has 9 training rows; it holds a fifth of them out .* needs 10"):
        run_protocol(args)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("num_rows", [40, 560, 8551])
def test_trials_make_as_many_steps_as_the_runs_that_they_stand_for(num_rows):
    args = FinetuneArguments(protocol="tuned", tuned_learning_rates=[1e-5, 2e-5], tuned_epochs=[2.0, 5.0], seed=3)
    rows = Dataset.from_dict({"row": range(num_rows), "label": [0] * num_rows})
    task = PreparedTask(find_task("rte"), {"train": rows}, "hash")
    points, parts = spread_grid(args), hold_out(task)
    trials = plan_trials(args, points, task, parts)
    assert [trial[0] for trial in trials] == parts * 4
    assert [trial[2] for trial in trials] == [8 + number for number in range(len(parts))] * 4  # after 3 to 7
    for (part, settings, _), point in zip(trials, (point for point in points for _ in parts), strict=True):
        rows_seen = settings.num_train_epochs * len(part.splits["train"])
        assert rows_seen == pytest.approx(point.num_train_epochs * num_rows)
        assert settings.learning_rate == point.learning_rate and not settings.save_models


def test_best_mean_is_chosen_and_of_equal_ones_the_first():
    """Not the best first part, nor the best single one, nor the best median."""
    args = FinetuneArguments(protocol="tuned", tuned_learning_rates=[1e-5, 2e-5, 3e-5, 4e-5, 5e-5], tuned_epochs=[2.0])
    rows = Dataset.from_dict({"row": range(2000), "label": [0] * 2000})
    parts = hold_out(PreparedTask(find_task("rte"), {"train": rows}, "hash"))
    scores = [[0.75, 0.25, 0.25], [0.5, 0.625, 0.75], [0.25, 1.0, 0.25], [0.5, 0.75, 0.625], [0.0, 0.6875, 0.6875]]
    lines = [
        {"scores": {"rte": {"accuracy": score}}, "seed": 3, "diverged": False} for point in scores for score in point
    ]
    chosen, record = choose_setting(args, parts, spread_grid(args), lines)
    assert chosen.learning_rate == record["chosen"]["learning_rate"] == 2e-5 and chosen.num_train_epochs == 2.0
    assert [point["scores"] for point in record["grid"]] == scores and record["grid"][1]["score"] == 0.625
    assert record["seeds"] == [3, 3, 3]
    lines[4]["diverged"] = True  # one part of the best
    _, record = choose_setting(args, parts, spread_grid(args), lines)
    assert record["chosen"]["learning_rate"] == 4e-5 and record["grid"][1]["score"] == 0.625
    assert [point["diverged"] for point in record["grid"]] == [False, True, False, False, False]
    for wrong in (lines[:-1], lines + lines[:1]):
        with pytest.raises(ValueError, match="zip"):
            choose_setting(args, parts, spread_grid(args), wrong)


def test_held_out_rows_are_not_trained_on(bert, data_dir, tmp_path):
    task = prepare_task("sst2", make_args(bert, data_dir, tmp_path), load_checkpoint(bert))
    parts, everything = hold_out(task), set(task.splits["train"]["row"])
    assert len({part.data_hash for part in parts} | {task.data_hash}) == 6
    for part in parts:
        trained, held_out = (part.splits[split]["row"] for split in ("train", "held_out"))
        assert (len(trained), len(held_out)) == (128, 32) and {*trained, *held_out} == everything
        assert list(part.splits) == ["train", "held_out"] and part.scored_splits == ["held_out"]
    assert {row for part in parts for row in part.splits["held_out"]["row"]} == everything  # five parts of a fifth


@pytest.mark.parametrize(
    "num_rows, num_parts, size",
    [(10, 5, 2), (560, 5, 112), (2490, 3, 498), (3668, 2, 733), (8551, 1, 1710), (67349, 1, 2000)],
)
def test_small_tasks_hold_several_parts_out(num_rows, num_parts, size):
    rows = Dataset.from_dict({"row": range(num_rows), "label": [0] * num_rows})
    parts = hold_out(PreparedTask(find_task("rte"), {"train": rows}, "hash"))
    held_out = [set(part.splits["held_out"]["row"]) for part in parts]
    assert len(parts) == num_parts and {len(rows) for rows in held_out} == {size}
    assert len(set().union(*held_out)) == num_parts * size
