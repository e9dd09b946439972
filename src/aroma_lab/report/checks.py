"""Reads and checks of records that a hand may have edited."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from aroma.errors import CheckpointError
from aroma.files import read_json

OF_RUN = "restore the file, or remove the run's folder and run it again"
"""What helps where a file of a run's folder is damaged."""
OF_GRID = "restore the file, or remove it and run the grid again, which writes it anew"
"""What helps where `grid.yaml` or `selection.json` is."""

_TYPES: Mapping[str, tuple[type, ...]] = {
    "a mapping": (Mapping,),
    "a list": (list,),
    "a text": (str,),
    "a number": (int, float),
    "a whole number": (int,),
}


def read_record(path: Path, remedy: str = OF_RUN) -> Any:
    """Return the JSON value in a record.

    Raises:
        CheckpointError: The file is missing, truncated or not JSON.
    """
    try:
        return read_json(path)
    except CheckpointError as error:
        # What read_json advises is for checkpoints, and of a record there is no other one.
        raise CheckpointError(f"{path}: missing, truncated or edited ({error.__cause__}); {remedy}") from error


def edited(where: Path | str, what: str, remedy: str = OF_RUN) -> CheckpointError:
    """Return (not raise) the error of a record that says what AROMA does not write."""
    return CheckpointError(f"{where}: edited, or of another version: {what}; {remedy}")


def require_keys(where: Path | str, content: object, keys: Iterable[str], remedy: str = OF_RUN) -> None:
    """Raise unless `content`, read at `where`, is a mapping that has `keys`.

    Raises:
        CheckpointError: It is not.
    """
    missing = list(keys) if not isinstance(content, Mapping) else [key for key in keys if key not in content]
    if missing or not isinstance(content, Mapping):
        raise edited(where, f"{', '.join(missing) or 'a mapping'} missing", remedy)


def require_types(where: Path | str, content: Any, types: Mapping[str, str], remedy: str = OF_RUN) -> None:
    """Raise unless `content`, read at `where`, is a mapping that has these keys, with values of these types.

    Args:
        where: File, and place in it.
        content: What was read there.
        types: By key `"a mapping"`, `"a list"`, `"a text"`, `"a number"` or `"a whole number"`.
        remedy: What helps if it is not.

    Raises:
        CheckpointError: It is not.
    """
    require_keys(where, content, types, remedy)
    for key, words in types.items():
        require_type(f"{where}, {key}", content[key], words, remedy)


def require_type(where: Path | str, value: object, words: str, remedy: str = OF_RUN) -> None:
    """Raise unless `value`, read at `where`, is of the type that `words` name; see `require_types`.

    Raises:
        CheckpointError: It is not.
    """
    # To Python a truth value is a whole number.
    if not isinstance(value, _TYPES[words]) or isinstance(value, bool):
        raise edited(where, f"{value!r:.60} is not {words}", remedy)
