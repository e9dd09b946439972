"""Table 2: every method on every task, and its paired difference to the baseline."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from .comparison import Comparison
from .formats import amount, points, span, spread_text
from .notes import common_notes, stopped_early
from .protocol import protocol, seeds_sentence
from .records import Records
from .stats import Scores, Spread
from .table import Cell, Column, Table, mark_best, number_cell, text_cell


def main_table(records: Records, baseline: str | None) -> Table:
    """Return the table of scores.

    Args:
        records: The runs.
        baseline: Method that the others are compared with; None: no comparison.
    """
    scored = [(task_column(records, task), score_cells(records, task, records.methods)) for task in records.tasks]
    if len(records.tasks) > 1:
        scored.append((Column("average", ("average",)), _average_cells(records)))
    comparison = None if baseline is None else Comparison(records, baseline, scores_of(records))
    notes = [*stopped_early(records), *common_notes(records)]
    return scored_table("main", _caption(records, comparison), records, scored, comparison, notes)


def scored_table(
    name: str,
    caption: str,
    records: Records,
    scored: Sequence[tuple[Column, list[Cell]]],
    comparison: Comparison | None,
    notes: Sequence[str],
) -> Table:
    """Return a table of all methods: columns of scores, then what each method takes, its difference and its failures.

    Args:
        name: Short name of the table.
        caption: Its caption.
        records: The runs.
        scored: The columns of scores, each with its cells.
        comparison: The differences to a baseline; None: no comparison.
        notes: What a reader has to know beside.
    """
    columns = [Column("method", ("method",), is_text=True)]
    cells = [[text_cell(method) for method in records.methods]]
    for column, those in scored:
        columns.append(column)
        cells.append(those)
    for column, of_method in _COST_COLUMNS:
        columns.append(column)
        cells.append([of_method(records, method) for method in records.methods])
    if comparison is not None:
        columns.append(comparison.column)
        cells.append(comparison.cells)
        notes = [*comparison.notes, *notes]
    columns.append(_FAILED_COLUMN)
    cells.append([_failed_cell(records, method) for method in records.methods])
    return Table(
        name=name,
        caption=caption,
        columns=columns,
        rows=list(zip(*cells, strict=True)),
        best="best mean of a column, among the methods with the most seeds in it",
        notes=notes,
    )


def task_column(records: Records, task: str) -> Column:
    """Return the column of a task's scores."""
    metrics = dict.fromkeys(str(run.result["metric"]) for run in records.of(task=task))
    title = f"{task} ({'/'.join(metrics)})" if metrics else task
    return Column(title, (f"{task}_mean", f"{task}_std", f"{task}_seeds"))


def score_cells(records: Records, task: str, methods: Sequence[str]) -> list[Cell]:
    """Return the scores of methods on a task, the best marked."""
    cells: list[Cell] = []
    counts: list[int] = []
    for method in methods:
        spread = Spread.of([run.score for run in records.of(method, task)])
        text = spread_text(spread, points, len(records.seeds))
        cells.append(Cell(text, (spread.mean, spread.std, spread.count) if spread else (None, None, 0)))
        counts.append(spread.count if spread else 0)
    return mark_best(cells, counts)


def _average_cells(records: Records) -> list[Cell]:
    cells: list[Cell] = []
    counts: list[int] = []
    for method in records.methods:
        scores = [[run.score for run in records.of(method, task)] for task in records.tasks]
        mean = statistics.fmean(map(statistics.fmean, scores)) if all(scores) else None
        average = Spread(mean, None, min(map(len, scores))) if mean is not None else None
        counts.append(min(map(len, scores)))
        text = spread_text(average, points, len(records.seeds))
        cells.append(Cell(text, (average.mean if average else None,)))
    return mark_best(cells, counts)


def _seeds_cell(records: Records, method: str) -> Cell:
    counts = [len(records.of(method, task)) for task in records.tasks]
    return Cell(span(counts), (len(records.seeds),))


def _initial_cell(records: Records, method: str) -> Cell:
    return _parameters_cell(records, method, "initial")


def _average_parameters_cell(records: Records, method: str) -> Cell:
    return _parameters_cell(records, method, "average")


def _parameters_cell(records: Records, method: str, which: str) -> Cell:
    """Return the mean over tasks of the mean over seeds."""
    by_task = [[float(run.result["parameters"][which]) for run in records.of(method, task)] for task in records.tasks]
    means = [statistics.fmean(values) for values in by_task if values]
    return number_cell(statistics.fmean(means) if means else None, amount)


def scores_of(records: Records) -> Callable[[str], Scores]:
    """Return what finds the scores of a method, by task and seed."""
    return lambda method: {(run.task, run.seed): run.score for run in records.of(method)}


def _failed_cell(records: Records, method: str) -> Cell:
    """Return the names of a method's failed runs."""
    return text_cell(" ".join(failure.name for failure in records.failures if failure.method == method))


_COST_COLUMNS: Sequence[tuple[Column, Callable[[Records, str], Cell]]] = (
    (Column("seeds", ("planned_seeds",)), _seeds_cell),
    (Column("trainable at start", ("initial_parameters",)), _initial_cell),
    (Column("trainable on average", ("average_parameters",)), _average_parameters_cell),
)
"""Columns of what a method takes, each with what makes the cell of a method."""
_FAILED_COLUMN = Column("failed", ("failed",), is_raw=True)


def parameters_sentence(records: Records) -> str:
    """Return what the trainable parameters are; empty where no run has finished."""
    if not records.runs:
        return ""
    # A method that trains nothing has no head to train either.
    heads = [float(run.result["parameters"]["head"]) for run in records.runs if run.trains]
    if any(heads):
        return (
            f"Trainable parameters leave out the head's {span(heads, amount)}, which every method trains; on average: "
            "over the planned steps."
        )
    return "Trainable parameters on average: over the planned steps."


def _caption(records: Records, comparison: Comparison | None) -> str:
    sentences = [
        f"{seeds_sentence(records)} Scores in points (100 × metric).",
        protocol(records),
        parameters_sentence(records),
        comparison.sentence() if comparison is not None else "",
    ]
    return " ".join(filter(None, sentences))
