"""Recipes on disk: YAML deltas on documented defaults, checked key by key."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from ..errors import ConfigError, bad_value
from ..files import write_text
from .specs import AdapterSpec, DataSpec, ModelSpec, Recipe, TrainSpec

__all__ = ["AdapterSpec", "DataSpec", "ModelSpec", "Recipe", "TrainSpec"]


def load_recipe(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file and apply overrides.

    Args:
        path: A YAML file with any of the keys of `Recipe`; what it leaves out has its default.
        overrides: Texts like `"training.batch_size=16"`, stronger than the file; values are read as YAML.

    Raises:
        ConfigError: No such file, no YAML, an unknown key (the nearest known one is named), or a value of a wrong type
            or out of range.
    """
    values = _flatten(_read_yaml(Path(path)))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise bad_value("override", override, "write KEY=VALUE, as training.batch_size=16")
        values[key] = _parse_yaml(text, f"the value of {key}")
    return make_recipe(values)


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """Return the recipe with `values`, given by dotted key (`"training.batch_size"`), over the defaults.

    Raises:
        ConfigError: An unknown key, or a value of a wrong type or out of range.
    """
    types = recipe_keys()
    sections: dict[str, dict[str, Any]] = {name: {} for name in _SECTIONS}
    top: dict[str, Any] = {}
    for key, value in values.items():
        if key not in types:
            raise _unknown_key(key, value, list(types))
        section, _, name = key.rpartition(".")
        (sections[section] if section else top)[name] = _typed(key, value, types[key])
    made = {name: kind(**sections[name]) for name, kind in _SECTIONS.items()}
    return Recipe(**made, **top)


def recipe_keys() -> dict[str, Any]:
    """Return every key of a recipe, dotted, with its type."""
    keys: dict[str, Any] = {}
    for name, kind in get_type_hints(Recipe).items():
        if is_dataclass(kind):
            keys |= {f"{name}.{field}": hint for field, hint in get_type_hints(kind).items()}
        else:
            keys[name] = kind
    return keys


def recipe_help() -> Iterator[tuple[str, Any, str]]:
    """Yield key, default and meaning of every field of a recipe, in the order of the file."""
    from docstring_parser import parse_from_object

    for section, kind in [*_SECTIONS.items(), ("", Recipe)]:
        docs = {entry.arg_name: entry.description for entry in parse_from_object(kind).params}
        for field in fields(kind):
            if field.name in docs:
                yield f"{section}.{field.name}".lstrip("."), field.default, docs[field.name] or ""


def save_recipe(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Write the resolved recipe, defaults included, atomically."""
    write_text(path, yaml.safe_dump(asdict(recipe), sort_keys=False, allow_unicode=True))


def differing_keys(one: Recipe, other: Recipe) -> list[str]:
    """Return the dotted keys in which two recipes differ. Where they write to does not count: folders are moved."""
    left, right = _flatten(asdict(one)), _flatten(asdict(other))
    return [key for key in left if left[key] != right[key] and key != "output"]


_SECTIONS: dict[str, Any] = {name: kind for name, kind in get_type_hints(Recipe).items() if is_dataclass(kind)}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise bad_value("recipe", str(path), f"cannot be read ({error.strerror}); give a YAML file") from error
    except UnicodeDecodeError as error:
        raise bad_value("recipe", str(path), "not UTF-8 text; give a YAML file") from error
    values = _parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise bad_value("recipe", str(path), f"it holds a {type(values).__name__}; a recipe is a mapping of keys")
    return values


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML ({' '.join(str(error).split())}); quote texts that hold ': '") from error


def _flatten(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested `values` by dotted key; a section that is null or absent has its defaults."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name in _SECTIONS and isinstance(value, dict | NoneType):
            flat |= _flatten(value or {}, f"{name}.")
        else:
            flat[name] = value
    return flat


def _unknown_key(key: str, value: Any, known: list[str]) -> ConfigError:
    if key in _SECTIONS:
        return ConfigError(f"{key}={value!r}: it is a section; give it keys, as {_first_key(key, known)}")
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
    by_name = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    return ConfigError(
        f"{key}={value!r}: a recipe has no such key; the nearest is {(by_name or [nearest])[0]!r}. "
        "`aroma train --help` lists all keys"
    )


def _first_key(section: str, known: list[str]) -> str:
    return next(key for key in known if key.startswith(f"{section}."))


def _typed(key: str, value: Any, kind: Any) -> Any:
    """Return `value` as `kind`, with jsonargparse's rules ("1e-4" is a float, 1.5 is no int)."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    try:
        typed = parser.parse_object({"value": value}).value
    except ArgumentError as error:
        raise bad_value(key, value, f"give {_type_name(kind)}") from error
    if typed is None and NoneType not in get_args(kind):
        raise bad_value(key, value, f"give {_type_name(kind)}; it cannot be null")
    return typed


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is list:
        return "a list of texts"
    if kind in _TYPE_NAMES:
        return _TYPE_NAMES[kind]
    return " or ".join(_type_name(part) for part in get_args(kind))
