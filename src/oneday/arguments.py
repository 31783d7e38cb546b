"""Every setting, as dataclasses. Help text lives here and nowhere else."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from transformers import TrainingArguments
from transformers.training_args import trainer_log_levels

from oneday.errors import SettingError, check_positive
from oneday.refused_settings import REFUSED_SETTINGS
from oneday.throughput import has_fast_bf16


def setting(default: object, help: str, **metadata: object) -> object:
    """A dataclass field with its help text; lists and dicts become default factories."""
    metadata["help"] = help
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelArguments:
    """What is trained."""

    model_config: str = setting(
        "model_configs/quickstart-bert.json",
        "A transformers config JSON; the model is built from it with random weights.",
    )
    position_encoding: str | None = setting(None, "learned, sinusoidal or rotary; empty keeps what the config says.")


@dataclass
class DataArguments:
    """What it is trained on."""

    dataset_name: str | list[str] = setting(
        "python-docs",
        "python-docs (built in), a Hub id, or a file, directory or glob of .txt .jsonl .csv .parquet "
        "(also .gz .xz .zst); several, comma-separated, make a mixture. Small .txt files beside others of one "
        "directory or glob are a document each; one alone, or over 1 MB, is cut at blank lines, "
        "or into pieces of 16 kB where there are none.",
    )
    dataset_weights: list[float] | None = setting(
        None, "Weights of a mixture, comma-separated, by documents; empty: in proportion to size."
    )
    dataset_config_name: str | None = setting(
        None, "Configuration of Hub data sets, say 20231101.en; of one alone: user/name:20231101.en."
    )
    dataset_split: str = setting("train", "Split of a Hub data set to train on.")
    text_column: str = setting("text", "Column that holds the text.")
    streaming: bool = setting(False, "Read a Hub data set as a stream instead of downloading it first.")
    stream_files: int = setting(8, "Files of a stream that are read at once, a document of each in turn.")
    max_train_documents: int | None = setting(None, "Use only this many documents.")
    validation_name: str | None = setting(
        None,
        "Held-out text, in the same forms as dataset_name, and not trained on; empty: a part of dataset_name is held "
        "out.",
    )
    validation_fraction: float = setting(
        0.005,
        "Fraction of documents held out if validation_name is empty. Of a stream: of max_train_documents, or of "
        "100,000 if that is empty. python-docs has a part of its own for this.",
    )
    tokenizer_name: str | None = setting(
        None, "An existing tokenizer (directory or Hub id); empty: one is trained on the corpus."
    )
    tokenizer_type: str = setting(
        "wordpiece", "Tokenizer to train: wordpiece, bpe (byte-level) or unigram (byte-level)."
    )
    vocab_size: int = setting(8192, "Vocabulary of the tokenizer to train, in tokens.")
    lowercase: bool = setting(True, "Lower-case and strip accents (wordpiece only).")
    tokenizer_train_bytes: int = setting(
        50_000_000, "Train the tokenizer on at most this many bytes, drawn from all the text; of a stream the first."
    )
    max_seq_length: int = setting(128, "Length of a packed row, in tokens; longer documents are split.")
    packing_strategy: str = setting(
        "best_fit", "best_fit (best-fit-decreasing; documents never see each other) or padded (one document a row)."
    )
    cache_dir: str | None = setting(
        None, "Where prepared corpora and packed rows are kept; empty: $ONEDAY_CACHE or ~/.cache/oneday."
    )
    max_validation_bytes: int = setting(2_000_000, "Hold out at most this many bytes of text, in whole documents.")


@dataclass
class ShardArguments:
    """What one machine of several prepares."""

    shard: int | None = setting(
        None, "Only tokenise this part of the text, counted from 0; once all parts are there, run without it."
    )
    num_shards: int = setting(1, "Parts of the text, one for each machine that tokenises.")

    def __post_init__(self) -> None:
        """Refuse what would tokenise the whole text on each machine."""
        if self.shard is None and self.num_shards != 1:
            raise SettingError(
                f"The setting num_shards is {self.num_shards}, but shard is empty; set it to this machine's part."
            )


@dataclass
class ExecutorArguments:
    """Tokenising as tasks of datatrove, an optional package."""

    executor: str | None = setting(
        None, "local, slurm or ray: datatrove's executor of that name tokenises the text; empty: this process does."
    )
    tasks: int = setting(1, "Parts of the text, one for each task.")
    workers: int = setting(-1, "Tasks that run at once; -1: all of them.")
    logging_dir: str | None = setting(
        None, "Where datatrove keeps the tasks' logs and what it submits; empty: datatrove/ in cache_dir."
    )
    partition: str | None = setting(None, "Slurm's partition.")
    time_hours: float = setting(4.0, "Time limit of a task, in hours (slurm, ray).")
    cpus_per_task: int = setting(1, "Cores of a task (slurm, ray).")
    mem_per_cpu_gb: int = setting(2, "Memory of a task for each of its cores, in GB (slurm, ray).")
    sbatch_args: dict[str, str] = setting({}, "Further options of sbatch, say '{account: mine, qos: high}'.")

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.executor is None and self.tasks != 1:
            raise SettingError(
                f"The setting tasks is {self.tasks}, but executor is empty; set executor to local, slurm or ray."
            )


POSITIVE_SETTINGS = (
    "batch_size_tokens", "batch_size_tokens_start", "micro_batch_tokens", "num_evaluations", "eval_steps",
    "save_steps", "save_minutes", "save_total_limit", "logging_steps", "num_threads", "max_seq_length_start",
    "max_bad_steps", "discriminator_weight", "learning_rate", "muon_learning_rate", "adam_epsilon", "usd_per_hour",
    "stated_watts",
)  # fmt: skip
HUB_STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")
MAX_SEED = 2**32
NOT_NEGATIVE_SETTINGS = ("seed", "data_seed", "weight_decay", "max_grad_norm")
BETWEEN_0_AND_1 = ("adam_beta1", "adam_beta2")
RAMP_FRACTIONS = ("batch_ramp_fraction", "seq_length_ramp_fraction")


@dataclass
class BudgetTrainingArguments(TrainingArguments):
    """How it is trained: the budget and everything that follows it."""

    refused: ClassVar[dict[str, str]] = REFUSED_SETTINGS

    output_dir: str = setting("runs/pretrain", "Run directory; the same command continues the run that is in it.")

    budget_hours: float | None = setting(None, "Wall-clock budget, in hours.")
    budget_minutes: float | None = setting(None, "Wall-clock budget, in minutes.")
    budget_tokens: float | None = setting(None, "Budget of training tokens, padding not counted.")
    budget_flops: float | None = setting(
        None,
        "Budget of floating-point operations executed, forward and backward, those of padding too; what "
        "gradient_checkpointing computes again does not count.",
    )
    budget_steps: int | None = setting(None, "Budget of optimizer steps.")
    budget_usd: float | None = setting(None, "Budget of money, in US dollars; needs usd_per_hour.")
    usd_per_hour: float | None = setting(None, "Price of the machine, or of all of them, in US dollars an hour.")
    budget_kwh: float | None = setting(
        None, "Budget of energy, in kilowatt-hours: metered by the GPU's and CPU's counters, or at stated_watts."
    )
    stated_watts: float | None = setting(
        None, "Power that the machine, or all of them, draw, in watts; takes the place of the counters."
    )
    extend: bool = setting(
        False,
        "Give a finished run the larger budget that is set now: it goes on from before its learning rate fell.",
    )
    replay: str | None = setting(
        None, "A run directory: do again, step by step, what that run did, whatever this machine's speed."
    )

    objective: str = setting(
        "mlm",
        "What is predicted: mlm (masked tokens), clm (the next token), mlm_nsp (masked tokens, and whether two "
        "segments follow each other), word_order (masked tokens, and the order of shuffled ones), rtd (which tokens a "
        "generator replaced) or plm (tokens in a permuted order; XLNet).",
    )
    mlm_probability: float = setting(0.25, "Fraction of the tokens predicted, for every objective that masks.")
    mlm_probability_end: float | None = setting(
        None, "Fraction at the end of the budget, reached linearly; empty: stays at mlm_probability."
    )
    mask_replacement: str = setting(
        "mask",
        "What stands at a predicted position: mask (always [MASK]) or bert (80 % [MASK], 10 % random, 10 % kept).",
    )

    whole_word_mask: bool = setting(False, "Mask all tokens of a word, or none.")
    nsp_negatives: str = setting(
        "swapped",
        "For mlm_nsp, half of the pairs: swapped (the segments change places) or random (text of another document in "
        "the row, which may end within a sentence; swapped where there is none).",
    )
    word_order_probability: float = setting(
        0.05, "For word_order, the fraction of tokens in shuffled runs, of those not masked."
    )
    word_order_span: int = setting(
        3, "For word_order, the tokens of a shuffled run; fewer than those of the shortest row."
    )
    generator_size: float = setting(0.34, "For rtd, the generator's layers as a fraction of the model's.")
    discriminator_weight: float = setting(
        50.0, "For rtd, the weight of the discriminator's loss beside the generator's."
    )

    batch_size_tokens: int = setting(16_384, "Tokens of one optimizer step, over all processes.")
    batch_size_tokens_start: int | None = setting(
        None, "Tokens of a step at the start; grows linearly to batch_size_tokens. Empty: constant."
    )
    batch_ramp_fraction: float = setting(0.6, "Fraction of the budget at which the batch has its full size.")
    max_seq_length_start: int | None = setting(
        None, "Tokens of a row at the start; doubles up to max_seq_length, which it must divide. Empty: constant."
    )
    seq_length_ramp_fraction: float = setting(0.5, "Fraction of the budget at which rows have their full length.")
    micro_batch_tokens: int = setting(16_384, "Tokens of one forward and backward pass on one process.")

    optim: str = setting("muon", "adamw, adamw_8bit, lion_8bit, ademamix_8bit, muon or muon_8bit.")
    learning_rate: float = setting(
        1e-3, "Peak learning rate of everything that Muon does not train; lion_8bit's matrices take a tenth."
    )
    muon_learning_rate: float = setting(5e-3, "Peak learning rate of the hidden matrices under muon.")
    weight_decay: float = setting(
        0.01,
        "Decoupled weight decay of the hidden matrices; embeddings, norms, biases and XLNet's attention have none. "
        "lion_8bit, whose rate is a tenth, has ten times as much.",
    )
    adam_beta1: float = setting(0.9, "First-moment decay of AdamW, also in 8 bit.")
    adam_beta2: float = setting(0.98, "Second-moment decay of AdamW, also in 8 bit.")
    adam_epsilon: float = setting(1e-8, "Epsilon of AdamW and AdEMAMix.")
    max_bad_steps: int = setting(
        5, "Steps in a row whose loss or gradient is not finite, after which the last checkpoint is taken again."
    )
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this norm; 0: not clipped.")
    lr_shape: str = setting(
        "trapezoid",
        "The learning rate after warmup_fraction. trapezoid and one_minus_sqrt: flat, then down to zero over "
        "decay_fraction (in a line, or steep at first). linear and cosine: down at once. constant: flat. triangle, "
        "without a warm-up: up from a quarter until decay_fraction is left, then down.",
    )
    warmup_fraction: float = setting(
        0.02, "Fraction of the budget over which the learning rate rises (not with triangle)."
    )
    decay_fraction: float = setting(
        0.5, "Fraction of the budget over which trapezoid, one_minus_sqrt and triangle fall to zero."
    )

    embedding_init: str = setting(
        "random",
        "Where token embeddings start: random, or cooccurrence (word vectors counted from the corpus, in the budget).",
    )
    attention_init: str | None = setting(
        None,
        "Where queries and keys start: neighbours (heads that look at near positions from the first step; for BERT, "
        "RoBERTa and their kin, and for ModernBERT, Llama, Qwen3 and theirs), or empty: at random.",
    )

    num_evaluations: int = setting(
        5,
        "Held-out evaluations, at equal parts of the budget, the last at its end; those before it are left out where "
        "they would take more than 5 % of the time so far.",
    )
    eval_steps: int | None = setting(None, "Evaluate every this many steps instead.")
    save_minutes: float = setting(20.0, "Minutes between checkpoints.")
    save_steps: int | None = setting(None, "Checkpoint every this many steps instead.")
    save_total_limit: int | None = setting(2, "Checkpoints kept.")
    logging_steps: int = setting(10, "Steps between reports to the trackers.")
    report_to: list[str] = setting(
        ["none"],
        "Dashboards, live, comma-separated: tensorboard (`tensorboard --logdir RUN/tensorboard`), trackio "
        "(`TRACKIO_DIR=RUN/trackio trackio show --project oneday`), wandb, or none. Files go into the run directory "
        "unless TRACKIO_DIR, TENSORBOARD_LOGGING_DIR or WANDB_DIR names another.",
    )
    eval_on_start: bool = setting(False, "Also evaluate the random weights; does not count against the clock.")
    push_to_hub: bool = setting(
        False, "Push to the Hub while training and at the end; a push that fails ends nothing."
    )
    hub_model_id: str | None = setting(None, "Repository on the Hub, user/name; made when it is not there.")
    hub_strategy: str = setting(
        "checkpoint",
        "What is pushed before the end: checkpoint (the newest, to the branch checkpoints), all_checkpoints, "
        "every_save (the model alone, to main) or end (nothing).",
    )
    hub_license: str = setting(
        "apache-2.0", "Licence that the model card states, by the Hub's name of it (your text may ask for another)."
    )
    hub_private_repo: bool | None = setting(None, "Make a new repository private.")
    resume_from_hub: str | None = setting(
        None, "user/name: go on with the last checkpoint that was pushed there, where output_dir holds no run."
    )
    seed: int = setting(42, "Seed of weights, masks and, unless data_seed is set, of the shuffle.")
    data_seed: int | None = setting(None, "Seed of the shuffle.")
    torch_compile: bool | None = setting(
        False,
        "Compile the layers with torch.compile, which takes up to 45 seconds of the budget; null: where that soon "
        "pays, on a GPU and on a CPU that computes in bfloat16.",
    )
    bf16: bool | None = setting(None, "Compute in bfloat16; empty: where the hardware has it.")
    num_threads: int | None = setting(None, "CPU threads; empty: the usable cores, shared by the local processes.")

    @property
    def shuffle_seed(self) -> int:
        """Seed of the order of the text."""
        return self.seed if self.data_seed is None else self.data_seed

    def __post_init__(self) -> None:
        """Give the parent what it accepts; keep this project's own choices beside it."""
        for name in POSITIVE_SETTINGS:
            check_positive(name, getattr(self, name))
        for name in NOT_NEGATIVE_SETTINGS:
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise SettingError(f"The setting {name} is {value}; it must not be below zero.")
        for name in ("seed", "data_seed"):
            if (getattr(self, name) or 0) >= MAX_SEED:
                raise SettingError(f"The setting {name} is {getattr(self, name)}; it must be below 2^32.")
        for name in BETWEEN_0_AND_1:
            if not 0 <= getattr(self, name) < 1:
                raise SettingError(f"The setting {name} is {getattr(self, name)}; it must be from 0 to below 1.")
        for name in RAMP_FRACTIONS:
            if not 0 < getattr(self, name) <= 1:
                raise SettingError(f"The setting {name} is {getattr(self, name)}; it must be above 0, at most 1.")
        for name in ("log_level", "log_level_replica"):
            if getattr(self, name) not in trainer_log_levels:
                levels = ", ".join(trainer_log_levels)
                raise SettingError(f"The setting {name} is {getattr(self, name)!r}; it must be one of {levels}.")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available():
            self.use_cpu = True  # accelerate, finding no GPU, would take each process for a run of its own
        self.optimizer_name = self.optim
        self.use_bf16 = self.bf16
        self.use_compile = self.torch_compile
        self.is_pushed, self.push_to_hub = self.push_to_hub, False
        self.shown_settings: dict[str, object] = {}
        if self.hub_strategy not in HUB_STRATEGIES:
            names = ", ".join(HUB_STRATEGIES)
            raise SettingError(f"The setting hub_strategy is {self.hub_strategy!r}; it must be one of {names}.")
        if self.is_pushed and not self.hub_model_id:
            raise SettingError("push_to_hub is true and hub_model_id is empty; name a repository, say you/my-model.")
        self.optim, self.bf16, self.torch_compile = "adamw_torch", False, False
        self.remove_unused_columns = False
        self.ignore_data_skip = True
        self.logging_nan_inf_filter = False
        self.disable_tqdm = bool(self.disable_tqdm)
        self.eval_strategy = self.save_strategy = "no"
        self.max_steps = 2**31
        super().__post_init__()

    def to_dict(self) -> dict[str, object]:
        """What dashboards show as the configuration: the settings of the recipe, those of text and model too."""
        own = {"optim": self.optimizer_name, "bf16": self.computes_in_bf16, "torch_compile": self.use_compile}
        given = {name: value for name, value in super().to_dict().items() if name not in REFUSED_SETTINGS}
        return given | own | {"push_to_hub": self.is_pushed} | self.shown_settings

    @property
    def computes_in_bf16(self) -> bool:
        """`bf16`, or what the hardware has where that is empty."""
        return has_fast_bf16(self.device) if self.use_bf16 is None else self.use_bf16
