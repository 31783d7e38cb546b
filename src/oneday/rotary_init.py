"""Attention that sees its neighbours from the first step, for models that rotate queries and keys (RoPE).

A rotary head knows positions only through the angle between a query and a key: constant vectors in both, the query's
turned ahead by an offset, make a head that looks that many words away, nearly whatever the words are. Few stock
projections have a bias to hold a constant. Here a coordinate of the token embeddings does: it starts out the same in
all of them, passes the norm before a layer nearly as a constant (larger for words with short vectors), and in a tied
output projection it moves all logits alike. A layer sees less of it, the more the layers before it add to the
embeddings: with a standard deviation of 0.02, as stock models start, the first layer of a Llama sees it and later ones
hardly do; with counted embeddings (0.1) the first three do. All of it goes on being trained.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Architectures in which token embeddings go through a norm to queries and keys, and the sign of their rotation.
ROTATIONS = {"llama": 1, "mistral": 1, "modernbert": 1, "nanochat": -1, "qwen2": 1, "qwen3": 1}
# Energy of the constant coordinate, as a share of that of the words.
CONSTANT_SHARE = 0.08
# Slowest rotation that tells near positions apart, in radians a word: slower ones only fill a normalised head.
SLOWEST = 0.11


def is_rotary(model: PreTrainedModel) -> bool:
    """Whether heads can be started here: an architecture that is known, rotated in whole and as it was published."""
    if model.config.model_type not in ROTATIONS:
        return False
    kinds = [find_rope(layer) for layer in find_rotary_layers(model)]
    return all(
        kind.get("rope_type", "default") == "default" and kind.get("partial_rotary_factor", 1.0) == 1.0
        for kind in kinds
    )


def find_rotary_layers(model: nn.Module) -> list[nn.Module]:
    """The attention modules, one a layer."""
    return [module for module in model.modules() if hasattr(module, "Wqkv") or hasattr(module, "q_proj")]


def turn_to_neighbours(model: PreTrainedModel, offsets: list[int], peak_logit: float) -> None:
    """Set queries and keys so that head h of every layer looks at the position `offsets[h]` away, in place.

    Of their weights only what reads the constant is set; what reads words stays random and, beside it, small.

    Args:
        model: Of `ROTATIONS`; the companion it carries is changed too.
        offsets: One a head.
        peak_logit: What the position looked at gets more than one far away.
    """
    sign = ROTATIONS[model.config.model_type]
    for layer in find_rotary_layers(model):
        speeds = find_speeds(layer)
        sizes = make_sizes(speeds, layer.head_dim, peak_logit, is_normalised=hasattr(layer, "q_norm"))
        queries = torch.cat([make_vector(sizes, sign * offset * speeds) for offset in offsets])
        key = make_vector(sizes, torch.zeros_like(speeds))
        query_rows, key_rows = find_rows(layer)
        level = constant_level(query_rows.shape[1])
        query_rows[:, 0] = queries / level
        key_rows[:, 0] = key.repeat(len(key_rows) // layer.head_dim) / level


def find_rows(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The weights that make queries and keys, (heads * head_dim, width) each, to be changed in place."""
    if hasattr(layer, "Wqkv"):
        queries, keys, _ = layer.Wqkv.weight.detach().chunk(3)
        return queries, keys
    return layer.q_proj.weight.detach(), layer.k_proj.weight.detach()


def find_speeds(layer: nn.Module) -> Tensor:
    """(head_dim / 2,) radians a word by which a layer rotates each pair of elements."""
    pairs = layer.head_dim // 2
    return find_rope(layer)["rope_theta"] ** (-torch.arange(pairs) / pairs)


def find_rope(layer: nn.Module) -> dict[str, Any]:
    """The rotation of one layer: of its type, where layers have several."""
    rope = layer.config.rope_parameters
    return rope if "rope_theta" in rope else rope[layer.config.layer_types[layer.layer_idx]]


def make_sizes(speeds: Tensor, head_dim: int, peak_logit: float, is_normalised: bool) -> Tensor:
    """(head_dim / 2,) lengths of the pairs of a query's or key's elements.

    The logit of two vectors is the sum over pairs of length^2 cos(angle) / sqrt(head_dim). Fast pairs share out the
    peak. Where a norm makes every vector as long as sqrt(head_dim) the slow ones take the rest: their part of a logit
    is nearly the same for all positions near and far.
    """
    fast = speeds >= SLOWEST
    energy, num_fast = peak_logit * math.sqrt(head_dim), int(fast.sum())
    if not is_normalised:
        return torch.where(fast, math.sqrt(energy / num_fast), 0.0)
    energy = min(energy, 0.99 * head_dim)
    slow = math.sqrt((head_dim - energy) / max(1, len(speeds) - num_fast))
    return torch.where(fast, math.sqrt(energy / num_fast), slow)


def make_vector(sizes: Tensor, angles: Tensor) -> Tensor:
    """(head_dim,): pairs of these lengths at these angles, their elements half a head apart."""
    return torch.cat([sizes * angles.cos(), sizes * angles.sin()])


def constant_level(width: int) -> float:
    """The constant coordinate behind a norm: its energy is CONSTANT_SHARE of (1 + CONSTANT_SHARE) parts of `width`."""
    return math.sqrt(CONSTANT_SHARE / (1 + CONSTANT_SHARE) * width)


def set_constant(table: Tensor) -> None:
    """Give the first coordinate of token embeddings, (vocab_size, width), its one value; in place."""
    with torch.no_grad():
        table[:, 0] = table[:, 1:].std() * math.sqrt(CONSTANT_SHARE * table.shape[1])
