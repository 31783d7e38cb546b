"""A task from a file of the user's own: kinds of files and labels, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import permutations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from classifiers import make_args, make_texts
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from oneday.errors import SettingError
from oneday.finetuning import run_protocol
from oneday.glue_protocol import FinetuneArguments
from oneday.own_task import load_own_task, sort_label

CLASSES = (AutoModelForSequenceClassification, AutoTokenizer)
CSV = 'id,body,kind\n1,"one, ""two""",spam\n2,"a\nb",ham\n3,NA,ham\n4,,eggs\n'


def load(tmp_path, content, **settings):
    path = tmp_path / settings.pop("file", "mail.csv")
    path.write_text(content)
    return load_own_task(FinetuneArguments(task_file=str(path), **settings))


def test_words_become_classes_in_order_and_texts_stay_as_they_are(tmp_path, caplog):
    (tmp_path / "v.csv").write_text("kind,body\nspam,x\n")
    caplog.set_level("INFO")
    validation = str(tmp_path / "v.csv")
    task, data = load(tmp_path, CSV, text_columns=["body"], label_column="kind", validation_file=validation)
    assert (task.name, task.label_names, task.num_labels) == ("mail", ("eggs", "ham", "spam"), 3)
    assert data["train"]["text1"][:] == ['one, "two"', "a\nb", "NA", ""]
    assert data["train"]["label"][:] == [2, 1, 1, 0] and data["validation"]["label"][:] == [2]
    assert "{0: 'eggs', 1: 'ham', 2: 'spam'}" in caplog.text


def test_numbers_that_leave_gaps_become_classes_too(tmp_path):
    lines = "".join(f'{{"a": "x", "b": "y", "label": {label}}}\n' for label in (10, 2, -1, 10) * 5)
    task, data = load(tmp_path, lines, file="t.jsonl", text_columns=["a", "b"])
    assert task.label_names == ("-1", "2", "10") and task.columns == ("text1", "text2")
    assert (len(data["train"]), len(data["validation"])) == (18, 2)
    again = load(tmp_path, lines, file="t.jsonl", text_columns=["a", "b"])[1]
    assert again["validation"]["label"][:] == data["validation"]["label"][:]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_names_and_labels_of_a_table_are_not_interpreted(tmp_path, kind):
    """Columns may be called as something is here, or not at all; 007 is not 7."""
    rows = ["row,kind,label,idx,,", "x,007,a,9,,", "y,7,b,9,,", "z,8,c,9,,"]
    content = "\n".join(rows).replace(",", "," if kind == "csv" else "\t")
    settings = {"text_columns": ["label", "row"], "label_column": "kind"}
    (tmp_path / f"v.{kind}").write_text(content)
    task, data = load(tmp_path, content, file=f"t.{kind}", **settings, validation_file=str(tmp_path / f"v.{kind}"))
    assert task.label_names == ("007", "7", "8")
    assert data["train"]["text1"][:] == ["a", "b", "c"] and data["train"]["text2"][:] == ["x", "y", "z"]
    assert data["train"]["row"][:] == [0, 1, 2]
    assert data["train"]["label"][:] == [0, 1, 2]


def test_truth_values_are_one_class_in_every_kind_of_file(tmp_path):
    (tmp_path / "v.jsonl").write_text('{"text": "x", "label": true}\n')
    content, validation = "text,label\nx,True\ny,False\n", str(tmp_path / "v.jsonl")
    task, data = load(tmp_path, content, metric="f1", positive_label="true", validation_file=validation)
    assert task.label_names == ("False", "True") and data["validation"]["label"][:] == [1]
    task, _ = load(tmp_path, content.replace("True", "1.0").replace("False", "0.0"), metric="f1", positive_label="0.0")
    assert task.label_names == ("1", "0")


def test_a_correlation_makes_it_a_regression(tmp_path):
    task, data = load(tmp_path, "text\tlabel\nx\t0.5\ny\t3\nz\t2\n", file="t.tsv", metric="pearson")
    assert task.num_labels == 1
    assert sorted(data["train"]["label"][:] + data["validation"]["label"][:]) == [0.5, 2.0, 3.0]


@pytest.mark.parametrize(
    ("content", "settings", "words"),
    [
        (CSV, {"label_column": "kind"}, "has no column 'text'; it has id, body, kind"),
        (CSV, {"text_columns": ["body"], "label_column": "kind", "metric": "f1"}, "there are 3; take f1_macro"),
        (CSV, {"text_columns": ["body"], "label_column": "kind", "metric": "pearson"}, "must be one of: numbers"),
        (CSV, {"text_columns": ["body"], "label_column": "kind", "metric": "bleu"}, "metric is 'bleu'"),
        (CSV, {"text_columns": ["body", "id", "kind"]}, "text_columns names 3 columns"),
        (CSV, {"file": "t.xls"}, "t.xls is of an unknown kind"),
        ("text,label\nx,1\ny,1\nz,1\n", {}, "has 1 distinct labels"),
        ("text,label\nx,1\ny,\nz,0\n", {}, "has no label in row 2 (the first is 1)"),
        ("text,label,text\nx,1,y\n", {}, "has two columns 'text'"),
        ("text,label\nx,1\n", {}, "has 1 rows"),
        ("text,label\nx,1\n", {"validation_file": "none.csv"}, "has 1 rows"),
        ("text,label\nx,1\ny,0\n", {"validation_file": "none.csv"}, "There is no task file none.csv"),
        ("text,label\nx,1,2\n", {}, "cannot be read"),
    ],
)  # fmt: skip
def test_what_does_not_fit_gets_one_sentence(tmp_path, content, settings, words):
    with pytest.raises(SettingError) as caught:
        load(tmp_path, content, **settings)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_classes_are_told_apart_by_their_exact_names(tmp_path):
    """A number that is no class is not taken for the number of one; case counts; 2.0 is 2."""
    (tmp_path / "v.csv").write_text("text,label\nx,2.0\n")
    content = "text,label\nx,1\ny,2\nz,5\n"
    _, data = load(tmp_path, content, validation_file=str(tmp_path / "v.csv"))
    assert data["train"]["label"][:] == [0, 1, 2] and data["validation"]["label"][:] == [1]
    (tmp_path / "v.csv").write_text("text,label\nx,0\n")
    with pytest.raises(SettingError, match="'0'; it must be one of: 1, 2, 5"):
        load(tmp_path, content, validation_file=str(tmp_path / "v.csv"))
    (tmp_path / "v.csv").write_text("text,label\nx,a\ny,A\n")
    _, data = load(tmp_path, "text,label\nx,A\ny,a\n", validation_file=str(tmp_path / "v.csv"))
    assert data["train"]["label"][:] == [0, 1] and data["validation"]["label"][:] == [1, 0]


def test_a_class_of_a_single_row_is_one_wherever_the_row_falls(tmp_path):
    for place in range(10):
        labels = ["rare" if row == place else "ab"[row % 2] for row in range(10)]
        task, _ = load(tmp_path, "text,label\n" + "".join(f"x,{label}\n" for label in labels))
        assert task.label_names == ("a", "b", "rare")


def test_f1_is_of_the_class_that_is_named(tmp_path, caplog):
    caplog.set_level("INFO")
    content = "text,label\n" + "x,fraud\ny,legit\n" * 4
    assert load(tmp_path, content, metric="f1")[0].label_names == ("fraud", "legit")
    assert "f1 is that of 'legit'" in caplog.text
    task, _ = load(tmp_path, content, metric="f1", positive_label="fraud", task_name="fraud")
    assert (task.name, task.label_names) == ("fraud", ("legit", "fraud"))
    for settings in ({"metric": "f1", "positive_label": "scam"}, {"positive_label": "fraud"}):
        with pytest.raises(SettingError, match="must be one of fraud, legit, and metric f1"):
            load(tmp_path, content, **settings)
    with pytest.raises(SettingError, match="no slash"):
        load(tmp_path, content, task_name="a/b")


def test_a_validation_label_that_training_never_saw(tmp_path):
    (tmp_path / "v.csv").write_text("text,label\nx,maybe\ny,yes\n")
    with pytest.raises(SettingError, match="'maybe'; it must be one of: no, yes"):
        load(tmp_path, "text,label\nx,yes\ny,no\n", validation_file=str(tmp_path / "v.csv"))


def test_labels_of_any_unit_are_learnt_alike_and_answered_in_it(bert, tmp_path):
    """Years are learnt as what they were made of; a saved model says how its answers are read."""
    rows, answers, results = make_texts(120), [], []
    for name, unit, start in (("plain", 1.0, 0.0), ("years", 40.0, 1950.0)):
        lines = [f"{row['sentence']},{start + unit * row['label']}\n" for row in rows]
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(lines))
        settings = {"task_file": str(tmp_path / f"{name}.csv"), "metric": "pearson", "bf16": False}
        args = make_args(bert, tmp_path, tmp_path / name, save_models=True, **settings)
        results.append(run_protocol(args)["tasks"][name])
        (run,) = (tmp_path / name / "out" / "runs").iterdir()
        answers.append(pq.read_table(run / "validation.parquet").to_pydict())
    assert results[1]["median"] == pytest.approx(results[0]["median"], abs=1e-5) and results[0]["median"] > 0.9
    assert np.allclose(answers[1]["prediction"], 1950 + 40 * np.array(answers[0]["prediction"]), atol=1e-2)
    assert {*answers[1]["label"]} == {1950.0, 1990.0}
    model, tokenizer = (kind.from_pretrained(run / "model") for kind in CLASSES)
    texts = [rows[row]["sentence"] for row in answers[1]["row"]]
    logits = model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0].detach()
    scale = model.config.label_mean, model.config.label_std
    assert tokenizer.model_max_length == 32, "the model's positions: truncation stops where the training's did"
    assert results[1]["label_scale"] == {"label_mean": scale[0], "label_std": scale[1]}
    assert np.allclose(logits * scale[1] + scale[0], answers[1]["prediction"], atol=1e-2)


def test_rows_that_are_cut_are_counted(bert, tmp_path, caplog):
    caplog.set_level("INFO")
    lines = "".join(f"{'good ' * (1 + 20 * (i % 2))},{i % 2}\n" for i in range(20))
    (tmp_path / "long.csv").write_text("text,label\n" + lines)
    args = {"task_file": str(tmp_path / "long.csv"), "max_seq_length": 12, "num_train_epochs": 1}
    run_protocol(make_args(bert, tmp_path, tmp_path, **args))
    said = re.findall(r"long (\w+): (\d+) of (\d+) rows fill or exceed 12 tokens and are cut there", caplog.text)
    assert {split for split, *_ in said} == {"train", "validation"} and sum(int(count) for _, count, _ in said) == 10


def test_large_numbers_stay_apart_and_an_adapter_has_its_scale_beside_it(bert, tmp_path):
    """Seconds since 1970, which float32 has in steps of 128."""
    rows = make_texts(60)
    lines = [f"{row['sentence']},{1_700_000_000 + 7 * number}\n" for number, row in enumerate(rows)]
    (tmp_path / "t.csv").write_text("text,label\n" + "".join(lines))
    settings = {"task_file": str(tmp_path / "t.csv"), "metric": "pearson", "num_train_epochs": 1, "bf16": False}
    task, data = load_own_task(make_args(bert, tmp_path, tmp_path, **settings))
    assert len({*data["train"]["label"]}) == 54 and task.label_std == pytest.approx(7 * 60 / 12**0.5, rel=0.1)
    run_protocol(make_args(bert, tmp_path, tmp_path, peft="lora", save_models=True, **settings))
    (run,) = (tmp_path / "out" / "runs").iterdir()
    assert json.loads((run / "model" / "label_scale.json").read_text()) == task.label_scale
    kept = pq.read_table(run / "validation.parquet").to_pydict()
    assert len({*kept["label"]}) == len({*kept["prediction"]}) == 6


def test_one_label_alone_has_no_unit(tmp_path):
    task, _ = load(tmp_path, "text,label\nx,5\ny,5\nz,5\n", metric="pearson")
    assert (task.label_mean, task.label_std) == (5.0, 1.0)


def test_texts_that_look_like_dates_stay_texts_and_bytes_are_refused(tmp_path):
    lines = "".join(f'{{"text": "2024-01-{day:02}", "label": "a"}}\n{{"text": "2024-02-{day:02}", "label": "b"}}\n'
                    for day in range(1, 11))  # fmt: skip
    _, data = load(tmp_path, lines, file="dates.jsonl")
    assert {*data["train"]["text1"], *data["validation"]["text1"]} >= {"2024-01-01", "2024-02-10"}
    path = tmp_path / "bytes.parquet"
    pq.write_table(pa.table({"text": [b"a", b"b"], "label": [0, 1]}), path)
    with pytest.raises(SettingError, match="holds bytes in the column 'text'"):
        load_own_task(FinetuneArguments(task_file=str(path)))


def test_a_task_of_ones_own_is_run_by_one_command_and_under_another_metric(bert, tmp_path):
    """Named as a task of GLUE, it is not taken for it; its rows are known by their place in the file."""
    rows = make_texts(200)
    (tmp_path / "rte.csv").write_text("text,label\n" + "".join(f"{r['sentence']},{r['label']}\n" for r in rows))
    settings = {"task_file": str(tmp_path / "rte.csv"), "max_train_examples": 150}
    args = make_args(bert, tmp_path, tmp_path, **settings)
    entry = run_protocol(args)["tasks"]["rte (own)"]
    assert entry["median"] > 0.9 and entry["subset"] and entry["official_num_train"] == 180
    (path,) = (tmp_path / "out" / "runs").glob("*/validation.parquet")
    kept = pq.read_table(path).to_pydict()
    assert [rows[row]["label"] for row in kept["row"]] == kept["label"] and len(set(kept["row"])) == 20
    results = run_protocol(dataclasses.replace(args, metric="f1"))
    assert results["tasks"]["rte (own)"]["metric"] == "f1" == results["tasks"]["rte (own)"]["own_task"]["metric"]
    (made,) = results["tasks"]["rte (own)"]["environments"]
    assert made["packages"]["torch"] == torch.__version__ and results["device"] == "cpu" == made["device_type"]


def test_a_task_of_ones_own_joins_the_others_of_its_settings(bert, data_dir, tmp_path):
    shared = {"num_train_epochs": 1, "max_train_examples": 16}
    run_protocol(make_args(bert, data_dir, tmp_path, **shared))
    (tmp_path / "mine.csv").write_text("text,label\n" + "good,1\nbad,0\n" * 20)
    own = run_protocol(make_args(bert, data_dir, tmp_path, task_file=str(tmp_path / "mine.csv"), **shared))
    assert list(own["tasks"]) == ["sst2", "mine"]
    (tmp_path / "mine.csv").write_text("text,mood,label\n" + "good,up,1\nbad,up,0\ngood,down,1\nbad,down,0\n" * 10)
    again = make_args(bert, data_dir, tmp_path, task_file=str(tmp_path / "mine.csv"), label_column="mood", **shared)
    with pytest.raises(SettingError, match="with label_column label are kept as mine, as those with mood would be"):
        run_protocol(again)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.csv").write_text("text,label\n" + "nice,1\nawful,0\n" * 20)
    other = make_args(bert, data_dir, tmp_path, task_file=str(tmp_path / "other" / "mine.csv"), **shared)
    with pytest.raises(SettingError, match="The scores of .*mine.csv are kept as mine.*set task_name"):
        run_protocol(other)
    assert list(run_protocol(dataclasses.replace(other, task_name="more"))["tasks"]) == ["sst2", "mine", "more"]


def test_labels_have_one_order_in_every_process():
    labels = ["2", "nan", "0", "10", "word"]
    assert all(sorted(order, key=sort_label) == ["0", "2", "10", "nan", "word"] for order in permutations(labels))


def test_a_correlation_is_of_two_rows_at_least(bert, tmp_path):
    path = tmp_path / "few.csv"
    path.write_text("text,label\n" + "".join(f"film {number},{number}\n" for number in range(12)))
    args = FinetuneArguments(model_name_or_path=bert, task_file=str(path), metric="pearson")
    assert len(load_own_task(args)[1]["validation"]) == 2
    with pytest.raises(SettingError, match="validation_file is .*, the task_file itself"):
        load_own_task(dataclasses.replace(args, validation_file=str(tmp_path / "." / "few.csv")))


@pytest.mark.parametrize("column", ["text", "label"])
def test_lists_are_no_texts_and_no_labels(tmp_path, column):
    rows = {"text": ["a", "b"], "label": [0, 1]} | {column: [["a"], ["a", "b"]]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    args = FinetuneArguments(model_name_or_path="any", task_file=str(tmp_path / "t.parquet"))
    with pytest.raises(SettingError, match=f"holds lists or objects in the column '{column}'; write one value a row"):
        load_own_task(args)
