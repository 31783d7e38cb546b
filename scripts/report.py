"""Show what a finished run gave: a few samples, then its table."""

from __future__ import annotations

from dataclasses import dataclass

from oneday.arguments import setting
from oneday.program import run_program
from oneday.recipe import parse_recipe
from oneday.reporting import format_report, format_samples


@dataclass
class ReportArguments:
    """What is shown."""

    run_dir: str = setting("runs/quickstart-bert", "A finished run directory.", bare_words="RUN_DIR")


def main() -> None:
    """Print samples and table."""
    (args,) = parse_recipe(
        (ReportArguments,),
        description="Show samples and the table of a finished run.",
        example="python scripts/report.py runs/quickstart-bert",
    )
    print(f"\n{args.run_dir} says\n\n{format_samples(args.run_dir)}\n")
    print(format_report(args.run_dir))


if __name__ == "__main__":
    run_program(main)
