"""Patterns of an adapter's configuration, which may be anything: matched as PEFT does, within a limit of time."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import regex
from peft.utils import CONFIG_NAME

from .errors import AromaError, CheckpointError, bad_value

_MATCHING_SECONDS = 5.0
"""What all patterns of an adapter may take together; of real ones they take milliseconds."""

_LONGEST_PATTERN = 1000


class Patterns:
    """Matches names of modules with the patterns of a file."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self._path = path
        self._config = config
        self._end = time.monotonic() + _MATCHING_SECONDS

    def value(self, field: str, module: str, otherwise: Any) -> Any:
        """Return what a pattern field, rank_pattern or alpha_pattern, says of a module, as PEFT reads it."""
        named, others = self._entries[field]
        value, place = named.get(module, (otherwise, math.inf))
        for earlier, key, found in others:
            if earlier > place:
                break
            if self._matches(field, rf"(.*\.)?({key})$", module, key, whole=False):
                return found
        return value

    @cached_property
    def _entries(self) -> dict[str, tuple[dict[str, tuple[Any, float]], list[tuple[int, str, Any]]]]:
        """Of each field the entries that name one module, as AROMA writes them, and all others; with their places."""
        found = {}
        for field in ("rank_pattern", "alpha_pattern"):
            named: dict[str, tuple[Any, float]] = {}
            others = []
            for place, (key, value) in enumerate((self._config.get(field) or {}).items()):
                name = re.sub(r"\\(.)", r"\1", key[1:])
                if key == f"^{re.escape(name)}":
                    named[name] = (value, place)
                else:
                    others.append((place, key, value))
            found[field] = (named, others)
        return found

    def names(self, field: str, module: str) -> bool:
        """Whether target_modules or exclude_modules names a module, as PEFT reads it."""
        named = self._config.get(field)
        if isinstance(named, str):
            return named == "all-linear" or self._matches(field, named, module, named, whole=True)
        return any(is_named(module, name) for name in named or ())

    def _matches(self, field: str, pattern: str, module: str, shown: str, whole: bool) -> bool:
        try:
            if len(pattern) > _LONGEST_PATTERN:
                raise ValueError(f"longer than {_LONGEST_PATTERN} characters")
            compiled = regex.compile(pattern)
            match = compiled.fullmatch if whole else compiled.match
            return match(module, timeout=max(self._end - time.monotonic(), 1e-3)) is not None
        except TimeoutError as error:
            raise wrong(self._path, field, shown, "matching it takes too long; name the modules one by one") from error
        except (regex.error, ValueError, RecursionError, OverflowError, MemoryError) as error:
            raise wrong(self._path, field, shown, f"no regular expression ({error}); name the modules") from error


def is_named(module: str, name: str) -> bool:
    """Whether a list of names, such as target_modules, names a module by `name`: its whole name, or the end of it."""
    return module == name or module.endswith(f".{name}")


_SIMPLE = re.compile(r"[\w.\\^$-]*")


def require_simple_patterns(folder: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
    """Raise unless all names of modules in a configuration are matched in no time, whatever they are matched with.

    For adapters of other kinds, which PEFT reads.

    Raises:
        CheckpointError: Naming the field.
    """
    for field in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"):
        value = config.get(field) or []
        for name in [value] if isinstance(value, str) else value if isinstance(value, list | dict) else [None]:
            if not (isinstance(name, str) and _SIMPLE.fullmatch(name)):
                raise wrong(
                    Path(folder) / CONFIG_NAME,
                    field,
                    name,
                    "matching it could take forever; name the modules one by one",
                )


def wrong(path: Path, field: str, value: object, remedy: str) -> AromaError:
    """Return the error of a field of a file that is wrong."""
    return bad_value(f"{path}: {field}", value, remedy, CheckpointError)
