"""From a YAML file to a grid: every key and value checked before anything runs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, get_type_hints

from aroma.errors import bad_value

from ..settings import apply_overrides, flatten, read_mapping, typed, unknown_key
from ..specs import TrainSpec, check_training
from ..tasks.spec import TaskSpec
from .settings import SECTIONS, check_option, check_setting, check_settings, require_mapping
from .spec import Grid, MethodSpec, Override, Selection

_PLAIN = ("output", "model", "dtype", "quantization", "processes")
"""Keys whose values are taken as they are."""
_TAKEN = {"select", "search"}
"""Folders, below the runs, of trials that are not reported."""


def load_grid(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Grid:
    """Read a grid file and apply overrides.

    Args:
        path: A YAML file with the keys of `Grid`.
        overrides: Texts like `"training.max_steps=60"` or `"methods.lora-r8.r=4"`, stronger than the file.

    Raises:
        ConfigError: No such file, no YAML, an unknown key (the nearest is named), or a value that cannot work.
    """
    return make_grid(read_grid_file(path, overrides))


def read_grid_file(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Return the nested values of a grid file (or of a search, which is one with more keys), overrides applied."""
    values = read_mapping("grid", path)
    apply_overrides(values, overrides)
    return values


def make_grid(values: Mapping[str, Any]) -> Grid:
    """Return the grid with these values.

    Raises:
        ConfigError: An unknown or missing key, or a value that cannot work.
    """
    hints = get_type_hints(Grid)
    for key, value in values.items():
        if key not in hints:
            raise unknown_key(str(key), value, hints, "a grid")
    made = {key: typed(key, values[key], hints[key]) for key in _PLAIN if key in values}
    for key in ("output", "model"):
        if not made.get(key):
            raise bad_value(key, made.get(key), "give it; a grid has no default for it")
    if made.get("processes", 1) < 1:
        raise bad_value("processes", made["processes"], "give 1 or more")
    tasks = _tasks(values.get("tasks"))
    methods = _methods(values.get("methods"))
    return Grid(
        tasks=tasks,
        methods=methods,
        training=_training(values.get("training")),
        seeds=_seeds(values.get("seeds", [0])),
        overrides=_overrides("overrides", values.get("overrides"), tasks, methods),
        select=_selection(values.get("select"), tasks, methods),
        **made,
    )


def _tasks(values: Any) -> dict[str, TaskSpec]:
    named = _named("tasks", values, "as mrpc: {}")
    for name in _TAKEN & named.keys():
        raise bad_value("tasks", name, "it would share a folder with trials of a selection or a search; rename it")
    hints = {key: hint for key, hint in get_type_hints(TaskSpec).items() if key != "name"}
    return {name: TaskSpec(name=name, **_fields(f"tasks.{name}", keys, hints)) for name, keys in named.items()}


def _methods(values: Any) -> dict[str, MethodSpec]:
    methods = {}
    for label, keys in _named("methods", values, "as lora-r8: {kind: lora, r: 8}").items():
        kind = typed(f"methods.{label}.kind", keys.get("kind"), str)
        options = {key: check_option(f"methods.{label}.{key}", value) for key, value in keys.items() if key != "kind"}
        methods[label] = MethodSpec(kind, options)
    return methods


def _named(key: str, values: Any, example: str) -> dict[str, dict[str, Any]]:
    """Return a mapping from labels, which are to name folders, to mappings of keys."""
    named = {name: require_mapping(f"{key}.{name}", keys) for name, keys in require_mapping(key, values).items()}
    if not named:
        raise bad_value(key, values, f"give at least one, {example}")
    for name in named:
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise bad_value(key, name, "it names folders; write it with letters, digits, '-', '+', '_' and '.'")
    return named


def _training(values: Any) -> TrainSpec:
    given = require_mapping("training", values)
    if "seed" in given:
        raise bad_value("training.seed", given["seed"], "a grid has `seeds`; leave it out")
    # One thread a worker unless the grid says otherwise: with PyTorch's own choice two workers fight for the cores.
    training = TrainSpec(**{"threads": 1, **_fields("training", given, get_type_hints(TrainSpec))})
    check_training(training)
    return training


def _fields(section: str, values: dict[str, Any], hints: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a dataclass's fields, each of its type."""
    for key, value in values.items():
        if key not in hints:
            raise unknown_key(f"{section}.{key}", value, [f"{section}.{name}" for name in hints], "a grid")
    return {key: typed(f"{section}.{key}", value, hints[key]) for key, value in values.items()}


def _seeds(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise bad_value("seeds", values, "give a list of whole numbers, as [0, 1, 2]")
    seeds = tuple(typed("seeds", values, list[int]))
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise bad_value("seeds", values, "give at least one, 0 or more, each once, as [0, 1, 2]")
    return seeds


def _overrides(
    key: str, entries: Any, tasks: Mapping[str, TaskSpec], methods: Mapping[str, MethodSpec]
) -> tuple[Override, ...]:
    if not isinstance(entries or [], list):
        raise bad_value(key, entries, "give a list, as [{task: rte, training.max_steps: 500}]")
    made = []
    for index, entry in enumerate(entries or []):
        where = f"{key}[{index}]"
        keys = dict(require_mapping(where, entry))
        filters = {
            "tasks": _filter(f"{where}.task", keys, "task", tasks),
            "methods": _filter(f"{where}.method", keys, "method", methods),
        }
        made.append(Override(check_settings(keys, f"{where}.", known=("task", "method")), **filters))
    return tuple(made)


def _filter(where: str, keys: dict[str, Any], name: str, known: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Take the filter `name` out of an override: a label, or a list of them. A mapping is a section of settings."""
    if keys.get(name) is None or isinstance(keys[name], dict):
        if keys.get(name, "") is None:
            del keys[name]
        return None
    value = typed(where, keys.pop(name), str | list[str])
    labels = (value,) if isinstance(value, str) else tuple(value)
    for label in labels:
        if label not in known:
            raise bad_value(where, label, f"the grid has no such {name}; it has {', '.join(known)}")
    return labels


def _selection(values: Any, tasks: Mapping[str, TaskSpec], methods: Mapping[str, MethodSpec]) -> Selection | None:
    if values is None:
        return None
    given = require_mapping("select", values)
    hints = {"over": None, "seed": None, "training": None, "overrides": None}
    for key, value in given.items():
        if key not in hints:
            raise unknown_key(f"select.{key}", value, [f"select.{name}" for name in hints], "a grid")
    seed = typed("select.seed", given.get("seed", 0), int)
    if seed < 0:
        raise bad_value("select.seed", seed, "give 0 or more")
    training = {"training": require_mapping("select.training", given.get("training"))}
    overrides = _overrides("select.overrides", given.get("overrides"), tasks, methods)
    return Selection(_over(given.get("over")), seed, check_settings(training, "select."), overrides)


def _over(values: Any) -> dict[str, list[Any]]:
    over = {}
    for key, candidates in flatten(require_mapping("select.over", values), SECTIONS).items():
        if not isinstance(candidates, list) or not candidates:
            raise bad_value(f"select.over.{key}", candidates, "give a list of values to try, as [5.0e-4, 1.0e-3]")
        over[key] = [check_setting(key, value, "select.over.") for value in candidates]
        if any(value in over[key][:index] for index, value in enumerate(over[key])):
            raise bad_value(f"select.over.{key}", candidates, "a value is there twice; give each once")
    if not over:
        raise bad_value("select.over", values, "name what is tried, as {training.learning_rate: [5.0e-4, 1.0e-3]}")
    return over
