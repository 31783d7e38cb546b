"""Results, model card and curve of a finished run, all from its directory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from oneday import run_directory as rundir
from oneday.arguments import DataArguments, ModelArguments
from oneday.card_results import describe_loss, describe_origin, model_index, subset_mark, zero_shot_section
from oneday.corpus_names import list_hub_ids
from oneday.curves import draw_curve
from oneday.durable_files import read_json, write_json, write_whole
from oneday.evaluation import hash_evaluation
from oneday.modeling import count_parameters
from oneday.objectives import COMPANION, OBJECTIVES, Objective
from oneday.python_docs import corpus_hash
from oneday.throughput import describe_environment, measure_peak_again, peak_memory_bytes
from oneday.tokenization import hash_tokenizer

if TYPE_CHECKING:
    from oneday.preparation import PreparedData
    from oneday.trainer import BudgetTrainer

# Pipeline -> the class that loads its model, and a call.
PIPELINES = {
    "fill-mask": ("AutoModelForMaskedLM", 'pipe("The function returns a [MASK] of values.")'),
    "text-generation": ("AutoModelForCausalLM", 'pipe("The function returns", max_new_tokens=40)'),
    "feature-extraction": ("AutoModel", 'pipe("The function returns a list of values.")'),
}


def write_reports(
    trainer: BudgetTrainer,
    data: PreparedData,
    model_args: ModelArguments,
    data_args: DataArguments,
    metrics: dict[str, float],
) -> None:
    """Write results.json, the curve and the card; results.json last, as the sign of the end."""
    if not trainer.args.should_save:
        return
    folder = Path(trainer.args.output_dir)
    if trainer.args.device.type == "cpu" and trainer.args.world_size == 1:
        trainer.peak_flops = measure_peak_again(trainer.peak_flops, trainer.args.device, trainer.bf16)
    results = collect_results(trainer, data, model_args, data_args, metrics)
    draw_curve(folder)
    write_whole(folder / rundir.CARD, format_card(folder, results))
    write_json(folder / rundir.RESULTS, results)


def refresh_card(output_dir: str | Path) -> None:
    """Write the card of a finished run again, with what has been added to its directory since (scores, say)."""
    folder = Path(output_dir)
    results = rundir.read_results(folder)
    if results:
        write_whole(folder / rundir.CARD, format_card(folder, results))


def collect_results(
    trainer: BudgetTrainer,
    data: PreparedData,
    model_args: ModelArguments,
    data_args: DataArguments,
    metrics: dict[str, float],
) -> dict[str, Any]:
    """The machine-readable result of a run (contract: `results.json`)."""
    clock, args = trainer.clock, trainer.args
    parameters, without_embeddings = count_parameters(trainer.model, COMPANION)
    before = next((event for event in rundir.read_metrics(args.output_dir) if event["event"] == "eval"), {})
    before = {key: value for key, value in before.items() if key.startswith("eval_") and before["step"] == 0}
    efficiency = data.train.packing_efficiency
    return {
        **name_publicly(metrics),
        "before": name_publicly(before),
        "objective": trainer.objective.name,
        "kind": trainer.objective.kind,
        "model_config": Path(model_args.model_config).name,
        "num_parameters": parameters,
        "num_parameters_without_embeddings": without_embeddings,
        "corpus": data.corpus.name,
        "corpus_hash": data.corpus.corpus_hash,
        "hub_datasets": list_hub_ids(data_args.dataset_name),
        "validation_hash": corpus_hash(data.corpus.validation),
        "masks_hash": hash_evaluation(trainer.objective, data.validation, "eval_loss"),
        "tokenizer_hash": hash_tokenizer(data.tokenizer),
        "train_tokens_available": getattr(data.train, "num_tokens", None),
        "epochs": trainer.loader.epoch,
        **({} if efficiency is None else {"packing_efficiency": efficiency}),
        "unknown_rate": data.unknown_rate,
        "vocab_size": len(data.tokenizer),
        "max_seq_length": data_args.max_seq_length,
        "seed": args.seed,
        "threads": describe_environment(args.device)["threads"],
        "precision": trainer.describe_precision(),
        "optim": args.optimizer_name,
        "tokens_seen": clock.tokens,
        "steps": clock.steps,
        "flops": clock.flops,
        "train_seconds": trainer.clock.train_seconds,
        "preparation_seconds": data.seconds,
        "budget_used": clock.used_fraction(),
        "tokens_per_second": trainer.clock.tokens_per_second,
        "mfu": trainer.mfu,
        "peak_flops_measured": trainer.peak_flops,
        "peak_memory_bytes": peak_memory_bytes(args.device),
    }


def name_publicly(metrics: dict[str, float]) -> dict[str, float]:
    """`eval_bits_per_byte` is called `bits_per_byte` in results.json."""
    return {"bits_per_byte" if key == "eval_bits_per_byte" else key: value for key, value in metrics.items()}


def format_card(folder: Path, results: dict[str, Any]) -> str:
    """The model card: Hub metadata, then what was trained on what, for how much, with what result."""
    budget, environment = read_json(folder / rundir.BUDGET), read_json(folder / rundir.ENVIRONMENT)
    sections = [
        f"---\n{yaml.safe_dump(card_metadata(folder, results), sort_keys=False)}---",
        f"# {folder.resolve().name}",
        describe_model(results),
        "## How to use it\n\n" + usage(folder, results),
        "## Results\n\n" + results_table(results) + glue_section(folder) + zero_shot_section(folder),
        f"![Training curve]({rundir.CURVE})",
        "## Budget\n\n" + budget_table(budget),
        "## Data\n\n" + describe_data(results),
        "## Training\n\n" + training_table(results, environment),
        "## Limits\n\n" + LIMITS,
    ]
    return "\n\n".join(sections) + "\n"


LIMITS = (
    "A small model trained for a short time: it knows little, repeats what its corpus says, biases included, and is "
    "meant for study and as a start for fine-tuning. Held-out losses compare only at an equal corpus hash and "
    "tokenizer; scores of different protocols do not compare."
)


def card_metadata(folder: Path, results: dict[str, Any]) -> dict[str, Any]:
    """The YAML head that the Hub reads, with the results as `model-index`."""
    task = find_pipeline(results["objective"])
    return {
        "library_name": "transformers",
        "pipeline_tag": task,
        **describe_origin(folder, results),
        "tags": ["oneday", "pretrained-from-scratch", results["objective"]],
        "model-index": model_index(folder, results, task),
    }


def describe_model(results: dict[str, Any]) -> str:
    """The first paragraph."""
    style = "A BERT-style encoder" if results["kind"] == "encoder" else "A GPT-style decoder"
    return (
        f"{style} (`{results['model_config']}`) of {results['num_parameters'] / 1e6:.1f} M parameters "
        f"({results['num_parameters_without_embeddings'] / 1e6:.1f} M without embeddings), trained from random "
        f"weights on {results['tokens_seen'] / 1e6:.1f} M tokens in {results['train_seconds'] / 60:.1f} minutes of "
        "steps with oneday."
    )


def find_pipeline(objective: str) -> str:
    """The pipeline that a checkpoint of an objective serves."""
    return OBJECTIVES.get(objective, Objective).pipeline


def usage(folder: Path, results: dict[str, Any]) -> str:
    """Code that loads the model; with the mask of its tokenizer, which may be one from elsewhere."""
    task = find_pipeline(results["objective"])
    name, call = PIPELINES[task]
    mask = read_json(folder / "tokenizer_config.json").get("mask_token") or "[MASK]"
    call = call.replace("[MASK]", mask["content"] if isinstance(mask, dict) else mask)
    return (
        "```python\n"
        f"from transformers import AutoTokenizer, {name}, pipeline\n\n"
        f'model = {name}.from_pretrained("{rundir.PLACEHOLDER}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{rundir.PLACEHOLDER}")\n'
        f'pipe = pipeline("{task}", model=model, tokenizer=tokenizer)\n'
        f"print({call})\n```"
    )


def results_table(results: dict[str, Any]) -> str:
    """Held-out numbers before and after."""
    names = {
        "eval_loss": describe_loss(results["objective"]),
        "eval_mlm_loss": "loss at 15 % masks, all [MASK], nats a masked token",
        "bits_per_byte": "bits per byte",
        "eval_pair_accuracy": "accuracy of the pair task",
        "eval_masked_loss": "loss of the masked words, nats each",
        "eval_nsp_loss": "loss of the pair task, nats a pair",
        "eval_generator_loss": "loss of the generator, nats a masked token",
        "eval_discriminator_loss": "loss of the discriminator, nats per token",
        "eval_detection_accuracy": "accuracy of the discriminator",
    }
    rows = []
    for key, name in names.items():
        after = results.get(key)
        if after is not None:
            before = results["before"].get(key)
            rows.append((name, "" if before is None else f"{before:.3f}", f"{after:.3f}"))
    return markdown_table(("held out", "random weights", "trained"), rows)


def glue_section(folder: Path) -> str:
    """The fine-tuning scores, when there are some."""
    glue = read_json(folder / rundir.GLUE / rundir.GLUE_RESULTS)
    if not glue:
        return ""
    rows = []
    for name, task in glue["tasks"].items():
        random = task.get("random_weights", {}).get("median")
        rows.append(
            (
                name + subset_mark(task),
                task["metric"],
                f"{100 * task['median']:.1f}",
                f"{100 * min(task['scores']):.1f} to {100 * max(task['scores']):.1f}",
                "" if random is None else f"{100 * random:.1f}",
                len(task["scores"]),
            )
        )
    table = markdown_table(("task", "metric", "median", "range", "random weights", "seeds"), rows)
    average = f"{glue['average_name']}: {100 * glue['average']:.1f}"
    return f"\n\n## Fine-tuning\n\nProtocol: {glue['protocol']}.\n\n{table}\n\n{average}."


def budget_table(budget: dict[str, Any]) -> str:
    """Asked, spent, and where the seconds went."""
    spent = budget["spent"]
    rows = [
        (kind, "" if kind not in budget["limit"] else f"{budget['limit'][kind]:,.6g}", f"{value:,.6g}")
        for kind, value in spent.items()
    ]
    ledger = [(entry, f"{seconds:.1f}") for entry, seconds in budget["ledger_seconds"].items()]
    return (
        markdown_table(("budget", "asked", "spent"), rows)
        + f"\n\n{100 * budget['used_fraction']:.1f} % used. Where the seconds went:\n\n"
        + markdown_table(("entry", "seconds"), ledger)
    )


def describe_data(results: dict[str, Any]) -> str:
    """What it was trained on."""
    passes = "read as a stream"
    if results["epochs"] is not None:
        passes = f"{results['epochs']:.2f} passes over {results['train_tokens_available'] / 1e6:.1f} M tokens"
    efficiency = results.get("packing_efficiency")
    filled = f" with {100 * efficiency:.2f} % efficiency" if efficiency else ""
    return (
        f"Corpus `{results['corpus']}` (content hash `{results['corpus_hash']}`), {passes}, packed at "
        f"{results['max_seq_length']} tokens{filled}; documents in one row do not see each other. "
        "The held-out documents were never trained on. The tokenizer has "
        f"{results['vocab_size']:,} tokens; {100 * results['unknown_rate']:.3f} % of the held-out text is unknown."
    )


def training_table(results: dict[str, Any], environment: dict[str, Any]) -> str:
    """Settings, hardware and versions."""
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    count = environment.get("num_processes", 1)
    device = f"{environment['device']}, {environment['threads']} threads of {environment['cores']} cores"
    peak, memory = (
        f"{results['peak_flops_measured'] / 1e12:.2f} TFLOP/s measured",
        results["peak_memory_bytes"] / 2**30,
    )
    each = " in each process" if count > 1 else ""
    rows = [
        ("objective", results["objective"]),
        ("optimizer", results["optim"]),
        ("precision", results["precision"]),
        ("steps", f"{results['steps']:,}"),
        ("tokens per second", f"{results['tokens_per_second']:,.0f}"),
        ("MFU", f"{100 * results['mfu']:.1f} % of {peak}{each}"),
        ("peak memory", f"{memory:.2f} GiB" + (" in process 0" if each else "")),
        ("seed", results["seed"]),
        ("hardware", f"{count} processes, each with {device}" if each else device),
        ("versions", f"Python {environment['python']}, {packages}"),
        ("commit", environment["commit"]),
    ]
    return (
        markdown_table(("", ""), rows)
        + f"\n\nEvery setting stands in [`{rundir.RECIPE}`]({rundir.RECIPE}); with another output_dir it starts "
        "the same run anew."
    )


def markdown_table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = [list(head), *[list(row) for row in rows]]
    text = ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]
    return "\n".join([text[0], "|" + "---|" * len(lines[0]), *text[1:]])
