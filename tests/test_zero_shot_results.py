"""Accuracies, perplexity and bits per byte: by hand, and by the program."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from statistics import stdev

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from scoring_parts import Fixed

from oneday.errors import SettingError
from oneday.scoring import Score, Scorer
from oneday.tokenizer_training import train_tokenizer
from oneday.zero_shot import Question
from oneday.zero_shot_results import EvaluateArguments, evaluate_task, format_zero_shot, read_texts, run_evaluation


def test_text_is_measured_in_nats_and_bits(make_model, tokenizers, texts, anyone):
    model, tokenizer = anyone(make_model("llama")), tokenizers["decoder"]
    long = [" ".join(texts[:4]), *texts[4:6]]
    measures = Scorer(model, tokenizer).score_texts(long)
    nats = tokens = 0
    with torch.no_grad():
        for text in long:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            for start in range(0, len(ids), 63):
                piece = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + 63]]])
                logits = model.double()(piece).logits[0, :-1]
                nats += torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="sum").item()
                tokens += piece.shape[1] - 1
    assert measures["num_tokens"] == tokens
    assert measures["loss"] == pytest.approx(nats / tokens, rel=1e-4)
    assert measures["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-3)
    num_bytes = sum(len(text.encode()) for text in long)
    assert measures["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-4)
    # Lower-cased words without accents are fewer bits than the text's bytes.
    lossy = train_tokenizer(texts, "wordpiece", 150, objective_kind="decoder")
    assert "bits_per_byte" not in Scorer(model, lossy).score_texts(long)


def test_accuracies_by_hand():
    questions = [Question((("Q", " ab"), ("Q", " abcdefgh")), gold) for gold in (0, 1, 1)]
    scores = [Score(2.0, 1, True), Score(4.0, 2, False)] * 3
    results = evaluate_task(Fixed(scores), questions)
    assert results["accuracy"] == pytest.approx(1 / 3) and results["chance"] == 0.5
    assert results["accuracy_norm"] == pytest.approx(2 / 3), "0.5 nats a character beat 1"
    assert results["standard_error"] == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 2))
    words = [Question((("Q", " ab"),), 0)] * 2
    results = evaluate_task(Fixed([Score(2.0, 2, True), Score(4.0, 1, False)]), words)
    assert results["accuracy"] == 0.5 and results["perplexity"] == pytest.approx(math.exp(3.0)), "of a word"
    pairs = [Question((("", "a"), ("", "b")), 0, group) for group in "xxy"]
    results = evaluate_task(Fixed([Score(n, 1, False) for n in (1, 2, 2, 1, 1, 2)]), pairs)
    assert results["groups"] == {"x": 0.5, "y": 1.0} and "accuracy_norm" not in results


def test_equal_choices_share_what_the_right_one_counts():
    """A minimal pair that the model cannot tell apart is worth a guess, not a hit."""
    pairs = [Question((("", "a"), ("", "b")), 0)] * 3
    results = evaluate_task(Fixed([Score(n, 1, False) for n in (1, 1, 1, 2, 2, 1)]), pairs)
    assert results["accuracy"] == 0.5
    assert results["standard_error"] == pytest.approx(stdev([0.5, 1.0, 0.0]) / math.sqrt(3))
    choices = [Question((("Q", " ab"), ("Q", " cd"), ("Q", " efgh")), gold) for gold in (0, 1, 2)]
    results = evaluate_task(Fixed([Score(n, 1, False) for n in (1.0, 1.0, 2.0)] * 3), choices)
    assert results["accuracy"] == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert results["accuracy_norm"] == pytest.approx(3 * 1 / 3 / 3), "all three are equal by their lengths"


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_program(run_script, make_model, tokenizers, anyone, texts, tmp_path, name):
    folder, tokenizer = tmp_path / "model", tokenizers["encoder" if name == "bert" else "decoder"]
    anyone(make_model(name)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [
        {"sentence_good": text, "sentence_bad": text[::-1], "UID": f"set{i % 2}"} for i, text in enumerate(texts[:8])
    ]
    (tmp_path / "order.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "words.jsonl").write_text(json.dumps({"text": texts[0]}) + "\n")
    (tmp_path / "text.txt").write_text(texts[1])
    argv = ["--model_name_or_path", folder, "--task_data_dir", tmp_path, "--task_names", "order,words"]
    code, shown, stderr = run_script("evaluate", *argv, "--text_name", tmp_path / "text.txt")
    assert code == 0, stderr
    results = json.loads((folder / "zero_shot_results.json").read_text())
    assert results["tasks"]["order"]["num_questions"] == 8 and set(results["tasks"]["order"]["groups"]) == {
        "set0",
        "set1",
    }
    assert ("bits_per_byte" in results["text"]) == (name == "llama")
    assert format_zero_shot(results) in shown
    assert max(map(len, shown.splitlines()[:-1])) <= 80
    (tmp_path / "more.jsonl").write_text(json.dumps({"text": texts[2]}) + "\n")
    assert run_script("evaluate", *argv[:-1], "more", "--max_examples", "5")[0] == 0
    later = json.loads((folder / "zero_shot_results.json").read_text())
    assert list(later["tasks"]) == ["order", "words", "more"] and later["text"] == results["text"]
    assert later["tasks"]["order"] == results["tasks"]["order"]
    assert [later["tasks"][task]["max_examples"] for task in ("order", "more")] == [None, 5]
    assert "bfloat16" not in shown and not later["tasks"]["words"]["bf16"]
    code, shown, stderr = run_script("evaluate", *argv[:-1], "words", "--bf16", "true")
    assert code == 0 and "in bfloat16: words\n" in shown, stderr
    rounded = json.loads((folder / "zero_shot_results.json").read_text())["tasks"]
    assert rounded["words"]["bf16"] and rounded["words"]["perplexity"] != later["tasks"]["words"]["perplexity"]
    assert rounded["order"] == later["tasks"]["order"]
    other = anyone(make_model(name))
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.01)
    other.save_pretrained(folder)
    assert run_script("evaluate", *argv[:-1], "more")[0] == 0
    assert list(json.loads((folder / "zero_shot_results.json").read_text())["tasks"]) == ["more"], "other weights"
    another = tmp_path / "another"
    another.mkdir()
    (another / "recipe.yaml").write_text("")  # of a run that goes on
    pq.write_table(pa.table({"text": ["", " "]}), tmp_path / "blank.parquet")
    for wrong, words in (
        (["--task_names", "ordre"], "the nearest is order"),
        (["--model_name_or_path", "nowhere"], "set output_dir"),
        (["--batch_tokens", "0"], "batch_tokens is 0"),
        (["--output_dir", another], "holds another model"),
        (["--text_name", tmp_path / "blank.parquet"], "holds no text"),
    ):
        code, _, stderr = run_script("evaluate", *argv, *wrong)
        assert code == 1 and words in stderr, stderr


def test_what_is_scored_is_kept_and_not_scored_again(tmp_path, monkeypatch, caplog):
    """Interrupted in the second task, the program finds the first in the file; other questions are scored anew."""
    caplog.set_level("INFO")
    for task in ("first", "second"):
        (tmp_path / f"{task}.jsonl").write_text('{"sentence_good": "a", "sentence_bad": "b"}\n')
    args = EvaluateArguments(task_names=["first", "second"], task_data_dir=str(tmp_path))
    path, facts = tmp_path / "out.json", {"weights_hash": "w", "architecture_hash": "a"}
    scorer = Fixed([Score(1.0, 1, False), Score(2.0, 1, False)])
    once, calls = scorer.score, []

    def stop_at_the_second(pairs):
        calls.append(pairs)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return once(pairs)

    scorer.score = stop_at_the_second
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(scorer, args, facts, {"commit": "old"}, path)
    assert list(json.loads(path.read_text())["tasks"]) == ["first"]
    results = run_evaluation(scorer, args, facts, {"commit": "new"}, path)["tasks"]
    assert len(calls) == 3 and "first: these questions have been scored" in caplog.text
    assert [results[task]["accuracy"] for task in ("first", "second")] == [1.0, 1.0]
    assert [results[task]["environment"]["commit"] for task in ("first", "second")] == ["old", "new"]
    args = dataclasses.replace(args, max_examples=1)
    assert run_evaluation(scorer, args, facts, {}, path)["tasks"]["first"]["max_examples"] == 1 and len(calls) == 3
    (tmp_path / "first.jsonl").write_text('{"sentence_good": "a", "sentence_bad": "c"}\n')
    run_evaluation(scorer, args, facts, {}, path)
    assert len(calls) == 4
    run_evaluation(scorer, args, facts | {"weights_hash": "other"}, {}, path)
    assert len(calls) == 6
    args = dataclasses.replace(args, task_names=["second"])
    older = json.loads(path.read_text())
    del older["architecture_hash"]
    path.write_text(json.dumps(older))
    results = run_evaluation(scorer, args, facts | {"weights_hash": "other"}, {}, path)
    assert len(calls) == 6 and set(results["tasks"]) == {"first", "second"}, "a file of an older version stays"
    results = run_evaluation(scorer, args, facts | {"weights_hash": "other", "architecture_hash": "x"}, {}, path)
    assert len(calls) == 7 and list(results["tasks"]) == ["second"], "what another tokenizer made does not stay beside"


@pytest.mark.parametrize("streaming", [False, True])
def test_text_of_the_hub_is_read(streaming, tmp_path, monkeypatch):
    """A folder stands for the Hub: the loader is the same, only asking for the newest commit needs the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONEDAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("oneday.hub_texts.find_revision", lambda name, is_needed=True: None)
    monkeypatch.setattr("oneday.corpus.is_local", lambda name: False)
    (tmp_path / "ann").mkdir()
    for split in ("train", "validation"):
        rows = [f"{split} {number}" for number in range(5)]
        pq.write_table(pa.table({"body": [" ", *rows]}), tmp_path / "ann" / f"{split}-0.parquet")
    args = EvaluateArguments(text_name="ann", text_column="body", streaming=streaming, max_examples=3)
    assert read_texts(args) == ("ann", ["validation 0", "validation 1", "validation 2"])
    args.dataset_split = "train"
    assert read_texts(args)[1] == ["train 0", "train 1", "train 2"]
    args.dataset_split = "test"
    with pytest.raises(SettingError, match="text_name 'ann' is no file here and could not be loaded .* dataset_split"):
        read_texts(args)


def test_text_has_the_forms_of_dataset_name(tmp_path, monkeypatch):
    """The built-in corpus, held-out part first of all; several names; what is called by them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONEDAY_CACHE", str(tmp_path / "cache"))
    docs = Dataset.from_dict({"text": ["to train on", "held out"], "split": ["train", "validation"]})
    monkeypatch.setattr("oneday.corpus.build_python_docs", lambda cache: docs)
    (tmp_path / "mine.txt").write_text("mine")
    args = EvaluateArguments(text_name="python-docs,./mine.txt")
    assert read_texts(args) == ("python-docs, mine.txt", ["held out", "mine"])
    assert read_texts(dataclasses.replace(args, max_examples=1))[1] == ["held out", "mine"], "one of each"
    args = EvaluateArguments(text_name="python-docs", dataset_split="test")
    with pytest.raises(SettingError, match="text_name 'python-docs' holds no text; look at it, and at dataset_split"):
        read_texts(args)
    with pytest.raises(SettingError, match="streaming is true and max_examples is empty"):
        EvaluateArguments(text_name="ann/texts", streaming=True)


def test_nothing_to_evaluate_is_refused():
    with pytest.raises(SettingError, match="Nothing is to be evaluated"):
        EvaluateArguments()
    assert Path(EvaluateArguments(task_names=["blimp"]).model_name_or_path).name == "quickstart-gpt"
