"""Settings on disk: YAML mappings, overrides by dotted key, values of the type that a field wants."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from aroma.errors import ConfigError, bad_value


def read_mapping(field: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the mapping that a YAML file holds; an empty file is an empty one.

    Args:
        field: What the file is called in errors, as `"recipe"`.
        path: The file.

    Raises:
        ConfigError: No such file, no YAML, a key given twice, or no mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise bad_value(field, str(path), f"cannot be read ({error.strerror}); give a YAML file") from error
    except UnicodeDecodeError as error:
        raise bad_value(field, str(path), "not UTF-8 text; give a YAML file") from error
    values = parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise bad_value(field, str(path), f"it holds a {type(values).__name__}; a {field} is a mapping of keys")
    return values


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of a YAML text.

    Args:
        text: The text.
        where: Where it stands, for errors.

    Raises:
        ConfigError: No YAML, or a key given twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except _RepeatedKey as error:
        raise ConfigError(f"{where}: {error.problem}, the second time in line {error.line}; keep one") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML ({' '.join(str(error).split())}); quote texts that hold ': '") from error


def split_override(override: str) -> tuple[str, Any]:
    """Return key and value of a text like `"training.batch_size=16"`; the value is read as YAML.

    Raises:
        ConfigError: No equals sign, or no YAML after it.
    """
    key, equals, text = override.partition("=")
    if not equals:
        raise bad_value("override", override, "write KEY=VALUE, as training.batch_size=16")
    return key, parse_yaml(text, f"the value of {key}")


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> None:
    """Put the values of `overrides` into nested `values`.

    Keys of `values` may hold dots themselves, as the label `lora-0.5` of a method: the longest that fits is meant.

    Raises:
        ConfigError: An override that is none, or that leads through something that has no keys.
    """
    for override in overrides:
        key, value = split_override(override)
        _put(values, key, value, key)


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


def flatten(values: Mapping[str, Any], sections: Iterable[str], prefix: str = "") -> dict[str, Any]:
    """Return `values` by dotted key; only the mappings called `sections` (dotted) are taken apart.

    A section that is null has no keys.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name in sections and isinstance(value, dict | NoneType):
            flat |= flatten(value or {}, sections, f"{name}.")
        else:
            flat[name] = value
    return flat


def unknown_key(key: str, value: Any, known: Iterable[str], whole: str, remedy: str = "") -> ConfigError:
    """Return (not raise) the error for a key that does not exist, naming the nearest that does.

    Args:
        key: The key, dotted.
        value: Its value.
        known: All keys there are; at least one.
        whole: What lacks it, as `"a recipe"`.
        remedy: A further sentence.
    """
    names = list(known)
    # A key of the right name in the wrong section is nearer than one that is merely spelled alike.
    by_name = [name for name in names if name.rpartition(".")[2] == key.rpartition(".")[2]]
    nearest = (by_name or difflib.get_close_matches(key, names, n=1, cutoff=0.0))[0]
    sentences = [f"{key}={value!r}: {whole} has no such key; the nearest is {nearest!r}", remedy]
    return ConfigError(". ".join(filter(None, sentences)))


def typed(key: str, value: Any, kind: Any) -> Any:
    """Return `value` as `kind`, with jsonargparse's rules ("1e-4" is a float, 1.5 is no int).

    Args:
        key: The key, for errors.
        value: What was given.
        kind: A type hint.

    Raises:
        ConfigError: It is none.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    try:
        made = parser.parse_object({"value": value}).value
    except ArgumentError as error:
        raise bad_value(key, value, f"give {type_name(kind)}") from error
    if made is None and NoneType not in get_args(kind):
        raise bad_value(key, value, f"give {type_name(kind)}; it cannot be null")
    return made


_TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    NoneType: "null",
}
_CONTAINER_NAMES: dict[Any, str] = {list: "a list of", dict: "a mapping of"}
_ELEMENT_NAMES: dict[Any, str] = {int: "whole numbers", float: "numbers", str: "texts"}


def type_name(kind: Any) -> str:
    """Return a type hint in words."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if kind in _TYPE_NAMES:
        return _TYPE_NAMES[kind]
    container = _CONTAINER_NAMES.get(get_origin(kind))
    if container is not None:
        return f"{container} {_ELEMENT_NAMES.get(get_args(kind)[-1], 'values')}"
    return " or ".join(type_name(part) for part in get_args(kind))


class _RepeatedKey(yaml.YAMLError):
    def __init__(self, key: str, line: int) -> None:
        super().__init__(key)
        self.problem = f"the key {key!r} is given twice"
        self.line = line


class _Loader(yaml.SafeLoader):
    """YAML's safe part, where 1e-4 is a number, as YAML 1.2 has it, and no key may be given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise _RepeatedKey(key.value, key.start_mark.line + 1)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
