"""Tokenizers: exact round trips, special tokens, determinism across processes, limits, loading by AutoTokenizer."""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import pydoc
import re
import subprocess
import sys
import textwrap
import typing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoConfig, AutoTokenizer, GPT2Tokenizer, GPTNeoXTokenizer, LlamaTokenizer, Qwen2Tokenizer

from oneday.errors import SettingError
from oneday.preparation import keep_tokenizer
from oneday.tokenization import (
    adopt_layout,
    encode_documents,
    hash_tokenizer,
    keeps_text,
    load_tokenizer,
    special_layout,
    unknown_rate,
)
from oneday.tokenizer_training import train_tokenizer

# Every Python has this prose and code.
TEXTS = [
    paragraph
    for module in (argparse, functools, os, pydoc, textwrap, typing)
    for paragraph in Path(module.__file__).read_text(encoding="utf-8").split("\n\n")
]
PEOPLE = ["老师", "我的朋友", "那位医生", "邻居家的孩子", "一个年轻的科学家", "北京来的客人", "图书馆的管理员", "农民"]
ACTIONS = ["喜欢阅读", "正在研究", "昨天买了", "决定放弃", "认真地讨论", "从来没有见过", "终于完成了", "忘记带走"]
THINGS = [
    "一本关于历史的书。",
    "新的计算机程序!",
    "三只白色的猫,",
    "从上海寄来的信。",
    "2024年的计划。",
    "这首古老的歌曲。",
    "经济问题?",
]
CHINESE = [
    p + a + t for i, p in enumerate(PEOPLE) for j, a in enumerate(ACTIONS) for t in [THINGS[(i + j) % len(THINGS)]]
]
KINDS = [("wordpiece", None), ("wordpiece", "decoder"), ("bpe", None), ("bpe", "encoder"), ("unigram", None)]
KINDS += [("unigram", "decoder")]
NASTY = [
    "",
    " ",
    "\n\n \t x  ",
    "naïve café déjà İstanbul ẞ",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽",
    "a\x00b\x01\x1f\x7f\x80\u200b\ufeff",
    "e\u0301\u0323 \u0301x q\u0307\u0323",
    "中文和English混合",
    "\u202eabc\u2028x\u2029\U0010ffff\ufffd",
    "[UN\x00K] ##a # #a don't can not ' s",
]


@functools.cache
def train(tokenizer_type, kind=None):
    return train_tokenizer(TEXTS, tokenizer_type, 1000, objective_kind=kind)


def decode(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def assert_round_trip(tokenizer, text):
    tokens, _ = encode_documents(tokenizer, [text])
    assert decode(tokenizer, tokens.tolist()) == text


@pytest.mark.parametrize(("kind", "is_whole"), [("bpe", True), ("unigram", True), ("wordpiece", False)])
def test_which_tokenizers_keep_a_text(kind, is_whole):
    assert keeps_text(train(kind)) == is_whole


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "text", [*NASTY, "a [SEP] b<|endoftext|>[UNK]", "ab" * 500_000, "hello world " * 80_000, " " * 10**6]
)
def test_byte_level_gives_hard_text_back(kind, text):
    assert_round_trip(train(kind), text)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_byte_level_gives_any_text_back(kind, text):
    assert_round_trip(train(kind), text)
    # A plain call gives the same ids, after whatever its template adds.
    plain = train(kind)(text, add_special_tokens=False)["input_ids"]
    assert decode(train(kind), plain) == text


def assert_idempotent(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer(decode(tokenizer, ids), add_special_tokens=False)["input_ids"] == ids


@pytest.mark.parametrize("text", [*NASTY, "x [SEP][MASK] [unk] y", "ab" * 500_000, "hello world " * 80_000])
def test_wordpiece_is_idempotent_on_hard_text(text):
    assert_idempotent(train("wordpiece"), text)


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(st.text(), st.text(alphabet="ab #'.,[]UNKİéẞ中\u0301\u200d", max_size=30)))
@example("[UN K]")
def test_wordpiece_is_idempotent(text):
    assert_idempotent(train("wordpiece"), text)


@pytest.mark.parametrize(("tokenizer_type", "kind"), KINDS)
@pytest.mark.parametrize("architecture", [None, "bert", "gpt2", "modernbert", "llama"])
def test_auto_tokenizer_gives_the_same_ids(tokenizer_type, kind, architecture, tmp_path):
    tokenizer = train(tokenizer_type, kind)
    tokenizer.save_pretrained(tmp_path)
    if architecture:  # transformers may rebuild a tokenizer for the model type that lies beside it
        AutoConfig.for_model(architecture).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "Café's  don't [MASK] <|endoftext|> 中 \n"
    assert loaded(text) == tokenizer(text)
    assert loaded(text, "b c") == tokenizer(text, "b c")
    assert loaded.decode(loaded(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert hash_tokenizer(loaded) == hash_tokenizer(tokenizer)
    assert loaded.special_tokens_map == tokenizer.special_tokens_map


def test_special_tokens_come_first_and_templates_fit_the_kind():
    bert = train("wordpiece")
    assert bert.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]
    pair = bert("return", "value")
    assert pair["input_ids"][0] == 2 and pair["input_ids"].count(3) == 2
    assert pair["token_type_ids"][-2:] == [1, 1] and pair["token_type_ids"][0] == 0
    gpt = train("bpe")
    assert (gpt.bos_token_id, gpt.eos_token_id, gpt.pad_token_id, gpt.cls_token_id) == (0, 0, 1, None)
    body = gpt("return", add_special_tokens=False)["input_ids"]
    assert gpt("return")["input_ids"] == [0, *body]
    assert gpt("return", "return")["input_ids"] == [0, *body, 0, *body]
    assert "token_type_ids" not in gpt("return", "return")
    both = train("unigram")
    assert (both.cls_token_id, both.bos_token_id, both.eos_token_id) == (2, 5, 5)


def test_byte_level_mask_takes_the_space_before_it():
    tokenizer = train("bpe", "encoder")
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("the [MASK] is", add_special_tokens=False)["input_ids"])
    assert tokens[-2:] == ["[MASK]", "Ġis"] and "Ġ" not in tokens


def test_special_layout():
    assert special_layout(train("wordpiece"), "encoder") == ([2], [3])
    assert special_layout(train("bpe"), "decoder") == ([0], [])
    assert special_layout(train("unigram"), "decoder") == ([5], [])
    with pytest.raises(SettingError, match="CLS"):
        special_layout(train("bpe"), "encoder")
    with pytest.raises(SettingError, match="start"):
        special_layout(train("wordpiece"), "decoder")


def test_a_tokenizer_from_elsewhere_calls_as_pieces_were_packed(tmp_path):
    """Whatever its class builds when it is loaded: the template, its special tokens and its settings stay."""
    words = json.loads(train("bpe").backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in words["merges"]]
    for number, kind in enumerate((GPT2Tokenizer, GPTNeoXTokenizer, LlamaTokenizer, Qwen2Tokenizer)):
        given = kind(vocab=words["vocab"], merges=merges, model_max_length=77)
        given.chat_template = "{{ messages }}"
        given.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
        ids = given("return", add_special_tokens=False)["input_ids"]
        assert given("return")["input_ids"] == ids, "no start token, as of most decoders of the Hub"
        (start,), _ = special_layout(given, "decoder")
        made = adopt_layout(given, "decoder", 64)
        made.save_pretrained(tmp_path / str(number))
        loaded = AutoTokenizer.from_pretrained(tmp_path / str(number))
        for tokenizer in (made, loaded):
            assert tokenizer("return")["input_ids"] == [start, *ids]
            assert tokenizer("return", "return")["input_ids"] == [start, *ids, start, *ids]
            assert tokenizer.special_tokens_map == given.special_tokens_map
            assert tokenizer.all_special_ids == given.all_special_ids and tokenizer.extra_special_tokens
            assert tokenizer("return", "return").keys() == given("return").keys()
            assert (tokenizer.model_max_length, tokenizer.chat_template) == (64, "{{ messages }}")
            assert len(tokenizer("return " * 99, truncation=True)["input_ids"]) == 64
            assert tokenizer.decode(tokenizer("a  b ?")["input_ids"][1:]) == given.decode(given("a  b ?")["input_ids"])
        assert given("return")["input_ids"] == ids, "the given one is as it was"
        assert given.model_max_length == 77 == adopt_layout(given, "decoder", 99).model_max_length


def test_offsets_stay_trimmed_and_a_mask_takes_its_space():
    given = copy.deepcopy(train("bpe", "encoder"))
    given.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    text = "return [MASK] x"
    expected, bare = given(text, return_offsets_mapping=True), given(text)["input_ids"]
    found = adopt_layout(given, "encoder", 64)(text, return_offsets_mapping=True)
    assert found["input_ids"] == [given.cls_token_id, *bare, given.sep_token_id]
    assert found["offset_mapping"][1:-1] == expected["offset_mapping"]


def test_layouts_that_are_their_architectures_own_stay():
    for name, kind in (("wordpiece", "encoder"), ("bpe", "decoder"), ("unigram", "encoder")):
        given = train(name, kind)
        made = adopt_layout(given, kind, 64)
        assert type(made) is type(given) and hash_tokenizer(made) == hash_tokenizer(given)
        assert made("return", "return") == given("return", "return") and given.model_max_length > 64
    xlnet = copy.deepcopy(train("unigram", "encoder"))
    specials = [(token, xlnet.convert_tokens_to_ids(token)) for token in ("[SEP]", "[CLS]")]
    layout = processors.TemplateProcessing("$A [SEP] [CLS]", special_tokens=specials)
    xlnet.backend_tokenizer.post_processor = layout
    assert adopt_layout(xlnet, "encoder", 64)("return") == xlnet("return")
    both = adopt_layout(xlnet, "decoder", 64)
    tokens = both.convert_ids_to_tokens(both("return")["input_ids"])
    assert tokens[0] == "<|endoftext|>" and not {"[SEP]", "[CLS]"} & set(tokens)


def test_encode_documents_agrees_with_calls_and_takes_special_strings_as_text():
    tokenizer = train("wordpiece")
    texts = ["the value is returned", "", "[SEP] [MASK]", "zzz"]
    # What a call leaves behind must not reach the corpus.
    tokenizer(texts, padding="max_length", truncation=True, max_length=4)
    tokens, lengths = encode_documents(tokenizer, texts)
    assert tokens.dtype == np.uint32 and lengths.dtype == np.int64
    expected = [tokenizer(t, add_special_tokens=False, split_special_tokens=True)["input_ids"] for t in texts]
    assert lengths.tolist() == [len(ids) for ids in expected] and lengths[1] == 0 and lengths[0] >= 4
    assert tokens.tolist() == sum(expected, [])
    assert not {3, 4} & set(tokens.tolist())
    assert tokenizer("[SEP]", add_special_tokens=False)["input_ids"] == [3]


def test_lone_surrogates_do_not_stop_a_corpus():
    tokenizer = train("bpe")
    tokens, lengths = encode_documents(tokenizer, ["fine", "bro\ud800ken"])
    assert decode(tokenizer, tokens[lengths[0] :].tolist()) == "bro\ufffdken"
    assert len(train_tokenizer([*TEXTS, "bro\udc00ken"], "wordpiece", 600)) == 600


def test_unknown_rate():
    tokenizer = train("wordpiece")
    assert unknown_rate(tokenizer, ["return value"]) == 0.0
    tokens, _ = encode_documents(tokenizer, ["return ௵"])
    assert unknown_rate(tokenizer, ["return ௵"]) == pytest.approx(1 / len(tokens))
    assert unknown_rate(train("bpe"), ["௵"]) == 0.0
    assert unknown_rate(tokenizer, []) == 0.0


def test_lowercase_is_a_choice():
    assert decode(train("wordpiece"), train("wordpiece")("None É")["input_ids"][1:2]) == "none"
    cased = train_tokenizer(TEXTS, "wordpiece", 1000, lowercase=False)
    assert decode(cased, cased("None")["input_ids"][1:2]) == "None"


TRAIN_AND_HASH = """
import sys
sys.path.insert(0, sys.argv[1])
from test_tokenization import TEXTS, hash_tokenizer, train_tokenizer
for kind in ("wordpiece", "bpe", "unigram"):
    print(hash_tokenizer(train_tokenizer(TEXTS[:600], kind, 1500)))
"""


def test_training_is_the_same_in_every_process():
    command = [sys.executable, "-c", TRAIN_AND_HASH, str(Path(__file__).parent)]
    # The trainer's ties follow hash maps with a seed of their own, so two processes need not be enough to see it.
    runs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONHASHSEED": str(seed)})
        for seed in range(2)
    ]
    hashes = [run.communicate()[0].split() for run in runs]
    here = [hash_tokenizer(train_tokenizer(TEXTS[:600], kind, 1500)) for kind in ("wordpiece", "bpe", "unigram")]
    assert hashes == [here, here]


@pytest.mark.parametrize("tokenizer_type", ["wordpiece", "bpe", "unigram"])
def test_vocabulary_larger_than_the_text_supports(tokenizer_type):
    with pytest.raises(SettingError, match=r"vocab_size=5000 .* lower it to at most (\d+)") as error:
        train_tokenizer(["one short sentence, one short sentence"], tokenizer_type, 5000)
    reached = int(error.value.args[0].partition("at most ")[2].split(",")[0])
    # What the message offers works.
    assert len(train_tokenizer(["one short sentence, one short sentence"], tokenizer_type, reached)) == reached


@pytest.mark.parametrize(("tokenizer_type", "too_small"), [("wordpiece", 20), ("bpe", 257), ("unigram", 261)])
def test_vocabulary_too_small(tokenizer_type, too_small):
    with pytest.raises(SettingError, match=f"vocab_size={too_small} is too small"):
        train_tokenizer(TEXTS, tokenizer_type, too_small)


@pytest.mark.parametrize("tokenizer_type", ["wordpiece", "bpe", "unigram"])
def test_the_least_vocabulary_that_the_message_offers_works(tokenizer_type):
    with pytest.raises(SettingError, match=r"at least (\d+)") as error:
        train_tokenizer(TEXTS, tokenizer_type, 50)
    least = int(re.search(r"at least (\d+)", str(error.value))[1])
    tokenizer = train_tokenizer(TEXTS, tokenizer_type, least)
    assert len(tokenizer) == least and unknown_rate(tokenizer, TEXTS) < 0.1
    with pytest.raises(SettingError, match="too small"):
        train_tokenizer(TEXTS, tokenizer_type, least - 1)


def test_smallest_byte_vocabulary_still_gives_text_back():
    assert_round_trip(train_tokenizer(TEXTS, "bpe", 258), "Grüße 👍")


@pytest.mark.parametrize("texts", [[], ["", " \n"]])
def test_no_text(texts):
    with pytest.raises(SettingError, match="no text"):
        train_tokenizer(texts, "wordpiece", 1000)


def test_unknown_type():
    with pytest.raises(SettingError, match="tokenizer_type='sentencepiece'"):
        train_tokenizer(TEXTS, "sentencepiece", 1000)


def test_load_tokenizer(tmp_path):
    train("wordpiece").save_pretrained(tmp_path / "there")
    assert hash_tokenizer(load_tokenizer(str(tmp_path / "there"))) == hash_tokenizer(train("wordpiece"))
    (tmp_path / "empty").mkdir()
    for missing in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(SettingError, match="tokenizer_name=.*could not be loaded"):
            load_tokenizer(str(missing))


@pytest.mark.parametrize(("tokenizer_type", "vocab_size"), [("wordpiece", 115), ("bpe", 400)])
def test_chinese(tokenizer_type, vocab_size):
    assert len(set(CHINESE)) == len(CHINESE) >= 60
    tokenizer = train_tokenizer(CHINESE, tokenizer_type, vocab_size)
    tokens, lengths = encode_documents(tokenizer, CHINESE)
    assert unknown_rate(tokenizer, CHINESE) < 0.01
    starts = np.cumsum(lengths) - lengths
    first = decode(tokenizer, tokens[starts[0] : starts[0] + lengths[0]].tolist())
    assert first.replace(" ", "") == CHINESE[0]


@pytest.mark.parametrize("fails_in", ["save", "rename"])
def test_a_tokenizer_is_kept_whole_or_not_at_all(tmp_path, monkeypatch, fails_in):
    """tokenizers itself raises a plain Exception where the disk is full."""
    tokenizer = train_tokenizer(["some words of text"] * 20, "wordpiece", 36)

    def refuse(*arguments, **options):
        raise (Exception if fails_in == "save" else OSError)("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((type(tokenizer), "save_pretrained") if fails_in == "save" else (os, "replace")), refuse)
        with pytest.raises(SettingError, match="could not be written .No space left on device.: free some space"):
            keep_tokenizer(tokenizer, tmp_path / "kept")
    assert not list(tmp_path.iterdir())
    for _ in range(2):  # as another process that has made the same
        keep_tokenizer(tokenizer, tmp_path / "kept")
        assert [path.name for path in tmp_path.iterdir()] == ["kept"] and (tmp_path / "kept/tokenizer.json").exists()
