"""Scores on the card, as huggingface_hub reads them back."""

from __future__ import annotations

import json

import pytest
import yaml
from huggingface_hub import ModelCard

from oneday.card_results import zero_shot_section
from oneday.model_card import card_metadata, glue_section, results_table, usage
from oneday.reporting import format_report

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
    glue = {"protocol": "cramming", "tasks": {"sst2": GLUE, "rte": PART}} | average
    (tmp_path / "glue" / "glue_results.json").write_text(json.dumps(glue))
    zero_shot = {"kind": "encoder", "tasks": {"blimp": BLIMP | {"max_examples": 200}, "mine": BLIMP}}
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
    assert card.data.datasets == ["HuggingFaceFW/fineweb-edu"]
    assert "alice" not in str(card)
    assert "rte (subset: 100 of 2,490" in glue_section(tmp_path) and "80.0 to 82.0" in glue_section(tmp_path)
    assert glue_section(tmp_path).endswith("\n\naverage of sst2, rte: 65.6.")
    assert "| blimp (subset: 200 questions) | 200 | 50.0 | 61.0 +- 2.0 |" in zero_shot_section(tmp_path)


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
    (tmp_path / "budget.json").write_text(json.dumps({"used_fraction": 1.0, "limit": {"steps": 3}}))
    (score,) = card_metadata(tmp_path, results)["model-index"][0]["results"]
    assert score["metrics"][0]["name"] == f"held-out loss, {said[0]}"
    assert f"held-out loss, {said[0]} |" in results_table(results)
    assert f"held-out loss {said[1]}" in format_report(tmp_path)
