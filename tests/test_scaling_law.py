"""The scaling law: a known one is found again, its interval holds new runs, and the ladder predicts a longer run."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from conftest import ROOT

from oneday.errors import SettingError
from oneday.ladder import Family, family_of, fit_family, format_law, read_records, to_point
from oneday.scaling_law import EXPONENTS, Point, fit_law, log_losses, objective_and_slope

SIZES, TOKENS = (2e6, 5e6, 15e6, 40e6), (1e6, 3e6, 1e7, 3e7)


def known_loss(parameters, tokens):
    return 1.8 + 2.0 * (parameters / 1e6) ** -0.35 + 3.0 * (tokens / 1e6) ** -0.4


def make_points(noise=0.0, seed=0):
    generator = np.random.default_rng(seed)
    return [
        Point(size, tokens, known_loss(size, tokens) * float(np.exp(generator.normal(0.0, noise))))
        for size, tokens in itertools.product(SIZES, TOKENS)
    ]


def test_a_known_law_is_found_again():
    law = fit_law(make_points())
    log_e, log_a, a, log_b, b = law.values
    assert np.exp([log_e, log_a, log_b]) == pytest.approx([1.8, 2.0, 3.0], rel=0.01)
    assert (a, b) == pytest.approx((0.35, 0.4), rel=0.01)
    far = law.predict(8e7, 1.5e8)
    assert far.loss == pytest.approx(known_loss(8e7, 1.5e8), rel=1e-3)
    assert far.outside == "parameters 2.0 x above, tokens 5.0 x above"
    assert law.predict(5e6, 2e6).outside == ""


@pytest.mark.slow
def test_the_interval_holds_what_it_says():
    """Of predictions just outside the range, from twenty noisy ladders, most intervals hold the truth."""
    held = 0
    for seed in range(20):
        said = fit_law(make_points(noise=0.01, seed=seed)).predict(6e7, 6e7)
        held += said.low <= known_loss(6e7, 6e7) <= said.high
    assert held >= 15


def test_the_slope_is_that_of_the_loss():
    points = make_points(noise=0.05)
    targets, free = np.log([point.loss for point in points]), np.full(5, True)
    values = np.array([0.4, 0.6, 0.3, 1.0, 0.5])
    _, slope = objective_and_slope(values, points, targets, free, EXPONENTS)
    for place in range(5):
        step = np.eye(5)[place] * 1e-6
        ends = [objective_and_slope(values + sign * step, points, targets, free, EXPONENTS)[0] for sign in (1, -1)]
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slope[place], rel=1e-4)


def test_two_sizes_do_not_make_a_law_of_sizes():
    """The size with most runs gives a law of tokens alone; a few runs give none."""
    few = [Point(2e6, tokens, 2.0 + 3.0 * (tokens / 1e6) ** -0.5) for tokens in (1e6, 2e6, 4e6, 8e6, 1.6e7)]
    law = fit_law([*few, Point(9e6, 1e6, 3.0)])
    assert (law.num_sizes, len(law.points)) == (1, 5)
    assert law.predict(2e6, 3.2e7).loss == pytest.approx(2.0 + 3.0 * 32**-0.5, rel=0.01)
    assert law.covers(2e6)
    assert not law.covers(9e6)
    assert fit_law(few[:2]) is None
    seeds = [Point(2e6, tokens, 4.86) for tokens in (1.77e6, 1.82e6, 1.83e6)]
    assert fit_law(seeds) is None, "three seeds of one wall clock"
    assert fit_law([*seeds, *few[:1]]) is None and fit_law([*seeds, few[0], few[3]]) is not None
    assert fit_law([]) is None
    assert np.isfinite(log_losses(law.values, few)).all()


# ---- The ladder in this repository ----


@pytest.fixture(scope="module")
def records():
    return read_records([ROOT / "recipes" / "ladder", ROOT / "recipes" / "benchmarks"])


def is_short(record):
    return record["tokens"] < 5e6


def of_ladder(records, attention_init):
    """The runs of the ladder's family that has this setting."""
    family = next(
        family_of(record)
        for record in records
        if record["kind"] == "ladder" and record["settings"].get("attention_init") == attention_init
    )
    return [record for record in records if family_of(record) == family]


def test_the_ladder_predicts_the_ten_minute_run(records):
    """From runs of at most a third of its tokens, of four sizes, to the measured loss of ten minutes: within 1 %."""
    own = of_ladder(records, None)
    long, short = ([record for record in own if is_short(record) == wanted] for wanted in (False, True))
    assert len(long) >= 3
    alike = [record for record in short if record["precision"] == long[0]["precision"]]  # of machines as fast
    assert len(alike) >= 4
    assert max(record["clock_seconds"] for record in alike) < 240
    law = fit_family(short, family_of(long[0]), long[0]["settings"]["held_out"]).law
    assert law.num_sizes == 4
    assert max(point.tokens for point in law.points) < 0.4 * long[0]["tokens"]
    for record in long:
        point = to_point(record)
        said = law.predict(point.parameters, point.tokens)
        assert said.loss == pytest.approx(point.loss, rel=0.01)
        assert said.low < point.loss < said.high
        assert said.outside.startswith("tokens 3.")


@pytest.mark.parametrize(
    ("attention_init", "model", "tokens"),
    [
        (None, "modernbert-tiny", 2e6),
        (None, "modernbert-mini", 2e6),
        (None, "quickstart", 1e6),
        ("neighbours", "modernbert-tiny", 2e6),
        ("neighbours", "modernbert-mini", 1e6),
        ("neighbours", "quickstart", 1e6),
    ],
)
def test_the_ladder_predicts_a_run_that_it_has_not_seen(records, attention_init, model, tokens):
    """Within 2 %, also the largest size."""
    own = of_ladder(records, attention_init)
    (unseen,) = (r for r in own if model in r["name"] and 0.9 * tokens < r["tokens"] < 1.1 * tokens)
    law = fit_family([record for record in own if record is not unseen], family_of(unseen)).law
    point = to_point(unseen)
    assert law.num_sizes >= 3
    assert law.predict(point.parameters, point.tokens).loss == pytest.approx(point.loss, rel=0.02)


def test_the_ladder_of_the_recipe_as_it_is_predicts_its_runs_of_ten_minutes(records):
    """Of their size the ladder has one run, of half their tokens: within 1 %, and inside the interval."""
    own = of_ladder(records, "neighbours")
    known, asked = ([record for record in own if record["kind"] == kind] for kind in ("ladder", "ours"))
    assert len(asked) >= 6 and {record["budget_seconds"] for record in asked} == {600.0}
    law = fit_family(known, family_of(known[0])).law
    for record in asked:
        point = to_point(record)
        assert sum(other.parameters == point.parameters and other.tokens > 1.1e6 for other in law.points) == 0
        said = law.predict(point.parameters, point.tokens)
        assert said.loss == pytest.approx(point.loss, rel=0.01)
        assert said.low < point.loss < said.high


def test_records_say_what_they_are_of(records):
    ladder = [record for record in records if record["kind"] == "ladder"]
    assert ladder
    for record in ladder:
        assert record["environment"]["device"]
        assert record["environment"]["commit"]
        assert record["environment"]["packages"]["torch"]
        assert record["flops"] > 6 * record["num_parameters_without_embeddings"] * record["tokens"] * 0.9
        assert record["seed"] == 42
    families = {family_of(record) for record in records}
    assert len({(family_of(record), record["measure"]) for record in records}) == len(families) > 1, (
        "one loss, one law"
    )
    laws = [law for law in (fit_family(records, family) for family in families) if law is not None]
    assert len(laws) > 1
    for law in laws:
        assert len({record["settings"]["held_out"] for record in law.records}) == 1, "one text, one law"
        assert len(law.records) == sum(family_of(record) == family_of(law.records[0]) for record in records)
    family = family_of(ladder[0])
    table = format_law(fit_family(records, family), family)
    assert max(map(len, table.splitlines())) <= 80


def test_only_runs_of_the_family_count_and_a_damaged_file_harms_nothing(records, tmp_path, caplog):
    (tmp_path / "torn.json").write_text('{"kind": "ladder", "name"')
    (tmp_path / "empty.json").write_text('{"kind": "ladder", "recipe": "a"}')
    (tmp_path / "finetuned.json").write_text('{"kind": "ours", "scores": {}}')
    (tmp_path / "good.json").write_text(json.dumps(records[0]))
    final = records[0]["final"] | {records[0]["measure"]: math.nan}
    (tmp_path / "diverged.json").write_text(json.dumps(records[0] | {"final": final}))
    assert read_records([tmp_path]) == [records[0]]
    assert sorted(message.split()[0] for message in caplog.messages) == ["diverged.json", "empty.json", "torn.json"]
    with pytest.raises(SettingError, match="There is no directory .*laddr"):
        read_records([tmp_path / "laddr"])
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "good.json").write_text(json.dumps(records[1]))
    assert read_records([tmp_path]) == read_records([tmp_path, tmp_path / "below"]) == [records[1], records[0]]
    assert fit_family(records, Family("bert", "mlm", 8192, 128)) is None


def test_a_law_is_not_mixed_of_runs_that_start_otherwise():
    """A record from before the setting is of a run without it."""
    settings = {"objective": "mlm", "vocab_size": 8192, "max_seq_length": 128, "model": {"model_type": "modernbert"}}
    old, without, with_it = (
        family_of({"settings": settings | more})
        for more in ({}, {"attention_init": None}, {"attention_init": "neighbours"})
    )
    assert old == without != with_it
    assert "neighbours" in str(with_it) and "neighbours" not in str(old)
    changes = {"weight_decay": 1.0, "embedding_init": "x", "batch_size_tokens": 65536, "learning_rate": 2e-4,
               "muon_learning_rate": 2e-3, "mlm_probability": 0.4}  # fmt: skip
    others = {name: family_of({"settings": settings | {name: value}}) for name, value in changes.items()}
    assert len({old, with_it, *others.values()}) == 2 + len(changes)
    words = {"weight_decay": "decay 1", "batch_size_tokens": "steps of 65,536", "mlm_probability": "mlm at 40 %",
             "learning_rate": "muon at 0.0002", "muon_learning_rate": "muon at 0.002"}  # fmt: skip
    assert all(word in str(others[name]) and word not in str(old) for name, word in words.items())
