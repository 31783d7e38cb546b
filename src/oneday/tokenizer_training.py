"""Train tokenizers: WordPiece, byte-level BPE, byte-level Unigram.

A trained tokenizer is a plain `PreTrainedTokenizerFast`: `save_pretrained` writes what `AutoTokenizer` reads. Special
tokens have the first ids. What a call adds follows the kind of model the tokenizer was trained for:

    encoder   tokenizer(a)     [CLS] a [SEP]           tokenizer(a, b)   [CLS] a [SEP] b [SEP]
    decoder   tokenizer(a)     <|endoftext|> a         tokenizer(a, b)   <|endoftext|> a <|endoftext|> b

A decoder starts every text with its start token, as each packed piece does in pretraining, so that generation and
scoring start from a state the model knows; the same token parts a pair. Nothing follows the text, so that a prompt is
open for generation, and a classifier reads the text's last token. The vocabulary keeps its size here: rounding it up
for the hardware is the model's business.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from oneday.errors import SettingError
from oneday.tokenization import ObjectiveKind, build_template, chunk_texts, replace_surrogates

ENCODER_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
END_OF_TEXT = "<|endoftext|>"
DECODER_TOKENS = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": "<|pad|>"}
DEFAULT_KIND: dict[str, ObjectiveKind] = {"wordpiece": "encoder", "bpe": "decoder", "unigram": "encoder"}

# Characters beyond these shares of the text are left to [UNK]; below the second a vocabulary is called too small.
ALPHABET_COVERAGE = 0.9999
LEAST_COVERAGE = 0.99
MIN_FREQUENCY = 2
# Sums over threads differ near 1e-11 from run to run; rounded scores do not.
UNIGRAM_SCORE_DECIMALS = 3


def train_tokenizer(
    texts: Iterable[str],
    tokenizer_type: str,
    vocab_size: int,
    lowercase: bool = True,
    objective_kind: ObjectiveKind | None = None,
) -> PreTrainedTokenizerFast:
    """Trains a tokenizer; the same texts give the same tokenizer in every process.

    Args:
        texts: documents; all of them are held in memory.
        tokenizer_type: `wordpiece` (BERT's normaliser and words), `bpe` (bytes, GPT-2's word pattern) or `unigram`
            (the same bytes and words, Unigram language model). The last two give every text back exactly.
        vocab_size: tokens, special ones included; the result has exactly this many.
        lowercase: lower-case and strip accents (wordpiece only).
        objective_kind: whose special tokens and template it gets; default encoder, for bpe decoder. A unigram
            tokenizer carries the special tokens of both, and the kind only chooses the template.

    Raises:
        SettingError: unknown type, no text, or a vocabulary that is too large or too small for the text.
    """
    kind = objective_kind or DEFAULT_KIND.get(tokenizer_type)
    if kind is None:
        raise SettingError(f"tokenizer_type={tokenizer_type!r} is not known: use wordpiece, bpe or unigram.")
    texts = [replace_surrogates(text) for text in texts if text.strip()]
    if not texts:
        raise SettingError("The tokenizer has no text to train on: dataset_name gave only empty documents.")
    names = choose_special_tokens(tokenizer_type, kind)
    specials = list(dict.fromkeys(names.values()))
    if tokenizer_type == "wordpiece":
        backend = train_wordpiece(texts, vocab_size, lowercase, specials)
    else:
        backend = train_byte_level(texts, tokenizer_type, vocab_size, specials)
    check_size(backend, vocab_size)
    return wrap_backend(backend, tokenizer_type, kind, names)


def choose_special_tokens(tokenizer_type: str, kind: ObjectiveKind) -> dict[str, str]:
    """Attribute -> special token, in the order of their ids. Only unigram serves both kinds at once."""
    if tokenizer_type == "bpe" and kind == "decoder":
        return dict(DECODER_TOKENS)
    needs_ends = kind == "decoder" or tokenizer_type == "unigram"
    return {**ENCODER_TOKENS, **({"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT} if needs_ends else {})}


def train_wordpiece(texts: list[str], vocab_size: int, lowercase: bool, specials: list[str]) -> Tokenizer:
    """Trains with the ids of all single characters fixed beforehand: left alone, the trainer numbers the ##characters
    in the order of a hash map, and ties between merges, which follow ids, fall differently in each process."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=ENCODER_TOKENS["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    forms = choose_alphabet(texts, tokenizer, vocab_size, len(specials))
    alphabet = [form for form in forms if len(form) == 1]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=specials + forms,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The characters were special tokens for the trainer only: a fresh tokenizer forgets that.
    fresh = Tokenizer(models.WordPiece(tokenizer.get_vocab(), unk_token=ENCODER_TOKENS["unk_token"]))
    fresh.normalizer, fresh.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    fresh.decoder = decoders.WordPiece(cleanup=False)
    return fresh


def choose_alphabet(texts: list[str], tokenizer: Tokenizer, vocab_size: int, num_specials: int) -> list[str]:
    """The most frequent characters that cover the text, then the ## forms of those that can stand inside a word."""
    counts = count_characters(texts, tokenizer.normalizer)
    total, covered, size, num_needed, forms = sum(counts.values()), 0, num_specials, 0, []
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= ALPHABET_COVERAGE * total:
            break
        # An ideograph or a sign is a word of its own and never continues one.
        joins = len(tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str("a" + character))) == 1
        size += 1 + joins
        if size <= vocab_size:
            forms += [character, "##" + character] if joins else [character]
        elif covered < LEAST_COVERAGE * total:
            num_needed = size
        covered += count
    if num_needed:
        raise SettingError(
            f"vocab_size={vocab_size} is too small for the {len(counts)} different characters of the text: they need "
            f"at least {num_needed}; raise it."
        )
    return sorted(forms, key=lambda form: (len(form), form))


def count_characters(texts: list[str], normalizer: normalizers.Normalizer) -> dict[str, int]:
    """Normalised character -> count, without white space. BERT's normaliser works on each character by itself."""
    counts = np.zeros(0x110000, dtype=np.int64)
    for chunk in chunk_texts(texts):
        codes = np.frombuffer("".join(chunk).encode("utf-32-le"), dtype=np.uint32)
        counts += np.bincount(codes, minlength=len(counts))
    normalised: dict[str, int] = {}
    for code in np.flatnonzero(counts):
        for character in normalizer.normalize_str(chr(code)):
            if not character.isspace():
                normalised[character] = normalised.get(character, 0) + int(counts[code])
    return normalised


def train_byte_level(texts: list[str], tokenizer_type: str, vocab_size: int, specials: list[str]) -> Tokenizer:
    """Trains on bytes: BPE or Unigram."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + len(specials):
        raise SettingError(
            f"vocab_size={vocab_size} is too small for tokenizer_type={tokenizer_type}: {len(alphabet)} bytes and "
            f"{len(specials)} special tokens need at least {len(alphabet) + len(specials)}."
        )
    shared = {
        "vocab_size": vocab_size,
        "special_tokens": specials,
        "initial_alphabet": alphabet,
    }
    if tokenizer_type == "bpe":
        tokenizer = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(min_frequency=MIN_FREQUENCY, show_progress=False, **shared)
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(unk_token=ENCODER_TOKENS["unk_token"], show_progress=False, **shared)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer_type == "unigram":
        tokenizer.model = settle_unigram(tokenizer, vocab_size, specials)
    return tokenizer


def settle_unigram(tokenizer: Tokenizer, vocab_size: int, specials: list[str]) -> models.Unigram:
    """The same pieces with scores and ids that do not vary from run to run.

    The trainer gives the bytes it had pruned the lowest score, plus 0.0001 for each in the order of a hash map; and it
    orders equal scores the same way. Here those bytes share one score, and ids follow (score, piece). A vocabulary of
    hardly more than the bytes comes out too large: the least likely pieces of more than a byte go.
    """
    pieces = dict(map(tuple, json.loads(tokenizer.to_str())["model"]["vocab"]))
    ordinary = {piece: score for piece, score in pieces.items() if piece not in specials}
    lowest = round(min(ordinary.values()), UNIGRAM_SCORE_DECIMALS)
    pruned_below = lowest + 256 * 0.0001 + 0.001
    for piece, score in ordinary.items():
        is_pruned_byte = len(piece) == 1 and score <= pruned_below
        ordinary[piece] = lowest if is_pruned_byte else round(score, UNIGRAM_SCORE_DECIMALS)
    ranked = sorted(ordinary.items(), key=lambda item: (-item[1], item[0]))
    longer = [item for item in ranked if len(item[0]) > 1]
    num_bytes = len(ranked) - len(longer)
    surplus = set(longer[max(0, vocab_size - len(specials) - num_bytes) :])
    ranked = [item for item in ranked if item not in surplus]
    unk_id = specials.index(ENCODER_TOKENS["unk_token"])
    return models.Unigram([(token, 0.0) for token in specials] + ranked, unk_id=unk_id, byte_fallback=False)


def check_size(backend: Tokenizer, vocab_size: int) -> None:
    """Raise SettingError where the text gave fewer tokens than were asked for."""
    reached = backend.get_vocab_size()
    if reached < vocab_size:
        raise SettingError(
            f"vocab_size={vocab_size} is larger than the text supports: {reached} tokens were found; lower it to at "
            f"most {reached}, or train on more text."
        )


def wrap_backend(
    backend: Tokenizer, tokenizer_type: str, kind: ObjectiveKind, names: dict[str, str]
) -> PreTrainedTokenizerFast:
    """What transformers reads: special tokens and the template of a call."""
    # A byte-level word carries its space, so a mask that stands for the word takes the space before it, as RoBERTa's.
    tokens = [
        AddedToken(token, lstrip=token == "[MASK]" and tokenizer_type != "wordpiece", normalized=False, special=True)
        for token in dict.fromkeys(names.values())
    ]
    backend.add_special_tokens(tokens)
    by_content = {token.content: token for token in tokens}
    start, end = ("[CLS]", "[SEP]") if kind == "encoder" else (END_OF_TEXT, None)
    backend.post_processor = build_template(backend, start, end)
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_input_names=inputs if tokenizer_type == "wordpiece" else [inputs[0], inputs[2]],
        **{name: by_content[token] for name, token in names.items()},
    )
