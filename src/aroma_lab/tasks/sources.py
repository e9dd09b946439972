"""Columns out of files and hub data sets, as plain Python lists.

CSV, TSV and JSON lines are read here, not by `datasets.load_dataset`: it fills short CSV lines with empty fields,
drops surplus ones with a warning, reads the label 01 as 1, and names no line of damaged JSON.
"""

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

FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".txt")
"""Suffixes of the files that can be read."""

Columns = dict[str, list[Any]]
"""Values by column name, all of the same length; a missing value is None."""

Choices = Sequence[Sequence[str]]
"""Sets of column names; the first one that a file has is read."""

_LARGEST_FIELD = 2**31 - 1


def read_file(field: str, path: str, choices: Choices, *, skip_damaged: bool = False) -> tuple[int, Columns]:
    """Read a local file whose columns are one of several known sets; its suffix gives the format.

    CSV and TSV have a header line, unless the columns are named by position, `#1`, `#2`, …; an empty field is a
    missing value. CSV is quoted as usual; in TSV a quotation mark is an ordinary character. JSONL has one object a
    line.

    Args:
        field: The recipe's key, for errors.
        path: A .csv, .tsv, .jsonl, .ndjson, .parquet or .txt (read as TSV) file.
        choices: Sets of column names; the first that the file has is read.
        skip_damaged: Leave out lines of CSV and TSV that have a wrong number of fields or lack a value that is read,
            and warn how many they were.

    Returns:
        The index of the choice, and its columns.

    Raises:
        DataError: No such file, an unknown suffix, a damaged line (with its number), a missing column, or no rows.
    """
    file = Path(path)
    if not file.is_file():
        raise bad_value(field, path, "no such file; give the path of a CSV, TSV, JSONL or Parquet file", DataError)
    suffix = file.suffix.lower()
    if suffix not in FORMATS:
        raise bad_value(field, path, f"unknown format; its name must end in {', '.join(FORMATS)}", DataError)
    try:
        if suffix in (".jsonl", ".ndjson"):
            choice, columns = _read_json_lines(field, file, choices)
        elif suffix == ".parquet":
            choice, columns = _read_parquet(field, file, choices)
        else:
            choice, columns = _read_table(field, file, choices, skip_damaged)
    except UnicodeDecodeError as error:
        raise bad_value(field, path, f"not UTF-8 text (byte {error.start}); convert the file", DataError) from error
    if not columns[choices[choice][0]]:
        raise _no_rows(field, path)
    return choice, columns


def _read_table(field: str, file: Path, choices: Choices, skip_damaged: bool) -> tuple[int, Columns]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        lines = _lines(field, file, stream)
        first = next(lines, None)
        if first is None:
            raise _no_rows(field, str(file))
        names = first[1]
        choice = _fitting(field, str(file), names, choices, by_position=True)
        if all(map(_is_position, choices[choice])):
            positions = {name: int(name[1:]) - 1 for name in choices[choice]}
            lines = chain([first], lines)
        else:
            positions = {name: names.index(name) for name in choices[choice]}
        columns: Columns = {name: [] for name in positions}
        skipped = 0
        for number, line in lines:
            whole = len(line) == len(names)
            if not whole and not skip_damaged:
                raise _damaged(field, file, number, "its number of fields is not that of the first line")
            values = [line[position] or None for position in positions.values()] if whole else []
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
    last = 0  # line of the last whole record: an unclosed quote begins after it, and is noticed at the end of the file
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
        raise _no_rows(field, str(file))
    choice = _fitting(field, str(file), list(dict.fromkeys(name for row in rows for name in row)), choices)
    return choice, {name: [row.get(name) for row in rows] for name in choices[choice]}


def _read_parquet(field: str, file: Path, choices: Choices) -> tuple[int, Columns]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import read_table

    try:
        table = read_table(file)
    except ArrowInvalid as error:
        raise bad_value(field, str(file), f"not a whole Parquet file ({error}); write it anew", DataError) from error
    choice = _fitting(field, str(file), table.column_names, choices)
    return choice, {name: table.column(name).to_pylist() for name in choices[choice]}


def _damaged(field: str, file: Path, line: int, what: str) -> AromaError:
    return bad_value(field, str(file), f"line {line}: {what}; mend the line", DataError)


def _no_rows(field: str, source: str) -> AromaError:
    return bad_value(field, source, "it has no rows; give at least one example", DataError)


def _fitting(field: str, source: str, names: list[str], choices: Choices, by_position: bool = False) -> int:
    """Return the index of the first choice whose columns all exist.

    Args:
        field: The recipe's key, for errors.
        source: The file or split, for errors.
        names: Names of the existing columns.
        choices: Sets of column names.
        by_position: Whether columns may be named `#1`, `#2`, ….

    Raises:
        DataError: There is none; the error says what the nearest one lacks.
    """
    lacking = []
    for wanted in choices:
        if by_position and all(map(_is_position, wanted)):
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


def _is_position(name: str) -> bool:
    return re.fullmatch(r"#[1-9]\d*", name) is not None


# The hub -------------------------------------------------------------------------------------------------------------


def read_hub(
    field: str, split: str, name: str, config: str | None, choices: Choices, name_field: str = "data.name"
) -> tuple[int, Columns]:
    """Read one split of a hub data set whose columns are one of several known sets; class labels become their names.

    Args:
        field: The recipe's key of the split, for errors.
        split: Name of the split, or a slice, such as `train[:10%]`.
        name: Hub name or local folder.
        config: Configuration, if the data set has several.
        choices: Sets of column names; the first that the split has is read.
        name_field: The recipe's key of the data set, for errors.

    Returns:
        The index of the choice, and its columns.

    Raises:
        DataError: The data set, the split or a column is missing, or there are no rows.
    """
    from datasets import ClassLabel, load_dataset

    known = hub_splits(name, config, name_field)
    if split.partition("[")[0] not in known:
        raise bad_value(field, split, f"{name} has no such split; it has {', '.join(known)}", DataError)
    try:
        data = load_dataset(name, config, split=split)
    except ValueError as error:  # a slice that datasets cannot read
        reason = " ".join(str(error).split())
        raise bad_value(
            field, split, f"not a split ({reason}); write it as train or train[:10%]", DataError
        ) from error
    if not len(data):
        raise _no_rows(field, split)
    choice = _fitting(field, split, data.column_names, choices)
    columns: Columns = {column: list(data[column]) for column in choices[choice]}
    for column, values in columns.items():
        feature = data.features[column]
        if isinstance(feature, ClassLabel):
            # −1 marks a hidden label on the hub.
            columns[column] = [None if i is None or i < 0 else feature.int2str(i) for i in values]
    return choice, columns


def hub_splits(name: str, config: str | None, name_field: str = "data.name") -> list[str]:
    """Return the names of the splits of a hub data set.

    Raises:
        DataError: There is no such data set or configuration.
    """
    from datasets import get_dataset_split_names

    try:
        return list(get_dataset_split_names(name, config))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise bad_value(
            name_field,
            name,
            f"cannot be loaded with configuration {config!r} ({reason}); give local files instead",
            DataError,
        ) from error
