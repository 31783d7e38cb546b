"""Recipes: a YAML file (one level of `extends:`) and the command line become arguments.

Later layers win: defaults < the recipe it extends < the recipe < the command line. `null` unsets a setting.
This is the only module that reads the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import keyword
import shlex
import sys
import textwrap
import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from oneday.errors import SettingError

# Two spellings of one budget: given in one layer, either replaces the other from the layers below.
SAME_KIND = (("budget_hours", "budget_minutes"),)

# Words that YAML takes for truth values: they are left as they are where a text is asked for.
TRUTHS = {"yes": True, "on": True, "no": False, "off": False}

# Of a key on the command line without one: true where that can be.
NO_VALUE = object()

Settings = dict[str, Any]


def parse_recipe(
    classes: tuple[type, ...],
    argv: list[str] | None = None,
    description: str = "",
    example: str = "",
    default_recipe: str | None = None,
) -> tuple[Any, ...]:
    """Read `[RECIPE.yaml] [--key value ...]` into one instance of each dataclass.

    Where a setting takes the words without a key (`find_bare_words`), there is no recipe.

    Args:
        classes: Dataclasses whose fields are the settings; a field name occurs once.
        argv: The command line without the program; `sys.argv[1:]` when None.
        description: First lines of `--help`.
        example: A command that works, shown by `--help`.
        default_recipe: Recipe used when none is named.

    Raises:
        SettingError: On an unknown key, a value of the wrong type, or a file that cannot be read.
    """
    return build_arguments(classes, resolve_settings(classes, argv, description, example, default_recipe))


def resolve_settings(
    classes: tuple[type, ...],
    argv: list[str] | None = None,
    description: str = "",
    example: str = "",
    default_recipe: str | None = None,
) -> Settings:
    """The settings given by the recipe and the command line, merged and checked, without the defaults."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--help" in argv or "-h" in argv:
        sys.stdout.write(format_help(classes, description, example))
        raise SystemExit(0)
    recipe, overrides = split_command_line(argv, repeatable_settings(classes), find_bare_words(classes))
    layers = read_layers(recipe or default_recipe) if (recipe or default_recipe) else []
    known, refused = fields_of(classes), refused_settings(classes)
    settings: Settings = {}
    for place, layer in [*layers, ("the command line", overrides)]:
        check_layer(place, layer, known, refused)
        for names in SAME_KIND:
            if any(layer.get(name) is not None for name in names):
                settings = {key: value for key, value in settings.items() if key not in names}
        settings.update(layer)
    return {key: coerce(key, value, known[key]) for key, value in settings.items()}


def split_mode(
    modes: tuple[str, ...], argv: list[str] | None = None, default: str | None = None
) -> tuple[str | None, list[str]]:
    """The first word of the command line, one of `modes`, and what follows; None for a `--help` without one.

    Raises:
        SettingError: When the first word is none of them and there is no `default`.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in modes:
        return argv[0], argv[1:]
    if default is not None:
        return default, argv
    if argv and argv[0] in ("--help", "-h"):
        return None, argv
    given = f"is {argv[0]!r}" if argv else "is missing"
    raise SettingError(f"The first word of the command {given}; it must be one of {', '.join(modes)}.")


def repeatable_settings(classes: tuple[type, ...]) -> set[str]:
    """Settings that may be given several times on the command line, each time one item of their list."""
    return {field.name for cls in classes for field in dataclasses.fields(cls) if field.metadata.get("repeatable")}


def find_bare_words(classes: tuple[type, ...]) -> tuple[str, str] | None:
    """The setting that takes the words without a key, and their form in a usage; None: they name a recipe.

    A program says so where it declares the setting: `setting(..., bare_words="RUN_DIR")`, or `"RUN_DIR ..."` where
    there may be several.
    """
    forms = {field.name: field.metadata.get("bare_words") for cls in classes for field in dataclasses.fields(cls)}
    return next(((name, form) for name, form in forms.items() if form is not None), None)


def split_command_line(
    argv: list[str], repeatable: Collection[str] = (), bare_words: tuple[str, str] | None = None
) -> tuple[str | None, Settings]:
    """`['r.yaml', '--a', '1', '--b=x', '--c']` -> `('r.yaml', {'a': 1, 'b': 'x', 'c': NO_VALUE})`.

    Of a setting given twice the last one counts; of a `repeatable` one, all: `--a 1 --a 2` -> `{'a': [1, 2]}`.
    With `bare_words`, as `find_bare_words` gives them, the words without a key are a setting and no recipe.
    """
    words, overrides, position = [], {}, 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if not word.startswith("--"):
            words.append(word)
            continue
        key, equals, text = word[2:].partition("=")
        if not equals:
            has_value = position < len(argv) and not argv[position].startswith("--")
            text = argv[position] if has_value else None
            position += has_value
        name, value = key.replace("-", "_"), NO_VALUE if text is None else read_value(text)
        name += "_" * keyword.iskeyword(name)  # `--for` is the field `for_`
        if name in repeatable:
            earlier = overrides.get(name, [])
            value = NO_VALUE if value is NO_VALUE or earlier is NO_VALUE else [*earlier, value]
        overrides[name] = value
    if bare_words is not None:
        return None, place_bare_words(words, overrides, *bare_words)
    if len(words) > 1:
        raise SettingError(
            f"The command line names {words[1]!r} beside the recipe {words[0]!r}; give one recipe, then --key value."
        )
    return next(iter(words), None), overrides


def place_bare_words(words: list[str], overrides: Settings, name: str, form: str) -> Settings:
    """The settings of the command line with the words that had no key.

    Raises:
        SettingError: When they are more than the setting takes, or it is given with its key too.
    """
    if words and name in overrides:
        raise SettingError(f"The command line names {words[0]!r} beside --{name}; give one of them.")
    if len(words) > 1 and not form.endswith("..."):
        raise SettingError(f"The command line names {words[1]!r} beside {words[0]!r}; give one {name}.")
    return overrides | ({name: words if form.endswith("...") else words[0]} if words else {})


def read_value(text: str) -> Any:
    """One command-line value: YAML's null, true, false, lists, mappings and quoted texts; all else as it stands.

    What it is to be, `coerce` knows: to YAML 1:30 is 90, 2024_11_27 a number, `no` a truth value, # a remark.
    """
    word = text.strip()
    if word.lower() not in ("", "~", "null", "true", "false") and word[0] not in "[{'\"":
        return text
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # a date that is none is a ValueError
        return text
    return text if word[:1] in ("'", '"') and not isinstance(value, str) else value


def read_layers(path: str) -> list[tuple[str, Settings]]:
    """The recipe and, before it, the one it extends: (file name, settings) pairs."""
    layer = read_yaml(path)
    parent = layer.pop("extends", None)
    if parent is None:
        return [(str(path), layer)]
    parent_path = Path(path).parent / str(parent)
    parent_layer = read_yaml(str(parent_path))
    if "extends" in parent_layer:
        raise SettingError(
            f"{path} extends {parent}, which extends another recipe; one level of `extends:` is all there is."
        )
    return [(str(parent_path), parent_layer), (str(path), layer)]


def read_yaml(path: str) -> Settings:
    """A recipe file as a dictionary."""
    try:
        layer = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path, [str(p) for p in Path("recipes").rglob("*.yaml")], 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else "see recipes/ for those that are there."
        raise SettingError(f"There is no recipe {path}; {hint}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise SettingError(
            f"The recipe {path} cannot be read as YAML ({' '.join(str(error).split())}); mend it."
        ) from None
    if layer is not None and not isinstance(layer, dict):
        raise SettingError(f"The recipe {path} holds a {type(layer).__name__}; it must be lines of `key: value`.")
    return layer or {}


def refused_settings(classes: tuple[type, ...]) -> dict[str, str]:
    """Fields that a class has from its parent but does not take -> why."""
    return {name: reason for cls in classes for name, reason in getattr(cls, "refused", {}).items()}


def check_layer(place: str, layer: Settings, known: dict[str, Any], refused: dict[str, str]) -> None:
    """Refuse unknown keys (naming the nearest) and one budget spelled twice."""
    for key in layer:
        if key in refused:
            raise SettingError(f"{place} sets {key}, which {refused[key]}.")
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.4)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise SettingError(f"{place} has the unknown setting {key!r}{hint} (--help lists them).")
    for names in SAME_KIND:
        if sum(layer.get(name) is not None for name in names) > 1:
            raise SettingError(f"{place} sets both {' and '.join(names)}, which are one budget; keep one of them.")


def fields_of(classes: tuple[type, ...]) -> dict[str, Any]:
    """Setting name -> its type, over all the dataclasses."""
    known: dict[str, Any] = {}
    for cls in classes:
        hints = typing.get_type_hints(cls)
        known.update({field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init})
    return known


def coerce(key: str, value: Any, kind: Any) -> Any:
    """Turn a YAML value into the field's type.

    Raises:
        SettingError: When it cannot be one.
    """
    if value is None:
        return None
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    options = [option for option in (typing.get_args(kind) if union else (kind,)) if option is not type(None)]
    if value is NO_VALUE:
        if bool in options:
            return True
        raise SettingError(f"The setting {key} is given without a value; write --{key} VALUE, or leave it out.")
    for option in options:
        try:
            return coerce_one(value, option)
        except (TypeError, ValueError, OverflowError):
            continue
    wanted = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise SettingError(f"The setting {key} is {value!r}; it must be {wanted}.")


def coerce_one(value: Any, kind: Any) -> Any:
    """`value` as `kind`; ValueError when it is not one. Kinds beyond the plain ones pass through."""
    if typing.get_origin(kind) is list:
        items = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
        (item_kind,) = typing.get_args(kind)
        return [coerce_one(item.strip() if isinstance(item, str) else item, item_kind) for item in items]
    if kind is bool:
        value = TRUTHS.get(value.strip().lower(), value) if isinstance(value, str) else value
        if not isinstance(value, bool):
            raise ValueError(value)
        return value
    if kind is int:
        if isinstance(value, bool) or float(value) != int(float(value)):
            raise ValueError(value)
        return int(value) if not isinstance(value, str) or value.strip("+-").isdecimal() else int(float(value))
    if kind is float:
        if isinstance(value, bool):
            raise ValueError(value)
        return float(value)
    if kind is str:
        if isinstance(value, (list, dict)):
            raise ValueError(value)
        return str(value).lower() if isinstance(value, bool) else str(value)
    return value


def build_arguments(classes: tuple[type, ...], settings: Settings) -> tuple[Any, ...]:
    """One instance a dataclass; a setting that is None keeps the default where the type has no None."""
    built = []
    for cls in classes:
        hints = typing.get_type_hints(cls)
        names = {field.name for field in dataclasses.fields(cls) if field.init}
        optional = {name for name in names if type(None) in typing.get_args(hints[name])}
        given = {
            key: value for key, value in settings.items() if key in names and (value is not None or key in optional)
        }
        try:
            built.append(cls(**given))
        except SettingError:
            raise
        except (TypeError, ValueError, ImportError) as error:
            raise SettingError(f"A setting cannot work: {' '.join(str(error).split())}") from None
    return tuple(built)


def complete_settings(classes: tuple[type, ...], settings: Settings) -> Settings:
    """The given settings over every default of this project, so that a later change of a default changes nothing."""
    defaults = {
        field.name: default_of(field)
        for cls in classes
        for field in dataclasses.fields(cls)
        if field.name in cls.__annotations__ and "help" in field.metadata
    }
    return defaults | settings


def default_of(field: dataclasses.Field) -> Any:
    """A field's default value."""
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def format_help(classes: tuple[type, ...], description: str, example: str) -> str:
    """The text of `--help`, 80 columns wide: every setting of this project, by group."""
    usage = format_usage(example, find_bare_words(classes))
    lines = [*textwrap.wrap(description, 79), "", f"Usage: {usage}", "Example:"]
    lines += ["  " + " \\\n      ".join(wrap_command(example, 70)), ""]
    inherited, refused = [], refused_settings(classes)
    for cls in classes:
        lines += [*textwrap.wrap((cls.__doc__ or cls.__name__).strip().splitlines()[0], 79), ""]
        parent_names = {
            field.name
            for base in cls.__mro__[1:]
            if dataclasses.is_dataclass(base)
            for field in dataclasses.fields(base)
        }
        for field in dataclasses.fields(cls):
            if field.name in parent_names and field.name not in cls.__annotations__:
                inherited += [field.name] * (field.name not in refused)
            elif field.init and field.name not in refused:
                lines += format_setting(field)
        lines.append("")
    if inherited:
        names = ", ".join(sorted(inherited))
        lines += textwrap.wrap(f"Settings of transformers.TrainingArguments are known too: {names}.", 79)
    return "\n".join(lines) + "\n"


def format_usage(example: str, bare_words: tuple[str, str] | None = None) -> str:
    """The form of a command: `python scripts/benchmark.py MODE [RECIPE.yaml] [--key value ...]`."""
    words = list(itertools.takewhile(lambda word: not word.startswith("--"), shlex.split(example)))
    end = 1 + next((place for place, word in enumerate(words) if word.endswith(".py")), -1)
    forms = ["[RECIPE.yaml]" if word.endswith(".yaml") else "MODE" for word in words[end:]]
    forms = forms if bare_words is None else [f"[{bare_words[1]}]"]
    return " ".join([*words[:end], *forms, "[--key value ...]"])


def wrap_command(command: str, width: int) -> list[str]:
    """The lines of a command, broken between its words alone."""
    lines = [""]
    for word in map(shlex.quote, shlex.split(command)):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


def format_setting(field: dataclasses.Field) -> list[str]:
    """`--name` with its default, then its help, indented."""
    default = default_of(field)
    listed = ",".join(map(str, default)) if isinstance(default, list) else default
    shown = "" if listed in (None, "", {}) else f" (default: {listed})"
    return [
        f"  --{field.name.rstrip('_')}{shown}",
        *textwrap.wrap(field.metadata.get("help", ""), 73, initial_indent="      ", subsequent_indent="      "),
    ]
