"""Settings of the benchmarks; every other setting on the command line is one of the recipe."""

from __future__ import annotations

from dataclasses import dataclass

from oneday.arguments import setting
from oneday.errors import SettingError, check_positive


@dataclass
class ThroughputArguments:
    """throughput: how fast a recipe trains, over a grid of settings."""

    grid: list[str] | None = setting(
        None,
        "NAME=VALUE,VALUE ... of any recipe setting; given several times, all combinations are measured. Empty: "
        "optim=muon,muon_8bit,adamw,adamw_8bit packing_strategy=best_fit,padded torch_compile=false,true, and the "
        "recipe's micro_batch_tokens beside half of it.",
        repeatable=True,
    )
    measure_seconds: float = setting(10.0, "Seconds of training steps measured at each point, after the warm-up.")

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        check_positive("measure_seconds", self.measure_seconds)


@dataclass
class VersusStockArguments:
    """versus-stock: a recipe against transformers.Trainer as the Hub's own examples use it."""

    baselines: list[str] | None = setting(
        None,
        "Stock models: bert, modernbert, gpt2, llama, or a config JSON; empty: bert,modernbert for an encoder's "
        "recipe, gpt2,llama for a decoder's.",
    )
    learning_rates: list[float] = setting(
        [3e-4, 1e-3, 3e-3], "Learning rates stock chooses from, for each baseline, in short runs if there are several."
    )
    screen_minutes: float = setting(2.5, "Minutes of each run that chooses a learning rate.")
    sides: list[str] = setting(["ours", "stock"], "What is run: ours, stock or both; records of the other are shown.")
    num_points: int = setting(24, "Points of each held-out curve, denser early.")
    stock_rows: list[int] = setting(
        [8, 32],
        "Rows of a batch (per_device_train_batch_size) that stock chooses from together with its learning rate; the "
        "examples' default is 8.",
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        for name in ("screen_minutes", "num_points"):
            check_positive(name, getattr(self, name))
        for name, example in (("learning_rates", "3e-4,1e-3,3e-3"), ("stock_rows", "8,32")):
            for value in getattr(self, name):
                check_positive(name, value)
            if not getattr(self, name):
                raise SettingError(f"The setting {name} is empty; give one or several, say {example}.")
        if not self.sides or set(self.sides) - {"ours", "stock"}:
            raise SettingError(f"The setting sides is {','.join(self.sides)!r}; it must be ours, stock or both.")


@dataclass
class AblationArguments:
    """ablate: one change at a time from a recipe."""

    change: list[str] | None = setting(
        None, "NAME=VALUE[,NAME=VALUE ...], one change from the recipe; may be given several times.", repeatable=True
    )


@dataclass
class SeedArguments:
    """Repetitions, for versus-stock and ablate."""

    seeds: list[int] = setting([1, 2, 3], "Seeds; every side or change is run with each.")

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            shown = ",".join(map(str, self.seeds))
            raise SettingError(f"The setting seeds is {shown!r}; give one or several different ones, say 1,2,3.")


@dataclass
class KeepArguments:
    """What is kept of our side's runs, for versus-stock and ablate."""

    keep_runs: str | None = setting(
        None,
        "Keep the run directories of our side here, models included; an older one of the same name is replaced. Runs "
        "that are not repeated, because their record stands, leave none. Empty: keep none.",
    )


@dataclass
class RecordArguments:
    """Records: every finished run is kept as a JSON file and used again while it stands."""

    records_dir: str = setting("runs/benchmarks", "Where records, tables and pictures are kept.")
    reuse_ours: bool = setting(False, "Use records of our side even if this project's code has changed since.")
