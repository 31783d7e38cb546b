"""A pretrained checkpoint as a sequence classifier: read once, built anew for every run, and its inputs."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import datasets
import pandas as pd
import torch
import transformers
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BatchEncoding,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from oneday.attention import count_positions
from oneday.errors import SettingError, describe_error
from oneday.glue import Task, name_labels
from oneday.modeling import freeze_sinusoids
from oneday.tokenization import check_fit, hash_tokenizer

logger = logging.getLogger(__name__)

# What a configuration says of where it was read and what wrote it.
ORIGIN = ("_name_or_path", "transformers_version")
# Classes whose head is of a task that was learnt before, or told replaced tokens: every run begins with a new one.
OF_A_TASK = ("ForSequenceClassification", "ForTokenClassification")
# Outside the encoder and no part of such a head: ModernBERT's, which masked words train.
PRETRAINED_LAYERS = ("head.",)


@dataclass(frozen=True)
class Checkpoint:
    """A pretrained model as it is needed by many runs: read once, kept on the CPU.

    Attributes:
        name: Directory or Hub id.
        config: As it was saved.
        tokenizer: With what `adapt_tokenizer` gives it.
        weights: Every pretrained tensor that the classification model has a place for, in float32.
        weights_hash: Of those tensors.
        architecture_hash: Of the configuration and the tokenizer.
        num_positions: The most tokens of a text that it has positions for; None: any number.
    """

    name: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    weights: dict[str, torch.Tensor]
    weights_hash: str
    architecture_hash: str
    num_positions: int | None


@dataclass(frozen=True)
class PreparedTask:
    """A task, tokenised once for all its runs; `label`, `row` and `length` (tokens) ride beside the model's inputs.

    `row` is a row's `idx` on the Hub, or its place in the file. `test_splits` are answered and not scored; `test_hash`
    is of their rows. `num_rows` of each split were there before `max_train_examples` and `max_eval_examples`.
    """

    task: Task
    splits: dict[str, Dataset]
    data_hash: str
    test_splits: dict[str, Dataset] = field(default_factory=dict)
    test_hash: str = ""
    num_rows: dict[str, int] = field(default_factory=dict)

    @property
    def scored_splits(self) -> list[str]:
        return [split for split in self.splits if split != "train"]

    @functools.cached_property
    def without_tests(self) -> PreparedTask:
        """The same without test rows; one object, whose rows processes are handed once."""
        return dataclasses.replace(self, test_splits={}) if self.test_splits else self

    @functools.cached_property
    def train_lengths(self) -> list[int]:
        """Tokens of each training row, read at once: a column of a data set is slow row by row."""
        return list(self.splits["train"]["length"][:])


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Without the libraries' bars, and without their warnings of a head that is meant to be new."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    datasets_bars = not datasets.are_progress_bars_disabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
        if datasets_bars:
            datasets.enable_progress_bars()


def load_checkpoint(name: str) -> Checkpoint:
    """Read a checkpoint once for all runs.

    Raises:
        SettingError: When it is not there, has no tokenizer, or its architecture has no classification head.
    """
    try:
        with silence_libraries():
            config, tokenizer = AutoConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    except Exception as error:  # configs and tokenizers refuse in many ways
        raise SettingError(
            f"model_name_or_path {name} cannot be loaded ({describe_error(error)}); name a checkpoint."
        ) from None
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise SettingError(
            f"model_name_or_path {name} is a {config.model_type} model, which has no sequence classification head in "
            "transformers; fine-tune another architecture."
        )
    check_fit(tokenizer, config)
    adapt_tokenizer(tokenizer, config)
    try:
        with silence_libraries():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                name, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except Exception as error:  # no weights, damaged ones, other sizes: each library has its own errors
        raise SettingError(
            f"The weights in model_name_or_path {name} cannot be loaded ({describe_error(error)}); fetch them again."
        ) from None
    new = set(info["missing_keys"]) | {mismatch[0] for mismatch in info["mismatched_keys"]}
    if any(name.endswith(OF_A_TASK) for name in config.architectures or []):
        kept = (f"{model.base_model_prefix}.", *PRETRAINED_LAYERS)
        new |= {key for key in model.state_dict() if not key.startswith(kept)}
    weights = {key: tensor.detach().clone() for key, tensor in model.state_dict().items() if key not in new}
    if not weights:
        raise SettingError(f"No weight in model_name_or_path {name} fits its own config.json; save the model again.")
    logger.info("%s: %d tensors loaded, %d new ones for the task: %s", name, len(weights), len(new), sorted(new))
    hashes = hash_weights(weights), hash_architecture(config, tokenizer)
    return Checkpoint(name, config, tokenizer, weights, *hashes, count_positions(model))


def hash_architecture(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """Sixteen hexadecimal digits of configuration and tokenizer, wherever they lie and whatever wrote them."""
    settings = {name: value for name, value in config.to_dict().items() if name not in ORIGIN}
    # Where there is no fast tokenizer, of its words.
    is_fast = getattr(tokenizer, "backend_tokenizer", None) is not None
    ids = hash_tokenizer(tokenizer) if is_fast else repr(sorted(tokenizer.get_vocab().items()))
    return hex_digest(json.dumps(settings, sort_keys=True, default=str) + ids)


def adapt_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Give the tokenizer a padding token, the side on which this architecture wants it, and the inputs that it reads.

    The padding token of a decoder without one is its end token: stock heads read the last token that is not padding,
    and a causal model never looks at what follows it.
    """
    if tokenizer.pad_token is None:
        # Where the model has one, its positions are counted from it.
        pad_id = config.get_text_config().pad_token_id
        if pad_id is not None and 0 <= pad_id < len(tokenizer):
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.convert_ids_to_tokens(0)
    # What is saved beside a classifier makes the inputs that it was trained on. GPT-2 would add the embeddings of the
    # words 0 and 1 for the types, and a model with one type has no second.
    types = ["token_type_ids"] if getattr(config, "type_vocab_size", 0) >= 2 else []
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = ["input_ids", *types, "attention_mask"]
    # XLNet alone reads its summary from the last position.
    side = "left" if config.model_type == "xlnet" else "right"
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = side  # the latter is what is saved


def limit_length(max_seq_length: int, checkpoint: Checkpoint, task: Task) -> int:
    """`max_seq_length`, or less where the model has fewer positions.

    Raises:
        SettingError: It holds no word of the task's texts.
    """
    is_pair = len(task.columns) > task.num_first_columns
    num_special, limit = checkpoint.tokenizer.num_special_tokens_to_add(pair=is_pair), checkpoint.num_positions
    if min(max_seq_length, limit or max_seq_length) <= num_special + is_pair:
        raise SettingError(
            f"max_seq_length is {max_seq_length}, and {num_special} special tokens go to every row of {task.name}; "
            "raise it."
        )
    if limit is None or limit >= max_seq_length:
        return max_seq_length
    logger.info(
        "max_seq_length is %d, but the model has %d positions: longer texts are cut to those", max_seq_length, limit
    )
    return limit


def pad_batch(rows: list[dict], checkpoint: Checkpoint, task: Task, multiple: int | None) -> BatchEncoding:
    """Rows of a prepared task as a batch, (rows, tokens): the length of the longest, or the next multiple of it.

    Never more than the model has positions. Labels of a regression are those that the model learns, of the task's
    `label_mean` and `label_std`.
    """
    longest = max(row["length"] for row in rows)
    length = longest if multiple is None else -(-longest // multiple) * multiple
    length = min(length, checkpoint.num_positions or length)
    inputs = [{key: value for key, value in row.items() if key not in ("length", "row")} for row in rows]
    if task.num_labels == 1:
        inputs = [row | {"label": (row["label"] - task.label_mean) / task.label_std} for row in inputs]
    return DataCollatorWithPadding(checkpoint.tokenizer, padding="max_length", max_length=length)(inputs)


def tokenize_split(rows: Dataset, encode: Callable[[dict[str, list]], dict[str, list]]) -> Dataset:
    """A split as model inputs, with `label`, `row` and `length`."""
    texts = [column for column in rows.column_names if column not in ("label", "row")]
    return rows.map(encode, batched=True, remove_columns=texts, keep_in_memory=True, new_fingerprint="tokenised")


def encode_batch(batch: dict[str, list], task: Task, checkpoint: Checkpoint, max_length: int) -> dict[str, list]:
    """Token ids of a batch of rows, one text or a pair each, truncated and not padded.

    Where a fast tokenizer has a mark between texts, a text that spells a special token is ordinary text.
    """
    tokenizer, columns = checkpoint.tokenizer, [batch[name] for name in task.columns]
    split = task.num_first_columns
    # A decoder's tokenizer may set no mark between texts.
    mark = tokenizer.sep_token or tokenizer.eos_token or tokenizer.bos_token or "\n"
    joints = (" ", f" {mark} ")  # of a premise and its question; of choices, which must be told apart
    groups = [(columns[:split], joints[0]), (columns[split:], joints[1])]
    texts = [[joint.join(parts) for parts in zip(*group)] for group, joint in groups if group]
    num_added = tokenizer.num_special_tokens_to_add(pair=False)
    has_own_mark = len(texts) == 2 and tokenizer.num_special_tokens_to_add(pair=True) <= num_added
    if has_own_mark:
        # At the start of the second no truncation takes it.
        texts[1] = [mark + text for text in texts[1]]
    has_own_mark |= len(columns) - split > 1
    # Tokenizers in Python find their words, too, by what this would switch off.
    splits = tokenizer.is_fast and not has_own_mark
    encoded = tokenizer(*texts, truncation=True, max_length=max_length, split_special_tokens=splits)
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded}
    for row, ids in enumerate(inputs["input_ids"]):
        if not ids:
            for name, values in inputs.items():
                values[row] = {"input_ids": [tokenizer.pad_token_id], "attention_mask": [1]}.get(name, [0])
    return inputs | {"length": [len(ids) for ids in inputs["input_ids"]]}


def build_classifier(
    checkpoint: Checkpoint,
    task: Task,
    dropout: float | None,
    seed: int,
    from_random: bool,
    attention: str | None = None,
) -> PreTrainedModel:
    """The classification model: random from the seed, then the pretrained tensors over it.

    Args:
        checkpoint: Gives the architecture and the tensors.
        task: Gives the number of outputs.
        dropout: For every dropout of the architecture; None keeps the checkpoint's.
        seed: Of the new tensors, all of them with `from_random`.
        from_random: Leave the pretrained tensors out.
        attention: Stock attention implementation; None is transformers' choice.
    """
    config = copy.deepcopy(checkpoint.config)
    config.num_labels = task.num_labels
    config.id2label = dict(enumerate(name_labels(task)))
    config.label2id = {name: label for label, name in config.id2label.items()}
    config.problem_type = "regression" if task.num_labels == 1 else "single_label_classification"
    for name, value in task.label_scale.items():  # whoever loads the model takes answer * label_std + label_mean
        setattr(config, name, value)
    config.pad_token_id = config.get_text_config().pad_token_id = checkpoint.tokenizer.pad_token_id
    config.use_cache = False
    set_dropout(config, dropout)
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32, attn_implementation=attention)
    if getattr(config, "position_encoding", None) == "sinusoidal":
        freeze_sinusoids(model)
    if not from_random:
        places = model.state_dict()
        fitting = {
            key: tensor
            for key, tensor in checkpoint.weights.items()
            if key in places and places[key].shape == tensor.shape
        }
        model.load_state_dict(fitting, strict=False)
    return model


def set_dropout(config: PreTrainedConfig, dropout: float | None) -> None:
    """Set every dropout probability that the configuration has, under whatever name."""
    if dropout is None:
        return
    for key, value in config.to_dict().items():
        is_rate = value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
        if is_rate and ("dropout" in key or key.endswith("pdrop")) and "layerdrop" not in key:
            setattr(config, key, dropout)


def hex_digest(text: str) -> str:
    """Sixteen hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_rows(splits: dict[str, Dataset]) -> str:
    """Sixteen hexadecimal digits of all rows."""
    hashes = [pd.util.hash_pandas_object(rows.to_pandas()).to_numpy().tobytes() for rows in splits.values()]
    return hashlib.sha256(b"".join(hashes)).hexdigest()[:16]


def hash_weights(weights: dict[str, torch.Tensor]) -> str:
    """Sixteen hexadecimal digits of the tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
