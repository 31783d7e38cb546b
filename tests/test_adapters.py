"""Adapters: what is trained of each architecture, and that merging and loading change no output."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from classifiers import make_args
from conftest import TINY
from peft import AutoPeftModelForSequenceClassification
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    BertTokenizer,
)
from transformers.pytorch_utils import Conv1D

from oneday.adapters import add_adapters, count_trained, find_head, find_linear_layers, restrict_training
from oneday.adapters import save_classifier as save
from oneday.errors import SettingError
from oneday.finetuning import run_protocol
from oneday.glue_protocol import FinetuneArguments

SMALL = {**TINY, "vocab_size": 64, "num_labels": 3, "pad_token_id": 0, "initializer_range": 0.2}
DECODER = {"num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 1}
MODERN = {"bos_token_id": 1, "eos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1}
# The head as transformers' source has it, by the names of its modules.
ARCHITECTURES = {
    "bert": ({}, "classifier bert.pooler"),
    "roberta": ({}, "classifier"),
    "electra": ({"embedding_size": 16}, "classifier"),
    "albert": ({"embedding_size": 16}, "classifier albert.pooler"),
    "distilbert": ({"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}, "pre_classifier classifier"),
    "modernbert": (MODERN, "head classifier"),
    "eurobert": (DECODER | {"mask_token_id": 2}, "dense classifier"),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 1}, "score"),
    "gpt_neox": ({"bos_token_id": 1, "eos_token_id": 1}, "score"),
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 32}, "score"),
    "llama": (DECODER, "score"),
    "mistral": (DECODER, "score"),
    "qwen3": (DECODER | {"head_dim": 16}, "score"),
    "olmo2": (DECODER, "score"),
    "smollm3": (DECODER, "score"),
    "gemma3_text": (DECODER | {"head_dim": 16, "query_pre_attn_scalar": 16}, "score"),
    "modernbert-decoder": (MODERN, "head classifier"),
    "xlnet": ({"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64}, "sequence_summary logits_proj"),
}
INPUTS = {"input_ids": torch.arange(3, 27).view(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
FROZEN_LINEAR = (nn.Linear, Conv1D)


def make_classifier(kind, **sizes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SMALL | ARCHITECTURES[kind][0] | sizes))
    return AutoModelForSequenceClassification.from_config(config).eval()


def compute_logits(model):
    with torch.no_grad():
        return model.eval()(**INPUTS).logits


def adapt(kind, sizes=None, **settings):
    """A model whose adapters do something: fresh ones add exactly nothing."""
    model = add_adapters(make_classifier(kind, **sizes or {}), FinetuneArguments(**{"peft": "lora"} | settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_adapters_stand_on_every_layer_and_the_head_is_trained(kind):
    model = make_classifier(kind)
    head = ARCHITECTURES[kind][1].split()
    assert sorted(find_head(model)) == sorted(head)
    layers = [name for name, module in model.base_model.named_modules() if isinstance(module, FROZEN_LINEAR)]
    layers = [name for name in layers if not name.startswith("pooler")]
    head_size = sum(value.numel() for name in head for value in model.get_submodule(name).parameters())
    before, total = compute_logits(model), sum(value.numel() for value in model.parameters())
    model = add_adapters(model, FinetuneArguments(peft="lora"))
    assert torch.equal(compute_logits(model), before)
    trained = {name: value.numel() for name, value in model.named_parameters() if value.requires_grad}
    assert len([name for name in trained if "lora_A" in name]) == len(layers) > 0
    adapters_size = sum(size for name, size in trained.items() if "lora_" in name)
    assert sum(trained.values()) == adapters_size + head_size
    assert count_trained(model) == {
        "trainable_parameters": adapters_size + head_size,
        "total_parameters": total + adapters_size,
    }


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("peft", ["lora", "dora"])
def test_merged_is_unmerged(kind, peft, tmp_path):
    model = adapt(kind, peft=peft)
    logits = compute_logits(model)
    assert not torch.allclose(logits, compute_logits(make_classifier(kind)), atol=1e-3)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    save(model, BertTokenizer(str(tmp_path / "vocab.txt")), tmp_path / "merged", merge=True, max_length=16)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(compute_logits(merged), logits, atol=1e-5, rtol=1e-5)


def test_saved_adapter_loads_with_peft_alone(tmp_path, monkeypatch):
    make_classifier("bert").base_model.save_pretrained(tmp_path / "base")  # its pooler is not the one that was trained
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    nn.init.normal_(base.bert.pooler.dense.weight)
    monkeypatch.chdir(tmp_path)  # named from here, it is found from anywhere
    model = add_adapters(base, FinetuneArguments(peft="lora", model_name_or_path="base"))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    save(model, BertTokenizer(str(tmp_path / "vocab.txt")), tmp_path / "adapter", merge=False, max_length=16)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    torch.testing.assert_close(compute_logits(loaded), compute_logits(model))


def test_probe_trains_the_head_alone():
    model = restrict_training(make_classifier("bert"), FinetuneArguments(protocol="probe"))
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    parts = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert trained == parts


def test_four_bit_layers_are_near_the_full_ones_and_learn():
    pytest.importorskip("bitsandbytes")
    # Keys and values of 16 outputs, which bitsandbytes cannot pack for CPUs with bf16 units.
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    model = adapt("llama", sizes, peft="qlora", use_cpu=True)
    full = adapt("llama", sizes, peft="lora")
    packed = [value for value in model.parameters() if value.dtype == torch.uint8]
    assert len(packed) == len(find_linear_layers(make_classifier("llama")))
    for name in find_linear_layers(make_classifier("llama")):
        layer, whole = model.get_submodule(f"base_model.model.{name}"), full.get_submodule(f"base_model.model.{name}")
        inputs = torch.randn(4, whole.base_layer.in_features)
        error = (layer.base_layer(inputs) - whole.base_layer(inputs)).norm() / whole.base_layer(inputs).norm()
        assert 0.05 < error < 0.13, "NF4 rounds normal weights by 9 %"
    assert count_trained(model) == count_trained(full)
    with model.disable_adapter(), full.disable_adapter():
        difference = (compute_logits(model) - compute_logits(full)).abs().max()
        assert 0 < difference < compute_logits(full).std()
    model(**INPUTS, labels=torch.tensor([0, 1])).loss.backward()
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)


def test_layers_without_a_four_bit_form_are_refused():
    with pytest.raises(SettingError, match="the 32 inputs of .*q_proj, which are no multiple of 64; take lora"):
        add_adapters(make_classifier("llama"), FinetuneArguments(peft="qlora", use_cpu=True))
    with pytest.raises(SettingError, match="no 4-bit form of the layers of a gpt2 model; take lora"):
        add_adapters(make_classifier("gpt2"), FinetuneArguments(peft="qlora", use_cpu=True))


def test_probe_leaves_the_encoder_as_it_was(bert, data_dir, tmp_path):
    args = make_args(bert, data_dir, tmp_path, protocol="probe", num_train_epochs=1, save_models=True)
    results = run_protocol(args)
    assert results["protocol"] == "custom probe" and results["settings"]["dropout"] == 0.0
    assert results["tasks"]["sst2"]["trainable_parameters"] == 32 * 32 + 32 + 2 * 32 + 2
    (folder,) = (tmp_path / "out" / "runs").glob("*/model")
    before, after = (BertForSequenceClassification.from_pretrained(path).state_dict() for path in (bert, folder))
    same = {name for name in after if torch.equal(before[name], after[name])}
    assert {name.split(".")[1] for name in same} == {"embeddings", "encoder"}
    assert not same & {"classifier.weight", "bert.pooler.dense.weight"}


def test_adapters_are_scored_saved_and_shown_beside_all_weights(bert, data_dir, tmp_path, run_script):
    """`--peft lora` through the program, after the same task with all weights; the same command runs nothing again."""
    model = tmp_path / "model"
    shutil.copytree(bert, model)
    argv = ["--model_name_or_path", model, "--task_names", "sst2", "--task_data_dir", data_dir, "--use_cpu", "true"]
    argv += ["--num_seeds", "1", "--dropout", "0", "--num_train_epochs", "6", "--protocol", "mine"]
    code, _, stderr = run_script("finetune", *argv, "--learning_rate", "3e-3")
    assert code == 0, stderr
    argv += ["--peft", "lora", "--save_models", "true", "--learning_rate", "1e-2"]
    code, shown, stderr = run_script("finetune", *argv)
    assert code == 0, stderr
    results, full = (json.loads((model / f"{name}/glue_results.json").read_text()) for name in ("glue-lora", "glue"))
    scores = [100 * side["tasks"]["sst2"]["median"] for side in (results, full)]
    assert min(scores) > 90 and f"  {'sst2':15}{scores[0]:6.1f} /{scores[1]:6.1f}" in shown
    assert max(map(len, shown.splitlines()[:-1])) <= 80
    sizes = [side["tasks"]["sst2"]["trainable_parameters"] for side in (results, full)]
    assert sizes[0] < sizes[1] and "lora: 0.0" in shown and "trained: 0.0" in shown
    (adapter,) = model.glob("glue-lora/runs/*/model")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(adapter, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    rows = [json.loads(line) for line in (data_dir / "sst2" / "validation.jsonl").read_text().splitlines()]
    batch = tokenizer([row["sentence"] for row in rows], padding=True, return_tensors="pt")
    answers = loaded.eval()(**batch).logits.argmax(-1).tolist()
    assert 100 * np.mean([a == row["label"] for a, row in zip(answers, rows)]) == pytest.approx(scores[0])
    lines = (model / "glue-lora" / "glue_runs.jsonl").read_text()
    assert run_script("finetune", *argv)[0] == 0
    assert (model / "glue-lora" / "glue_runs.jsonl").read_text() == lines


def test_an_architecture_that_takes_no_adapters_is_one_sentence(tmp_path):
    config = AutoConfig.for_model(
        "squeezebert", vocab_size=64, hidden_size=32, embedding_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    args = FinetuneArguments(model_name_or_path=str(tmp_path), peft="lora")
    with pytest.raises(
        SettingError, match="peft is 'lora', which cannot be added to a squeezebert model .*; leave it"
    ):
        add_adapters(AutoModelForSequenceClassification.from_config(config), args)
