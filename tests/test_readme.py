"""What the README names exists: commands, paths, settings, modules."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from oneday.errors import SettingError
from oneday.recipe import fields_of, resolve_settings

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


def list_commands(blocks):
    """(program, the words after it) of each command; settings that stand alone are pretraining's."""
    found = []
    for words in filter(None, (shlex.split(line, comments=True) for line in blocks.replace("\\\n", " ").splitlines())):
        scripts = [place for place, word in enumerate(words) if re.fullmatch(r"scripts/\w+\.py", word)]
        if scripts:
            found.append((Path(words[scripts[0]]).stem, words[scripts[0] + 1 :]))
        elif words[0] == "./run_finetune.sh":  # it passes on what follows the model and the tasks
            found.append(("finetune", list(itertools.dropwhile(lambda word: not word.startswith("--"), words))))
        elif words[0] == "sbatch":
            found.append((Path(words[1]).stem, words[2:]))
        elif words[0].startswith("--"):
            found.append(("pretrain", words))
        else:
            assert words[0] in ("make", "source", "hf"), words
    return found


class HaveReadError(Exception):
    """A program has read its settings: (their classes, what was given)."""


@pytest.fixture
def read_command(monkeypatch):
    """Runs a program until it has read its command line; returns (classes of its settings, those given)."""

    def stop(classes, *args, **kwargs):
        raise HaveReadError(classes, resolve_settings(classes, *args, **kwargs))

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("oneday.recipe.resolve_settings", stop)

    def read(name, words):
        spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        with pytest.raises(HaveReadError) as read:
            module.main()
        return read.value.args

    return read


COMMANDS = list_commands(BLOCKS)


@pytest.mark.parametrize(("name", "words"), COMMANDS, ids=[f"{name} {shlex.join(words)}" for name, words in COMMANDS])
def test_a_command_is_read_by_the_program_that_it_calls(read_command, name, words):
    words = [word.replace("RECIPE.yaml", "recipes/quickstart/bert.yaml") for word in words]
    _, settings = read_command(name, words)
    assert {word[2:] for word in words if word.startswith("--")} <= settings.keys()


def test_commands_are_found_and_settings_of_another_program_are_refused(read_command):
    assert {name for name, _ in COMMANDS} == {path.stem for path in (ROOT / "scripts").glob("*.py")} - {"report"}
    blocks = "./run_finetune.sh a rte --seed 1  # x\naccelerate launch \\\n  --n 8 scripts/pretrain.py r.yaml --seed 1"
    assert list_commands(blocks) == [("finetune", ["--seed", "1"]), ("pretrain", ["r.yaml", "--seed", "1"])]
    for name, words in (("finetune", ["--budget_minutes", "3"]), ("try_model", ["runs/a", "--num_seeds", "3"])):
        with pytest.raises(SettingError, match=f"unknown setting '{words[-2][2:]}'"):
            read_command(name, words)


MODES = {"benchmark": ("throughput", "versus-stock", "ablate", "finetuning"), "plan_budget": ("plan", "ladder")}


def test_settings_outside_of_commands_are_known(read_command):
    known = {"help", "config_file"}  # the latter is accelerate's
    for name in sorted(path.stem for path in (ROOT / "scripts").glob("*.py")):
        for mode in MODES.get(name, ("",)):
            classes, _ = read_command(name, [mode] if mode else [])
            known |= {field.rstrip("_") for field in fields_of(classes)}
    assert not set(re.findall(r"--([a-z_0-9]+)", README)) - known


def test_the_library_names_every_module():
    library = ROOT / "src" / "oneday"
    modules = [path.name for path in library.glob("*.py") if path.name != "__init__.py"]
    rooms = [f"{path.name}/" for path in library.iterdir() if path.is_dir() and path.name != "__pycache__"]
    named = re.findall(r"^\| `(\w+(?:\.py|/))` \|", (library / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(modules + rooms)


@pytest.mark.parametrize("folder", ["src", "scripts", "tests"])
def test_files_and_functions_stay_short(folder):
    for path in (ROOT / folder).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, (path, node.name)


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
