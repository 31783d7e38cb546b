"""Heads that look at near positions from the first step, against the attention that a stock model computes."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForMaskedLM, BertConfig, BertLMHeadModel, RobertaConfig

from oneday.arguments import SettingError
from oneday.modeling import find_position_table, make_sinusoids
from oneday.objectives import COMPANION
from oneday.position_init import (
    PEAK_LOGIT,
    attend_to_neighbours,
    check_attention_init,
    find_head_dim,
    leave_to_positions,
    select_positions,
)
from oneday.pretraining import prepare_first_step

SIZES = {"vocab_size": 500, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 64, "max_position_embeddings": 130, "hidden_dropout_prob": 0.0}  # fmt: skip


@pytest.mark.parametrize("offset", [0, -1, 1, 5])
def test_a_logit_is_the_sum_of_the_cosines(offset):
    """q(p) . k(r) = PEAK sqrt(d) * mean of cos((p + offset - r) w), where a position's elements have variance 1/2."""
    width, head_dim = 256, 64
    positions = make_sinusoids(40, width).double()  # variance 1/2 an element
    query, key = (select_positions(width, head_dim, k).double() for k in (offset, 0))
    logits = (positions @ query.T) @ (positions @ key.T).T / math.sqrt(head_dim)
    apart = torch.arange(40)[:, None] + offset - torch.arange(40)
    speeds = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / width)
    torch.testing.assert_close(logits, PEAK_LOGIT * (apart[..., None] * speeds).cos().mean(-1), atol=1e-5, rtol=0)
    assert logits[10].argmax() == 10 + offset


@pytest.mark.parametrize("kind", ["bert", "roberta", "decoder"])
def test_heads_of_a_stock_model_look_at_their_neighbours(kind):
    torch.manual_seed(0)
    if kind == "decoder":
        model = BertLMHeadModel._from_config(BertConfig(**SIZES, is_decoder=True), attn_implementation="eager")
        offsets = [-1, -2, -3, -4]
    else:
        config = {"bert": BertConfig, "roberta": RobertaConfig}[kind](**SIZES)
        model = AutoModelForMaskedLM.from_config(config, attn_implementation="eager")
        offsets = [-1, 1, -2, 2]
    check_attention_init("neighbours", model)
    attend_to_neighbours(model, 0.1)
    assert find_position_table(model).weight.std().item() == pytest.approx(0.1, rel=1e-4)
    model.get_input_embeddings().weight.data.normal_(std=0.1)
    leave_to_positions(model.get_input_embeddings().weight, find_head_dim(model))
    with torch.no_grad():
        attention = model(torch.randint(10, 500, (2, 64)), output_attentions=True).attentions[0]
    middle = torch.arange(8, 56)
    for head, offset in enumerate(offsets):
        assert (attention[:, head, middle].argmax(-1) == middle + offset).float().mean() > 0.8, (head, offset)


def test_words_of_a_new_run_leave_their_place_to_the_positions(make_trainer):
    for is_new in (True, False):  # what goes on has learnt what stands there
        trainer = make_trainer("bert", output=f"new-{is_new}", budget_steps=1, attention_init="neighbours")
        prepare_first_step(trainer, is_new=is_new)
        table, head_dim = trainer.model.get_input_embeddings().weight, find_head_dim(trainer.model)
        assert (table[:, :head_dim] == 0).all() == is_new
        assert (table[:, head_dim:] != 0).any(0).all()


def test_the_generator_of_rtd_and_a_frozen_table_start_there_too(make_trainer):
    model = make_trainer(
        "bert", objective="rtd", budget_steps=1, attention_init="neighbours", embedding_init="cooccurrence"
    ).model
    for part in (model, getattr(model, COMPANION)):
        assert find_position_table(part).weight.std().item() == pytest.approx(0.1, rel=1e-4)
    layer = getattr(model, COMPANION).bert.encoder.layer[0].attention.self
    size = layer.query.out_features // model.config.num_attention_heads
    torch.testing.assert_close(layer.query.weight[:size], select_positions(layer.query.in_features, size, -1))


def test_what_has_no_table_and_unknown_names_are_refused(make_trainer):
    with pytest.raises(SettingError, match="for modernbert set it to random"):
        make_trainer("modernbert", budget_steps=1, attention_init="neighbours")
    with pytest.raises(SettingError, match="for gpt2 set it to random"):
        make_trainer("gpt2", budget_steps=1, attention_init="neighbours")
    with pytest.raises(SettingError, match="attention_init is 'near'; it must be one of random, neighbours"):
        make_trainer("bert", budget_steps=1, attention_init="near")
