"""The fine-tuning protocol: its settings, what is checked of them, and when a result may carry its name.

The defaults are the protocol of "Cramming" (arXiv 2212.14034, section 5; its `GLUE_sane.yaml`): one setting for all
tasks, last epoch, validation split, median of 5 seeds. Results of another setting never carry its name. One thing is
not as there: rows of like length share a batch, which saves padding; there they are drawn at random.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from oneday.arguments import MAX_SEED, setting
from oneday.errors import SettingError, check_positive
from oneday.glue import expand_task_names
from oneday.run_directory import GLUE
from oneday.throughput import has_fast_bf16

logger = logging.getLogger(__name__)

CRAMMING, TUNED, PROBE = PROTOCOLS = ("cramming", "tuned", "probe")
# Those of transformers that need nothing but the number of steps.
SCHEDULES = (
    "cosine", "linear", "polynomial", "cosine_with_restarts", "inverse_sqrt", "constant_with_warmup", "constant"
)  # fmt: skip
PEFT_KINDS = ("lora", "dora", "qlora")
# Peak learning rates where none is given: cramming's for all the weights; adapters want about ten times as much.
LEARNING_RATE, ADAPTER_LEARNING_RATE, PROBE_LEARNING_RATE = 4e-5, 4e-4, 1e-3
TUNED_FACTORS = (1, 2.5, 5)
# Parts of a small task's training split that are held out in turn, at most, each with a seed of its own.
TUNED_PARTS = 5


@dataclass
class FinetuneArguments:
    """How a checkpoint is fine-tuned and scored; the defaults are the cramming protocol."""

    model_name_or_path: str = setting("", "Checkpoint to fine-tune: a run directory or a Hub id.")
    task_names: list[str] = setting(
        ["glue"], "Tasks, comma-separated; glue stands for the eight tasks of the GLUE average."
    )
    task_data_dir: str | None = setting(
        None, "Directory with <task>/<split>.parquet, .jsonl or .tsv in the Hub's column names; empty: the Hub."
    )
    task_file: str | None = setting(
        None, "A task of your own in place of task_names: a .csv, .tsv, .jsonl or .parquet file of labelled rows."
    )
    validation_file: str | None = setting(None, "Rows that are scored; empty: a tenth of task_file is held out.")
    text_columns: list[str] = setting(["text"], "Of task_file: the column of the text, or two for pairs.")
    label_column: str = setting("label", "Of task_file: words or numbers.")
    task_name: str | None = setting(None, "Of task_file: what its scores are called; empty: the file's name.")
    positive_label: str | None = setting(
        None, "Of task_file with metric f1: the class that f1 is of; empty: the second one in order."
    )
    metric: str = setting(
        "accuracy", "Of task_file: accuracy, f1, f1_macro, matthews_correlation, pearson, spearmanr."
    )
    cache_dir: str | None = setting(None, "Where downloads and built-in tasks are kept; empty: the default cache.")
    output_dir: str | None = setting(
        None,
        "Where glue_results.json goes; empty: MODEL/glue for a local MODEL, with peft MODEL/glue-lora (dora, qlora).",
    )
    protocol: str = setting(
        CRAMMING,
        "cramming (one setting for all tasks), tuned (a task's learning rate and epochs are chosen on held-out "
        "training rows; a point of the grid takes a run, or up to five for a task below 5,000 rows), probe (only the "
        "head is trained, without dropout), or a name of your own for your settings.",
    )
    num_seeds: int = setting(5, "Runs a task, with the seeds seed, seed + 1, ...; the score is their median.")
    seed: int = setting(0, "First seed.")
    random_baseline: bool = setting(False, "Also run the same architecture from random weights, with the same seeds.")
    num_train_epochs: float = setting(5.0, "Passes over the training split.")
    per_device_train_batch_size: int = setting(16, "Examples a step.")
    per_device_eval_batch_size: int = setting(
        64, "Examples a batch while scoring; changes no scores but of models that read padding (FNet)."
    )
    learning_rate: float | None = setting(
        None, "Peak learning rate of AdamW; empty: 4e-5, with peft 4e-4, probe 1e-3."
    )
    lr_scheduler_type: str = setting("cosine", "transformers' schedule after the warm-up.")
    warmup_fraction: float = setting(0.1, "Fraction of the steps in which the learning rate rises.")
    adam_beta1: float = setting(0.9, "AdamW's first decay.")
    adam_beta2: float = setting(0.98, "AdamW's second decay.")
    adam_epsilon: float = setting(1e-6, "AdamW's epsilon.")
    weight_decay: float = setting(0.0, "AdamW's weight decay.")
    max_grad_norm: float = setting(0.0, "Gradients are clipped to this norm; 0: not clipped.")
    dropout: float | None = setting(0.1, "Every dropout the architecture has; empty keeps the checkpoint's.")
    max_seq_length: int = setting(128, "Longer examples are truncated, in tokens.")
    tuned_learning_rates: list[float] | None = setting(
        None, "Grid of the tuned protocol; empty: 1, 2.5 and 5 times learning_rate's default."
    )
    tuned_epochs: list[float] = setting([3.0, 10.0], "Grid of the tuned protocol: passes over the training split.")
    peft: str | None = setting(
        None, "lora, dora, or qlora (4-bit weights): train adapters on the linear layers, and the head; empty: all."
    )
    lora_rank: int = setting(8, "Rank of the adapters.")
    lora_alpha: int = setting(16, "An adapter's output is multiplied by lora_alpha / lora_rank.")
    write_submission: bool = setting(
        False, "Also answer the test splits and write GLUE's submission files, by the run with the median score."
    )
    save_models: bool = setting(
        False, "Keep each run's model (with peft: its adapter) in output_dir/runs; runs from random weights keep none."
    )
    merge_adapters: bool = setting(
        False, "Merge the adapter into the weights, so that the saved model loads without peft."
    )
    max_train_examples: int | None = setting(None, "Train on this many examples, the same for every seed.")
    max_eval_examples: int | None = setting(None, "Score this many examples of each validation split.")
    bf16: bool | None = setting(None, "bfloat16 autocast; empty: where the hardware has it.")
    use_cpu: bool = setting(False, "Use the CPU even where there is a GPU.")
    num_threads: int | None = setting(None, "CPU threads of all runs at a time; empty: the usable cores.")
    num_processes: int | None = setting(
        None,
        "Runs at a time, each in a process of its own with its share of num_threads; empty: one a core for a small "
        "model on a CPU where the runs are worth it, else 1, in this process. A run's scores may follow from its "
        "threads, not from what runs beside it.",
    )


# What one run's scores follow from; seeds count for the protocol's name.
RUN_SETTINGS = (
    "num_train_epochs",
    "per_device_train_batch_size",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_fraction",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "weight_decay",
    "max_grad_norm",
    "dropout",
    "max_seq_length",
    "peft",
    "lora_rank",
    "lora_alpha",
    "max_train_examples",
    "max_eval_examples",
)
PROTOCOL_SETTINGS = (*RUN_SETTINGS, "num_seeds")
OWN_TASK_SETTINGS = ("task_file", "validation_file", "text_columns", "label_column", "metric", "positive_label")
TUNED_SETTINGS = ("tuned_learning_rates", "tuned_epochs")
ADAPTER_SETTINGS = ("lora_rank", "lora_alpha")
CHOSEN_SETTINGS = ("learning_rate", "num_train_epochs")
# What a protocol ignores, and why.
UNREAD = {
    TUNED: {name: f"it chooses from {grid}" for name, grid in zip(CHOSEN_SETTINGS, TUNED_SETTINGS)},
    PROBE: {"dropout": "the encoder is frozen"},
}
POSITIVE_SETTINGS = (
    "num_seeds",
    "num_train_epochs",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "learning_rate",
    "max_seq_length",
    "lora_rank",
    "lora_alpha",
    "max_train_examples",
    "max_eval_examples",
    "num_threads",
    "num_processes",
)


def complete_arguments(args: FinetuneArguments) -> FinetuneArguments:
    """The settings, with those that were left open filled in."""
    rate = LEARNING_RATE if args.peft is None else ADAPTER_LEARNING_RATE
    changes = {}
    if args.protocol == PROBE:
        rate, changes = PROBE_LEARNING_RATE, {"dropout": 0.0}
    if args.protocol == TUNED and not args.tuned_learning_rates:
        changes = {"tuned_learning_rates": [float(f"{factor * rate:.6g}") for factor in TUNED_FACTORS]}
    rate = rate if args.learning_rate is None else args.learning_rate
    return dataclasses.replace(args, learning_rate=rate, **changes)


def check_arguments(args: FinetuneArguments) -> list[str]:
    """The task names, expanded, once every setting has been looked at.

    Raises:
        SettingError: For the first setting that cannot work.
    """
    if not args.model_name_or_path:
        raise SettingError("model_name_or_path is empty; name a checkpoint directory or a Hub id.")
    for name in POSITIVE_SETTINGS:
        check_positive(name, getattr(args, name))
    for name in ("warmup_fraction", "dropout", "adam_beta1", "adam_beta2"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < 1:
            raise SettingError(f"{name} is {value}; it must be at least 0 and below 1.")
    for name in ("adam_epsilon", "weight_decay", "max_grad_norm"):
        if getattr(args, name) < 0:
            raise SettingError(f"{name} is {getattr(args, name)}; it must be at least 0.")
    if args.lr_scheduler_type not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise SettingError(f"lr_scheduler_type is {args.lr_scheduler_type!r}; it must be one of {known}.")
    num_seeds = args.num_seeds + TUNED_PARTS * (args.protocol == TUNED)
    if not 0 <= args.seed <= MAX_SEED - num_seeds:
        trials = f" and {TUNED_PARTS} for the trials" * (args.protocol == TUNED)
        raise SettingError(f"seed is {args.seed}; it must be at least 0 and, with num_seeds{trials}, below 2^32.")
    if not args.tuned_epochs or any(value <= 0 for name in TUNED_SETTINGS for value in getattr(args, name) or ()):
        raise SettingError("tuned_learning_rates and tuned_epochs must hold numbers above 0; correct them.")
    near = difflib.get_close_matches(args.protocol.lower(), PROTOCOLS, 1, 0.7)
    if near and args.protocol not in PROTOCOLS:
        raise SettingError(
            f"protocol is {args.protocol!r}; take {near[0]!r}, or a name of your own that is less like it."
        )
    if args.protocol == PROBE and args.peft is not None:
        raise SettingError(
            f"protocol is probe and peft is {args.peft!r}; a probe trains the head alone: leave one out."
        )
    check_peft(args)
    check_unused(args)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SettingError("Fine-tuning runs in one process (WORLD_SIZE is above 1); start it with plain python.")
    if args.task_file and args.write_submission:
        raise SettingError("write_submission is on and task_file is set; GLUE's server takes GLUE's tasks only.")
    names = [args.task_file] if args.task_file else expand_task_names(args.task_names)
    if not names:
        raise SettingError("task_names is empty; name a task, say sst2.")
    find_output_dir(args)
    return names


def check_peft(args: FinetuneArguments) -> None:
    """Raise SettingError where the settings of adapters cannot work together."""
    if args.peft is not None and args.peft not in PEFT_KINDS:
        raise SettingError(f"peft is {args.peft!r}; it must be one of {', '.join(PEFT_KINDS)}, or empty.")
    if args.merge_adapters and (args.peft in (None, "qlora") or not args.save_models):
        why = "save_models is off" if not args.save_models else f"peft is {args.peft or 'empty'}"
        raise SettingError(f"merge_adapters is on and {why}; it needs save_models, and peft lora or dora.")


def check_unused(args: FinetuneArguments) -> None:
    """Raise SettingError for a setting that says something and is of another one that is not set."""
    usual = FinetuneArguments()
    for names, is_read, why in (
        ((*OWN_TASK_SETTINGS[1:], "task_name"), args.task_file, "task_file is empty (task_names has the known tasks)"),
        (TUNED_SETTINGS, args.protocol == TUNED, f"protocol is {args.protocol}"),
        (ADAPTER_SETTINGS, args.peft, "peft is empty"),
    ):
        for name in names:
            if not is_read and getattr(args, name) != getattr(usual, name):
                raise SettingError(f"{name} is {getattr(args, name)!r} and {why}: set that too, or leave {name} out.")


def warn_of_unread(args: FinetuneArguments) -> None:
    """Say which settings, a recipe's perhaps, the protocol ignores."""
    usual = FinetuneArguments()
    for name, instead in UNREAD.get(args.protocol, {}).items():
        if getattr(args, name) not in (None, 0, getattr(usual, name)):
            logger.warning("protocol %s ignores %s %g: %s", args.protocol, name, getattr(args, name), instead)


def find_output_dir(args: FinetuneArguments) -> Path:
    """`output_dir`, or `glue` inside a local checkpoint (`glue-lora` with adapters, whose scores stand beside)."""
    if args.output_dir:
        return Path(args.output_dir)
    if Path(args.model_name_or_path).is_dir():
        return Path(args.model_name_or_path) / (f"{GLUE}-{args.peft}" if args.peft else GLUE)
    raise SettingError(
        f"model_name_or_path {args.model_name_or_path} is not a local directory; "
        "if it is a Hub id, say with output_dir where the scores go, else correct it (scripts/pretrain.py trains one)."
    )


def name_protocol(args: FinetuneArguments) -> str:
    """The protocol's name; `custom` where it claims one of ours with other settings (say `custom tuned`)."""
    if args.protocol not in PROTOCOLS:
        return args.protocol
    usual, args = complete_arguments(FinetuneArguments(protocol=args.protocol)), complete_arguments(args)
    names = (*PROTOCOL_SETTINGS, *TUNED_SETTINGS) if args.protocol == TUNED else PROTOCOL_SETTINGS
    taken = CHOSEN_SETTINGS if args.protocol == TUNED else ()
    changed = [name for name in names if name not in taken and getattr(args, name) != getattr(usual, name)]
    if not changed:
        return args.protocol
    logger.info("protocol is custom, not %s: %s differ", args.protocol, ", ".join(changed))
    return "custom" if args.protocol == CRAMMING else f"custom {args.protocol}"


def choose_device(args: FinetuneArguments) -> torch.device:
    """The GPU when there is one and it may be used, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu")


def choose_bf16(args: FinetuneArguments) -> bool:
    """Whether to use bfloat16 autocast: as told, else where the hardware is fast in it."""
    return has_fast_bf16(choose_device(args)) if args.bf16 is None else args.bf16


def choose_pad_multiple(args: FinetuneArguments) -> int | None:
    """What a batch's length is a multiple of.

    32 on a GPU, where few lengths are few graphs (`graphed_loss`). None on a CPU: 8 was a fifth of CoLA's tokens.
    """
    return 32 if choose_device(args).type == "cuda" else None


def choose_attention(args: FinetuneArguments) -> str | None:
    """The stock implementation: transformers' choice (sdpa) on a GPU, eager on the CPU.

    The backward pass of the CPU's flash kernel is slow in bfloat16: a step of 32 x 48 tokens through 6 layers of width
    256 took 371 ms of one core with sdpa and 256 ms with eager; in float32 the two were equal.
    """
    return None if choose_device(args).type == "cuda" else "eager"
