"""The two files that a grid leaves beside its runs: itself, resolved, and what was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from aroma.errors import CheckpointError

from .checks import OF_GRID, edited, read_record, require_keys, require_type


def read_grid(path: Path) -> Mapping[str, Any]:
    """Return the content of a `grid.yaml`; nothing where the file is not there.

    Raises:
        CheckpointError: It is no YAML, or its methods, tasks or seeds are not what a grid has.
    """
    if not path.exists():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: edited, no YAML ({' '.join(str(error).split())}); {OF_GRID}") from error
    require_keys(path, content, (), OF_GRID)
    for key, words, words_of_each in _LISTED:
        if content.get(key) is not None:
            require_type(f"{path}, {key}", content[key], words, OF_GRID)
            for each in content[key]:
                require_type(f"{path}, {key}", each, words_of_each, OF_GRID)
    return dict(content)


_LISTED = (
    ("methods", "a mapping", "a text"),
    ("tasks", "a mapping", "a text"),
    ("seeds", "a list", "a whole number"),
)
"""What is read of a grid, with its type and that of each of its items."""


def read_selection(path: Path) -> Mapping[str, Any]:
    """Return the content of a `selection.json`; nothing where the file is not there.

    Raises:
        CheckpointError: It is truncated, or not what a grid leaves.
    """
    if not path.exists():
        return {}
    content = read_record(path, OF_GRID)
    require_keys(path, content, (), OF_GRID)
    for task, of_task in content.items():
        require_keys(f"{path}, {task}", of_task, (), OF_GRID)
        for method, entry in of_task.items():
            _require_entry(f"{path}, {task}/{method}", entry)
    return dict(content)


def _require_entry(where: str, entry: Any) -> None:
    """Raise unless what was chosen is a mapping or nothing, and what was tried has values for the same keys."""
    require_keys(where, entry, (), OF_GRID)
    chosen = {} if entry.get("chosen") is None else entry["chosen"]
    require_keys(f"{where}, chosen", chosen, (), OF_GRID)
    tried = entry.get("tried", [])
    require_type(f"{where}, tried", tried, "a list", OF_GRID)
    for pair in tried:
        if not isinstance(pair, list) or len(pair) != 2:
            raise edited(f"{where}, tried", f"{pair!r:.60} is not a pair of values and score", OF_GRID)
        require_keys(f"{where}, tried", pair[0], chosen, OF_GRID)
