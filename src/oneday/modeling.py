"""Config JSON to model: special ids from the tokenizer, random weights, positions, counts of parameters."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from oneday.attention import PACKED, count_positions, position_offset
from oneday.errors import SettingError

VOCABULARY_MULTIPLE = 64  # matrix units want it: a vocabulary of 50,257 is slower than one of 50,304
SPECIAL_TOKENS = ("pad", "bos", "eos", "cls", "sep", "mask")
EXAMPLE_CONFIGS = {"learned": "bert-mini.json", "rotary": "modernbert-mini.json", "sinusoidal": "bert-mini.json"}
AUTO_CLASSES = {"encoder": AutoModelForMaskedLM, "decoder": AutoModelForCausalLM}
# Architectures here that do not go through transformers' attention interface: for objective plm, on padded rows.
OWN_ATTENTION = ("xlnet",)


def check_config_file(path: str | os.PathLike) -> Path:
    """The config file at `path` (a JSON file, or a directory with a config.json), read and known to transformers.

    Raises:
        SettingError: it is missing, is not JSON, or has a `model_type` that this transformers does not know.
    """
    file = Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise SettingError(f"model_config: {path} does not exist{suggest_config(file)}.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingError(f"model_config: {file} is not valid JSON ({error}); mend the file.") from error
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING), 1)
        hint = f"did you mean {near[0]}?" if near else "set model_type to one that transformers has, say bert or llama"
        raise SettingError(f"model_config: {file} has the unknown model_type {model_type!r}; {hint}")
    return file


def hash_config(path: str | os.PathLike) -> str:
    """Equal only for config files that say the same."""
    content = json.loads(check_config_file(path).read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def suggest_config(file: Path) -> str:
    """`; did you mean ...?` with the nearest config beside a missing file, or nothing."""
    folders = (file.parent, Path("model_configs"))
    names = {f.stem: f for folder in folders if folder.is_dir() for f in sorted(folder.glob("*.json"))}
    near = difflib.get_close_matches(file.stem, names, 1, cutoff=0.4)
    return f"; did you mean {names[near[0]]}?" if near else ""


def load_config(
    path: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    position_encoding: str | None = None,
) -> PreTrainedConfig:
    """Read a model config and fit it to a tokenizer.

    Args:
        path: config JSON, or a directory that holds a config.json.
        tokenizer: gives the vocabulary, rounded up to a multiple of 64, and every special id.
        max_seq_length: row length in tokens that the model must have positions for.
        position_encoding: learned or rotary must be what the config has; sinusoidal replaces learned positions.

    Raises:
        SettingError: see `check_config_file`; too few positions; a position encoding that the config lacks.
    """
    file = check_config_file(path)
    with name_refused_file(file):
        config = AutoConfig.from_pretrained(str(file))
        config.vocab_size = math.ceil(len(tokenizer) / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        set_special_ids(config, tokenizer)
        skeleton = build_skeleton(config)
    check_length(config, skeleton, max_seq_length, file)
    position_encoding = position_encoding or getattr(config, "position_encoding", None)
    if position_encoding is not None:
        check_position_encoding(skeleton, position_encoding, file)
        config.position_encoding = position_encoding
    return config


@contextmanager
def name_refused_file(file: Path) -> Iterator[None]:
    """Raise SettingError, with the file's name, for whatever transformers says against a config."""
    try:
        yield
    except SettingError:
        raise
    except Exception as error:  # the config classes and models refuse values in many ways
        reason = " ".join(str(error).split())
        raise SettingError(f"model_config: {file} is refused by transformers ({reason}); mend the file.") from error


def read_skeleton(path: str | os.PathLike, vocab_size: int | None = None) -> PreTrainedModel:
    """The model of a config file, not fitted to a tokenizer and without storage for weights.

    Args:
        path: See `check_config_file`.
        vocab_size: In place of the file's.

    Raises:
        SettingError: see `check_config_file`; transformers cannot build it.
    """
    file = check_config_file(path)
    with name_refused_file(file):
        config = AutoConfig.from_pretrained(str(file))
        if vocab_size is not None:
            config.vocab_size, config.pad_token_id = vocab_size, None  # its id may be beyond
        return build_skeleton(config)


def set_special_ids(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every special id of the config is the tokenizer's, or None; no id stays above the vocabulary."""
    for name in SPECIAL_TOKENS:
        if name in ("pad", "bos", "eos") or hasattr(config, f"{name}_token_id"):
            setattr(config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    known = {f"{name}_token_id" for name in SPECIAL_TOKENS}
    for key in [k for k in config.to_dict() if k.endswith("_token_id") and k not in known]:
        setattr(config, key, None)


def build_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without storage for weights, for looking at its structure."""
    with torch.device("meta"):
        return AUTO_CLASSES[model_kind(config)].from_config(config)


def model_kind(config: PreTrainedConfig) -> str:
    """`encoder` if transformers has a masked-LM head for it (and it is not made causal), else `decoder`.

    Raises:
        SettingError: it is neither.
    """
    masked, causal = type(config) in MODEL_FOR_MASKED_LM_MAPPING, type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if config.is_encoder_decoder or not (masked or causal):
        raise SettingError(f"model_config: {config.model_type} is neither an encoder nor a decoder; choose another.")
    return "encoder" if masked and not (causal and getattr(config, "is_decoder", False)) else "decoder"


def find_position_table(model: nn.Module) -> nn.Embedding | None:
    """The table of learned positions, if the model has one."""
    return next(iter(find_position_tables(model)), None)


def find_position_tables(model: nn.Module) -> list[nn.Embedding]:
    """All tables of learned positions: the model's own first, then those of a companion that it carries."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and re.search(r"(position|wpe)[^.]*$", name)
    ]


def check_length(config: PreTrainedConfig, skeleton: PreTrainedModel, max_seq_length: int, file: Path) -> None:
    """Raises SettingError if rows of `max_seq_length` tokens have more positions than the model."""
    limit = count_positions(skeleton)
    if limit is not None and max_seq_length > limit:
        raise SettingError(
            f"max_seq_length is {max_seq_length}, but {file} has {limit} positions: lower max_seq_length or "
            f"set max_position_embeddings to {max_seq_length + position_offset(skeleton)} in the file."
        )


def check_position_encoding(skeleton: PreTrainedModel, position_encoding: str, file: Path) -> None:
    """Raises SettingError if the architecture does not have what the setting asks for."""
    if position_encoding not in EXAMPLE_CONFIGS:
        raise SettingError(
            f"position_encoding is {position_encoding!r}: set it to one of {', '.join(EXAMPLE_CONFIGS)}."
        )
    is_rotary = any("rotary" in type(module).__name__.lower() for module in skeleton.modules())
    has = "rotary" if is_rotary else "learned" if find_position_table(skeleton) is not None else "no absolute"
    if has != ("rotary" if position_encoding == "rotary" else "learned"):
        raise SettingError(
            f"position_encoding is {position_encoding}, but {file} has {has} positions: leave it empty or take a "
            f"config that fits, say model_configs/{EXAMPLE_CONFIGS[position_encoding]}."
        )


def build_model(config: PreTrainedConfig, auto_class: type | None = None, packed: bool = True) -> PreTrainedModel:
    """A stock model with random float32 weights; the caller sets the seed.

    Args:
        config: from `load_config`. Its `use_cache` stays on, so that a saved decoder generates with its cache: pass
            `use_cache=False` to the forward call in training.
        auto_class: say `AutoModelForPreTraining`; None takes the masked or causal LM that the config is made for.
        packed: with the packed attention; False keeps the architecture's own.

    Raises:
        SettingError: the architecture has no head of that class, or does not take a registered attention.
    """
    auto_class = auto_class or AUTO_CLASSES[model_kind(config)]
    if type(config) not in auto_class._model_mapping:
        raise SettingError(
            f"model_config: {config.model_type} has no {auto_class.__name__}, which the objective needs; "
            "choose another model_config or objective."
        )
    try:
        model = auto_class.from_config(config, dtype=torch.float32, attn_implementation=PACKED if packed else None)
    except KeyError as error:
        raise SettingError(f"model_config: {config.model_type} does not take packed attention ({error}).") from error
    if getattr(config, "position_encoding", None) == "sinusoidal":
        freeze_sinusoids(model)
    wake_start_token(model)
    return model


def wake_start_token(model: PreTrainedModel) -> None:
    """Let a start token that also pads be learnt (as Qwen's do): stock tables hold the padding row at zero."""
    table, config = model.get_input_embeddings(), model.config
    start = config.eos_token_id if config.bos_token_id is None else config.bos_token_id
    if start is not None and model_kind(config) == "decoder" and getattr(table, "padding_idx", None) == start:
        with torch.no_grad():
            table.weight[start] = torch.randn_like(table.weight[start]) * table.weight.std()
        table.padding_idx = None


def make_sinusoids(num_positions: int, width: int) -> torch.Tensor:
    """(num_positions, width): row p holds sin(p / 10000^(2i/D)) at 2i and cos(p / 10000^(2i/D)) at 2i + 1.

    Vaswani et al. 2017, arXiv 1706.03762, section 3.5.
    """
    angles = torch.arange(num_positions)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]


def freeze_sinusoids(model: nn.Module) -> None:
    """Fill the table of learned positions with sinusoids and stop its training.

    They are scaled to the standard deviation the table was initialised with: stock models add it to token embeddings
    of that size, unscaled sinusoids would drown them (`attention_init` may scale them again, to the
    words as they start). A stock class reloads the values of a checkpoint, but as weights that would train.
    """
    table = find_position_table(model)
    assert table is not None, "checked by load_config"
    sinusoids = make_sinusoids(*table.weight.shape)
    with torch.no_grad():
        table.weight.copy_(sinusoids * (table.weight.std() / sinusoids.std()))
    table.weight.requires_grad_(False)


def count_parameters(model: nn.Module, without: str | None = None) -> tuple[int, int]:
    """Parameters, in all and without embeddings; tied ones count once.

    Embeddings are the tables (tokens, positions, token types) and an untied output projection.

    Args:
        model: A stock model.
        without: Name of a child that does not count: what is trained beside the model and not saved.
    """
    tables = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and not name.startswith(f"{without}.")
    ]
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    tables += [output.weight] if output is not None else []
    embeddings = {id(weight): weight.numel() for weight in tables}
    names = dict(model.named_parameters())
    total = sum(
        value.numel() for name, value in names.items() if without is None or not name.startswith(f"{without}.")
    )
    return total, total - sum(embeddings.values())


def recompute_activations(model: PreTrainedModel, args: TrainingArguments) -> None:
    """Have activations computed again in the backward pass, as `Trainer.train` would at its start.

    What is rehearsed, compiled and probed before it must be what is trained.
    """
    if not hasattr(model, "activation_checkpointing_enable"):  # transformers before 5.20
        model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        return
    kwargs = dict(args.activation_checkpointing_kwargs or {})
    chosen = {name: kwargs.pop(name) for name in ("every_n_layers", "offload") if name in kwargs}
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs or None, **chosen)
