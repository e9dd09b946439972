"""Records of runs and grids, read from files that a hand may have edited, and checked against what they must have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from aroma.errors import CheckpointError
from aroma.files import read_json

OF_RUN = "restore the file, or remove the run's folder and run it again"
_OF_GRID = "restore the file, or remove it and run the grid again, which writes it anew"
OF_TABLE = "restore the file, or make it again from the run folders with `aroma lab collect`"

_TYPES: Mapping[str, tuple[type, ...]] = {
    "a mapping": (Mapping,),
    "a list": (list,),
    "a text": (str,),
    "a number": (int, float),
    "a whole number": (int,),
    "anything": (object,),
}
# What a record must have, and of which type where tables compute with it or group by it; see `check`.
TRIAL = {
    **dict.fromkeys(("name", "model", "method", "kind", "purpose"), "a text"),
    "task": {"name": "a text"},
    "training": {"seed": "a whole number"},
    "options": {},
}
RESULT = {
    "metric": "a text",
    "score": "a number",
    "examples": {"train": "a whole number", ...: "a whole number"},
    "parameters": dict.fromkeys(("initial", "average", "head"), "a number"),
    "versions": {},
    **dict.fromkeys(("steps", "planned_steps"), "a whole number"),
    "epoch_seconds": ["a number"],
    **dict.fromkeys(("stopped_early", "git_revision", "platform", "device", "cpu_count", "threads"), "anything"),
}
FAILURE = dict.fromkeys(("error", "message"), "anything")
CURVE = dict.fromkeys(("parameters", "total_rank", "ranks"), "anything")
HISTORY = {"evaluations": "a list"}
_GRID = {"methods?": {...: "anything"}, "tasks?": {...: "anything"}, "seeds?": ["a whole number"]}
_SELECTION = {...: {...: {"chosen?": {}, "tried?": ["a list"]}}}


def read_record(path: Path, remedy: str = OF_RUN) -> Any:
    """Return the JSON value in a record.

    Raises:
        CheckpointError: The file is missing, truncated or not JSON.
    """
    try:
        return read_json(path)
    except CheckpointError as error:
        # What read_json advises is for checkpoints, and there is no other one of a record.
        raise CheckpointError(f"{path}: missing, truncated or edited ({error.__cause__}); {remedy}") from error


def _edited(where: object, what: str, remedy: str) -> CheckpointError:
    return CheckpointError(f"{where}: edited, or of another version: {what}; {remedy}")


def check(where: object, value: Any, spec: Any, remedy: str = OF_RUN) -> None:
    """Raise unless `value`, read at `where`, is what `spec` says.

    A spec is the name of a type; or a list with the spec of each item; or a mapping with the spec of each key. Keys
    that end in `?` may be missing or null, and `...` stands for all keys, which must be texts.

    Raises:
        CheckpointError: It is not.
    """
    if isinstance(spec, Mapping):
        if not isinstance(value, Mapping):
            raise _edited(where, f"{value!r:.60} is not a mapping", remedy)
        missing = [key for key in spec if key is not ... and not key.endswith("?") and key not in value]
        if missing:
            raise _edited(where, f"{', '.join(missing)} missing", remedy)
        for key, of_key in spec.items():
            for name in value if key is ... else [key.removesuffix("?")]:
                if not isinstance(name, str):
                    raise _edited(where, f"{name!r:.60} is not a text", remedy)
                if name in value and (key in (..., name) or value[name] is not None):
                    check(f"{where}, {name}", value[name], of_key, remedy)
    elif isinstance(spec, list):
        check(where, value, "a list", remedy)
        for item in value:
            check(where, item, spec[0], remedy)
    elif not isinstance(value, _TYPES[spec]) or (isinstance(value, bool) and spec != "anything"):
        # A truth value is a whole number to Python.
        raise _edited(where, f"{value!r:.60} is not {spec}", remedy)


def read_grid(path: Path) -> Mapping[str, Any]:
    """Return the content of a `grid.yaml`; empty if the file is not there.

    Raises:
        CheckpointError: It is no YAML, or its methods, tasks or seeds are not what a grid has.
    """
    if not path.exists():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: edited, no YAML ({' '.join(str(error).split())}); {_OF_GRID}") from error
    check(path, content, _GRID, _OF_GRID)
    return dict(content)


def read_selection(path: Path) -> Mapping[str, Any]:
    """Return the content of a `selection.json`, what was tried and chosen; empty if the file is not there.

    Raises:
        CheckpointError: It is truncated, or not what a grid leaves.
    """
    if not path.exists():
        return {}
    content = read_record(path, _OF_GRID)
    check(path, content, _SELECTION, _OF_GRID)
    for task, of_task in content.items():
        for method, entry in of_task.items():
            where = f"{path}, {task}, {method}, tried"
            for pair in entry.get("tried") or []:
                if len(pair) != 2:
                    raise _edited(where, f"{pair!r:.60} is not a pair of values and score", _OF_GRID)
                # All that was tried has a value for each setting that was chosen.
                check(where, pair[0], dict.fromkeys(entry.get("chosen") or {}, "anything"), _OF_GRID)
    return dict(content)
