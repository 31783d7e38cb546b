"""Attention that sees its neighbours from the first step.

A model with random weights has to find out which positions are near each other before it can use a word's neighbours;
a BERT on a small budget spends millions of tokens at the loss of single words on that. Where positions are a table,
with sinusoids in it the position k away is a rotation of this one (Vaswani et al. 2017, arXiv 1706.03762, section
3.5), so that a head whose keys are the positions and whose queries are the rotated positions looks k words away. Words
and positions are added up: the coordinates that are read are left to the positions, words start with zeros there.
Rotary models are started in `rotary_init`. All else, and the architecture, stay stock.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oneday.errors import SettingError
from oneday.modeling import find_position_tables, make_sinusoids, model_kind
from oneday.rotary_init import ROTATIONS, is_rotary, set_constant, turn_to_neighbours

NEIGHBOURS = "neighbours"
# Logit of the position a head looks at, where words and positions are equally large. 16 was as good, 36 a little less.
PEAK_LOGIT = 5.76


def check_attention_init(name: str | None, model: PreTrainedModel) -> None:
    """Refuse a name that does not exist, and neighbours where heads cannot be started there.

    Raises:
        SettingError: Says what to set instead.
    """
    if name is None:
        return
    if name != NEIGHBOURS:
        raise SettingError(f"The setting attention_init is {name!r}; it must be {NEIGHBOURS}, or null.")
    kind = model.config.model_type
    if is_rotary(model):
        return
    if kind in ROTATIONS:
        raise SettingError(
            f"attention_init is {NEIGHBOURS}, which needs heads rotated as they were published; this {kind} rotates "
            "them in part, or scaled (rope_parameters): set attention_init to null."
        )
    width = getattr(model.config, "hidden_size", None)
    shapes = {(heads.query.in_features, heads.query.out_features) for heads in find_heads(model)}
    tables = [table.weight.shape[1] for table in find_position_tables(model)]
    # Between the tables and the layers a projection would mix what stands in the tables.
    mixed = [name for name, _ in model.named_modules() if name.endswith(("hidden_mapping_in", "embeddings_project"))]
    if tables != [width] or shapes != {(width, width)} or mixed or count_pairs(model) == 0:
        raise SettingError(
            f"attention_init is {NEIGHBOURS}, which is for models with one table of positions and separate queries "
            f"and keys (BERT, RoBERTa), and for {', '.join(ROTATIONS)}; for this {kind} set attention_init to null."
        )


def find_heads(model: nn.Module) -> list[nn.Module]:
    """The modules with a `query` and a `key` projection, one a layer."""
    return [
        module
        for module in model.modules()
        if all(isinstance(getattr(module, name, None), nn.Linear) for name in ("query", "key"))
    ]


def count_pairs(model: PreTrainedModel) -> int:
    """Sines and cosines that a head reads: as many as it holds, and at most a quarter of all coordinates."""
    width = model.config.hidden_size
    return min(width // model.config.num_attention_heads // 2, width // 8)


def attend_to_neighbours(model: PreTrainedModel, embedding_std: float) -> None:
    """Set tables of positions, queries and keys so that head h of every layer looks at a neighbour of its own.

    The heads of an encoder look 1 back, 1 ahead, 2 back, 2 ahead ..., those of a decoder 1, 2, 3 ... back.

    Args:
        model: Changed in place, and the companion it carries; see `check_attention_init`.
        embedding_std: Standard deviation of the token embeddings, and then of the sinusoids added to them; of rotary
            models what stands in the table counts.
    """
    num_heads = model.config.num_attention_heads
    is_decoder = model_kind(model.config) == "decoder"
    offsets = [-(head + 1) if is_decoder else (head // 2 + 1) * (1 if head % 2 else -1) for head in range(num_heads)]
    if is_rotary(model):
        turn_to_neighbours(model, offsets, PEAK_LOGIT)
        leave_room(model.get_input_embeddings().weight, model)
        return
    num_pairs = count_pairs(model)
    with torch.no_grad():
        for table in find_position_tables(model):
            sinusoids = make_sinusoids(*table.weight.shape)
            table.weight.copy_(sinusoids * (embedding_std / sinusoids.std()))
        for heads in find_heads(model):
            shape = (num_pairs, heads.query.out_features // num_heads, heads.query.in_features)
            heads.query.weight.copy_(torch.cat([make_projection(*shape, offset) for offset in offsets]))
            heads.key.weight.copy_(make_projection(*shape, 0).repeat(num_heads, 1))
        for name, module in model.named_modules():
            if name.endswith("token_type_embeddings"):
                module.weight[:, : 2 * num_pairs] = 0
    leave_room(model.get_input_embeddings().weight, model)


def leave_room(table: Tensor, model: PreTrainedModel) -> None:
    """Keep out of token embeddings, (vocab_size, width), what the heads read positions by; in place.

    Zeros in the coordinates where a table's positions are read, one value in the coordinate that a rotary model reads.
    """
    if is_rotary(model):
        set_constant(table)
        return
    with torch.no_grad():
        table[:, : 2 * count_pairs(model)] = 0


def make_projection(num_pairs: int, head_dim: int, width: int, offset: int) -> Tensor:
    """(head_dim, width): reads the fastest sinusoids of a position p, as those of p + `offset`.

    Its product with that of offset 0 is PEAK_LOGIT * sqrt(head_dim) where the two positions are `offset` apart and
    each element of a position has a variance of 1/2, the other half being the word's.
    """
    angles = offset / 10000 ** (torch.arange(0, 2 * num_pairs, 2) / width)
    pairs = torch.arange(num_pairs)
    weight = torch.zeros(head_dim, width)
    # sin(x + a) = cos(a) sin(x) + sin(a) cos(x); cos(x + a) = cos(a) cos(x) - sin(a) sin(x)
    weight[2 * pairs, 2 * pairs], weight[2 * pairs, 2 * pairs + 1] = angles.cos(), angles.sin()
    weight[2 * pairs + 1, 2 * pairs + 1], weight[2 * pairs + 1, 2 * pairs] = angles.cos(), -angles.sin()
    return weight * math.sqrt(PEAK_LOGIT * math.sqrt(head_dim) / num_pairs)
