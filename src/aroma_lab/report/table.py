"""A table before it has a format: columns, cells with their text and their raw values, caption, notes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

Value = float | int | str | None
"""A raw value, as CSV has it; None for an empty field."""


@dataclass(frozen=True)
class Column:
    """One column.

    Args:
        title: Its head.
        keys: Heads of the fields that CSV has for it.
        is_text: Whether it holds words, aligned to the left, rather than numbers.
        is_raw: Whether only CSV has it.
    """

    title: str
    keys: tuple[str, ...]
    is_text: bool = False
    is_raw: bool = False


@dataclass(frozen=True)
class Cell:
    """One cell.

    Args:
        text: What a person reads.
        values: Raw values, one a key of the column.
        is_best: Whether it is emphasized as the best of its column.
    """

    text: str
    values: tuple[Value, ...]
    is_best: bool = False


@dataclass(frozen=True)
class Table:
    """One table.

    Args:
        name: Short name, for the label of a LaTeX table.
        caption: What the numbers are and how they came about.
        columns: The columns.
        rows: The rows, each with a cell a column.
        best: What an emphasized cell means; empty where there is none.
        notes: What a reader has to know beside, an entry a matter.
    """

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    best: str = ""
    notes: Sequence[str] = field(default_factory=tuple)


EMPTY = "–"
"""Text of a cell without value."""


def text_cell(text: str) -> Cell:
    """Return a cell that is its own raw value."""
    return Cell(text, (text,))


def empty_cell(column: Column) -> Cell:
    """Return a cell without value."""
    return Cell(EMPTY, (None,) * len(column.keys))


def number_cell(value: float | None, text: Callable[[float], str]) -> Cell:
    """Return the cell of one number, or an empty one."""
    return Cell(EMPTY if value is None else text(value), (value,))


def mark_best(cells: Sequence[Cell], counts: Sequence[int]) -> list[Cell]:
    """Return the cells of a column with the largest first value marked, ties as printed included.

    Args:
        cells: The cells.
        counts: Runs behind each cell. Only cells with the most runs compete: a mean over the seeds that survived
            is not comparable with one over all.
    """
    competing = [
        cell for cell, count in zip(cells, counts, strict=True) if count == max(counts) and _number(cell) is not None
    ]
    if len(competing) < 2:
        return list(cells)
    winner = max(competing, key=lambda cell: _number(cell) or 0.0)
    shown = _mean_text(winner)
    return [
        replace(cell, is_best=any(cell is one for one in competing) and _mean_text(cell) == shown) for cell in cells
    ]


def _number(cell: Cell) -> float | None:
    value = cell.values[0]
    return value if isinstance(value, float | int) else None


def _mean_text(cell: Cell) -> str:
    return cell.text.split()[0]
