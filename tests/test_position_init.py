"""Heads that look at near positions from the first step, against the attention that a stock model computes."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AlbertConfig, AutoModelForMaskedLM, BertConfig, BertLMHeadModel, LayoutLMConfig, RobertaConfig

from oneday.errors import SettingError
from oneday.initialization import EMBEDDING_STD
from oneday.modeling import find_position_table, make_sinusoids
from oneday.objectives import COMPANION
from oneday.position_init import (
    NEIGHBOURS,
    PEAK_LOGIT,
    attend_to_neighbours,
    check_attention_init,
    count_pairs,
    find_heads,
    make_projection,
)
from oneday.pretraining import prepare_first_step

SIZES = {"vocab_size": 500, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 64, "max_position_embeddings": 130, "hidden_dropout_prob": 0.0}  # fmt: skip


@pytest.mark.parametrize("offset", [0, -1, 1, 5])
def test_a_logit_is_the_sum_of_the_cosines(offset):
    """q(p) . k(r) = PEAK sqrt(d) * mean of cos((p + offset - r) w), where a position's elements have variance 1/2."""
    width, head_dim = 256, 64
    positions = make_sinusoids(40, width).double()  # variance 1/2 an element
    query, key = (make_projection(head_dim // 2, head_dim, width, k).double() for k in (offset, 0))
    logits = (positions @ query.T) @ (positions @ key.T).T / math.sqrt(head_dim)
    apart = torch.arange(40)[:, None] + offset - torch.arange(40)
    speeds = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / width)
    torch.testing.assert_close(logits, PEAK_LOGIT * (apart[..., None] * speeds).cos().mean(-1), atol=1e-5, rtol=0)
    assert logits[10].argmax() == 10 + offset


@pytest.mark.parametrize("std", [0.1, 0.02])
@pytest.mark.parametrize("kind", ["bert", "roberta", "decoder"])
def test_heads_of_a_stock_model_look_at_their_neighbours(kind, std):
    """In every layer, whatever the words and the segment."""
    torch.manual_seed(0)
    if kind == "decoder":
        model = BertLMHeadModel._from_config(BertConfig(**SIZES, is_decoder=True), attn_implementation="eager")
        offsets = [-1, -2, -3, -4]
    else:
        config = {"bert": BertConfig, "roberta": RobertaConfig}[kind](**SIZES)
        model = AutoModelForMaskedLM.from_config(config, attn_implementation="eager")
        offsets = [-1, 1, -2, 2]
    model.get_input_embeddings().weight.data.normal_(std=std)
    check_attention_init(NEIGHBOURS, model)
    attend_to_neighbours(model, std)
    assert find_position_table(model).weight.std().item() == pytest.approx(std, rel=1e-4)
    with torch.no_grad():
        attentions = model(torch.randint(10, 500, (8, 64)), output_attentions=True).attentions
    middle = torch.arange(8, 56)
    for attention in attentions:
        for head, offset in enumerate(offsets):
            found = attention[:, head, middle].argmax(-1) == middle + offset
            assert found.float().mean() > 0.8, (head, offset, found.float().mean())


def test_one_head_leaves_words_most_of_their_coordinates():
    model = AutoModelForMaskedLM.from_config(BertConfig(**SIZES | {"num_attention_heads": 1}))
    check_attention_init(NEIGHBOURS, model)
    attend_to_neighbours(model, 0.1)
    is_zero = (model.get_input_embeddings().weight == 0).all(0)
    assert is_zero[:64].all() and not is_zero[64:].any()


@pytest.mark.parametrize("init", ["random", "cooccurrence"])
def test_words_of_a_new_run_leave_their_place_to_the_positions(make_trainer, init):
    trainer = make_trainer("bert", budget_steps=1, attention_init=NEIGHBOURS, embedding_init=init)
    prepare_first_step(trainer, is_new=True)
    table, num_read = trainer.model.get_input_embeddings().weight, 2 * count_pairs(trainer.model)
    assert (table[:, :num_read] == 0).all()
    used = table[10:, num_read:] != 0
    assert used.all() and num_read > 0


def test_the_generator_of_rtd_starts_there_too(make_trainer):
    settings = {"attention_init": NEIGHBOURS, "embedding_init": "cooccurrence", "budget_steps": 1}
    model = make_trainer("bert", objective="rtd", **settings).model
    for part in (model, getattr(model, COMPANION)):
        assert find_position_table(part).weight.std().item() == pytest.approx(EMBEDDING_STD, rel=1e-4)
        for heads in find_heads(part):
            width = heads.query.in_features
            shape = (count_pairs(model), width // model.config.num_attention_heads, width)
            torch.testing.assert_close(heads.query.weight[: shape[1]], make_projection(*shape, -1))
            torch.testing.assert_close(heads.key.weight[: shape[1]], make_projection(*shape, 0))


@pytest.mark.parametrize("name", ["gpt2", "electra"])
def test_models_without_such_heads_are_refused(make_trainer, name):
    with pytest.raises(SettingError, match=f"for this {name} set attention_init to null"):
        make_trainer(name, budget_steps=1, attention_init=NEIGHBOURS)


@pytest.mark.parametrize(
    ("config", "name"),
    [(AlbertConfig(**SIZES | {"embedding_size": 256}), "albert"), (LayoutLMConfig(**SIZES), "layoutlm")],
    ids=["a projection before the layers", "several tables"],
)
def test_other_sums_of_positions_and_words_are_refused(config, name):
    with pytest.raises(SettingError, match=f"for this {name} set attention_init to null"):
        check_attention_init(NEIGHBOURS, AutoModelForMaskedLM.from_config(config))


def test_an_unknown_name_is_refused(make_trainer):
    with pytest.raises(SettingError, match="attention_init is 'near'; it must be neighbours, or null"):
        make_trainer("bert", budget_steps=1, attention_init="near")
