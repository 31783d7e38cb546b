"""Scores of zero-shot tasks: accuracies with their errors, as a file and as a table."""

from __future__ import annotations

import itertools
import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pvariance
from typing import Any

from oneday.arguments import DataArguments, setting
from oneday.classification import hex_digest
from oneday.corpus import load_part
from oneday.corpus_names import name_corpus, split_names
from oneday.durable_files import read_json, write_json
from oneday.errors import SettingError, check_positive
from oneday.scoring import Score, Scorer
from oneday.zero_shot import Question, load_task

logger = logging.getLogger(__name__)


@dataclass
class EvaluateArguments:
    """What is evaluated, without training."""

    model_name_or_path: str = setting("runs/quickstart-gpt", "A checkpoint: directory or Hub id.")
    task_names: list[str] | None = setting(
        None, "Zero-shot tasks, comma-separated: blimp, lambada_openai, piqa, arc_easy ..., or files of your own."
    )
    task_data_dir: str | None = setting(
        None, "Directory with TASK.jsonl or TASK/*.jsonl (also .gz, .xz); empty: from the Hub."
    )
    text_name: str | None = setting(
        None,
        "Text to measure perplexity and bits per byte on: python-docs (built in), a Hub id, or a file, directory or "
        "glob of .txt .jsonl .csv .parquet; several, comma-separated.",
    )
    text_column: str = setting("text", "Column that holds the text.")
    dataset_config_name: str | None = setting(
        None, "Configuration of the Hub data sets in text_name; of one alone: user/name:20231101.en."
    )
    dataset_split: str = setting("validation", "Split of the Hub data sets in text_name, and of python-docs.")
    streaming: bool = setting(
        False, "Read Hub data sets as streams, max_examples documents of them, instead of downloading them first."
    )
    max_examples: int | None = setting(
        None, "Only so many questions of each task, evenly spread, and the first so many documents of each text."
    )
    batch_tokens: int = setting(8192, "Most tokens of one forward pass; a CPU takes 2,048.")
    bf16: bool = setting(
        False,
        "Run the model's layers in bfloat16, faster on GPUs and on CPUs with bf16 units; losses stay in float32, and "
        "the head where it is a product alone. The results say so.",
    )
    output_dir: str | None = setting(
        None, "Where the results are written; empty: the checkpoint's directory, where it is one."
    )
    num_threads: int | None = setting(None, "CPU threads; empty: all usable cores.")

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        for name in ("batch_tokens", "max_examples", "num_threads"):
            check_positive(name, getattr(self, name))
        if not self.task_names and self.text_name is None:
            raise SettingError("Nothing is to be evaluated; set task_names, say blimp,piqa, or text_name.")
        if self.streaming and self.max_examples is None:
            raise SettingError("The setting streaming is true and max_examples is empty; say how many documents.")


def evaluate_task(scorer: Scorer, questions: Sequence[Question]) -> dict[str, Any]:
    """Accuracies of one task: what `credit` gives on average.

    Returns:
        `accuracy` (by the summed log-probability), `standard_error`, `chance`, `num_questions`; `accuracy_norm` (by
        the log-probability a character) where contexts are the same; `perplexity` of the right continuation (not of
        its tokens) where there is only one; `groups` where questions have some.
    """
    scores = scorer.score([pair for question in questions for pair in question.pairs])
    ends = [0]
    for question in questions:
        ends.append(ends[-1] + len(question.pairs))
    parts = [scores[start:end] for start, end in zip(ends, ends[1:])]
    points = [credit(question, part) for question, part in zip(questions, parts)]
    results: dict[str, Any] = {
        "accuracy": fmean(points),
        "standard_error": math.sqrt(pvariance(points) / max(1, len(points) - 1)),
        "chance": fmean(1 / len(q.pairs) if len(q.pairs) > 1 else 0.0 for q in questions),
        "num_questions": len(questions),
    }
    if all(len(question.pairs) == 1 for question in questions):
        results["perplexity"] = math.exp(min(700.0, fmean(score.nats for score in scores)))
    elif all(question.pairs[0][0] for question in questions) and not shares_ending(questions):
        results["accuracy_norm"] = fmean(
            credit(question, part, question.lengths) for question, part in zip(questions, parts)
        )
    if any(question.group for question in questions):
        groups: dict[str, list[float]] = defaultdict(list)
        for question, own in zip(questions, points):
            groups[question.group].append(own)
        results["groups"] = {name: fmean(group) for name, group in sorted(groups.items())}
    return results


def credit(question: Question, scores: Sequence[Score], lengths: Sequence[int] | None = None) -> float:
    """1 where the right choice is the most probable one, else 0; of several equal ones each has its share of the 1.

    lm-evaluation-harness takes the first of them, which in a minimal pair is always the right one.
    """
    if len(scores) == 1:
        return float(scores[0].is_greedy)
    nats = [score.nats / length for score, length in zip(scores, lengths or [1] * len(scores))]
    best = [choice for choice, own in enumerate(nats) if own == min(nats)]
    return 1 / len(best) if question.gold in best else 0.0


def shares_ending(questions: Sequence[Question]) -> bool:
    """Whether the choices differ in their contexts, so that there is nothing to normalise."""
    return all(len({continuation for _, continuation in question.pairs}) == 1 for question in questions)


def run_evaluation(
    scorer: Scorer, args: EvaluateArguments, facts: dict[str, Any], environment: dict[str, Any], path: Path
) -> dict[str, Any]:
    """Score what the settings name; what is finished is in the file at once, and is not scored again.

    All tasks and texts are read before the first is scored.

    Args:
        scorer: Of the checkpoint.
        args: The settings.
        facts: What the file says beside the scores; `weights_hash` and `architecture_hash` tell whose they are.
        environment: Hardware, versions and commit, which each score gets.
        path: The file.

    Returns:
        What the file holds then, scores of earlier calls with the same weights among it.

    Raises:
        SettingError: When a task or a text cannot be read.
    """
    tasks = {name: load_task(name, args.task_data_dir, args.max_examples) for name in args.task_names or []}
    text = None if args.text_name is None else read_texts(args)
    results = keep_earlier({**facts, "tasks": {}}, read_json(path))
    source = "hub" if args.task_data_dir is None else "files"
    for name, questions in tasks.items():
        asked = [(question.pairs, question.gold, question.group) for question in questions]
        key = hex_digest(repr(asked) + facts["architecture_hash"] + "bf16" * args.bf16)
        entry = results["tasks"].get(name, {})
        if entry.get("questions_hash") == key:
            logger.info("%s: these questions have been scored; without %s they are scored anew", name, path)
        else:
            logger.info("%s: %s questions", name, f"{len(questions):,}")
            scored = {"questions_hash": key, "bf16": args.bf16, "environment": environment}
            entry = evaluate_task(scorer, questions) | scored
        results["tasks"][name] = entry | {"max_examples": args.max_examples, "source": source}
        write_json(path, results)
    if text is not None:
        name, documents = text
        read = {"name": name, "dataset_split": args.dataset_split, "max_examples": args.max_examples}
        results["text"] = {**read, **scorer.score_texts(documents), "bf16": args.bf16, "environment": environment}
    write_json(path, results)
    return results


def read_texts(args: EvaluateArguments) -> tuple[str, list[str]]:
    """The public name of the text to measure on, and the first `max_examples` documents of each of its parts.

    Blank ones do not count.

    Raises:
        SettingError: When it cannot be read, or holds no text.
    """
    assert args.text_name
    data_args = DataArguments(
        dataset_config_name=args.dataset_config_name, text_column=args.text_column, streaming=args.streaming
    )
    names = split_names(args.text_name)
    try:
        parts = [load_part(name, data_args, args.dataset_split) for name in names]
        texts = [row["text"] for part in parts for row in itertools.islice(part, args.max_examples)]
    except SettingError as error:
        raise SettingError(str(error).replace("dataset_name", "text_name")) from None
    if not texts:
        raise SettingError(f"text_name {args.text_name!r} holds no text; look at it, and at dataset_split.")
    return name_corpus(names, data_args), texts


def keep_earlier(results: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """The results with those of other tasks that the file held before, if of the same model and tokenizer."""
    # Of an older version it says nothing of config and tokenizer.
    is_same_model = earlier.get("architecture_hash", results["architecture_hash"]) == results["architecture_hash"]
    if earlier.get("weights_hash") != results["weights_hash"] or not is_same_model:
        if earlier:
            logger.info(
                "The file held scores of another model or tokenizer, %s: replaced.",
                ", ".join(earlier["tasks"]) or "a text",
            )
        return results
    text = {"text": earlier["text"]} if "text" in earlier else {}
    return text | results | {"tasks": earlier["tasks"] | results["tasks"]}


def name_measure(results: dict[str, Any]) -> str:
    """By what choices were compared."""
    return "pseudo-log-likelihood" if results.get("kind") == "encoder" else "log-likelihood"


def format_zero_shot(results: dict[str, Any]) -> str:
    """The table, in 80 columns."""
    lines = [
        f"{results['model']}, {name_measure(results)}",
        f"{'task':24}{'questions':>10}{'chance':>9}{'accuracy':>10}{'+-':>6}{'a character':>16}",
        "-" * 78,
    ]
    for name, task in results["tasks"].items():
        shown = f"{100 * task['accuracy_norm']:.1f}" if "accuracy_norm" in task else ""
        shown = f"ppl {task['perplexity']:,.3g}" if "perplexity" in task else shown
        lines.append(
            f"{name[:23]:24}{task['num_questions']:>10,}{100 * task['chance']:>9.1f}{100 * task['accuracy']:>10.1f}"
            f"{100 * task['standard_error']:>6.1f}{shown:>16}".rstrip()
        )
    text = results.get("text")
    if text:
        bits = f", {text['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in text else ""
        name = text["name"].rpartition("/")[2]
        lines.append(f"{name[:20]}: loss {text['loss']:.4f}, perplexity {text['perplexity']:,.4g}{bits}")
    lines.append("-" * 78)
    in_bf16 = [name for name, task in results["tasks"].items() if task.get("bf16")]
    in_bf16 += [text["name"].rpartition("/")[2]] if text and text.get("bf16") else []
    if in_bf16:
        lines.append(f"in bfloat16: {', '.join(in_bf16)}")
    lines.append("accuracy: by summed log-probability; a character: divided by the choice's length")
    return "\n".join(lines)
