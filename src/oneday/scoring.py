"""Log-probabilities of texts under a stock model, in batches.

A causal model gives a continuation the sum of log P(token | what is before it). A masked model gives it the sum of
log P(token | all others), each token masked in turn: the pseudo-log-likelihood of Salazar et al. 2020 (ACL, "Masked
Language Model Scoring").
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from oneday import run_directory as rundir
from oneday.attention import count_positions
from oneday.checkpoints import STATE
from oneday.cross_entropy import chunk_rows
from oneday.durable_files import read_json
from oneday.errors import SettingError, describe_error
from oneday.hub import fetch_results
from oneday.modeling import OWN_ATTENTION, model_kind
from oneday.objectives import SelectedPositions
from oneday.recipe import read_yaml
from oneday.tokenization import check_fit, keeps_text, special_layout

logger = logging.getLogger(__name__)

BAR_SECONDS = 3.0
TEXTS_AT_ONCE = 1000
# On a CPU a forward pass of so many tokens stays in its caches.
CPU_TOKENS = 2048


@dataclass(frozen=True)
class Score:
    """What a model says of one continuation.

    Attributes:
        nats: Sum of -log P over its tokens.
        num_tokens: Its tokens.
        is_greedy: Every token is the most probable one in its place.
    """

    nats: float
    num_tokens: int
    is_greedy: bool


@dataclass(frozen=True)
class TokenSequence:
    """Token ids, and the places in them that are scored."""

    ids: list[int]
    places: range


class Scorer:
    """Scores texts with a causal or a masked model.

    Args:
        model: A stock model with a word head.
        tokenizer: Its tokenizer.
        batch_tokens: Most tokens of one forward pass, padding included.
        text_length: Longest text or context with its continuation, special tokens included: the length that the model
            was trained on. None: all of its positions.
        bf16: Run the model's layers in bfloat16 (autocast); the losses stay in float32, and the word head where it is
            a product alone (not one that also caps or scales its logits).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_tokens: int = 8192,
        text_length: int | None = None,
        bf16: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.batch_tokens, self.bf16 = model.eval(), tokenizer, batch_tokens, bf16
        self.kind = model_kind(model.config)
        self.prefix, self.suffix = special_layout(tokenizer, self.kind)
        if self.kind == "encoder" and tokenizer.mask_token_id is None:
            raise SettingError("The tokenizer of model_name_or_path has no mask token; a masked model needs one.")
        # Like lm-evaluation-harness: a start token where the tokenizer sets one itself, or where nothing else stands.
        self.sets_start = self.kind == "encoder" or tokenizer("a")["input_ids"][:1] == self.prefix
        self.max_length = count_positions(model) or batch_tokens
        self.text_length = min(self.max_length, text_length or self.max_length)
        self.selected = SelectedPositions(model)

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """The score of each (context, continuation)."""
        return self.score_sequences(self.encode(pairs))

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[TokenSequence]:
        """Ids with the continuation's places; what is too long loses its beginning.

        A space between the two belongs to the continuation, and both are tokenised as one text, as
        lm-evaluation-harness does.
        """
        contexts = [context.rstrip() for context, _ in pairs]
        wholes = self.tokenize([context + continuation for context, continuation in pairs])
        known = dict.fromkeys(context for context in contexts if context)
        num_tokens = dict(zip(known, map(len, self.tokenize(list(known)))))
        sequences = []
        for context, whole in zip(contexts, wholes):
            prefix = self.prefix if self.sets_start or not context else []
            # A causal model is not fed the last token, so that one more fits.
            room = self.text_length - len(self.suffix) + (self.kind == "decoder")
            kept = len(prefix) if self.kind == "encoder" else 0  # [CLS] stays, a start token may go
            cut = max(0, len(prefix) + len(whole) - room)
            ids = [*prefix[:kept], *[*prefix, *whole][kept + cut :]]
            start = max(kept, len(prefix) + num_tokens.get(context, 0) - cut)
            sequences.append(TokenSequence([*ids, *self.suffix], range(start, len(ids))))
        return sequences

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text without special tokens; what spells one is ordinary text, as in pretraining."""
        quiet = dict.fromkeys(("return_attention_mask", "return_token_type_ids", "verbose"), False)
        quiet |= {"split_special_tokens": True} if self.tokenizer.is_fast else {}
        parts = (texts[at : at + TEXTS_AT_ONCE] for at in range(0, len(texts), TEXTS_AT_ONCE))
        return [ids for part in parts for ids in self.tokenizer(part, add_special_tokens=False, **quiet)["input_ids"]]

    def score_sequences(self, sequences: Sequence[TokenSequence]) -> list[Score]:
        """Scores in the order given; computed from the longest to the shortest, with a bar where it takes long."""
        rows = self.spread(sequences)
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index][1]))
        nats, greedy = np.zeros(len(sequences)), np.ones(len(sequences), dtype=bool)
        with tqdm(total=len(rows), desc="scoring", unit="rows", delay=BAR_SECONDS, leave=False) as bar:
            while order:
                length = len(rows[order[0]][1])
                tokens = self.batch_tokens
                if self.model.device.type == "cpu":
                    tokens = min(tokens, CPU_TOKENS)
                if self.selected.projection is None:  # the head gives all logits at once
                    tokens = min(tokens, chunk_rows(self.model.device.type, self.selected.num_words))
                count = max(1, tokens // length)
                part, order = order[:count], order[count:]
                for number, loss, is_best in self.score_rows([rows[index] for index in part]):
                    nats[number] += loss
                    greedy[number] &= is_best
                bar.update(len(part))
        if not np.isfinite(nats).all():
            raise SettingError("The model gives log-probabilities that are not finite; its weights are damaged.")
        return [Score(float(n), len(s.places), bool(g)) for n, s, g in zip(nats, sequences, greedy)]

    def spread(self, sequences: Sequence[TokenSequence]) -> list[tuple[int, list[int], list[int], list[int]]]:
        """(number of the sequence, ids, places that are read, ids that should stand there) of each forward row.

        A causal model reads all of a sequence in one row, each token in the place before it. A masked one reads a row
        for each token.
        """
        rows = []
        for number, sequence in enumerate(sequences):
            places = [place for place in sequence.places if place > 0]
            targets = [sequence.ids[place] for place in places]
            if self.kind == "decoder":
                rows.append((number, sequence.ids[:-1], [place - 1 for place in places], targets))
            else:  # the ids are shared; the mask is set in the batch
                rows += [(number, sequence.ids, [place], [target]) for place, target in zip(places, targets)]
        return [row for row in rows if row[2]]

    @torch.no_grad()
    def score_rows(self, rows: list[tuple[int, list[int], list[int], list[int]]]) -> list[tuple[int, float, bool]]:
        """(number of the sequence, nats, whether greedy) of each row."""
        device, length = self.model.device, max(len(ids) for _, ids, _, _ in rows)
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.full((len(rows), length), pad)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for row, (_, own, places, _) in enumerate(rows):
            ids[row, : len(own)] = torch.tensor(own)
            mask[row, : len(own)] = 1
            if self.kind == "encoder":
                ids[row, places[0]] = self.tokenizer.mask_token_id
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if self.kind == "decoder":
            inputs["use_cache"] = False
        positions = torch.tensor(
            [row * length + place for row, (_, _, places, _) in enumerate(rows) for place in places]
        )
        targets = torch.tensor([target for _, _, _, own in rows for target in own], device=device)
        owners = np.repeat(np.arange(len(rows)), [len(places) for _, _, places, _ in rows])
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            states = self.selected.run(self.model, inputs, positions.to(device)).float()
        losses, best = [], []
        at_once = chunk_rows(device.type, self.selected.num_words)
        for part, own in zip(states.split(at_once), targets.split(at_once)):
            logits = self.selected.logits(part).float()
            losses.append(torch.nn.functional.cross_entropy(logits, own, reduction="none"))
            best.append(logits.argmax(-1) == own)
        losses, best = (torch.cat(parts).cpu().numpy() for parts in (losses, best))
        nats = np.bincount(owners, weights=losses, minlength=len(rows))
        wrong = np.bincount(owners, weights=~best, minlength=len(rows))
        return [(number, nats[row], wrong[row] == 0) for row, (number, _, _, _) in enumerate(rows)]

    def score_texts(self, texts: Sequence[str]) -> dict[str, float]:
        """Measures of whole texts: `loss` (nats per token), `perplexity` and `bits_per_byte`.

        The last of a causal model whose tokenizer loses nothing of a text.

        Texts longer than `text_length` are cut into pieces, each with the special tokens around it.
        """
        room = self.text_length - len(self.prefix) - len(self.suffix)
        pieces = []
        for ids in self.tokenize(list(texts)):
            for start in range(0, len(ids), room):
                part = ids[start : start + room]
                first = len(self.prefix)
                pieces.append(TokenSequence([*self.prefix, *part, *self.suffix], range(first, first + len(part))))
        scores = self.score_sequences(pieces)
        nats, tokens = sum(score.nats for score in scores), sum(score.num_tokens for score in scores)
        loss = nats / max(1, tokens)
        measures = {"loss": loss, "perplexity": float(np.exp(loss)), "num_tokens": tokens}
        if self.kind == "decoder" and keeps_text(self.tokenizer):
            measures["bits_per_byte"] = nats / np.log(2) / max(1, sum(len(text.encode()) for text in texts))
        return measures


def load_scorer(name: str, batch_tokens: int, device: torch.device, bf16: bool = False) -> Scorer:
    """A scorer for a checkpoint.

    Raises:
        SettingError: When it cannot be loaded, or has no head that predicts words.
    """
    try:
        config, tokenizer = AutoConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    except Exception as error:  # configs and tokenizers refuse in many ways
        raise SettingError(describe_load_error(name, error)) from None
    check_fit(tokenizer, config)
    if config.model_type in OWN_ATTENTION:
        raise SettingError(
            f"model_name_or_path {name} is a {config.model_type} model, which reads in no fixed order; take another."
        )
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise SettingError(
            f"model_name_or_path {name} is a {config.model_type} model, which predicts no words; take another."
        )
    auto_class = AutoModelForMaskedLM if model_kind(config) == "encoder" else AutoModelForCausalLM
    try:
        model, info = auto_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # no weights, damaged ones, other sizes: each library has its own errors
        raise SettingError(describe_load_error(name, error)) from None
    if info["missing_keys"]:
        raise SettingError(
            f"model_name_or_path {name} has no trained word head ({sorted(info['missing_keys'])[0]} is missing): it "
            "cannot score texts; fine-tune it instead."
        )
    trained_length = find_trained_length(name)
    scorer = Scorer(model.to(device), tokenizer, batch_tokens, trained_length, bf16)
    if trained_length is None:
        logger.info(
            "The row length that %s was trained on is not known: texts of up to %d tokens are scored in one piece.",
            name, scorer.text_length,
        )  # fmt: skip
    return scorer


def find_trained_length(name: str) -> int | None:
    """Tokens of a row of this project's run that a checkpoint is of; None: not known.

    A run directory and a repository on the Hub have it in their results; a checkpoint of a run that goes on has the
    run's recipe beside it.
    """
    folder = Path(name)
    if not folder.is_dir():
        return read_length(fetch_results(name))
    run_dir = folder.resolve().parent if (folder / STATE).is_file() else folder
    length, recipe = read_length(read_json(run_dir / rundir.RESULTS)), run_dir / rundir.RECIPE
    return read_length(read_yaml(str(recipe))) if length is None and recipe.is_file() else length


def read_length(settings: Any) -> int | None:
    """`max_seq_length` of a run's results or recipe; None: the file is another project's."""
    length = settings.get("max_seq_length") if isinstance(settings, dict) else None
    return length if isinstance(length, int) and length > 0 else None


def describe_load_error(name: str, error: Exception) -> str:
    """One sentence for a checkpoint that cannot be loaded."""
    return f"The checkpoint {name} cannot be loaded ({describe_error(error)}); name another."
