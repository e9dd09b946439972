"""JSON files of examples: a list of objects, or an object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aroma.errors import AromaError, DataError, bad_value


def read_records(field: str, path: str) -> list[dict[str, Any]]:
    """Return the objects of a JSON list (.json) or of JSON lines (any other suffix).

    Args:
        field: The recipe's key, for errors.
        path: The file.

    Raises:
        DataError: No such file, not UTF-8, no JSON, something that is no object (with its line or row), or no rows.
    """
    file = Path(path)
    if not file.is_file():
        raise bad_value(field, path, "no such file; give the path of a JSONL file or of a JSON list", DataError)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise bad_value(field, path, f"not UTF-8 text (byte {error.start}); convert the file", DataError) from error
    rows = _parse_list(field, path, text) if file.suffix.lower() == ".json" else _parse_lines(field, path, text)
    for place, row in rows:
        if not isinstance(row, dict):
            raise bad_value(field, path, f"{place}: a {type(row).__name__}, not an object; mend it", DataError)
    if not rows:
        raise bad_value(field, path, "it has no rows; give at least one example", DataError)
    return [row for _, row in rows]


def _parse_list(field: str, path: str, text: str) -> list[tuple[str, Any]]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise _no_json(field, path, str(error)) from error
    if not isinstance(values, list):
        raise _no_json(field, path, f"it holds a {type(values).__name__}, not a list")
    return [(f"row {number}", value) for number, value in enumerate(values, start=1)]


def _parse_lines(field: str, path: str, text: str) -> list[tuple[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append((f"line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise _no_json(field, path, f"line {number}: {error}") from error
    return rows


def _no_json(field: str, path: str, what: str) -> AromaError:
    return bad_value(field, path, f"not JSON as it should be ({what}); mend it", DataError)
