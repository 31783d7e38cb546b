"""What tests of fine-tuning share: small checkpoints, tasks that one word decides, settings under which they learn."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from oneday.glue_protocol import FinetuneArguments

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
FILLER = ["the", "film", "was", "with", "a", "story", "and", "its", "actors", "in", "town"]


def make_texts(num_rows):
    """A task that one word decides, wherever it stands."""
    rows = []
    for index in range(num_rows):
        words = FILLER[index % 7 : index % 7 + 3] + FILLER[: index % 4]
        words.insert(index % 3, "good" if index % 2 else "bad")
        rows.append({"sentence": " ".join(words), "label": index % 2})
    return rows


def write_task(folder, name, train, validation, validation_split="validation"):
    (folder / name).mkdir(parents=True)
    for split, rows in (("train", train), (validation_split, validation)):
        (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_mrpc(num_rows):
    return [{"sentence1": row["sentence"], "sentence2": "good", "label": row["label"]} for row in make_texts(num_rows)]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, "sst2", make_texts(160), make_texts(60))
    pairs = [
        {"sentence1": row["sentence"], "sentence2": "good", "label": 5.0 * row["label"]} for row in make_texts(40)
    ]
    write_task(folder, "stsb", pairs, pairs)
    nli = [{"premise": "good town", "hypothesis": row["sentence"], "label": row["label"]} for row in make_texts(20)]
    write_task(folder, "mnli", nli, nli, "validation_matched")
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A masked-LM checkpoint, 2 layers of width 32, with its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = [row["sentence"] for row in make_texts(50)]
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    return str(folder)


def save_decoder(folder, model):
    """A decoder and a byte-level tokenizer that has an end token, no padding token and no template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(["good bad"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def gpt(tmp_path_factory):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=270, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=0, bos_token_id=0)
    return save_decoder(tmp_path_factory.mktemp("gpt"), GPT2LMHeadModel(config))


def make_args(model, data_dir, tmp_path, **changes):
    settings = {
        "model_name_or_path": model,
        "task_names": ["sst2"],
        "task_data_dir": str(data_dir),
        "output_dir": str(tmp_path / "out"),
        "protocol": "test",
        "num_seeds": 1,
        "num_train_epochs": 6,
        "learning_rate": 3e-3,
        "dropout": 0.0,
        "use_cpu": True,
        "num_threads": 1,
    }
    return FinetuneArguments(**settings | changes)
