"""Talk to what was trained: it fills masks, or goes on with a text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from transformers import TextStreamer, pipeline

from oneday.arguments import setting
from oneday.attention import count_positions
from oneday.errors import SettingError
from oneday.program import run_program
from oneday.recipe import parse_recipe
from oneday.reporting import format_filled
from oneday.scoring import Scorer, load_scorer

Answer = Callable[[str], None]

DESCRIPTION = (
    "Type a text with [MASK] for an encoder to fill, or a beginning for a decoder to go on with. Ends at Ctrl-D."
)
EXAMPLE = "python scripts/try_model.py runs/quickstart-bert --text 'The [MASK] is empty.'"


@dataclass
class TryArguments:
    """What is tried."""

    run_dir: str = setting("runs/quickstart-bert", "A run directory, or any checkpoint.", bare_words="RUN_DIR")
    text: str | None = setting(None, "One text instead of a conversation.")
    max_new_tokens: int = setting(80, "Most tokens that a decoder adds.")
    temperature: float = setting(0.8, "Sampling temperature of a decoder; 0 takes the most probable token.")
    top_p: float = setting(0.9, "A decoder chooses among the tokens that make up this probability.")

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.max_new_tokens < 1:
            raise SettingError(f"The setting max_new_tokens is {self.max_new_tokens}; it must be above zero.")
        if not 0.0 < self.top_p <= 1.0:
            raise SettingError(f"The setting top_p is {self.top_p:g}; it must be above 0 and at most 1.")


def main() -> None:
    """Answer one text, or every line that is typed."""
    (args,) = parse_recipe((TryArguments,), description=DESCRIPTION, example=EXAMPLE)
    try:
        scorer = load_scorer(args.run_dir, batch_tokens=1024, device=torch.device("cpu"))
    except SettingError as error:
        raise SettingError(str(error).replace("model_name_or_path", "run_dir")) from None
    make = make_filler if scorer.kind == "encoder" else make_writer
    answer = make(args, scorer)
    for text in [args.text] if args.text is not None else read_lines():
        answer(text)


def read_lines() -> Iterable[str]:
    """Lines as they are typed."""
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line:
            yield line


def make_filler(args: TryArguments, scorer: Scorer) -> Answer:
    """Fills each mask of a text."""
    tokenizer, limit = scorer.tokenizer, scorer.max_length
    fill = pipeline("fill-mask", model=scorer.model, tokenizer=tokenizer, top_k=5, device="cpu")

    def answer(text: str) -> None:
        text = text.replace("[MASK]", tokenizer.mask_token)
        if tokenizer.mask_token not in text:
            sys.stdout.write(f"  put {tokenizer.mask_token} where a word is to be found\n")
            return
        if len(tokenizer(text)["input_ids"]) > limit:
            sys.stdout.write(f"  more than the {limit} tokens that the model reads: put in less\n")
            return
        guesses = fill(text)
        for each in guesses if isinstance(guesses[0], list) else [guesses]:
            sys.stdout.write(format_filled(text, each) + "\n")

    return answer


def make_writer(args: TryArguments, scorer: Scorer) -> Answer:
    """Goes on with a text, token by token; of a long one the end is read."""
    model, tokenizer = scorer.model, scorer.tokenizer
    limit = count_positions(model)
    if limit is not None and limit <= args.max_new_tokens:
        raise SettingError(f"max_new_tokens is {args.max_new_tokens}, but the model has {limit} positions; lower it.")
    choice = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    settings = choice if args.temperature > 0 else {"do_sample": False}

    def answer(text: str) -> None:
        inputs = tokenizer(text, return_tensors="pt")
        if limit is not None:
            inputs = {name: value[:, args.max_new_tokens - limit :] for name, value in inputs.items()}
        streamer = TextStreamer(tokenizer, skip_special_tokens=True)
        with torch.no_grad():
            model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], streamer=streamer,
                max_new_tokens=args.max_new_tokens, pad_token_id=tokenizer.pad_token_id, **settings,
            )  # fmt: skip

    return answer


if __name__ == "__main__":
    run_program(main)
