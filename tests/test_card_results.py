"""Scores on the card, as huggingface_hub reads them back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from oneday.card_results import zero_shot_section
from oneday.errors import SettingError
from oneday.model_card import card_metadata, glue_section, refresh_card, results_table, training_table, usage
from oneday.reporting import format_report
from oneday.run_directory import read_metrics

RESULTS = {"eval_loss": 4.125, "corpus": "python-docs", "objective": "mlm"}
GLUE = {
    "task": "sst2", "split": "validation", "metric": "accuracy", "median": 0.8125, "scores": [0.8, 0.8125, 0.82],
    "num_train": 67349, "num_validation": 872, "official_num_train": 67349, "official_num_validation": 872,
    "subset": False,
}  # fmt: skip
PART = GLUE | {"task": "rte", "num_train": 100, "official_num_train": 2490, "subset": True, "median": 0.5}
BLIMP = {"accuracy": 0.61, "standard_error": 0.02, "chance": 0.5, "num_questions": 200}


def test_every_score_is_on_the_card_and_a_part_is_called_one(tmp_path):
    (tmp_path / "glue").mkdir()
    average = {"average": 0.65625, "average_name": "average of sst2, rte"}
    letters = GLUE | {"task": "letters", "own_task": {"task_file": "/home/alice/letters.csv"}}
    glue = {"protocol": "cramming", "tasks": {"sst2": GLUE, "rte": PART, "letters": letters}} | average
    (tmp_path / "glue" / "glue_results.json").write_text(json.dumps(glue))
    hub = BLIMP | {"source": "hub"}
    arc = {name: hub | {"accuracy": value} for name, value in (("arc_easy", 0.3), ("arc_challenge", 0.2))}
    own = {"mine": BLIMP | {"source": "files"}, "half": BLIMP | {"bf16": True}, "piqa": BLIMP | {"source": "files"}}
    zero_shot = {"kind": "encoder", "tasks": {"blimp": hub | {"max_examples": 200}} | own | arc}
    (tmp_path / "zero_shot_results.json").write_text(json.dumps(zero_shot))
    (tmp_path / "recipe.yaml").write_text("dataset_name: HuggingFaceFW/fineweb-edu,a/b.txt,/home/alice/c\n")
    metadata = card_metadata(tmp_path, RESULTS | {"hub_datasets": ["HuggingFaceFW/fineweb-edu"]})
    card = ModelCard(f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n", ignore_metadata_errors=False)
    scores = {score.dataset_name: score for score in card.data.eval_results}
    assert scores["python-docs"].metric_value == 4.125
    assert (scores["sst2"].dataset_type, scores["sst2"].metric_value) == ("nyu-mll/glue", 0.8125)
    assert "median of 3 seeds (cramming)" in scores["sst2"].metric_name
    assert scores["rte (subset: 100 of 2,490 rows trained on, 872 of 872 scored)"].metric_value == 0.5
    blimp = scores["blimp (subset: 200 questions)"]
    assert (blimp.dataset_type, blimp.metric_value) == ("nyu-mll/blimp", 0.61)
    assert blimp.metric_name.endswith("by pseudo-log-likelihood") and scores["mine"].dataset_type == "mine"
    assert (scores["piqa"].dataset_type, scores["piqa"].dataset_split) == ("piqa", None), "a file of that name"
    assert [scores[name].metric_value for name in arc] == [0.3, 0.2]
    assert scores["arc_challenge"].dataset_config == "ARC-Challenge"
    assert card.data.datasets == ["HuggingFaceFW/fineweb-edu"]
    assert scores["letters"].metric_value == 0.8125 and "alice" not in str(card)
    assert "rte (subset: 100 of 2,490" in glue_section(tmp_path) and "80.0 to 82.0" in glue_section(tmp_path)
    assert glue_section(tmp_path).endswith("\n\naverage of sst2, rte: 65.6.")
    assert "half (bfloat16)" in scores
    assert "| blimp (subset: 200 questions) | 200 | 50.0 | 61.0 +- 2.0 |" in zero_shot_section(tmp_path)


def test_of_several_processes_the_card_says_so(tmp_path):
    results = {"objective": "mlm", "optim": "muon", "precision": "float32", "steps": 3, "tokens_per_second": 10.0,
               "mfu": 0.5, "peak_flops_measured": 2e12, "peak_memory_bytes": 2**30, "seed": 1}  # fmt: skip
    environment = {"device": "card", "threads": 4, "cores": 8, "python": "3.12", "packages": {}, "commit": "c"}
    alone = training_table(results, environment)
    assert "| card, 4 threads of 8 cores |" in alone and "| 50.0 % of 2.00 TFLOP/s measured |" in alone
    of_eight = training_table(results, environment | {"num_processes": 8})
    assert "| 8 processes, each with card, 4 threads of 8 cores |" in of_eight
    assert "| 50.0 % of 2.00 TFLOP/s measured in each process |" in of_eight
    assert "| 1.00 GiB in process 0 |" in of_eight


def test_a_run_directory_named_by_a_dot_has_its_name_on_the_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert card_metadata(Path("."), RESULTS)["model-index"][0]["name"] == tmp_path.name


@pytest.mark.parametrize("mask", ["<mask>", {"content": "<mask>"}, None])
def test_the_code_on_the_card_has_the_tokenizers_mask(tmp_path, mask):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"mask_token": mask}))
    assert f"returns a {'[MASK]' if mask is None else '<mask>'} of values" in usage(tmp_path, RESULTS)


def test_a_run_without_other_scores_has_its_held_out_loss_and_language(tmp_path):
    (tmp_path / "recipe.yaml").write_text("dataset_name: python-docs\n")
    metadata = card_metadata(tmp_path, RESULTS | {"bits_per_byte": 1.5, "objective": "clm"})
    assert (metadata["language"], metadata["license"]) == ("en", "apache-2.0")
    (tmp_path / "recipe.yaml").write_text("dataset_name: a.txt\nhub_license: cc-by-sa-3.0\n")
    assert card_metadata(tmp_path, RESULTS)["license"] == "cc-by-sa-3.0"
    (index,) = metadata["model-index"]
    values = {metric["type"]: metric["value"] for result in index["results"] for metric in result["metrics"]}
    assert values == {"loss": 4.125, "bits_per_byte": 1.5}
    assert zero_shot_section(tmp_path) == glue_section(tmp_path) == ""


@pytest.mark.parametrize(
    ("objective", "term", "said"),
    [
        ("mlm", {}, ("nats a predicted token", "(nats / token)")),
        ("rtd", {"eval_discriminator_loss": 0.25}, ("the weighted sum of both terms' means", "(weighted sum)")),
        (
            "mlm_nsp",
            {"eval_masked_loss": 4.0, "eval_nsp_loss": 0.125},
            ("the sum of both terms' means", "(weighted sum)"),
        ),
    ],
)
def test_a_loss_of_several_terms_is_called_a_sum(tmp_path, objective, term, said):
    results = RESULTS | {
        "objective": objective, "before": {}, "tokens_per_second": 1.0, "mfu": 0.5, "tokens_seen": 1,
        "num_parameters": 1, "model_config": "a.json", "corpus_hash": "c", "threads": 1,
    } | term  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(results))
    limit = {"tokens": 1e6, "usd": 0.25, "seconds": 90.0, "flops": 2.5e17}
    (tmp_path / "budget.json").write_text(json.dumps({"used_fraction": 1.0, "limit": limit}))
    (score,) = card_metadata(tmp_path, results)["model-index"][0]["results"]
    assert score["metrics"][0]["name"] == f"held-out loss, {said[0]}"
    assert f"held-out loss, {said[0]} |" in results_table(results)
    assert f"held-out loss {said[1]}" in format_report(tmp_path)
    spent = "100.0 % of 1,000,000 tokens and 0.25 usd and 1.5 minutes and 2.5e+17 flops"
    assert f"budget used      {spent}\n" in format_report(tmp_path)


def test_results_and_metrics_of_another_project_are_none_of_ours(tmp_path):
    """A checkpoint of the Hub's examples has files of these names."""
    (tmp_path / "results.json").write_text('{"eval_accuracy": 0.9}')
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1.0, "step": 5}\n')
    refresh_card(tmp_path)
    assert not (tmp_path / "README.md").exists() and read_metrics(tmp_path) == []
    with pytest.raises(SettingError, match="no finished run"):
        format_report(tmp_path)
