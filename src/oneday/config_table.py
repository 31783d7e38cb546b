"""The table of `model_configs/README.md`: shape, parameters and FLOPs of each config file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoConfig

from oneday.attention import PACKED
from oneday.flops import FlopCounter
from oneday.modeling import AUTO_CLASSES, OWN_ATTENTION, count_parameters, model_kind

TABLE_MARKS = ("<!-- table: begin -->", "<!-- table: end -->")
TABLE_LENGTH, TABLE_MASKED_FRACTION = 512, 0.15


def format_config_table(files: Iterable[Path]) -> str:
    """A Markdown table of config files: shape, parameters, training FLOPs per token at length 512 (or the longest).

    An encoder predicts 15 % of its tokens, a decoder all.
    """
    lines = [
        "| config | type | layers | width | heads | vocabulary | parameters | without embeddings | MFLOPs a token |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    return "\n".join(lines + [format_config_row(file) for file in sorted(files)]) + "\n"


def format_config_row(file: Path) -> str:
    """One row of the table."""
    config = AutoConfig.from_pretrained(str(file))
    kind = model_kind(config)
    attention = None if config.model_type in OWN_ATTENTION else PACKED
    with torch.device("cpu" if attention is None else "meta"):  # XLNet allocates past the device that is set
        model = AUTO_CLASSES[kind].from_config(config, attn_implementation=attention)
    total, body = count_parameters(model)
    num_positions = config.max_position_embeddings
    length = min(TABLE_LENGTH, num_positions) if num_positions > 0 else TABLE_LENGTH
    predicted = length if kind == "decoder" else round(TABLE_MASKED_FRACTION * length)
    flops = FlopCounter(model).step_flops(length, length**2, predicted, [length]) / length
    shape = f"{config.num_hidden_layers} | {config.hidden_size} | {config.num_attention_heads} | {config.vocab_size:,}"
    name = f"[{file.stem}]({file.name})"
    return f"| {name} | {config.model_type} | {shape} | {total / 1e6:.1f} M | {body / 1e6:.1f} M | {flops / 1e6:.0f} |"


def write_config_table(readme: str | os.PathLike) -> None:
    """Refresh the table between the marks of a README that lies beside its config files."""
    readme = Path(readme)
    begin, end = TABLE_MARKS
    before, _, rest = readme.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    table = format_config_table(readme.parent.glob("*.json"))
    readme.write_text(f"{before}{begin}\n{table}{end}{after}", encoding="utf-8")
