"""Columns out of files and hub data sets, as plain Python lists."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from ..errors import AromaError, DataError, bad_value

Columns = dict[str, list[Any]]
"""Values by column name, all of the same length; a missing value is None."""

Rows = list[dict[str, Any]]

_LARGEST_FIELD = 2**31 - 1


def read_file(field: str, path: str, wanted: list[str]) -> Columns:
    """Read the columns `wanted` of a local file; the suffix tells its format.

    CSV and TSV have a header line; an empty field is a missing value. CSV is quoted as usual; in TSV a quotation mark
    is a character like any other. JSONL has an object a line.

    Args:
        field: The recipe's key, for errors.
        path: A .csv, .tsv, .jsonl, .ndjson or .parquet file.
        wanted: Column names.

    Raises:
        DataError: No such file, an unknown suffix, a damaged line (with its number), a missing column, or no rows.
    """
    file = Path(path)
    if not file.is_file():
        raise bad_value(field, path, "no such file; give the path of a CSV, TSV, JSONL or Parquet file", DataError)
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise bad_value(field, path, f"unknown format; its name must end in {', '.join(_READERS)}", DataError)
    try:
        names, rows = reader(field, file)
    except UnicodeDecodeError as error:
        raise bad_value(field, path, f"not UTF-8 text (byte {error.start}); convert the file", DataError) from error
    if not rows:
        raise _no_rows(field, path)
    _require_columns(field, path, names, wanted)
    return {name: [row.get(name) for row in rows] for name in wanted}


def read_hub(field: str, split: str, name: str, config: str | None, wanted: list[str]) -> Columns:
    """Read the columns `wanted` of one split of a hub data set; class labels come as their names.

    Args:
        field: The recipe's key of the split, for errors.
        split: Name of the split.
        name: Hub name or local folder.
        config: Configuration, where the data set has several.
        wanted: Column names.

    Raises:
        DataError: The data set or the split is missing, or a column, or there are no rows.
    """
    from datasets import ClassLabel, load_dataset

    known = hub_splits(name, config)
    if split.partition("[")[0] not in known:
        raise bad_value(field, split, f"{name} has no such split; it has {', '.join(known)}", DataError)
    try:
        data = load_dataset(name, config, split=split)
    except ValueError as error:  # a slice that datasets cannot read, as train[:10%
        reason = " ".join(str(error).split())
        raise bad_value(
            field, split, f"not a split ({reason}); write it as train or train[:10%]", DataError
        ) from error
    if not len(data):
        raise _no_rows(field, split)
    _require_columns(field, split, data.column_names, wanted)
    columns: Columns = {column: list(data[column]) for column in wanted}
    for column, values in columns.items():
        feature = data.features[column]
        if isinstance(feature, ClassLabel):
            # The hub's mark of a hidden label is −1.
            columns[column] = [None if i is None or i < 0 else feature.names[i] for i in values]
    return columns


def hub_splits(name: str, config: str | None) -> list[str]:
    """Return the names of the splits of a hub data set.

    Raises:
        DataError: There is no such data set or configuration.
    """
    from datasets import get_dataset_split_names

    try:
        return list(get_dataset_split_names(name, config))
    except (OSError, ValueError) as error:
        raise bad_value(
            "data.name",
            name,
            f"cannot be loaded with data.config={config!r} ({' '.join(str(error).split())}); give local files instead",
            DataError,
        ) from error


def _read_table(field: str, file: Path) -> tuple[list[str], Rows]:
    csv.field_size_limit(_LARGEST_FIELD)
    tabs: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    rows = []
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, **(tabs if file.suffix.lower() == ".tsv" else {"strict": True}))
        try:
            for row in reader:
                # DictReader files surplus fields under None, and gives missing ones the value None.
                if None in row or None in row.values():
                    raise _damaged(field, file, reader.line_num, "its number of fields is not that of the header")
                rows.append({name: value or None for name, value in row.items()})
        except csv.Error as error:
            raise _damaged(field, file, reader.line_num + 1, str(error)) from error
        return list(reader.fieldnames or []), rows


def _read_json_lines(field: str, file: Path) -> tuple[list[str], Rows]:
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
    return list(dict.fromkeys(name for row in rows for name in row)), rows


def _read_parquet(field: str, file: Path) -> tuple[list[str], Rows]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import read_table

    try:
        table = read_table(file)
    except ArrowInvalid as error:
        raise bad_value(field, str(file), f"not a whole Parquet file ({error}); write it anew", DataError) from error
    return table.column_names, table.to_pylist()


_READERS = {
    ".csv": _read_table,
    ".tsv": _read_table,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": _read_parquet,
}


def _require_columns(field: str, source: str, names: list[str], wanted: list[str]) -> None:
    missing = [name for name in wanted if name not in names]
    if missing:
        raise bad_value(
            field,
            source,
            f"it has no column {', '.join(map(repr, missing))}; its columns are {', '.join(map(repr, names))}. Set "
            "data.text, data.text_pair and data.label",
            DataError,
        )


def _no_rows(field: str, source: str) -> AromaError:
    return bad_value(field, source, "it has no rows; give at least one example", DataError)


def _damaged(field: str, file: Path, line: int, what: str) -> AromaError:
    return bad_value(field, str(file), f"line {line}: {what}; mend the line", DataError)
