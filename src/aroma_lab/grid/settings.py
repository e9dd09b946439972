"""Settings by dotted key: what an override, a selection or a search may change of a trial."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, get_type_hints

from aroma.errors import ConfigError, bad_value

from ..settings import flatten, typed, unknown_key
from ..specs import TrainSpec
from ..tasks.spec import TaskSpec

SECTIONS = ("training", "options", "task")
"""`training.KEY` is a key of the loop, `options.KEY` one of the method, `task.KEY` one of the task."""

Settings = dict[str, Any]
"""Values by dotted key; `model` stands alone."""


@cache
def setting_types() -> dict[str, Any]:
    """Return every dotted key with its type; `options.KEY` is left to the method."""
    types = {f"training.{name}": hint for name, hint in get_type_hints(TrainSpec).items()}
    types |= {f"task.{name}": hint for name, hint in get_type_hints(TaskSpec).items() if name != "name"}
    return {**types, "model": str}


def check_setting(key: str, value: Any, where: str = "", known: Iterable[str] = ()) -> Any:
    """Return the value of a dotted key, of the type that its field wants.

    Args:
        key: The key, as `training.learning_rate`, `options.r`, `task.max_length` or `model`.
        value: What was given.
        where: What stands before the key in errors, as `"select.over."`.
        known: Further keys that could have been meant.

    Raises:
        ConfigError: An unknown key, a seed, or a value of a wrong type.
    """
    if key == "training.seed":
        raise bad_value(f"{where}{key}", value, "seeds are given by `seeds` and `select.seed`; leave it out")
    if key.startswith("options.") and key != "options.":
        return check_option(f"{where}{key}", value)
    types = setting_types()
    if key not in types:
        raise unknown_key(f"{where}{key}", value, [*types, "options.r", *known], "a grid")
    return typed(f"{where}{key}", value, types[key])


def check_option(key: str, value: Any) -> Any:
    """Return the value of a method's option, which must be one that JSON can hold.

    Raises:
        ConfigError: It is not, as a date or a NaN.
    """
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise bad_value(key, value, "give a finite number, a text, true, false, null, or a list of them") from error
    return value


def check_settings(values: Mapping[str, Any], where: str, known: Iterable[str] = ()) -> Settings:
    """Return settings given nested or by dotted key, each checked; see `check_setting`."""
    return {key: check_setting(key, value, where, known) for key, value in flatten(values, SECTIONS).items()}


def section_of(settings: Settings, section: str) -> dict[str, Any]:
    """Return the settings of one section, by the names of its fields."""
    prefix = f"{section}."
    return {key[len(prefix) :]: value for key, value in settings.items() if key.startswith(prefix)}


def require_mapping(key: str, value: Any) -> dict[str, Any]:
    """Return `value`, a mapping with texts as keys, or an empty one for null.

    Raises:
        ConfigError: It is something else.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad_value(key, value, "give a mapping of keys")
    for name in value:
        if not isinstance(name, str):
            raise ConfigError(f"{key}: the key {name!r} is no text; quote it")
    return value
