"""Tasks without training: rows in every layout, and the same answers as the LM Evaluation Harness."""

from __future__ import annotations

import gzip
import json
import lzma

import pytest
from scoring_parts import PAIRS

from oneday.errors import SettingError
from oneday.scoring import Scorer
from oneday.zero_shot import Question, list_local_tasks, load_task
from oneday.zero_shot_results import credit, evaluate_task

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
