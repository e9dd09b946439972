"""Settings on disk: YAML files and KEY=VALUE overrides become values by dotted key, each typed by jsonargparse."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from aroma.errors import ConfigError, bad_value


def types_of(kind: type[Any], prefix: str = "") -> dict[str, Any]:
    """Return the types of a dataclass's fields by name, with `prefix`."""
    return {f"{prefix}{name}": hint for name, hint in get_type_hints(kind).items()}


def typed_fields(types: Mapping[str, Any], values: Mapping[str, Any], whole: str, prefix: str = "") -> dict[str, Any]:
    """Return `values`, each of its type.

    Args:
        types: By key.
        whole: What an unknown key does not belong to, as `"a grid"`.
        prefix: Stands before every key in errors, as `"options."`.

    Raises:
        ConfigError: An unknown key (the nearest is named), or a value of a wrong type.
    """
    for key, value in values.items():
        if key not in types:
            # A key of the right name in the wrong section is nearer than one that is merely spelled alike.
            alike = [name for name in types if name.rpartition(".")[2] == key.rpartition(".")[2]]
            nearest = alike or difflib.get_close_matches(key, types, n=1, cutoff=0.0)
            hint = f"the nearest is {prefix + nearest[0]!r}" if nearest else "it has none; leave it out"
            raise bad_value(prefix + key, value, f"{whole} has no such key; {hint}")
    return {key: typed(prefix + key, value, types[key]) for key, value in values.items()}


def typed(key: str, value: Any, kind: Any) -> Any:
    """Return one `value` as `kind` ("1e-4" is a float, 1.5 is no int); ConfigError under `key` if it is none."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    literals = [text for one in kinds if get_origin(one) is Literal for text in get_args(one)]
    if kind is Any or type(value) in kinds or value in literals:  # a parser takes ten times as long
        return value
    try:
        if value is not None:
            return _parser(kind).parse_object({"value": value})["value"]
    except ArgumentError:
        pass
    name = kind.__name__ if type(kind) is type else str(kind).replace("typing.", "")
    raise bad_value(key, value, f"give a value of type {name}")


@cache
def _parser(kind: Any) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    return parser


# Files and overrides -------------------------------------------------------------------------------------------------


def load_values(field: str, path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Return the mapping of a YAML file, with overrides such as `"training.batch_size=16"`, the value as YAML.

    Keys may hold dots themselves, as the label `lora-0.5` of a method: the longest that fits is meant.

    Args:
        field: What the file is, for errors.

    Raises:
        ConfigError: The file cannot be read, or holds no mapping; or an override is none.
    """
    try:
        values = _parse_yaml(Path(path).read_text(encoding="utf-8"), str(path)) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise bad_value(field, str(path), f"cannot be read ({error}); give a YAML file") from error
    if not isinstance(values, dict):
        raise bad_value(field, str(path), f"it holds a {type(values).__name__}; a {field} is a mapping of keys")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise bad_value("override", override, "write KEY=VALUE, as training.batch_size=16")
        _put(values, key, _parse_yaml(text, f"the value of {key}"), key)
    return values


def _put(values: dict[str, Any], key: str, value: Any, whole: str) -> None:
    within = [name for name in values if isinstance(name, str) and (key == name or key.startswith(f"{name}."))]
    name = max(within, key=len, default=key.partition(".")[0])
    rest = key[len(name) + 1 :]
    if not rest:
        values[name] = value
        return
    if values.get(name) is None:
        values[name] = {}
    if not isinstance(values[name], dict):
        raise bad_value(whole, value, f"{name!r} holds {values[name]!r}, which has no keys; give it as a whole")
    _put(values[name], rest, value, whole)


def flatten(values: Mapping[str, Any], sections: Iterable[str]) -> dict[str, Any]:
    """Return `values` by dotted key; only mappings called `sections` are taken apart. Null has no keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        is_section = key in sections and isinstance(value, dict | NoneType)
        flat |= {f"{key}.{name}": one for name, one in (value or {}).items()} if is_section else {key: value}
    return flat


def section_of(settings: Mapping[str, Any], section: str) -> dict[str, Any]:
    """Return the settings of one section, by the names of its fields."""
    prefix = f"{section}."
    return {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}


class _Loader(yaml.SafeLoader):
    """YAML's safe part, where 1e-4 is a number, as YAML 1.2 has it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML ({' '.join(str(error).split())}); quote texts that hold ': '") from error
