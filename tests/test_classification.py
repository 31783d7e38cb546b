"""From a checkpoint to a classifier: its head, its tokens and lengths, and what is no checkpoint."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from classifiers import make_args, save_decoder
from conftest import ENCODERS, UNPACKED
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    EsmTokenizer,
    NanoChatConfig,
    NanoChatForCausalLM,
    PreTrainedTokenizerFast,
)

from oneday.adapters import save_classifier
from oneday.classification import (
    adapt_tokenizer,
    build_classifier,
    encode_batch,
    limit_length,
    load_checkpoint,
    pad_batch,
    set_dropout,
)
from oneday.errors import SettingError
from oneday.finetuning import run_protocol
from oneday.finetuning_run import ClassificationTrainer
from oneday.glue import find_task


def test_a_batch_is_as_long_as_its_longest_row(bert, data_dir, tmp_path, monkeypatch):
    """On a CPU: there a multiple of 8 is only more to compute."""
    batches, step = [], ClassificationTrainer.training_step

    def record_batch(trainer, model, inputs, *rest):
        batches.append(inputs["attention_mask"])
        return step(trainer, model, inputs, *rest)

    monkeypatch.setattr(ClassificationTrainer, "training_step", record_batch)
    run_protocol(make_args(bert, data_dir, tmp_path, num_train_epochs=1))
    assert all(mask.sum(1).max() == mask.shape[1] for mask in batches)
    assert any(mask.shape[1] % 8 for mask in batches)


def test_classifier_holds_the_checkpoint_and_a_head_of_the_seed(bert):
    checkpoint = load_checkpoint(bert)
    saved = BertForMaskedLM.from_pretrained(bert).state_dict()
    models = [build_classifier(checkpoint, find_task("mnli"), 0.1, seed, False) for seed in (0, 0, 1)]
    states = [model.state_dict() for model in models]
    name = "bert.encoder.layer.1.output.dense.weight"
    assert all(torch.equal(state[name], saved[name]) for state in states)
    for head in ("classifier.weight", "bert.pooler.dense.weight"):
        assert torch.equal(states[0][head], states[1][head]) and not torch.equal(states[0][head], states[2][head])
    assert states[0]["classifier.weight"].shape == (3, 32)
    random = build_classifier(checkpoint, find_task("mnli"), 0.1, 0, True).state_dict()
    assert not torch.equal(random[name], saved[name])
    assert models[0].config.hidden_dropout_prob == models[0].config.attention_probs_dropout_prob == 0.1


@pytest.mark.parametrize("old_task", ["mnli", "cola"])
def test_a_checkpoint_of_another_task_begins_with_a_new_head(bert, tmp_path, old_task):
    """Whether or not the old one has as many classes; what was pretrained stays, the pooler too."""
    start = load_checkpoint(bert)
    old = build_classifier(start, find_task(old_task), 0.0, 7, False)
    old.save_pretrained(tmp_path)
    start.tokenizer.save_pretrained(tmp_path)
    checkpoint = load_checkpoint(str(tmp_path))
    states = [build_classifier(checkpoint, find_task("cola"), 0.0, seed, False).state_dict() for seed in (0, 1)]
    assert not torch.equal(states[0]["classifier.weight"], states[1]["classifier.weight"])
    assert all(not torch.equal(state["classifier.weight"], old.classifier.weight) for state in states)
    for name in ("bert.pooler.dense.weight", "bert.encoder.layer.0.output.dense.weight"):
        assert all(torch.equal(state[name], old.state_dict()[name]) for state in states)


@pytest.mark.parametrize(
    ("config", "kept", "dropped"),
    [
        (transformers.ModernBertConfig, {"head.dense.weight", "head.norm.weight"}, {"classifier.weight"}),
        (transformers.ElectraConfig, set(), {"classifier.dense.weight", "classifier.out_proj.weight"}),
        (transformers.Qwen3Config, set(), {"score.weight"}),
    ],
)
def test_of_a_classifier_the_layers_that_words_trained_stay(bert, tmp_path, config, kept, dropped):
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    grouped = {"num_key_value_heads": 2, "head_dim": 16} if config is transformers.Qwen3Config else {}
    config = config(vocab_size=120, pad_token_id=0, num_labels=2, **small, **grouped)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
    weights = set(load_checkpoint(str(tmp_path)).weights)
    assert kept <= weights and not dropped & weights and len(weights) > 8


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (transformers.GPT2Config(), "resid_pdrop embd_pdrop attn_pdrop summary_first_dropout"),
        (transformers.ModernBertConfig(), "attention_dropout embedding_dropout mlp_dropout classifier_dropout"),
        (transformers.DistilBertConfig(), "dropout attention_dropout seq_classif_dropout"),
        (transformers.AlbertConfig(), "hidden_dropout_prob attention_probs_dropout_prob classifier_dropout_prob"),
        (transformers.LlamaConfig(), "attention_dropout"),
    ],
)
def test_dropout_reaches_every_field(config, fields):
    set_dropout(config, 0.123)
    assert [getattr(config, name) for name in fields.split()] == [0.123] * len(fields.split())


def test_decoder_without_padding_token(gpt, data_dir, tmp_path):
    args = make_args(gpt, data_dir, tmp_path, task_names=["sst2", "mnli"], max_seq_length=48)
    results = run_protocol(args)
    assert results["tasks"]["sst2"]["median"] > 0.9
    assert list(results["tasks"]) == ["sst2", "mnli_matched"]


def test_decoder_pairs_are_marked_and_nothing_is_empty(gpt):
    checkpoint = load_checkpoint(gpt)
    batch = {"sentence1": ["good " * 50, ""], "sentence2": ["bad", ""]}
    encoded = encode_batch(batch, find_task("rte"), checkpoint, max_length=20)
    end = checkpoint.tokenizer.eos_token_id
    assert [len(ids) for ids in encoded["input_ids"]] == encoded["length"] == [20, 1]
    assert encoded["input_ids"][0].count(end) == 1 and "token_type_ids" not in encoded
    assert checkpoint.tokenizer.decode(encoded["input_ids"][0]).endswith("<|end|>bad")
    single = encode_batch({"sentence": [""]}, find_task("sst2"), checkpoint, max_length=20)
    assert single == {"input_ids": [[end]], "attention_mask": [[1]], "length": [1]}


def test_encoder_pairs_have_types_and_copas_choices_are_told_apart(bert):
    checkpoint = load_checkpoint(bert)
    encoded = encode_batch({"sentence1": ["good film"], "sentence2": ["bad"]}, find_task("rte"), checkpoint, 16)
    assert encoded["token_type_ids"] == [[0, 0, 0, 0, 1, 1]]
    batch = {"premise": ["good"], "question": ["film"], "choice1": ["bad"], "choice2": ["story"]}
    copa = encode_batch(batch, find_task("copa"), checkpoint, 16)
    assert checkpoint.tokenizer.decode(copa["input_ids"][0]) == "[CLS] good film [SEP] bad [SEP] story [SEP]"


def test_positions_bound_the_length(bert, caplog):
    checkpoint = load_checkpoint(bert)
    with caplog.at_level(logging.INFO):
        assert limit_length(128, checkpoint, find_task("rte")) == 32
    assert "32 positions" in caplog.text and limit_length(16, checkpoint, find_task("rte")) == 16
    assert limit_length(128, dataclasses.replace(checkpoint, num_positions=None), find_task("rte")) == 128


def test_a_length_that_holds_no_word_is_refused(bert):
    """[CLS] and [SEP] beside a text, and another [SEP] beside a pair of them."""
    checkpoint = load_checkpoint(bert)
    assert limit_length(3, checkpoint, find_task("sst2")) == 3 and limit_length(5, checkpoint, find_task("rte")) == 5
    for length, task in ((2, "sst2"), (4, "rte")):
        with pytest.raises(SettingError, match=f"max_seq_length is {length}, and . special tokens go to every row"):
            limit_length(length, checkpoint, find_task(task))


def test_a_text_that_spells_a_special_token_is_ordinary_text(bert):
    checkpoint = load_checkpoint(bert)
    encoded = encode_batch({"sentence": ["good [SEP] film [MASK]"]}, find_task("sst2"), checkpoint, 16)
    (ids,) = encoded["input_ids"]
    assert [id in checkpoint.tokenizer.all_special_ids for id in (ids[0], ids[-1])] == [True, True]
    assert ids.count(checkpoint.tokenizer.sep_token_id) == 1 and checkpoint.tokenizer.mask_token_id not in ids


def test_a_padded_batch_stays_within_the_positions(bert):
    """32 positions: a GPU's multiple of 24 would make 48 of 30 tokens."""
    checkpoint = load_checkpoint(bert)
    rows = [{"input_ids": [5] * n, "attention_mask": [1] * n, "label": 1, "row": 0, "length": n} for n in (30, 7)]
    for multiple, lengths in ((24, (32, 24)), (None, (30, 7)), (8, (32, 8))):
        for chosen, length in zip((rows, rows[1:]), lengths):
            batch = pad_batch(chosen, checkpoint, find_task("rte"), multiple)
            assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(chosen), length)
            assert batch["attention_mask"].sum(1).tolist() == [row["length"] for row in chosen]
            assert set(batch) == {"input_ids", "attention_mask", "labels"}


@pytest.mark.parametrize(
    ("name", "kind", "have_types"),
    [
        ("bert", "encoder", True),
        ("bert", "decoder", True),
        ("bert", "of another maker", True),
        ("roberta", "encoder", False),
        ("xlnet", "encoder", False),
    ],
)
def test_a_saved_classifier_reads_pairs_as_it_was_trained(tokenizers, tmp_path, name, kind, have_types):
    """Its tokenizer alone makes the inputs: with types of tokens where the model was trained on them."""
    tokenizer = tokenizers.get(kind)
    if tokenizer is None:  # it says nothing of its model's inputs
        ours = tokenizers["encoder"]
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=ours.backend_tokenizer, **ours.special_tokens_map)
    settings = {"pad_token_id": tokenizer.pad_token_id, "vocab_size": 320}
    settings |= {"type_vocab_size": 1} if name == "roberta" else {}
    config = AutoConfig.for_model(name, **(ENCODERS | UNPACKED)[name], **settings)
    AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    checkpoint = load_checkpoint(str(tmp_path / "model"))
    task = find_task("stsb")
    trained_on = encode_batch({"sentence1": ["kalo mi"], "sentence2": ["ter"]}, task, checkpoint, 24)
    assert ("token_type_ids" in trained_on) == have_types
    model = build_classifier(checkpoint, task, None, 0, False).eval()
    save_classifier(model, checkpoint.tokenizer, tmp_path / "saved", False, 32)
    inputs = AutoTokenizer.from_pretrained(tmp_path / "saved")("kalo mi", "ter", return_tensors="pt")
    trained_on.pop("length")
    assert {key: value.tolist() for key, value in inputs.items()} == trained_on
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    wanted = model(**{key: torch.tensor(value) for key, value in trained_on.items()}).logits
    torch.testing.assert_close(loaded(**inputs).logits, wanted, atol=1e-6, rtol=0)


def test_a_text_config_inside_another_is_read(tokenizers, tmp_path):
    """Models of text and pictures keep vocabulary, positions and padding in a config of their own."""
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 16, "intermediate_size": 64, "vocab_size": 320, "max_position_embeddings": 48}  # fmt: skip
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
              "image_size": 56, "patch_size": 14}  # fmt: skip
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizers["decoder"].save_pretrained(tmp_path)
    checkpoint = load_checkpoint(str(tmp_path))
    assert checkpoint.num_positions == 48
    model = build_classifier(checkpoint, find_task("sst2"), None, 0, False).eval()
    pad = checkpoint.tokenizer.pad_token_id
    alone = model(input_ids=torch.tensor([[9, 8, 7]])).logits
    padded = model(
        input_ids=torch.tensor([[9, 8, 7, pad, pad]]), attention_mask=torch.tensor([[1, 1, 1, 0, 0]])
    ).logits
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=0)


def test_a_tokenizer_in_python_keeps_its_words(tmp_path):
    """ESM's finds them as added tokens, which are not to be split with the special ones."""
    words = ["<cls>", "<pad>", "<eos>", "<unk>", "L", "A", "G", "V", "<mask>"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    EsmTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = AutoConfig.for_model(
        "esm", vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=34, pad_token_id=1, mask_token_id=8,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(tmp_path)
    encoded = encode_batch({"sentence": ["LAGV"]}, find_task("sst2"), load_checkpoint(str(tmp_path)), 16)
    assert encoded["input_ids"] == [[0, 4, 5, 6, 7, 2]]


def test_model_without_a_classification_head(tmp_path, data_dir):
    config = NanoChatConfig(
        vocab_size=270, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    folder = save_decoder(tmp_path / "nanochat", NanoChatForCausalLM(config))
    with pytest.raises(SettingError, match="nanochat model, which has no sequence classification head"):
        run_protocol(make_args(folder, data_dir, tmp_path))
    assert not (tmp_path / "out").exists()


def test_checkpoint_without_a_tokenizer_is_refused(bert, tmp_path):
    BertForMaskedLM.from_pretrained(bert).save_pretrained(tmp_path)
    with pytest.raises(SettingError) as caught:
        load_checkpoint(str(tmp_path))
    assert "tokenizer" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content"), [("tokenizer.json", "{}"), ("config.json", '{"model_type": "bert", "hidden_size": "x"}')]
)
def test_a_damaged_checkpoint_is_one_sentence(bert, tmp_path, file, content):
    copy = shutil.copytree(bert, tmp_path / "copy")
    (copy / file).write_text(content)
    with pytest.raises(SettingError, match="model_name_or_path .*copy cannot be loaded") as caught:
        load_checkpoint(str(copy))
    assert "\n" not in str(caught.value)


def test_damaged_weights_are_one_sentence(bert, data_dir, tmp_path):
    copy = shutil.copytree(bert, tmp_path / "copy")
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(SettingError, match="The weights in model_name_or_path .*copy cannot be loaded"):
        run_protocol(make_args(copy, data_dir, tmp_path))
    assert not (tmp_path / "out").exists()


def test_tokenizer_of_another_model_is_refused(bert, tmp_path):
    model = BertForMaskedLM.from_pretrained(bert)
    model.resize_token_embeddings(20)
    model.save_pretrained(tmp_path)
    for file in Path(bert).glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(SettingError, match="ids and the model 20"):
        load_checkpoint(str(tmp_path))


def test_a_padding_token_that_the_config_names_is_taken(gpt):
    """Where the tokenizer has none; one beyond the vocabulary is none."""
    tokenizer, config = (kind.from_pretrained(gpt) for kind in (AutoTokenizer, AutoConfig))
    for pad_id, expected in ((3, 3), (len(tokenizer), tokenizer.eos_token_id)):
        tokenizer.pad_token, config.pad_token_id = None, pad_id
        adapt_tokenizer(tokenizer, config)
        assert tokenizer.pad_token_id == expected


def test_the_side_of_the_padding_is_saved(gpt, tmp_path):
    """XLNet's summary is of the last position, which padding must not have."""
    tokenizer = AutoTokenizer.from_pretrained(gpt)
    adapt_tokenizer(tokenizer, AutoConfig.for_model("xlnet"))
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).padding_side == "left"
