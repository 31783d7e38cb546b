"""Attention that sees its neighbours from the first step, for models with a table of positions.

A model with absolute positions and random weights has to find out which positions are near each other before it can
use a word's neighbours; a BERT on a small budget spends millions of tokens at the loss of single words on that. With
sinusoids in the table the position k away is a rotation of this one (Vaswani et al. 2017, arXiv 1706.03762, section
3.5), so that a head whose keys are the positions and whose queries are the rotated positions looks k words away. Words
and positions are added up: the coordinates that are read are left to the positions, words start with zeros there. All
else, and the architecture, stay stock.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oneday.arguments import SettingError
from oneday.modeling import find_position_tables, make_sinusoids, model_kind

ATTENTION_INITS = ("random", "neighbours")
# Logit of the position a head looks at, where words and positions are equally large; chosen by hand, not searched.
PEAK_LOGIT = 5.76


def check_attention_init(name: str, model: PreTrainedModel) -> None:
    """Refuse a name that does not exist, and neighbours where there is no table of positions, or no place to read it.

    Raises:
        SettingError: Says what to set instead.
    """
    if name not in ATTENTION_INITS:
        raise SettingError(f"The setting attention_init is {name!r}; it must be one of {', '.join(ATTENTION_INITS)}.")
    if name == "random":
        return
    widths = {table.weight.shape[1] for table in find_position_tables(model)}
    if not widths or widths != {layer.query.in_features for layer in find_attention_layers(model)}:
        raise SettingError(
            f"attention_init is neighbours, which needs a table of positions as wide as the layers and a query and a "
            f"key projection in each, as BERT and RoBERTa have them; for {model.config.model_type} set it to random."
        )


def find_attention_layers(model: nn.Module) -> list[nn.Module]:
    """The modules with a `query` and a `key` projection."""
    return [
        module
        for module in model.modules()
        if all(isinstance(getattr(module, name, None), nn.Linear) for name in ("query", "key"))
    ]


def attend_to_neighbours(model: PreTrainedModel, embedding_std: float) -> None:
    """Set tables of positions, queries and keys so that head h of every layer looks at a neighbour of its own.

    Those of an encoder look 1 back, 1 ahead, 2 back, 2 ahead ..., those of a decoder 1, 2, 3 ... back.

    Args:
        model: Changed in place, with what it carries; see `check_attention_init`.
        embedding_std: Standard deviation of the token embeddings, and then of the sinusoids added to them.
    """
    num_heads, is_decoder = model.config.num_attention_heads, model_kind(model.config) == "decoder"
    offsets = [-(head + 1) if is_decoder else (head // 2 + 1) * (1 if head % 2 else -1) for head in range(num_heads)]
    head_dim = find_head_dim(model)
    with torch.no_grad():
        for table in find_position_tables(model):
            sinusoids = make_sinusoids(*table.weight.shape)
            table.weight.copy_(sinusoids * (embedding_std / sinusoids.std()))
        for layer in find_attention_layers(model):
            width = layer.query.in_features
            layer.query.weight.copy_(torch.cat([select_positions(width, head_dim, offset) for offset in offsets]))
            num_key_heads = layer.key.out_features // head_dim
            layer.key.weight.copy_(select_positions(width, head_dim, 0).repeat(num_key_heads, 1))


def leave_to_positions(table: Tensor, head_dim: int) -> None:
    """Clear what the heads read of the positions in token embeddings, (vocab_size, width); changed in place."""
    with torch.no_grad():
        table[:, : head_dim // 2 * 2] = 0


def find_head_dim(model: PreTrainedModel) -> int:
    """Width of a head's query."""
    return find_attention_layers(model)[0].query.out_features // model.config.num_attention_heads


def select_positions(width: int, head_dim: int, offset: int) -> Tensor:
    """(head_dim, width): reads the fastest sinusoids of a position p, as those of p + `offset`.

    Its product with that of offset 0 is PEAK_LOGIT * sqrt(head_dim) where the two positions are `offset` apart and
    each element of a position has a variance of 1/2, the other half being the word's.
    """
    num_pairs = head_dim // 2
    angles = offset / 10000 ** (torch.arange(0, 2 * num_pairs, 2) / width)
    pairs = torch.arange(num_pairs)
    weight = torch.zeros(head_dim, width)
    # sin(x + a) = cos(a) sin(x) + sin(a) cos(x); cos(x + a) = cos(a) cos(x) - sin(a) sin(x)
    weight[2 * pairs, 2 * pairs], weight[2 * pairs, 2 * pairs + 1] = angles.cos(), angles.sin()
    weight[2 * pairs + 1, 2 * pairs + 1], weight[2 * pairs + 1, 2 * pairs] = angles.cos(), -angles.sin()
    return weight * math.sqrt(PEAK_LOGIT * math.sqrt(head_dim) / num_pairs)
