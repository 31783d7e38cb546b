"""Heads of rotary models that look at near positions from the first step, against what stock models compute."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from oneday.errors import SettingError
from oneday.position_init import NEIGHBOURS, PEAK_LOGIT, attend_to_neighbours, check_attention_init, leave_room
from oneday.pretraining import prepare_first_step
from oneday.rotary_init import (
    CONSTANT_SHARE,
    ROTATIONS,
    SLOWEST,
    constant_level,
    find_rotary_layers,
    find_speeds,
    make_sizes,
    make_vector,
)

SIZES = {"vocab_size": 500, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
         "intermediate_size": 64, "max_position_embeddings": 130, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
FORWARD = (-1, 1, -2, 2)
BACK = (-1, -2, -3, -4)


def build(name, **changes):
    is_encoder = name == "modernbert"
    grouped = {} if is_encoder else {"num_key_value_heads": 2}
    config = AutoConfig.for_model(name, **SIZES | grouped | changes)
    auto_class = AutoModelForMaskedLM if is_encoder else AutoModelForCausalLM
    torch.manual_seed(0)
    return auto_class.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize(("std", "num_layers"), [(0.1, 3), (0.02, 1)])
@pytest.mark.parametrize("name", sorted(ROTATIONS))
def test_heads_of_a_stock_model_look_at_their_neighbours(name, std, num_layers):
    """Whatever the words; in every layer where these are not small beside what the layers before it add."""
    model = build(name)
    model.get_input_embeddings().weight.data.normal_(std=std)
    check_attention_init(NEIGHBOURS, model)
    attend_to_neighbours(model, std)
    with torch.no_grad():
        attentions = model(torch.randint(10, 500, (8, 64)), output_attentions=True).attentions
    middle, near = torch.arange(8, 56), range(-6, 7)
    for attention in attentions[:num_layers]:
        for head, offset in enumerate(FORWARD if name == "modernbert" else BACK):
            means = {k: attention[:, head, middle, middle + k].mean().item() for k in near}
            assert max(means, key=means.get) == offset, (head, means)
            assert means[offset] > 0.2, "of 1; 0.02 to 0.12 where a head looks everywhere alike"


@pytest.mark.parametrize("is_normalised", [False, True])
@pytest.mark.parametrize("offset", [-2, 0, 1])
def test_a_logit_is_the_sum_of_the_cosines(offset, is_normalised):
    """q(p) . k(r) / sqrt(d) = PEAK * mean over fast pairs of cos((p + offset - r) w), and what slow ones add."""
    head_dim = 64
    speeds = 10000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
    sizes = make_sizes(speeds, head_dim, PEAK_LOGIT, is_normalised)
    query, key = make_vector(sizes, offset * speeds), make_vector(sizes, 0 * speeds)
    places = torch.arange(20, dtype=torch.float64)

    def rotate(vector):
        """Su et al. 2021, arXiv 2104.09864, equation 34, for pairs (i, i + d/2)."""
        a, b = vector.chunk(2)
        angles = places[:, None] * speeds
        return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)

    logits = rotate(query) @ rotate(key).T / math.sqrt(head_dim)
    apart = places[:, None] + offset - places
    cosines = (apart[..., None] * speeds).cos()
    fast = speeds >= SLOWEST
    expected = PEAK_LOGIT * cosines[..., fast].mean(-1)
    if is_normalised:
        assert query.square().mean() == pytest.approx(1.0), "a norm leaves it as it is"
        expected += (math.sqrt(head_dim) - PEAK_LOGIT) * cosines[..., ~fast].mean(-1)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert logits[10].argmax() == 10 + offset


@pytest.mark.parametrize(("name", "energy"), [("llama", PEAK_LOGIT * 8), ("qwen3", 64), ("nanochat", 64)])
def test_a_head_that_is_normalised_starts_as_long_as_its_norm_makes_it(name, energy):
    """Else the norm would stretch it, and with it the peak: 8 instead of PEAK_LOGIT."""
    model = build(name, head_dim=64)
    attend_to_neighbours(model, 0.02)
    for layer in find_rotary_layers(model):
        for weight in (layer.q_proj.weight, layer.k_proj.weight):
            heads = (weight.detach()[:, 0] * constant_level(256)).view(-1, 64)
            torch.testing.assert_close(heads.square().sum(-1), torch.full((len(heads),), float(energy)))


@pytest.mark.parametrize("init", ["random", "cooccurrence"])
def test_all_words_of_a_new_run_share_one_value(make_trainer, init):
    trainer = make_trainer("modernbert", budget_steps=1, attention_init=NEIGHBOURS, embedding_init=init)
    prepare_first_step(trainer, is_new=True)
    table = trainer.model.get_input_embeddings().weight.detach()
    assert (table[:, 0] == table[0, 0]).all()
    width = table.shape[1]
    energy = table[:, 0].square().mean() / (table[:, 1:].var() * width)
    assert energy.item() == pytest.approx(CONSTANT_SHARE, rel=1e-4)
    normed = torch.nn.functional.rms_norm(table, (width,))[:, 0]
    assert normed.mean().item() == pytest.approx(constant_level(width), rel=0.1)


def test_the_constant_moves_no_probability_of_a_tied_projection():
    """What the table says of a state is the same as without the coordinate, up to a sum that all words share."""
    model = build("llama", tie_word_embeddings=True)
    hidden, table = torch.randn(5, 256), model.get_input_embeddings().weight
    leave_room(table, model)
    with_constant = model.lm_head(hidden).log_softmax(-1)
    table.data[:, 0] = 0.0
    torch.testing.assert_close(with_constant, model.lm_head(hidden).log_softmax(-1), atol=1e-5, rtol=1e-5)
    table.data[:, 0] = torch.randn(len(table))
    assert (with_constant - model.lm_head(hidden).log_softmax(-1)).abs().max() > 1e-3, "other values there would"


@pytest.mark.parametrize("name", ["modernbert", "qwen3"])
def test_speeds_are_those_of_the_layer(name):
    """ModernBERT's layers that see all and those with a window rotate at speeds of their own."""
    model = build(name)
    rotary = model.base_model.rotary_emb
    for layer in find_rotary_layers(model):
        kind = f"{model.config.layer_types[layer.layer_idx]}_inv_freq" if name == "modernbert" else "inv_freq"
        torch.testing.assert_close(find_speeds(layer), getattr(rotary, kind), rtol=1e-5, atol=0)
    assert name != "modernbert" or len({find_speeds(layer)[1].item() for layer in find_rotary_layers(model)}) == 2


def test_the_generator_of_rtd_starts_there_too(make_trainer):
    settings = {"attention_init": NEIGHBOURS, "embedding_init": "random", "budget_steps": 1}
    model = make_trainer("modernbert", objective="rtd", **settings).model
    layers = find_rotary_layers(model)
    assert len(layers) > len(find_rotary_layers(model.base_model)), "the companion's are among them"
    for layer in layers:
        queries, keys, _ = layer.Wqkv.weight.detach().chunk(3)
        speeds, level = find_speeds(layer), constant_level(queries.shape[1])
        sizes = make_sizes(speeds, layer.head_dim, PEAK_LOGIT, is_normalised=False)
        for head, offset in enumerate(FORWARD[: len(queries) // layer.head_dim]):
            rows = slice(head * layer.head_dim, (head + 1) * layer.head_dim)
            torch.testing.assert_close(queries[rows, 0], make_vector(sizes, offset * speeds) / level)
            torch.testing.assert_close(keys[rows, 0], make_vector(sizes, 0 * speeds) / level)
        assert (queries[:, 1:] != 0).any(), "words are still read"


@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
     {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}],
    ids=["stretched", "in part"],
)  # fmt: skip
def test_other_rotations_are_refused(rope):
    with pytest.raises(SettingError, match="this llama rotates them in part, or scaled.*set attention_init to null"):
        check_attention_init(NEIGHBOURS, build("llama", rope_parameters=rope))
