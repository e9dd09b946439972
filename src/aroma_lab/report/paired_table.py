"""Where a method wins, ties and loses against the baseline: the paired difference on each task."""

from __future__ import annotations

from collections.abc import Sequence

from aroma.errors import bad_value

from .comparison import Comparison
from .formats import counted
from .main_table import scores_of
from .notes import common_notes
from .protocol import protocol
from .records import Records
from .stats import Verdict
from .table import EMPTY, Cell, Column, Table, text_cell

_VERDICTS: tuple[Verdict, ...] = ("better", "tied", "worse")


def paired_table(records: Records, baseline: str | None) -> Table:
    """Return the table of differences to a baseline.

    Args:
        records: The runs.
        baseline: Method that the others are compared with.

    Raises:
        ConfigError: No baseline, or no other method.
    """
    others = [place for place, method in enumerate(records.methods) if method != baseline]
    if baseline is None or not others:
        raise bad_value("--baseline", baseline, "a table of differences compares two methods; name one that has run")
    comparisons = [Comparison(records, baseline, scores_of(records), task) for task in records.tasks]
    columns = [Column("method", ("method",), is_text=True)]
    cells = [[text_cell(method) for method in records.methods]]
    for comparison in comparisons:
        columns.append(comparison.column)
        cells.append(comparison.cells)
    columns.append(Column("–".join(_VERDICTS), _VERDICTS))
    cells.append([_verdicts(comparisons, method) for method in records.methods])
    rows = list(zip(*cells, strict=True))
    seeds = f"{counted(len(records.seeds), 'seed')}: {', '.join(map(str, records.seeds))}."
    notes = dict.fromkeys(note for comparison in comparisons for note in comparison.notes)
    return Table(
        name="paired",
        caption=(
            f"{comparisons[0].sentence()} Better, tied, worse: tasks whose interval lies above zero, holds it, or "
            f"lies below. {seeds} {protocol(records)}"
        ),
        columns=columns,
        rows=[rows[place] for place in others],
        notes=[*notes, *common_notes(records)],
    )


def _verdicts(comparisons: Sequence[Comparison], method: str) -> Cell:
    """Return on how many tasks a method does better, as well and worse; tasks without an interval do not count."""
    differences = [comparison.differences[method] for comparison in comparisons]
    found = [difference.verdict for difference in differences if difference is not None]
    counts = tuple(found.count(verdict) for verdict in _VERDICTS)
    return Cell("–".join(map(str, counts)) if any(counts) else EMPTY, counts)
