"""What columns mean: texts, class indices and numbers, every missing or strange value refused by its row."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from aroma.errors import AromaError, DataError, bad_value


def as_texts(field: str, column: str, values: Sequence[Any]) -> list[str]:
    """Return a column of texts.

    Args:
        field: The recipe's key of the file, for errors.
        column: Name of the column, for errors.
        values: One value an example.

    Raises:
        DataError: A text is missing.
    """
    empty = [row for row, value in enumerate(values, start=1) if value is None]
    if empty:
        raise _at_rows(field, column, None, empty, "a text is missing; fill it in or leave the row out")
    return [str(value) for value in values]


def as_numbers(
    field: str, column: str, values: Sequence[Any], between: tuple[float, float] | None = None
) -> list[float]:
    """Return a column of numbers; arguments as in `as_texts`.

    Args:
        between: The smallest and the largest number that can be; None: any.

    Raises:
        DataError: A value is missing, no finite number, or not in range.
    """
    numbers = []
    for row, value in enumerate(values, start=1):
        number = _as_number(value)
        if number is None:
            remedy = "a regression needs finite numbers; mend it, or make the task a classification"
            raise _at_rows(field, column, value, [row], remedy)
        if between is not None and not between[0] <= number <= between[1]:
            remedy = f"the numbers lie in [{between[0]}, {between[1]}]; another one stands for a hidden label"
            raise _at_rows(field, column, value, [row], remedy)
        numbers.append(number)
    return numbers


def as_indices(field: str, column: str, values: Sequence[Any], label_names: Sequence[str]) -> list[int]:
    """Return a column of labels as indices into `label_names`; other arguments as in `as_texts`.

    Labels are compared as texts.

    Raises:
        DataError: A label is missing or none of `label_names`.
    """
    missing = [row for row, label in enumerate(values, start=1) if label is None]
    if missing:
        remedy = "a label is missing; fill it in or leave the row out (a test set with hidden labels cannot be used)"
        raise _at_rows(field, column, None, missing, remedy)
    index = {name: number for number, name in enumerate(label_names)}
    unseen = sorted({str(label) for label in values} - set(index), key=_sort_key(label_names))
    if unseen:
        raise bad_value(
            f"{field} (column {column!r})",
            ", ".join(unseen),
            f"labels that the training examples lack; they have {', '.join(label_names)}. Mend the labels, or add "
            "training examples of them",
            DataError,
        )
    return [index[str(label)] for label in values]


def label_names_of(field: str, column: str, labels: Sequence[Any]) -> tuple[str, ...]:
    """Return the names of all classes, sorted (whole numbers by value); arguments as in `as_texts`.

    Raises:
        DataError: There is a single class.
    """
    names = {str(label) for label in labels if label is not None}
    if len(names) < 2:
        raise bad_value(
            f"{field} (column {column!r})",
            ", ".join(names),
            "all training examples bear one label, and there is nothing to tell apart; give examples of two classes "
            "or more",
            DataError,
        )
    return tuple(sorted(names, key=_sort_key(names)))


def _as_number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _sort_key(names: Collection[str]) -> Callable[[str], Any]:
    """Sort by value where all names are whole numbers, else as texts."""
    return int if all(re.fullmatch(r"-?\d+", name) for name in names) else str


def _at_rows(field: str, column: str, value: Any, rows: list[int], remedy: str) -> AromaError:
    shown = ", ".join(map(str, rows[:5])) + (", …" if len(rows) > 5 else "")
    where = f"row {shown}" if len(rows) == 1 else f"{len(rows)} rows ({shown})"
    return bad_value(f"{field} (column {column!r}, {where})", value, remedy, DataError)
