"""What tests of whole programs share: a small run in words."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT

SMALL = {
    "model_config": str(ROOT / "model_configs/bert-mini.json"),
    "vocab_size": 150,
    "max_seq_length": 32,
    "batch_size_tokens_start": "null",
    "batch_size_tokens": 256,
    "micro_batch_tokens": 256,
    "validation_fraction": 0.1,
    "budget_steps": 3,
    "num_evaluations": 1,
    "eval_on_start": "true",
    "budget_minutes": "null",
}


@pytest.fixture
def text_file(texts, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def flags(**settings):
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]
