"""Settings on disk: YAML files and KEY=VALUE overrides become dataclasses, checked by jsonargparse key by key."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from aroma.errors import ConfigError, bad_value


def typed_fields(
    kind: type[Any] | Mapping[str, Any],
    values: Mapping[str, Any],
    where: str = "",
    whole: str = "a grid",
    remedy: str = "",
    also: Callable[[], Iterable[str]] = lambda: (),
) -> dict[str, Any]:
    """Return the values of a dataclass's fields, each of its type; fields that are dataclasses are made.

    Args:
        kind: The dataclass, or types by name.
        values: What is given, nested or by dotted key.
        where: Stands before every key in errors, as `"training"` or `"tasks.mrpc"`.
        whole: What an unknown key does not belong to, as `"a grid"`.
        remedy: A further sentence about unknown keys.
        also: Gives further keys that could have been meant; called only for one that resembles none of these.

    Returns:
        Keyword arguments of the dataclass, with only the fields that `values` has.

    Raises:
        ConfigError: An unknown key, or a value of a wrong type.
    """
    types, prefix = _types(kind), f"{where}." if where else ""
    sections = {key[: dot.start()] for key in types for dot in re.finditer(r"\.", key)}
    flat = flatten(values, sections)
    for key, value in flat.items():
        if key in sections:
            example = next(known for known in types if known.startswith(f"{key}."))
            raise bad_value(f"{prefix}{key}", value, f"it is a section; give it keys, as {prefix}{example}")
        if key not in types:
            while isinstance(value, dict) and value:  # of a section that does not exist, a key tells more
                name, value = next(iter(value.items()))
                key = f"{key}.{name}"
            close = _of_name(key, types) or difflib.get_close_matches(key, types, n=1, cutoff=0.8)
            known = [*types] if close else [*types, *also()]
            raise unknown_key(f"{prefix}{key}", value, [f"{prefix}{name}" for name in known], whole, remedy)
    return _nested(kind, _parsed(types, flat, prefix))


def typed(key: str, value: Any, kind: Any) -> Any:
    """Return one `value` as `kind`, by the rules of `typed_fields` ("1e-4" is a float, 1.5 is no int).

    Raises:
        ConfigError: It is none; the error names `key`.
    """
    prefix, _, name = key.rpartition(".")
    return _parsed({name: kind}, {name: value}, f"{prefix}." if prefix else "")[name]


def describe(kind: type[Any]) -> Iterator[tuple[str, Any, str]]:
    """Yield dotted key, default and meaning (the text below the field) of every field of a dataclass, in order."""
    from docstring_parser import parse_from_object

    bases = [base for base in reversed(kind.__mro__) if is_dataclass(base)]
    docs = {entry.arg_name: entry.description or "" for base in bases for entry in parse_from_object(base).params}
    hints = get_type_hints(kind)
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            for key, default, meaning in describe(hints[field.name]):
                yield f"{field.name}.{key}", default, meaning
        else:
            default = field.default_factory() if field.default_factory is not MISSING else field.default
            yield field.name, default, " ".join(docs.get(field.name, "").split())


# Files and overrides -------------------------------------------------------------------------------------------------


def read_mapping(field: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the mapping that a YAML file holds; an empty file is an empty one.

    Args:
        field: What the file is called in errors, as `"recipe"`.

    Raises:
        ConfigError: No such file, no YAML, a key given twice, or no mapping.
    """
    try:
        values = parse_yaml(Path(path).read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise bad_value(field, str(path), f"cannot be read ({error.strerror}); give a YAML file") from error
    except UnicodeDecodeError as error:
        raise bad_value(field, str(path), "not UTF-8 text; give a YAML file") from error
    if not isinstance(values, dict | None):
        raise bad_value(field, str(path), f"it holds a {type(values).__name__}; a {field} is a mapping of keys")
    return values or {}


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of a YAML text, which stands at `where`.

    Raises:
        ConfigError: No YAML, or a key given twice.
    """
    loader = _Loader(text)
    loader.name = where
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML ({' '.join(str(error).split())}); quote texts that hold ': '") from error


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> None:
    """Put the values of `overrides`, such as `"training.batch_size=16"` with the value as YAML, into nested `values`.

    Keys of `values` may hold dots themselves, as the label `lora-0.5` of a method: the longest that fits is meant.

    Raises:
        ConfigError: An override that is none, or that leads through something that has no keys.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise bad_value("override", override, "write KEY=VALUE, as training.batch_size=16")
        _put(values, key, parse_yaml(text, f"the value of {key}"), key)


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


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values that are nested, or given by dotted key, all nested."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        _put(nested, str(key), nest(value) if isinstance(value, dict) else value, str(key))
    return nested


def flatten(values: Mapping[str, Any], sections: Iterable[str], prefix: str = "") -> dict[str, Any]:
    """Return `values` by dotted key; only mappings called `sections` (dotted) are taken apart. Null has no keys."""
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
        known: All keys there are; at least one.
        whole: What lacks it, as `"a recipe"`.
        remedy: A further sentence.
    """
    names = list(known)
    # A key of the right name in the wrong section is nearer than one that is merely spelled alike.
    nearest = (_of_name(key, names) or difflib.get_close_matches(key, names, n=1, cutoff=0.0))[0]
    sentences = [f"{key}={value!r}: {whole} has no such key; the nearest is {nearest!r}", remedy]
    return ConfigError(". ".join(filter(None, sentences)))


def _of_name(key: str, known: Iterable[str]) -> list[str]:
    """Return the keys whose last part is that of `key`."""
    return [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]


# Types ---------------------------------------------------------------------------------------------------------------


def _parsed(types: Mapping[str, Any], flat: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return values by dotted key, each of its type; errors name a key with `prefix`."""
    for key, value in flat.items():
        if value is None and NoneType not in get_args(types[key]) and types[key] is not Any:
            raise bad_value(f"{prefix}{key}", value, f"give {_type_name(types[key])}; it cannot be null")
    try:
        parsed = _parser(tuple(types.items())).parse_object(dict(flat))
    except ArgumentError as error:
        key = next(key for key in re.findall(r'[kK]ey "([^"]+)"', str(error)) if key in types)
        raise bad_value(f"{prefix}{key}", flat[key], f"give {_type_name(types[key])}") from error
    return {key: parsed[key] for key in flat}


@cache
def _parser(types: tuple[tuple[str, Any], ...]) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    for key, kind in types:
        parser.add_argument(f"--{key}", type=kind)
    return parser


def _types(kind: type[Any] | Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(kind, type):
        return dict(kind)
    types: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        types |= {f"{name}.{key}": one for key, one in _types(hint).items()} if is_dataclass(hint) else {name: hint}  # type: ignore[arg-type]
    return types


def _nested(kind: type[Any] | Mapping[str, Any], flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by dotted key as keyword arguments of `kind`, its sections made."""
    made: dict[str, Any] = {}
    hints = get_type_hints(kind) if isinstance(kind, type) else kind
    for key, value in flat.items():
        name = key.partition(".")[0]
        if key in hints:
            made[key] = value
        elif name not in made:
            inner = {other[len(name) + 1 :]: one for other, one in flat.items() if other.startswith(f"{name}.")}
            made[name] = hints[name](**_nested(hints[name], inner))
    return made


_TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    NoneType: "null",
}


def _type_name(kind: Any) -> str:
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if get_origin(kind) in (list, dict):
        items = _TYPE_NAMES.get(arguments[-1], "a value").removeprefix("a ")
        return f"a {'list' if get_origin(kind) is list else 'mapping'} of {items}s"
    return _TYPE_NAMES.get(kind) or " or ".join(map(_type_name, arguments))


class _Loader(yaml.SafeLoader):
    """YAML's safe part, where 1e-4 is a number, as YAML 1.2 has it, and no key may be given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise ConfigError(
                        f"{self.name}: the key {key.value!r} is given twice, the second time in line {line}; keep one"
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
