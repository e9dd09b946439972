"""Columns out of files, as plain Python lists."""

from __future__ import annotations

import csv
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from aroma.errors import AromaError, DataError, bad_value

Columns = dict[str, list[Any]]
"""Values by column name, all of the same length; a missing value is None."""

Choices = Sequence[Sequence[str]]
"""Sets of column names, of which the first that a file has is read."""

_LARGEST_FIELD = 2**31 - 1


def read_file(field: str, path: str, wanted: Sequence[str]) -> Columns:
    """Read the columns `wanted` of a local file; the suffix tells its format.

    CSV and TSV have a header line, unless the columns are called by their places, `#1`, `#2`, …; an empty field is a
    missing value. CSV is quoted as usual; in TSV a quotation mark is a character like any other. JSONL has an object
    a line.

    Args:
        field: The recipe's key, for errors.
        path: A .csv, .tsv, .jsonl, .ndjson, .parquet or .txt (read as TSV) file.
        wanted: Column names.

    Raises:
        DataError: No such file, an unknown suffix, a damaged line (with its number), a missing column, or no rows.
    """
    return read_fitting(field, path, [wanted])[1]


def read_fitting(field: str, path: str, choices: Choices, *, skip_damaged: bool = False) -> tuple[int, Columns]:
    """Read a file whose columns are one of several known sets, as `read_file` reads one of a single set.

    Args:
        field: The recipe's key, for errors.
        path: As in `read_file`.
        choices: Sets of column names; the first that the file has is read.
        skip_damaged: Leave out lines of CSV and TSV that have a wrong number of fields or lack a value that is read,
            and warn how many they were.

    Returns:
        The index of the choice, and its columns.

    Raises:
        DataError: As in `read_file`.
    """
    file = Path(path)
    if not file.is_file():
        raise bad_value(field, path, "no such file; give the path of a CSV, TSV, JSONL or Parquet file", DataError)
    if file.suffix.lower() not in FORMATS:
        raise bad_value(field, path, f"unknown format; its name must end in {', '.join(FORMATS)}", DataError)
    try:
        choice, columns = _read(field, file, choices, skip_damaged)
    except UnicodeDecodeError as error:
        raise bad_value(field, path, f"not UTF-8 text (byte {error.start}); convert the file", DataError) from error
    if not columns[choices[choice][0]]:
        raise no_rows(field, path)
    return choice, columns


def require_fitting(field: str, source: str, names: list[str], choices: Choices, headerless: bool = False) -> int:
    """Return the index of the first choice whose columns are all there.

    Args:
        field: The recipe's key, for errors.
        source: The file or split, for errors.
        names: Names of the columns that are there.
        choices: Sets of column names.
        headerless: Whether columns may be called by their places, `#1`, `#2`, ….

    Raises:
        DataError: None is; with what the nearest one lacks.
    """
    lacking = []
    for wanted in choices:
        if headerless and all(map(_is_numbered, wanted)):
            missing = [name for name in wanted if int(name[1:]) > len(names)]
        else:
            missing = [name for name in wanted if name not in names]
        lacking.append(missing)
    nearest = min(lacking, key=len)
    if nearest:
        raise bad_value(
            field,
            source,
            f"it has no column {', '.join(map(repr, nearest))}; its columns are {', '.join(map(repr, names))}. Name "
            "them by text, text_pair and label, or, for a language model, by the keys of the section language; "
            "examples without labels or responses are of no use here",
            DataError,
        )
    return lacking.index(nearest)


def no_rows(field: str, source: str) -> AromaError:
    """Return (not raise) the error about a source without rows."""
    return bad_value(field, source, "it has no rows; give at least one example", DataError)


def _read(field: str, file: Path, choices: Choices, skip_damaged: bool) -> tuple[int, Columns]:
    match file.suffix.lower():
        case ".jsonl" | ".ndjson":
            return _read_json_lines(field, file, choices)
        case ".parquet":
            return _read_parquet(field, file, choices)
    return _read_table(field, file, choices, skip_damaged)


def _read_table(field: str, file: Path, choices: Choices, skip_damaged: bool) -> tuple[int, Columns]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        lines = _lines(field, file, stream)
        first = next(lines, None)
        if first is None:
            raise no_rows(field, str(file))
        names = first[1]
        choice = require_fitting(field, str(file), names, choices, headerless=True)
        places = _places(choices[choice], names)
        if all(map(_is_numbered, choices[choice])):
            lines = chain([first], lines)
        columns: Columns = {name: [] for name in places}
        skipped = 0
        for number, line in lines:
            whole = len(line) == len(names)
            values = [line[place] or None for place in places.values()] if whole else []
            if not whole and not skip_damaged:
                raise _damaged(field, file, number, "its number of fields is not that of the first line")
            if skip_damaged and (not whole or None in values):
                skipped += 1
                continue
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
    if skipped:
        warnings.warn(f"{file}: {skipped} damaged lines are left out", stacklevel=2)
    return choice, columns


def _lines(field: str, file: Path, stream: Any) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the fields of every line that is not blank."""
    csv.field_size_limit(_LARGEST_FIELD)
    tabs: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(stream, **({"strict": True} if file.suffix.lower() == ".csv" else tabs))
    last = 0  # of the record before: an unclosed quote is to be named by where it is, not by the end of the file
    try:
        for line in reader:
            last = reader.line_num
            if line:
                yield last, line
    except csv.Error as error:
        raise _damaged(field, file, last + 1, str(error)) from error


def _read_json_lines(field: str, file: Path, choices: Choices) -> tuple[int, Columns]:
    rows = []
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise _damaged(field, file, number, str(error)) from error
            if not isinstance(row, dict):
                raise _damaged(field, file, number, f"a {type(row).__name__}, not an object")
            rows.append(row)
    if not rows:
        raise no_rows(field, str(file))
    choice = require_fitting(field, str(file), list(dict.fromkeys(name for row in rows for name in row)), choices)
    return choice, {name: [row.get(name) for row in rows] for name in choices[choice]}


def _read_parquet(field: str, file: Path, choices: Choices) -> tuple[int, Columns]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import read_table

    try:
        table = read_table(file)
    except ArrowInvalid as error:
        raise bad_value(field, str(file), f"not a whole Parquet file ({error}); write it anew", DataError) from error
    choice = require_fitting(field, str(file), table.column_names, choices)
    return choice, {name: table.column(name).to_pylist() for name in choices[choice]}


FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".txt")
"""Suffixes of the files that can be read."""


def _places(wanted: Sequence[str], names: list[str]) -> dict[str, int]:
    """Return where in a line the columns are, counted from 0."""
    if all(map(_is_numbered, wanted)):
        return {name: int(name[1:]) - 1 for name in wanted}
    return {name: names.index(name) for name in wanted}


def _is_numbered(name: str) -> bool:
    return re.fullmatch(r"#[1-9]\d*", name) is not None


def _damaged(field: str, file: Path, line: int, what: str) -> AromaError:
    return bad_value(field, str(file), f"line {line}: {what}; mend the line", DataError)
