"""Runs beside each other, and a model that answers."""

from __future__ import annotations

import doctest
import json

import pytest

from oneday import comparison
from oneday.comparison import format_comparison, name_runs, read_evaluations, time_to_match


def write_run(folder, losses, bits=False):
    folder.mkdir()
    lines = [{"event": "eval", "step": 0, "taken": 0, "tokens": 0, "budget_seconds": 0.0, "eval_loss": 9.0}]
    for number, loss in enumerate(losses, start=1):
        event = {"event": "eval", "step": number, "taken": number, "tokens": 1000 * number, "eval_loss": loss}
        lines.append({**event, "budget_seconds": 60.0 * number, **({"eval_bits_per_byte": loss / 2} if bits else {})})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "results.json").write_text(json.dumps({"validation_hash": "v"}))


def test_the_time_to_match_by_hand(tmp_path):
    assert doctest.testmod(comparison).failed == 0
    write_run(tmp_path / "slow", [6.0, 5.0, 4.0])
    write_run(tmp_path / "fast", [4.5, 3.5, 3.0])
    runs = {name: read_evaluations(tmp_path / name) for name in ("slow", "fast")}
    match = time_to_match(runs["fast"], 4.0, 180.0, "eval_loss", "budget_seconds")
    assert match.ratio == pytest.approx(2.0) and not match.is_bound
    table = format_comparison(runs, {"slow": {"validation_hash": "v"}, "fast": {}})
    assert table.splitlines()[3].startswith("slow") and table.splitlines()[3].endswith("2.00 x")
    assert "do not compare" not in table
    for key in ("corpus_hash", "validation_hash", "tokenizer_hash", "objective", "masks_hash"):
        assert "do not compare" in format_comparison(runs, {name: {key: name} for name in runs})
    write_run(tmp_path / "poor", [8.0])
    runs["poor"] = read_evaluations(tmp_path / "poor")
    assert "> 1.00 x" in format_comparison(runs, {name: {} for name in runs}), "passed before the first evaluation"


def test_runs_are_compared_by_what_they_share():
    """Bits per byte across tokenizers; the loss at 15 % masks, whatever each was trained with, across objectives."""
    event = {"tokens": 1000, "budget_seconds": 60.0}
    way = {**event, "budget_seconds": 30.0, "eval_loss": 6.0}  # as a run writes it: the other loss at its end alone
    runs = {
        "a": [way, {**event, "eval_loss": 3.0, "eval_mlm_loss": 4.0}],
        "b": [way, {**event, "eval_loss": 5.0, "eval_mlm_loss": 2.0}],
    }
    different = {name: {"objective": name} for name in runs}
    table = format_comparison(runs, different)
    assert "at 15 % masks" in table and "do not compare" not in table and table.splitlines()[2].startswith("b")
    assert "match" not in table.splitlines()[0] and "no time to match" in table, "there is one point"
    assert not any(line.endswith(" x") for line in table.splitlines())
    same = {name: {"objective": "mlm", "masks_hash": "m"} for name in runs}
    table = format_comparison(runs, same)
    assert "at 15 % masks" not in table and table.splitlines()[2].startswith("a"), "one loss has a curve"
    assert table.splitlines()[3].endswith(f"{60 / (30 + 30 / 3):.2f} x")
    assert "at 15 % masks" in format_comparison(runs, {name: {**same[name], "masks_hash": name} for name in runs})
    assert "at 15 % masks" in format_comparison(runs, {name: {"objective": "mlm"} for name in runs}), "not known"
    assert "different tokenizers" in format_comparison(runs, {name: {"tokenizer_hash": name} for name in runs})
    del runs["a"][-1]["eval_mlm_loss"]
    table = format_comparison(runs, different)
    assert "different objectives" in table and table.splitlines()[2].startswith("a")
    bits = {name: [{**event, "eval_loss": 3.0, "eval_bits_per_byte": 1.0}] for name in runs}
    assert "do not compare" not in format_comparison(bits, {name: {"tokenizer_hash": name} for name in runs})


def test_names_are_short_where_they_can_be():
    assert name_runs(["a/x", "b/y"]) == {"x": "a/x", "y": "b/y"}
    assert name_runs(["a/x", "b/x"]) == {"a/x": "a/x", "b/x": "b/x"}


@pytest.mark.parametrize("bits", [False, True])
def test_the_program(run_script, tmp_path, bits):
    for name, losses in (("one", [5.0, 4.0]), ("two", [4.0, 3.0])):
        write_run(tmp_path / name, losses, bits=bits)
    picture = tmp_path / "pictures" / "both.png"
    argv = [tmp_path / "one", tmp_path / "two", "--picture", picture]
    code, shown, stderr = run_script("compare_runs", *argv)
    assert code == 0, stderr
    named = ["--run_dirs", f"{tmp_path / 'one'},{tmp_path / 'two'}", "--picture", picture]
    assert run_script("compare_runs", *named)[:2] == (0, shown)
    assert ("bits / byte" in shown) == bits and max(map(len, shown.splitlines()[:6])) <= 80
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert run_script("compare_runs", "--run_dirs", tmp_path / "one")[2].count("fewer than two runs") == 1
    (tmp_path / "none").mkdir()
    code, _, stderr = run_script("compare_runs", "--run_dirs", f"{tmp_path / 'one'},{tmp_path / 'none'}")
    assert code == 1 and "has no held-out evaluation" in stderr


@pytest.mark.parametrize("name", ["bert", "qwen3"])
def test_a_model_answers(run_script, make_model, tokenizers, tmp_path, name):
    tokenizer = tokenizers["encoder" if name == "bert" else "decoder"]
    make_model(name).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text = "ka [MASK] mi" if name == "bert" else "ka lo"
    argv = [tmp_path / "model", "--text", text, "--max_new_tokens", 5]
    code, shown, stderr = run_script("try_model", *argv)
    assert code == 0, stderr
    assert ("-> " in shown) if name == "bert" else shown.startswith("ka lo")
    argv[2] = text + " ka" * 70  # longer than the model reads
    code, shown, stderr = run_script("try_model", *argv)
    assert code == 0 and (name != "bert" or shown == "  more than the 64 tokens that the model reads: put in less\n")
    code, _, stderr = run_script("try_model", "--run_dir", tmp_path / "nowhere", "--text", text)
    assert code == 1 and "cannot be loaded" in stderr
