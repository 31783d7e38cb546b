"""Zero-shot scores against plain forward passes, and rows in every layout."""

from __future__ import annotations

import copy
import dataclasses
import gzip
import json
import lzma
import math
from pathlib import Path
from statistics import stdev

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import UNPACKED
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from oneday.arguments import SettingError
from oneday.scoring import CPU_TOKENS, Score, Scorer, find_trained_length, load_scorer
from oneday.tokenization import train_tokenizer
from oneday.zero_shot import Question, list_local_tasks, load_task
from oneday.zero_shot_results import (
    EvaluateArguments,
    credit,
    evaluate_task,
    format_zero_shot,
    read_texts,
    run_evaluation,
)

PAIRS = [
    ("", "ka lo mi"),
    ("ka lo", " mi ter un"),
    ("ka lo ", "mi"),
    ("ves pra do sil en ka lo mi ter", " un"),
    ("", "ves pra do sil en ka lo mi ter un ves pra do"),
]


@pytest.fixture(scope="module")
def anyone():
    """A model whose weights are far from their first values, so that scores differ."""

    def spread(model):
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.15)
        return model.eval()

    return spread


def plain_score(model, tokenizer, kind, context, continuation):
    """(nats, tokens, greedy), one token at a time, each by a forward pass of its own."""
    model = model.double()
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    whole = encode(context.rstrip() + context[len(context.rstrip()) :] + continuation)
    start = len(encode(context.rstrip()))
    nats, greedy = 0.0, True
    if kind == "decoder":
        ids = [tokenizer.bos_token_id, *whole]
        for place in range(1 + start, len(ids)):
            logits = model(torch.tensor([ids[:place]])).logits[0, -1]
            nats -= logits.log_softmax(-1)[ids[place]].item()
            greedy &= logits.argmax().item() == ids[place]
        return nats, len(whole) - start, greedy
    ids = [tokenizer.cls_token_id, *whole, tokenizer.sep_token_id]
    for place in range(1 + start, len(ids) - 1):
        hidden = [*ids[:place], tokenizer.mask_token_id, *ids[place + 1 :]]
        logits = model(torch.tensor([hidden])).logits[0, place]
        nats -= logits.log_softmax(-1)[ids[place]].item()
        greedy &= logits.argmax().item() == ids[place]
    return nats, len(whole) - start, greedy


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "nanochat", "bert", "roberta", "modernbert"])
def test_scores_are_those_of_plain_passes(make_model, tokenizers, anyone, name):
    kind = "encoder" if name in ("bert", "roberta", "modernbert") else "decoder"
    model, tokenizer = anyone(make_model(name)), tokenizers[kind]
    for batch_tokens in (16, 4096):
        scores = Scorer(model.float(), tokenizer, batch_tokens).score(PAIRS)
        with torch.no_grad():
            expected = [plain_score(model, tokenizer, kind, *pair) for pair in PAIRS]
        for score, (nats, num_tokens, greedy) in zip(scores, expected):
            assert score.nats == pytest.approx(nats, rel=1e-5)
            assert (score.num_tokens, score.is_greedy) == (num_tokens, greedy)


def test_too_long_a_context_loses_its_beginning(make_model, tokenizers, anyone):
    scorer = Scorer(anyone(make_model("gpt2")), tokenizers["decoder"])
    (sequence,) = scorer.encode([(" ".join(["ka"] * 300), " mi lo")])
    assert len(sequence.ids) == 65, "the last token is not fed"
    assert sequence.places.stop == 65 and len(sequence.places) == len(tokenizers["decoder"].tokenize(" mi lo"))
    assert math.isfinite(scorer.score_sequences([sequence])[0].nats)


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


LAYOUTS = {
    "pairs": (
        {"sentence_good": "a b", "sentence_bad": "b a", "UID": "order"},
        Question((("", " a b"), ("", " b a")), 0, "order"),
    ),
    "queries": (
        {"query": "Question: Why?\n", "choices": ["x", "y"], "gold": 1},
        Question((("Question: Why?\nAnswer:", " x"), ("Question: Why?\nAnswer:", " y")), 1),
    ),
    "endings": ({"query": "He went", "choices": ["home"], "gold": 0}, Question((("He went", " home"),), 0)),
    "arc": (
        {"question": "Why?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
        Question((("Question: Why?\nAnswer:", " x"), ("Question: Why?\nAnswer:", " y")), 1),
    ),
    "openbook": (
        {"question_stem": "Fog is", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"},
        Question((("Fog is", " x"), ("Fog is", " y")), 0),
    ),
    "piqa": (
        {"goal": "Cut", "sol1": "x", "sol2": "y", "label": 1},
        Question((("Question: Cut\nAnswer:", " x"), ("Question: Cut\nAnswer:", " y")), 1),
    ),
    "hellaswag": (
        {"ctx": "A man", "endings": ["sat", "ran"], "label": "1"},
        Question((("A man", " sat"), ("A man", " ran")), 1),
    ),
    "siqa": (
        {"context": "C.", "question": "Q?", "answerA": "x", "answerB": "y", "answerC": "z", "label": "3"},
        Question((("Q: C. Q?\nA:", " x"), ("Q: C. Q?\nA:", " y"), ("Q: C. Q?\nA:", " z")), 2),
    ),
    "winogrande": (
        {"context_options": ["so Sarah", "so Maria"], "continuation": "won.", "gold": 1},
        Question((("so Sarah", " won."), ("so Maria", " won.")), 1),
    ),
    "blank": (
        {"sentence": "so _ won.", "option1": "Sarah", "option2": "Maria", "answer": "2"},
        Question((("so Sarah", " won."), ("so Maria", " won.")), 1),
    ),
    "lambada": (
        {"context": "don't care about", "continuation": "signs"},
        Question((("don't care about", " signs"),), 0),
    ),
    "last": ({"text": "don't care about signs"}, Question((("don't care about", " signs"),), 0)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_read(tmp_path, name):
    row, expected = LAYOUTS[name]
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n\n")
    assert load_task(name, str(tmp_path)) == [expected]


def test_files_are_found_in_either_form(tmp_path):
    row = json.dumps({"query": "Q", "choices": ["x", "y"], "gold": 0}) + "\n"
    (tmp_path / "mine").mkdir()
    with lzma.open(tmp_path / "mine" / "mine.jsonl.xz", "wt") as handle:
        handle.write(row * 10)
    (tmp_path / "mine" / "mine_validation.jsonl").write_text(row)
    (tmp_path / "yours.jsonl").write_text(row)
    (tmp_path / "blimp").mkdir()
    for number, name in enumerate(("adjunct_island", "wh_island"), start=1):
        (tmp_path / "blimp" / f"{name}.jsonl").write_text(row * number)
    assert {name: [path.name for path in paths] for name, paths in list_local_tasks(tmp_path).items()} == {
        "mine": ["mine.jsonl.xz"], "yours": ["yours.jsonl"], "blimp": ["adjunct_island.jsonl", "wh_island.jsonl"],
    }  # fmt: skip
    assert len(load_task("mine", str(tmp_path))) == 10 and len(load_task("mine", str(tmp_path), 4)) == 4
    assert len(load_task("blimp", str(tmp_path))) == 3
    with gzip.open(tmp_path / "blimp" / "wh_island.jsonl.gz", "wt") as handle:
        handle.write(row * 2)
    assert len(load_task("blimp", str(tmp_path))) == 3, "the same file in two compressions"
    (tmp_path / "blimp" / "blimp_train.jsonl").write_text(row)
    with pytest.raises(SettingError, match="several files in .*blimp, blimp_train.jsonl among them.*blimp.jsonl"):
        load_task("blimp", str(tmp_path))


@pytest.mark.parametrize(
    ("query", "prompt"),
    [
        ("Question: Why?\n", "Question: Why?\nAnswer:"),
        ("Passage: It is so.\nQuestion: is it so?\n", "Passage: It is so.\nQuestion: is it so?\nAnswer:"),
        ("Question: Who?\nChoices:\nA. one\nB. two\nAnswer:", "Question: Who?\nChoices:\nA. one\nB. two\nAnswer:"),
        ("The weather is ", "The weather is"),
    ],
)
def test_a_query_is_asked_once(tmp_path, query, prompt):
    (tmp_path / "mine.jsonl").write_text(json.dumps({"query": query, "choices": ["x", "y"], "gold": 1}))
    assert load_task("mine", str(tmp_path)) == [Question(((prompt, " x"), (prompt, " y")), 1)]


BAD = [
    ("mime", "", "has 'mime'.*the nearest is mine"),
    ("mine", "{", "cannot be read"),
    ("mine", "\n", "has no rows"),
    ("mine", "[1]\n", "Row 1 of task mine is no JSON object"),
    ("mine", '{"query": "Q", "choices": ["x", " "], "gold": 0}\n', "has an empty text"),
    ("mine", '{"a": 1}\n', "Row 1 of task mine has the columns a, which are no layout"),
    ("mine", '{"text": "I loved this film", "label": 1}\n', "has the columns label, text, which are no layout"),
    ("mine", '{"query": "Q", "choices": ["x"], "gold": 3}\n', "has the answer 3 of 1 choices"),
    ("mine", '{"query": "Q", "choices": ["x"], "gold": "A"}\n', "Row 1 of task mine cannot be read"),
    ("mine", '{"query": "Q", "choices": ["x", null], "gold": 0}\n', "None is no text"),
    ("mine", '{"query": "Q", "choices": "abc", "gold": 0}\n', "its choices are one text"),
    ("mine", '{"query": "Q", "choices": ["x", "y"], "gold": 0.9}\n', "0.9 is no whole number"),
    ("mine", '{"sentence_good": "a", "sentence_bad": null}\n', "None is no text"),
]


@pytest.mark.parametrize(("name", "content", "words"), BAD)
def test_bad_tasks_are_refused(tmp_path, name, content, words):
    (tmp_path / "mine.jsonl").write_text(content)
    with pytest.raises(SettingError, match=words):
        load_task(name, str(tmp_path))


def test_half_of_a_surrogate_pair_is_no_text(tmp_path):
    pair, half = json.dumps("\U0001f600"), '"\\ud83d"'
    (tmp_path / "mine.jsonl").write_text(f'{{"sentence_good": {pair}, "sentence_bad": {half}}}\n')
    (question,) = load_task("mine", str(tmp_path))
    assert question.pairs == (("", " \U0001f600"), ("", " \ufffd"))


def test_a_bad_row_is_named_by_its_place_in_the_file(tmp_path):
    rows = [{"text": f"number {index} ends"} for index in range(100)]
    rows[60] = {"a": 1}
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SettingError, match="Row 61 of task mine"):
        load_task("mine", str(tmp_path), 10)


class Fixed:
    """A scorer that gives the scores it was given."""

    def __init__(self, scores):
        self.scores = scores

    def score(self, pairs):
        assert len(pairs) == len(self.scores)
        return self.scores


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


def test_lm_evaluation_harness_gives_the_same(make_model, tokenizers, anyone):
    models = pytest.importorskip("lm_eval.models.huggingface")
    api = pytest.importorskip("lm_eval.api.instance")
    model, tokenizer = anyone(make_model("gpt2")), tokenizers["decoder"]
    pairs = [*PAIRS, ("", " ka lo mi"), (" ".join(["ka"] * 300), " mi lo")]
    harness = models.HFLM(pretrained=model, tokenizer=tokenizer, add_bos_token=True, batch_size=2, device="cpu")
    requests = [api.Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs]
    # One by one: asked together, the harness (0.4.13) takes two of them for one group of the same context.
    expected = [harness.loglikelihood([request])[0] for request in requests]
    scores = Scorer(model, tokenizer).score(pairs)
    for score, (log_probability, is_greedy) in zip(scores, expected):
        assert -score.nats == pytest.approx(log_probability, abs=1e-3)
        assert score.is_greedy == is_greedy


HARNESS_TASKS = {
    "pairs": {
        "doc_to_text": "",
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    },
    "endings": {
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
}


@pytest.mark.parametrize("name", HARNESS_TASKS)
def test_lm_evaluation_harness_chooses_the_same(make_model, tokenizers, anyone, texts, tmp_path, name):
    """The whole harness on the same local file: each example's log-likelihoods and choice, and the accuracies."""
    evaluator = pytest.importorskip("lm_eval.evaluator")
    models = pytest.importorskip("lm_eval.models.huggingface")
    rows = [
        {"sentence_good": " ".join(good.split()[:9]), "sentence_bad": " ".join(bad.split()[:9]), "UID": "u"}
        if name == "pairs"
        else {"query": good[:60].rstrip(), "choices": [bad[:20].strip(), good[60:75].strip() or "ka"], "gold": i % 2}
        for i, (good, bad) in enumerate(zip(texts[:24], texts[24:48]))
    ]
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, tokenizer = anyone(make_model("llama")), tokenizers["decoder"]
    harness = models.HFLM(pretrained=model, tokenizer=tokenizer, add_bos_token=True, batch_size=4, device="cpu")
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(path)}},
            "validation_split": "validation", "output_type": "multiple_choice", "num_fewshot": 0}  # fmt: skip
    found = evaluator.simple_evaluate(
        model=harness, tasks=[task | HARNESS_TASKS[name]], log_samples=True, bootstrap_iters=0
    )
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    questions, scorer = load_task(name, str(tmp_path)), Scorer(model, tokenizer)
    assert len(samples) == len(questions) == 24
    hits = []
    for question, sample in zip(questions, samples):
        scores = scorer.score(question.pairs)
        theirs = [float(answer[0]) for answer in sample["filtered_resps"]]
        assert [-score.nats for score in scores] == pytest.approx(theirs, abs=1e-3)
        hits.append(credit(question, scores))
        assert hits[-1] == sample["acc"]
        if name == "endings":
            assert credit(question, scores, question.lengths) == sample["acc_norm"]
    assert 0 < sum(hits) < 24, "choices of both kinds"
    ours, theirs = evaluate_task(scorer, questions), found["results"][name]
    assert ours["accuracy"] == pytest.approx(theirs["acc,none"])
    assert ours.get("accuracy_norm") == pytest.approx(theirs.get("acc_norm,none"))


def test_scores_in_batches_are_those_of_single_rows(make_model, tokenizers, anyone, texts):
    """Pairs of many lengths, more than a pass of a CPU takes: each as the model alone gives it, to 1e-5."""
    model, tokenizer = anyone(make_model("qwen3")), tokenizers["decoder"]
    pairs = [("", " " + " ".join(text.split()[: 2 + i % 23])) for i, text in enumerate(texts)]
    scorer = Scorer(model, tokenizer)
    sequences = scorer.encode(pairs)
    assert sum(len(sequence.ids) for sequence in sequences) > 2 * CPU_TOKENS
    for sequence, score in zip(sequences, scorer.score_sequences(sequences)):
        with torch.no_grad():
            logits = model(torch.tensor([sequence.ids])).logits[0, :-1].log_softmax(-1)
        targets = torch.tensor(sequence.ids[1:])
        assert score.nats == pytest.approx(-logits.gather(1, targets[:, None]).sum().item(), rel=1e-5)
        assert score.is_greedy == bool((logits.argmax(-1) == targets).all())


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
    results = run_evaluation(scorer, args, facts | {"architecture_hash": "of another tokenizer"}, {}, path)
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


def test_a_model_without_a_word_head_is_refused(run_script, make_model, tokenizers, tmp_path):
    folder = tmp_path / "model"
    make_model("bert").bert.save_pretrained(folder)
    tokenizers["encoder"].save_pretrained(folder)
    (tmp_path / "words.jsonl").write_text(json.dumps({"text": "ka lo"}) + "\n")
    argv = ["--model_name_or_path", folder, "--task_data_dir", tmp_path, "--task_names", "words"]
    code, _, stderr = run_script("evaluate", *argv)
    assert code == 1 and f"model_name_or_path {folder} has no trained word head" in stderr
    code, _, stderr = run_script("try_model", folder, "--text", "ka [MASK]")
    assert code == 1 and f"error: run_dir {folder} has no trained word head" in stderr, "by its own setting"


def test_a_model_without_its_own_tokenizer_is_refused(run_script, make_model, tokenizers, tmp_path):
    """transformers makes one of special tokens alone, to which every text is unknown."""
    folder = tmp_path / "model"
    make_model("bert").save_pretrained(folder)
    (tmp_path / "words.jsonl").write_text(json.dumps({"text": "ka lo"}) + "\n")
    argv = ["--model_name_or_path", folder, "--task_data_dir", tmp_path, "--task_names", "words"]
    code, _, stderr = run_script("evaluate", *argv)
    assert code == 1 and "has no tokenizer" in stderr
    tokenizer = copy.deepcopy(tokenizers["encoder"])
    tokenizer.add_tokens([f"new{number}" for number in range(200)])
    tokenizer.save_pretrained(folder)
    code, _, stderr = run_script("evaluate", *argv)
    assert code == 1 and "ids and the model" in stderr


def test_models_that_read_in_no_order_and_broken_ones_are_refused(run_script, make_model, tokenizers, tmp_path):
    folder = tmp_path / "model"
    config = AutoConfig.for_model("xlnet", vocab_size=320, **UNPACKED["xlnet"])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizers["encoder"].save_pretrained(folder)
    (tmp_path / "words.jsonl").write_text(json.dumps({"text": "ka lo"}) + "\n")
    argv = ["--model_name_or_path", folder, "--task_data_dir", tmp_path, "--task_names", "words"]
    assert "reads in no fixed order" in run_script("evaluate", *argv)[2]
    assert f"error: run_dir {folder} is a xlnet model" in run_script("try_model", folder, "--text", "ka")[2]
    make_model("bert").save_pretrained(folder)
    model = make_model("bert")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    model.save_pretrained(folder)
    code, _, stderr = run_script("evaluate", *argv)
    assert code == 1 and "not finite" in stderr and "Traceback" not in stderr
    (folder / "model.safetensors").write_bytes(b"broken")
    code, _, stderr = run_script("evaluate", *argv)
    assert code == 1 and "cannot be loaded" in stderr and "Traceback" not in stderr


def test_a_text_is_cut_at_the_length_that_was_trained(make_model, tokenizers, texts):
    scorer = Scorer(make_model("gpt2"), tokenizers["decoder"], text_length=20)
    seen = []
    scorer.score_sequences = lambda pieces: seen.extend(pieces) or []
    scorer.score_texts(texts[:3])
    assert max(len(piece.ids) for piece in seen) == 20


def test_a_context_is_cut_at_the_length_that_was_trained(make_model, tokenizers):
    """Positions beyond it, of a model that has some, hold what they were initialised with."""
    model, context = make_model("gpt2"), "ka lo mi " * 8
    short, long = Scorer(model, tokenizers["decoder"], text_length=12), Scorer(model, tokenizers["decoder"])
    (cut,), (whole,) = (scorer.encode([(context, " ka lo")]) for scorer in (short, long))
    assert len(cut.ids) == 13 and len(whole.ids) > 13, "the last token is not fed"
    assert cut.ids == whole.ids[-13:] and len(cut.places) == len(whole.places)


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError

    monkeypatch.setattr("oneday.hub.hf_hub_download", refuse)


def test_the_length_that_was_trained_is_found(tmp_path, monkeypatch, no_hub):
    """Of a finished run, of a checkpoint in one, whether finished or not, and of a pushed one."""
    run, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    assert find_trained_length(str(run)) is None
    (run / "recipe.yaml").write_text("max_seq_length: 48\n")
    assert find_trained_length(str(run)) == 48
    assert find_trained_length(str(checkpoint)) is None, "no checkpoint of this project"
    (checkpoint / "oneday_state.json").write_text("{}")
    monkeypatch.chdir(checkpoint)
    assert find_trained_length(str(checkpoint)) == find_trained_length(".") == 48
    (run / "results.json").write_text(json.dumps({"max_seq_length": 32}))
    assert find_trained_length(str(checkpoint)) == find_trained_length(str(run)) == 32
    assert find_trained_length("ann/tiny") is None, "there is no network"
    monkeypatch.setattr("oneday.hub.hf_hub_download", lambda repo, name: str(run / name))
    assert find_trained_length("ann/tiny") == 32
    for strange in ([1], {"max_seq_length": "long"}, {"max_seq_length": None}):
        (run / "results.json").write_text(json.dumps(strange))
        assert find_trained_length("ann/tiny") is None, "another project's file"


def test_a_checkpoint_is_scored_as_its_run(make_model, tokenizers, tmp_path, caplog):
    folder = tmp_path / "run" / "checkpoint-4"
    make_model("gpt2").save_pretrained(folder)
    tokenizers["decoder"].save_pretrained(folder)
    caplog.set_level("INFO", "oneday.scoring")
    load = lambda: load_scorer(str(folder), 512, torch.device("cpu")).text_length  # noqa: E731
    assert load() == 64
    assert "checkpoint-4 was trained on is not known: texts of up to 64 tokens" in caplog.text
    caplog.clear()
    (folder / "oneday_state.json").write_text("{}")
    (folder.parent / "recipe.yaml").write_text("max_seq_length: 32\n")
    assert (load(), caplog.text) == (32, "")


def test_nothing_to_evaluate_is_refused():
    with pytest.raises(SettingError, match="Nothing is to be evaluated"):
        EvaluateArguments()
    assert Path(EvaluateArguments(task_names=["blimp"]).model_name_or_path).name == "quickstart-gpt"
