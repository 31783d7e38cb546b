"""The ladder: short runs of a few sizes and budgets, kept as records, and the scaling law fitted on them."""

from __future__ import annotations

import itertools
import json
import logging
import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from oneday.arguments import setting
from oneday.benchmarks.planning import make_plan
from oneday.benchmarks.records import Record
from oneday.errors import SettingError, check_positive
from oneday.recipe import Settings
from oneday.scaling_law import Point, ScalingLaw, fit_law

logger = logging.getLogger(__name__)

# The records that come with the project, and where a user's own go.
RECORD_DIRS = ["recipes/ladder", "recipes/benchmarks", "runs/ladder"]
# Records of whole runs of ours; of the benchmarks only these are a recipe as it stands.
KINDS = ("ladder", "ours")


@dataclass
class LadderArguments:
    """ladder: run a recipe at several sizes and budgets of tokens, one process a run, finished ones kept."""

    models: list[str] | None = setting(None, "Config JSONs, comma-separated; empty: the recipe's model_config.")
    tokens: list[float] = setting(
        [1e6, 2e6, 4e6], "Budgets in tokens, comma-separated; the recipe's own is put aside."
    )
    records_dir: str = setting(RECORD_DIRS[-1], "Where the records go, and whence plans read them.")
    reuse_ours: bool = setting(True, "Keep records of an earlier commit of this project.")

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        for tokens in self.tokens:
            check_positive("tokens", tokens)
        if not self.tokens:
            raise SettingError("The setting tokens is empty; give one or several budgets, say 1e6,2e6,4e6.")


@dataclass(frozen=True)
class Family:
    """Runs whose losses follow one law: the same kind of model, task, vocabulary, start, decay; of one text each."""

    model_type: str
    objective: str
    vocab_size: int
    max_seq_length: int
    attention_init: str | None = None
    embedding_init: str = "random"
    weight_decay: float = 0.01
    optim: str = "muon"
    batch_size_tokens: int | None = None
    learning_rate: float | None = None
    muon_learning_rate: float | None = None
    mlm_probability: float | None = None

    @classmethod
    def of_settings(cls, settings: Settings, model_type: str) -> Family:
        """The family that a recipe's runs belong to."""
        names = ("objective", "vocab_size", "max_seq_length")
        # Of which old records may have none.
        others = tuple(field.name for field in fields(cls) if field.name not in ("model_type", *names))
        given = {name: settings[name] for name in others if settings.get(name) is not None}
        given["optim"] = given.get("optim", cls.optim).removesuffix("_8bit")  # its states may be held in 8 bits
        return cls(model_type, *(settings[name] for name in names), **given)

    def __str__(self) -> str:
        start = ", ".join(name for name in (self.attention_init, self.embedding_init) if name not in (None, "random"))
        batch = f", steps of {self.batch_size_tokens:,}" if self.batch_size_tokens else ""
        rates = [rate for rate in (self.muon_learning_rate, self.learning_rate) if rate is not None]
        masks = f" at {100 * self.mlm_probability:g} %" if self.mlm_probability and self.objective != "clm" else ""
        return (
            f"{self.model_type}, {self.objective}{masks}, vocabulary of {self.vocab_size:,}, rows of "
            f"{self.max_seq_length}{batch}, {self.optim}{' at ' * bool(rates)}{' / '.join(f'{r:g}' for r in rates)}, "
            f"decay {self.weight_decay:g}{f', {start}' if start else ''}"
        )


@dataclass(frozen=True)
class FamilyLaw:
    """A law, and the runs behind it.

    Attributes:
        law: Parameters and tokens to loss.
        records: The runs.
        measure: Name of the loss.
        corpus: Public name of their text.
        held_out: Key of the rows it was measured on.
    """

    law: ScalingLaw
    records: list[Record]
    measure: str
    corpus: str
    held_out: str


def run_ladder(recipe_path: str, settings: Settings, args: LadderArguments) -> list[Record]:
    """Run what is missing; returns the records of the runs asked for.

    Raises:
        SettingError: When a setting cannot work or a run fails.
    """
    others = {f"budget_{kind}": None for kind in ("hours", "minutes", "flops", "steps", "usd", "kwh")}
    plan = make_plan(recipe_path, {**settings, **others, "budget_tokens": max(args.tokens)}, args)
    seed, jobs = plan.settings["seed"], []
    models = args.models or [plan.settings["model_config"]]
    for name, count in Counter(Path(model).stem for model in models).items():
        if count > 1:
            raise SettingError(
                f"The setting models has {count} files named {name}, as their records would be; rename one."
            )
    for model, tokens in itertools.product(models, args.tokens):
        changes = {"model_config": model, "budget_tokens": tokens}
        jobs.append(plan.our_job("ladder", Path(model).stem, seed, 1, changes))
    return list(plan.store.obtain(jobs).values())


def read_records(folders: Sequence[str | Path]) -> list[Record]:
    """The records of whole pretraining runs in some directories and those below; files that are none are passed over.

    Raises:
        SettingError: When a directory that was named is not there.
    """
    records = []
    for folder in folders:
        if not Path(folder).is_dir() and folder not in RECORD_DIRS:
            raise SettingError(f"There is no directory {folder} with records for the scaling law; name another.")
    for path in sorted({path for folder in folders for path in Path(folder).rglob("*.json")}):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record.get("kind") in KINDS and "recipe" in record:  # others are of fine-tuning
                to_point(record)
                family_of(record)
                records.append(record)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s is not used for the scaling law: it is damaged or diverged (%s).", path.name, error)
    return records


def to_point(record: Record) -> Point:
    """What the law sees of a run.

    Raises:
        ValueError: When one of the three is no number above zero: of a run that diverged, say.
    """
    point = Point(record["num_parameters_without_embeddings"], record["tokens"], record["final"][record["measure"]])
    if not all(0 < value < math.inf for value in (point.parameters, point.tokens, point.loss)):
        raise ValueError(f"its loss is {point.loss} after {point.tokens} tokens")
    return point


def family_of(record: Record) -> Family:
    """The family a record belongs to."""
    return Family.of_settings(record["settings"], record["settings"]["model"]["model_type"])


def fit_family(records: Sequence[Record], family: Family, held_out: str | None = None) -> FamilyLaw | None:
    """The law of a family: on the text asked for if there are runs on it, else on that with most runs; None: no law.

    Args:
        records: Of any family.
        family: Whose law.
        held_out: Key of the plan's held-out rows.
    """
    own = [record for record in records if family_of(record) == family]
    texts = Counter(record["settings"]["held_out"] for record in own)
    if not texts:
        return None
    text = held_out if held_out in texts else texts.most_common(1)[0][0]
    chosen = [record for record in own if record["settings"]["held_out"] == text]
    law = fit_law([to_point(record) for record in chosen])
    if law is None:
        return None
    return FamilyLaw(law, chosen, chosen[0]["measure"], chosen[0]["settings"]["corpus"], text)


def format_law(fitted: FamilyLaw, family: Family) -> str:
    """The law, its range, and each run beside what the law says of it; in 80 columns."""
    law = fitted.law
    lines = [
        *textwrap.wrap(str(family), 80),
        f"{law.describe()}   (N, D in millions)",
        f"{'run':44}{'N':>8}{'D':>9}{'loss':>8}{'law':>8}",
        "-" * 78,
    ]
    for record in sorted(fitted.records, key=lambda record: (record["num_parameters"], record["tokens"])):
        point = to_point(record)
        # Of a size that it was not fitted on, the law says nothing.
        said = f"{law.predict(point.parameters, point.tokens).loss:.3f}" if law.covers(point.parameters) else "-"
        name = record["name"].removeprefix(f"{record['kind']}-{record['recipe']}-")
        lines.append(
            f"{name[:43]:44}{point.parameters / 1e6:>6.2f} M{point.tokens / 1e6:>7.2f} M{point.loss:>8.3f}{said:>8}"
        )
    return "\n".join([*lines, "-" * 78, f"loss: {fitted.measure}; text: {fitted.corpus[:56]}", describe_range(law)])


def describe_range(law: ScalingLaw) -> str:
    """What the law was fitted on, in words."""
    sizes = [point.parameters / 1e6 for point in law.points]
    tokens = [point.tokens / 1e6 for point in law.points]
    return (
        f"range: {min(sizes):.1f} to {max(sizes):.1f} M parameters without embeddings, {min(tokens):.1f} to "
        f"{max(tokens):.1f} M tokens"
    )
