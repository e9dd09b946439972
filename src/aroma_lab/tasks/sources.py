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
from pathlib import Path
from typing import Any

from aroma.errors import DataError, bad_value

FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".txt")

Columns = dict[str, list[Any]]
"""Values by column name, all of the same length; a missing value is None."""

Choices = Sequence[Sequence[str]]
"""Sets of column names; the first one that a file has is read."""


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
    file = _require_format(field, path)
    suffix = file.suffix.lower()
    try:
        if suffix in (".jsonl", ".ndjson"):
            choice, columns = _read_json_lines(field, file, choices)
        elif suffix == ".parquet":
            choice, columns = _read_parquet(field, file, choices)
        else:
            choice, columns = _read_table(field, file, choices, skip_damaged)
    except UnicodeDecodeError as error:
        raise bad_value(field, path, f"not UTF-8 text (byte {error.start}); convert the file", DataError) from error
    return choice, _with_rows(field, path, columns)


def require_data_file(field: str, path: str) -> Path:
    """Return the file of that path.

    Raises:
        DataError: There is none.
    """
    file = Path(path)
    if not file.is_file():
        raise bad_value(field, path, "no such file; give the path of a CSV, TSV, JSONL or Parquet file", DataError)
    return file


def check_columns(field: str, path: str, wanted: Sequence[str]) -> None:
    """Raise if a file lacks a column; of a file that has all of them, one row is read.

    Raises:
        DataError: No such file, an unknown suffix, a damaged first line, or a missing column.
    """
    _, row = next(stream_rows(field, path, headless=all(map(_is_position, wanted))), ("", {}))
    names = [*row]
    if names and Path(path).suffix.lower() in (".jsonl", ".ndjson"):
        # Objects may leave out what others have.
        names += [name for name in wanted if name not in row and _is_anywhere(json.dumps(name), Path(path))]
    if names:
        _fitting(field, path, names, [wanted], by_position=True)


def _is_anywhere(text: str, file: Path) -> bool:
    with file.open(encoding="utf-8", errors="replace") as stream:
        return any(text in line for line in stream)


Row = tuple[str, dict[str, Any]]
"""Where a row stands in its file, as "line 3", and its values by column name."""


def stream_rows(field: str, path: str, *, headless: bool = False) -> Iterator[Row]:
    """Yield all rows of a local file one by one, with all their columns; its suffix gives the format.

    Values of CSV and TSV are texts, a missing one the empty text.

    Args:
        field: The argument or option that named it, for errors.
        path: As for `read_file`.
        headless: Whether a CSV or TSV file has no header line, so that its columns are `#1`, `#2`, ….

    Raises:
        DataError: No such file, an unknown suffix, or a damaged line, with its number.
    """
    file = _require_format(field, path)
    suffix = file.suffix.lower()
    try:
        if suffix in (".jsonl", ".ndjson"):
            yield from _stream_json_lines(field, file)
        elif suffix == ".parquet":
            yield from _stream_parquet(field, file)
        else:
            yield from _stream_table(field, file, headless)
    except UnicodeDecodeError as error:
        raise bad_value(field, path, f"not UTF-8 text (byte {error.start}); convert the file", DataError) from error


def _stream_table(field: str, file: Path, headless: bool) -> Iterator[Row]:
    names: list[str] = []
    last = 0
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, **_dialect(file))
        try:
            for line in reader:
                start, last = last + 1, reader.line_num
                if not line:
                    continue
                if not names:
                    names = [f"#{number}" for number in range(1, len(line) + 1)] if headless else line
                    if twice := [name for name in names if names.count(name) > 1]:
                        raise _damaged(field, file, start, f"two columns are called {twice[0]!r}")
                    if not headless:
                        continue
                if len(line) != len(names):
                    raise _damaged(field, file, start, "its number of fields is not that of the first line")
                yield f"line {start}", dict(zip(names, line, strict=True))
        except csv.Error as error:  # an unclosed quote begins behind the last whole record
            raise _damaged(field, file, last + 1, str(error)) from error


def _stream_json_lines(field: str, file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _damaged(field, file, number, str(error)) from error
            if not isinstance(row, dict):
                raise _damaged(field, file, number, f"a {type(row).__name__}, not an object")
            yield f"line {number}", row


def _stream_parquet(field: str, file: Path) -> Iterator[Row]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as parquet:
            number = 0
            for batch in parquet.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except ArrowInvalid as error:
        raise bad_value(field, str(file), f"not a whole Parquet file ({error}); write it anew", DataError) from error


def _dialect(file: Path) -> dict[str, Any]:
    """Return how a CSV or TSV file is read; and let the fields of all of them have any length."""
    csv.field_size_limit(2**31 - 1)
    return {"strict": True} if file.suffix.lower() == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}


def _require_format(field: str, path: str) -> Path:
    """Return the file, if it is there and its suffix is one of `FORMATS`."""
    file = require_data_file(field, path)
    if file.suffix.lower() not in FORMATS:
        raise bad_value(field, path, f"unknown format; its name must end in {', '.join(FORMATS)}", DataError)
    return file


def _read_table(field: str, file: Path, choices: Choices, skip_damaged: bool) -> tuple[int, Columns]:
    names: list[str] = []
    rows: list[list[str | None]] = []
    choice, last, skipped = 0, 0, 0
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, **_dialect(file))
        try:
            for line in filter(None, reader):
                last = reader.line_num
                if not names:
                    names, choice = line, _fitting(field, file, line, choices, by_position=True)
                    headless = all(map(_is_position, choices[choice]))
                    positions = [int(name[1:]) - 1 if headless else names.index(name) for name in choices[choice]]
                    if not headless:
                        continue
                whole = len(line) == len(names)
                if not whole and not skip_damaged:
                    raise _damaged(field, file, last, "its number of fields is not that of the first line")
                row: list[str | None] = [line[position] or None for position in positions] if whole else [None]
                if skip_damaged and None in row:
                    skipped += 1
                else:
                    rows.append(row)
        except csv.Error as error:  # an unclosed quote begins behind the last whole record
            raise _damaged(field, file, last + 1, str(error)) from error
    if skipped:
        warnings.warn(f"{file}: {skipped} damaged lines are left out", stacklevel=3)
    return choice, {name: [row[index] for row in rows] for index, name in enumerate(choices[choice])}


def _read_json_lines(field: str, file: Path, choices: Choices) -> tuple[int, Columns]:
    rows = [row for _, row in _stream_json_lines(field, file)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    choice = _fitting(field, file, names, choices) if rows else 0
    return choice, {name: [row.get(name) for row in rows] for name in choices[choice]}


def _read_parquet(field: str, file: Path, choices: Choices) -> tuple[int, Columns]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import read_table

    try:
        table = read_table(file)
    except ArrowInvalid as error:
        raise bad_value(field, str(file), f"not a whole Parquet file ({error}); write it anew", DataError) from error
    choice = _fitting(field, file, table.column_names, choices)
    return choice, {name: table.column(name).to_pylist() for name in choices[choice]}


def _damaged(field: str, file: Path, line: int, what: str) -> Exception:
    return bad_value(field, str(file), f"line {line}: {what}; mend the line", DataError)


def _with_rows(field: str, source: str, columns: Columns) -> Columns:
    if not any(columns.values()):
        raise bad_value(field, source, "it has no rows; give at least one example", DataError)
    return columns


def _fitting(field: str, source: str | Path, names: Sequence[str], choices: Choices, by_position: bool = False) -> int:
    """Return the index of the first choice whose columns all exist; `by_position`: they may be `#1`, `#2`, ….

    Raises:
        DataError: There is none; the error says what the nearest one lacks.
    """
    there = {*names}
    lacking = []
    for wanted in choices:
        headless = by_position and all(map(_is_position, wanted))
        known = {f"#{number}" for number in range(1, len(names) + 1)} if headless else there
        lacking.append([name for name in wanted if name not in known])
    nearest = min(lacking, key=len)
    if nearest:
        raise bad_value(
            field,
            str(source),
            f"it has no column {', '.join(map(repr, nearest))}; its columns are {', '.join(map(repr, names))}. Name "
            "them by text, text_pair and label, or, for a language model, by the keys of the section language",
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
    except ValueError as error:
        raise bad_value(field, split, f"not a split ({error}); write it as train[:10%]", DataError) from error
    choice = _fitting(field, split, data.column_names, choices)
    columns: Columns = {column: list(data[column]) for column in choices[choice]}
    for column, values in columns.items():
        feature = data.features[column]
        if isinstance(feature, ClassLabel):
            # −1 marks a hidden label on the hub.
            columns[column] = [None if i is None or i < 0 else feature.int2str(i) for i in values]
    return choice, _with_rows(field, split, columns)


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
        remedy = f"cannot be loaded with configuration {config!r} ({reason}); give local files instead"
        raise bad_value(name_field, name, remedy, DataError) from error
