"""Set runs beside each other: a table with the time to match, and a picture of their held-out curves."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from oneday import run_directory as rundir
from oneday.arguments import setting
from oneday.comparison import draw_comparison, format_comparison, name_runs, read_evaluations
from oneday.errors import SettingError
from oneday.program import run_program
from oneday.recipe import parse_recipe

DESCRIPTION = "Compare runs by their held-out loss: a table with the time to match, and a picture of the curves."
EXAMPLE = "python scripts/compare_runs.py runs/first runs/second"


@dataclass
class ComparisonArguments:
    """What is compared."""

    run_dirs: list[str] | None = setting(
        None, "Run directories, comma-separated; or bare words.", bare_words="RUN_DIR ..."
    )
    picture: str = setting("runs/comparison.png", "Where the picture is written.")

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        self.run_dirs = list(dict.fromkeys(self.run_dirs or []))
        if len(self.run_dirs) < 2:
            raise SettingError("The setting run_dirs names fewer than two runs; name two or more.")


def main() -> None:
    """Read the runs, print the table, draw the picture."""
    (args,) = parse_recipe((ComparisonArguments,), description=DESCRIPTION, example=EXAMPLE)
    names = name_runs(args.run_dirs)
    runs = {name: read_evaluations(folder) for name, folder in names.items()}
    facts = {name: rundir.read_results(folder) for name, folder in names.items()}
    draw_comparison(Path(args.picture), runs, facts)
    sys.stdout.write(f"{format_comparison(runs, facts)}\n\npicture: {args.picture}\n")


if __name__ == "__main__":
    run_program(main)
