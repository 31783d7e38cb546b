"""Load tokenizers, apply them, and tell what they keep of a text.

Text that spells a special token ("[SEP]", "<|endoftext|>") becomes that token in a plain call, as everywhere in
transformers, and `split_special_tokens=True` there turns it off; `encode_documents` always takes it as ordinary text.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from oneday.errors import SettingError

ObjectiveKind = Literal["encoder", "decoder"]

# Capitals, accents, white space and what few vocabularies have as a word: what a lossy tokenizer would change.
PROBE = "Ünï Code  and\n\tspaces, don't : 🙂"
ENCODE_CHUNK_CHARACTERS = 4_000_000
# What a tokenizer keeps where its class changes, beside its special tokens and what tokenizer.json holds.
KEPT_SETTINGS = (
    "chat_template",
    "clean_up_tokenization_spaces",
    "extra_special_tokens",
    "model_input_names",
    "model_max_length",
    "padding_side",
    "truncation_side",
)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a directory or the Hub.

    Raises:
        SettingError: nothing there, or a tokenizer without a fast (Rust) backend.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, TypeError ... for a missing one
        reason = str(error).strip().partition("\n")[0]
        raise SettingError(
            f"tokenizer_name={name!r} could not be loaded ({reason}): give a directory that save_pretrained wrote, "
            "or a Hub id."
        ) from error
    if not tokenizer.is_fast:
        raise SettingError(f"tokenizer_name={name!r} has no fast version: choose one with a tokenizer.json.")
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= len(tokenizer):
        raise SettingError(
            f"tokenizer_name={name!r} has {len(tokenizer)} tokens and an id of {largest}: number them without gaps."
        )
    return tokenizer


def check_mask(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise SettingError where the tokenizer that `tokenizer_name` names has no mask token."""
    if tokenizer.mask_token_id is None:
        raise SettingError(
            f"tokenizer_name {name!r} has no mask token, behind which the objective hides words; take another."
        )


def check_fit(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Look whether a checkpoint's tokenizer is its own.

    Raises:
        SettingError: There is none, or it has more ids than the model has embeddings.
    """
    if len(tokenizer.get_vocab()) <= len(set(tokenizer.all_special_ids)):
        # Without its files transformers makes one that knows its special tokens only.
        raise SettingError("model_name_or_path has no tokenizer; put the one there that the model was trained with.")
    num_ids = max(tokenizer.get_vocab().values()) + 1
    vocab_size = getattr(config.get_text_config(), "vocab_size", None)
    if vocab_size is not None and num_ids > vocab_size:
        raise SettingError(
            f"The tokenizer of model_name_or_path has {num_ids} ids and the model {vocab_size}; "
            "put the tokenizer there that the model was trained with."
        )


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Encodes documents without special tokens, on all cores.

    Text that spells a special token is ordinary text here. A lone surrogate counts as U+FFFD.

    Returns:
        tokens: (sum of lengths,) uint32, the documents one after another.
        lengths: (len(texts),) int64, tokens of each document; 0 for an empty one.
    """
    parts, lengths = [], []
    with plain_backend(tokenizer) as backend:
        for chunk in chunk_texts(texts):
            for encoding in encode_chunk(backend, chunk):
                parts.append(np.array(encoding.ids, dtype=np.uint32))
                lengths.append(len(parts[-1]))
    tokens = np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint32)
    return tokens, np.array(lengths, dtype=np.int64)


def special_layout(tokenizer: PreTrainedTokenizerBase, kind: ObjectiveKind) -> tuple[list[int], list[int]]:
    """Ids the packer puts before and after each piece: encoder ([CLS], [SEP]); decoder (<bos>, nothing).

    A decoder's tokenizer without a start token (Qwen's) lends its end token.

    Raises:
        SettingError: the tokenizer lacks the special tokens of this kind.
    """
    if kind == "encoder":
        if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
            raise SettingError(
                "tokenizer_name: this tokenizer has no [CLS] and [SEP], which an encoder's objective needs."
            )
        return [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise SettingError(
            "tokenizer_name: this tokenizer has no start or end token, which a decoder's objective needs."
        )
    return [start], []


def build_template(backend: Tokenizer, start: str, end: str | None) -> processors.TemplateProcessing:
    """What a call adds: `start A end` and `start A end B end`; without an end `start A` and `start A start B`."""
    if end is not None:
        single, pair = f"{start} $A {end}", f"{start} $A {end} $B:1 {end}:1"
    else:
        single, pair = f"{start} $A", f"{start} $A {start}:1 $B:1"
    special_tokens = [(token, backend.token_to_id(token)) for token in dict.fromkeys((start, end)) if token]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=special_tokens)


def adopt_layout(tokenizer: PreTrainedTokenizerBase, kind: ObjectiveKind, row_length: int) -> PreTrainedTokenizerBase:
    """A copy that makes inputs like the pieces that the model sees in pretraining: as long, with their special tokens.

    `model_max_length` is at most the row length: positions beyond it are not trained, and truncation stops there.
    A decoder's tokenizer from elsewhere often sets no start token (GPT-2's, Qwen's) or an end token. What generates,
    scores and fine-tunes calls the tokenizer that is saved with the model. An encoder's is changed where it adds none;
    another order of them (XLNet's) is its architecture's own.

    Returns:
        Of the same class, or a `PreTrainedTokenizerFast`: other classes may build their own template when loaded.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = min(tokenizer.model_max_length, row_length)
    prefix, suffix = special_layout(tokenizer, kind)
    ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    called = tokenizer("a")["input_ids"]
    if called == [*prefix, *ids, *suffix] or (kind == "encoder" and called != ids):
        return tokenizer
    backend = tokenizer.backend_tokenizer
    start, *end = tokenizer.convert_ids_to_tokens([*prefix, *suffix])
    template = build_template(backend, start, *end or [None])
    given = backend.post_processor  # GPT-2's trims the spaces off offsets
    is_of_offsets = isinstance(given, processors.ByteLevel)
    backend.post_processor = processors.Sequence([given, template]) if is_of_offsets else template
    settings = {name: getattr(tokenizer, name) for name in KEPT_SETTINGS}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings, **tokenizer.special_tokens_map)


def unknown_rate(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> float:
    """Fraction of tokens that are [UNK]; 0.0 for byte-level tokenizers and for no text."""
    tokens, _ = encode_documents(tokenizer, texts)
    if tokenizer.unk_token_id is None or not len(tokens):
        return 0.0
    return float(np.mean(tokens == tokenizer.unk_token_id))


def keeps_text(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text comes back from its ids as it was, so that their probabilities are those of its bytes."""
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False).removeprefix(" ") == PROBE


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits over everything that decides ids; padding and truncation left by the last call do not count."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("padding", None)
    state.pop("truncation", None)
    state["special_tokens"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokenizer]:
    """The Rust tokenizer, with special tokens off in text, no truncation and no padding."""
    backend = tokenizer.backend_tokenizer
    kept = backend.encode_special_tokens
    # transformers sets truncation and padding anew at each call, so these need no restoring.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    try:
        yield backend
    finally:
        backend.encode_special_tokens = kept


def chunk_texts(texts: list[str]) -> Iterator[list[str]]:
    """Runs of texts of a few million characters, which bounds the memory of encodings."""
    chunk, num_characters = [], 0
    for text in texts:
        chunk.append(text)
        num_characters += len(text)
        if num_characters >= ENCODE_CHUNK_CHARACTERS:
            yield chunk
            chunk, num_characters = [], 0
    if chunk:
        yield chunk


def encode_chunk(backend: Tokenizer, texts: list[str]) -> list:
    """One encoding a text, without special tokens."""
    try:
        return backend.encode_batch_fast(texts, add_special_tokens=False)
    except (TypeError, UnicodeEncodeError):
        # The whole batch is refused for one lone surrogate.
        return backend.encode_batch_fast([replace_surrogates(text) for text in texts], add_special_tokens=False)


def replace_surrogates(text: str) -> str:
    """Lone surrogates, as broken JSON escapes give, have no UTF-8 form: each becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
