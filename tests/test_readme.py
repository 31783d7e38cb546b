"""What the README names exists: commands, paths, settings, modules."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from oneday.arguments import (
    BudgetTrainingArguments,
    DataArguments,
    ExecutorArguments,
    ModelArguments,
    ShardArguments,
)
from oneday.benchmarks.arguments import AblationArguments, RecordArguments, ThroughputArguments
from oneday.glue_protocol import FinetuneArguments
from oneday.ladder import LadderArguments
from oneday.recipe import fields_of
from oneday.zero_shot_results import EvaluateArguments

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "EXPERIMENTS.md", "recipes/README.md", "model_configs/README.md"]
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert links
    assert not [link for link in links if "://" not in link and not (ROOT / page).parent.joinpath(link).exists()]


def test_scripts_and_recipes_in_commands_exist():
    paths = re.findall(r"(?:scripts|recipes)/[\w/.-]+\.(?:py|yaml)|\./run_finetune\.sh", BLOCKS)
    assert len(paths) >= 4
    assert not [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize("target", re.findall(r"^make ([\w-]+)", BLOCKS, re.MULTILINE))
def test_make_targets_exist(target):
    subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_settings_in_commands_are_known():
    known = fields_of((ModelArguments, DataArguments, BudgetTrainingArguments)) | fields_of((FinetuneArguments,))
    known |= fields_of((EvaluateArguments,)) | fields_of((ShardArguments, ExecutorArguments))
    known |= fields_of((ThroughputArguments, AblationArguments, RecordArguments, LadderArguments))
    # Of accelerate, and of programs with settings of their own.
    outside = {"config_file", "num_processes", "run_dir", "run_dirs", "for", "mfu", "ladder_dirs", "last_checkpoint"}
    named = set(re.findall(r"--([a-z_]+)", README)) - outside
    assert not [name for name in named if name not in known and name != "help"]


def test_the_library_names_every_module():
    library = ROOT / "src" / "oneday"
    modules = [path.name for path in library.glob("*.py") if path.name != "__init__.py"]
    rooms = [f"{path.name}/" for path in library.iterdir() if path.is_dir() and path.name != "__pycache__"]
    named = re.findall(r"^\| `(\w+(?:\.py|/))` \|", (library / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(modules + rooms)


def test_the_tree_names_every_script():
    tree = README.split("## What is where")[1]
    assert all(path.stem in tree for path in (ROOT / "scripts").glob("*.py"))


def test_a_linked_environment_is_no_change(tmp_path):
    shutil.copy(ROOT / ".gitignore", tmp_path)
    (tmp_path / ".venv").symlink_to(tmp_path)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    status = subprocess.run(["git", "-C", tmp_path, "status", "--short"], capture_output=True, text=True, check=True)
    assert status.stdout == "?? .gitignore\n"


def test_nothing_of_the_making_is_named():
    """No path of a machine and no private host in what is shipped."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for file in files:
        if Path(file).suffix in {".py", ".md", ".yaml", ".json", ".toml", ".txt", ".sh", ""}:
            assert "/work/" not in (ROOT / file).read_text(encoding="utf-8").replace('"/work/"', ""), file
