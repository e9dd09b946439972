"""Recipes on disk: YAML deltas on documented defaults, checked key by key."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any, get_type_hints

import yaml

from aroma.errors import ConfigError
from aroma.files import write_text

from ..settings import flatten, read_mapping, split_override, typed, unknown_key
from ..specs import AdapterSpec, DataSpec, ModelSpec, Recipe, TrainSpec

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
    values = flatten(read_mapping("recipe", path), _SECTIONS)
    for override in overrides:
        key, value = split_override(override)
        values[key] = value
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
        (sections[section] if section else top)[name] = typed(key, value, types[key])
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
    left, right = (flatten(asdict(recipe), _SECTIONS) for recipe in (one, other))
    return [key for key in left if left[key] != right[key] and key != "output"]


_SECTIONS: dict[str, Any] = {name: kind for name, kind in get_type_hints(Recipe).items() if is_dataclass(kind)}


def _unknown_key(key: str, value: Any, known: list[str]) -> ConfigError:
    if key in _SECTIONS:
        return ConfigError(f"{key}={value!r}: it is a section; give it keys, as {_first_key(key, known)}")
    return unknown_key(key, value, known, "a recipe", "`aroma train --help` lists all keys")


def _first_key(section: str, known: list[str]) -> str:
    return next(key for key in known if key.startswith(f"{section}."))
