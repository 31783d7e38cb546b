"""What a finished run shows on the terminal: samples, and one table of 80 columns."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, pipeline

from oneday import run_directory as rundir
from oneday.budget import format_amount
from oneday.card_results import zero_shot_tasks
from oneday.durable_files import read_json
from oneday.errors import SettingError
from oneday.model_card import find_pipeline
from oneday.objectives import OBJECTIVES, Objective

MASKED_TEXTS = (
    "Return the [MASK] of elements in the list.",
    "If the argument is not a [MASK], an error is raised.",
    "This function computes the [MASK] of a matrix.",
    "The default [MASK] is used when no value is given.",
)
PROMPTS = ("This function returns", "The array is", "If the argument is None, the")
SAMPLE_SEED = 0


def format_samples(run_dir: str | Path) -> str:
    """A few filled masks of an encoder, or a few continuations of a decoder."""
    results = read_results(run_dir)
    if find_pipeline(results["objective"]) == "feature-extraction":
        return f"  (no words: a model of objective {results['objective']} fills no masks and writes no text)"
    tokenizer = AutoTokenizer.from_pretrained(run_dir)
    if results["kind"] == "encoder":
        fill = pipeline("fill-mask", model=str(run_dir), tokenizer=tokenizer, device="cpu", top_k=3)
        texts = [text.replace("[MASK]", tokenizer.mask_token) for text in MASKED_TEXTS]
        return "\n".join(format_filled(text, fill(text)) for text in texts)
    generate = pipeline("text-generation", model=str(run_dir), tokenizer=tokenizer, device="cpu")
    torch.manual_seed(SAMPLE_SEED)
    settings = {"max_new_tokens": 40, "do_sample": True, "top_p": 0.9, "top_k": 0, "temperature": 0.8}
    texts = [generate(prompt, **settings)[0]["generated_text"] for prompt in PROMPTS]
    return "\n\n".join(
        textwrap.fill(" ".join(text.split()), 78, initial_indent="  ", subsequent_indent="  ") for text in texts
    )


def format_filled(text: str, guesses: list[dict[str, Any]]) -> str:
    """`  The [MASK] is ...   -> value 0.31, result 0.12, array 0.05`"""
    words = ", ".join(f"{guess['token_str'].strip()} {guess['score']:.2f}" for guess in guesses)
    return f"  {text}\n      -> {words}"


def read_results(run_dir: str | Path) -> dict[str, Any]:
    """results.json of a run.

    Raises:
        SettingError: When the run is not there or not finished.
    """
    results = rundir.read_results(run_dir)
    if not results:
        raise SettingError(f"There is no finished run in {run_dir}; train one with scripts/pretrain.py.")
    return results


def format_report(run_dir: str | Path) -> str:
    """The table of a run: held-out numbers before and after, speed, budget, and the fine-tuning scores."""
    folder, results = Path(run_dir), read_results(run_dir)
    budget = read_json(folder / rundir.BUDGET)
    lines = [f"{'':34}{'random weights':>16}{'pretrained':>14}", "-" * 78]
    has_one_term = OBJECTIVES.get(results["objective"], Objective).loss_unit == Objective.loss_unit
    names = {
        "eval_loss": "held-out loss (nats / token)" if has_one_term else "held-out loss (weighted sum)",
        "eval_mlm_loss": "  the same at 15 % masks" if has_one_term else "  masked words at 15 % masks",
        "bits_per_byte": "bits / byte",
        "eval_masked_loss": "  of the masked words",
        "eval_discriminator_loss": "  of the discriminator",
    }
    for key, name in names.items():
        if key in results:
            lines.append(row(name, results["before"].get(key), results[key], "{:.3f}", smaller_is_better=True))
    if "eval_pair_accuracy" in results:
        before = results["before"].get("eval_pair_accuracy")
        lines.append(row("pair accuracy (floor 50.0)", before, results["eval_pair_accuracy"], "{:.1%}"))
    lines += task_rows(folder)
    lines += [
        row(f"{name} zero-shot (floor {100 * task['chance']:.1f})", None, task["accuracy"], "{:.1%}")
        for name, task, _ in zero_shot_tasks(folder)
    ]
    spent = f"{100 * budget['used_fraction']:.1f} % of {describe_limits(budget['limit'])}"
    lines += [
        "-" * 78,
        f"tokens / second  {results['tokens_per_second']:>10,.0f}     MFU {100 * results['mfu']:.1f} %     "
        f"tokens seen {results['tokens_seen'] / 1e6:.2f} M",
        f"budget used      {spent}",
        f"model            {results['model_config']}, {results['num_parameters'] / 1e6:.2f} M parameters",
        f"corpus           {results['corpus']} {results['corpus_hash']}, {results['threads']} threads",
    ]
    return "\n".join(lines)


def row(name: str, before: float | None, after: float, form: str, smaller_is_better: bool = False) -> str:
    """One line; says so where pretraining did not help."""
    shown = "" if before is None else form.format(before)
    helped = before is None or (after < before if smaller_is_better else after > before)
    return f"{name:34}{shown:>16}{form.format(after):>14}" + ("" if helped else "   no gain")


def task_rows(folder: Path) -> list[str]:
    """A line a fine-tuning task, with the floor of always answering the commonest class."""
    glue = read_json(folder / rundir.GLUE / rundir.GLUE_RESULTS)
    lines = []
    for name, task in glue.get("tasks", {}).items():
        label = f"{name} {task['metric']} (floor {100 * task['majority']:.1f})"
        before = task.get("random_weights", {}).get("median")
        lines.append(row(label, before, task["median"], "{:.1%}"))
    return lines


def describe_limits(limits: dict[str, float]) -> str:
    """`5 minutes` or `1,000,000 tokens`, joined."""
    words = [
        f"{limit / 60:,.4g} minutes" if kind == "seconds" else f"{format_amount(limit)} {kind}"
        for kind, limit in limits.items()
    ]
    return " and ".join(words)
