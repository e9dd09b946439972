"""Table 2: every method on every task, and its paired difference to the baseline."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .formats import amount, counted, points, signed_points, span, spread_text
from .notes import common_notes, stopped_early
from .protocol import protocol, seeds_sentence
from .records import Records
from .stats import CONFIDENCE, RESAMPLES, Difference, Scores, Spread, paired_difference
from .table import Cell, Column, Table, empty_cell, mark_best, number_cell, text_cell

_FEW_SEEDS = 10
"""Below so many seeds a table says that its intervals are too narrow."""


def main_table(records: Records, baseline: str | None) -> Table:
    """Return the table of scores.

    Args:
        records: The runs.
        baseline: Method that the others are compared with; None: no comparison.
    """
    columns = [Column("method", ("method",), is_text=True)]
    cells = [[text_cell(method) for method in records.methods]]
    for task in records.tasks:
        columns.append(task_column(records, task))
        cells.append(score_cells(records, task, records.methods))
    if len(records.tasks) > 1:
        columns.append(Column("average", ("average",)))
        cells.append(_average_cells(records))
    for column, of_method in (
        (Column("seeds", ("planned_seeds",)), _seeds_cell),
        (Column("trainable at start", ("initial_parameters",)), _initial_cell),
        (Column("trainable on average", ("average_parameters",)), _average_parameters_cell),
    ):
        columns.append(column)
        cells.append([of_method(records, method) for method in records.methods])
    notes = [*stopped_early(records), *common_notes(records)]
    if baseline is not None:
        differences = _differences(records, baseline)
        columns.append(_difference_column(baseline))
        cells.append([_difference_cell(records, columns[-1], difference) for difference in differences.values()])
        notes = [*_without_interval(differences, baseline), *notes]
    columns.append(Column("failed", ("failed",), is_raw=True))
    cells.append([_failed_cell(records, method) for method in records.methods])
    return Table(
        name="main",
        caption=_caption(records, baseline),
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


def _scores(records: Records, method: str) -> Scores:
    return {(run.task, run.seed): run.score for run in records.of(method)}


def _differences(records: Records, baseline: str) -> dict[str, Difference | None]:
    """Return the difference of every method to the baseline; None for those without a pair."""
    theirs = _scores(records, baseline)
    return {method: paired_difference(_scores(records, method), theirs) for method in records.methods}


def _difference_column(baseline: str) -> Column:
    keys = ("difference", "difference_low", "difference_high", "difference_pairs")
    return Column(f"− {baseline} [{CONFIDENCE:.0%}]", keys)


def _difference_cell(records: Records, column: Column, difference: Difference | None) -> Cell:
    if difference is None:
        return empty_cell(column)
    pairs, planned = sum(difference.pairs.values()), len(records.tasks) * len(records.seeds)
    text = f"{signed_points(difference.mean)} [no interval]"
    low, high = difference.interval or (None, None)
    if low is not None and high is not None:
        text = f"{signed_points(difference.mean)} [{signed_points(low)}, {signed_points(high)}]"
    if pairs != planned:
        text += f" ({pairs} of {counted(planned, 'pair')})"
    return Cell(text, (difference.mean, low, high, pairs))


def _without_interval(differences: dict[str, Difference | None], baseline: str) -> list[str]:
    """Return which methods have no interval, and why."""
    reasons: dict[str, list[str]] = {}
    for method, difference in differences.items():
        if difference is not None and difference.single:
            reasons.setdefault(", ".join(difference.single), []).append(method)
    return [
        f"No interval for {', '.join(methods)}: a single seed shared with {baseline} on {tasks} tells nothing of the "
        "spread."
        for tasks, methods in reasons.items()
    ]


def _failed_cell(records: Records, method: str) -> Cell:
    return text_cell(" ".join(failure.name for failure in records.failures if failure.method == method))


def _caption(records: Records, baseline: str | None) -> str:
    sentences = [f"{seeds_sentence(records)} Scores in points (100 × metric)."]
    sentences.append(protocol(records))
    heads = [float(run.result["parameters"]["head"]) for run in records.runs]
    if heads:
        sentences.append(
            f"Trainable parameters leave out the head's {span(heads, amount)}, which every method trains; on average: "
            "over the planned steps."
        )
    if baseline is not None:
        sentences.append(_difference_sentence(records, baseline))
    return " ".join(sentences)


def _difference_sentence(records: Records, baseline: str) -> str:
    seeds: Sequence[int] = records.seeds
    text = (
        f"Difference to {baseline}: of runs of the same task and seed, in points, mean over the tasks; interval: "
        f"{CONFIDENCE:.0%} bootstrap, percentiles of {RESAMPLES:,} resamples of the seeds of each task."
    )
    if 1 < len(seeds) < _FEW_SEEDS:
        text += f" With {len(seeds)} seeds such an interval is narrower than it should be."
    return text
