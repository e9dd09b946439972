"""Table 3: every method on every reported set, their average, and its paired difference to the baseline."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from aroma.errors import bad_value

from .checks import require_keys
from .comparison import Comparison
from .formats import listing, points, spread_text
from .main_table import parameters_sentence, scored_table
from .notes import common_notes, stopped_early
from .protocol import protocol, seeds_sentence
from .records import Records, Run
from .stats import Scores, Spread
from .table import Cell, Column, Table, mark_best

_MEANING = {
    "accuracy": "the candidate whose label has the highest log-probability",
    "accuracy_normalised": "the candidate whose label has the highest mean log-probability over its tokens",
    "accuracy_per_character": "the candidate whose label has the highest log-probability a character",
    "generated": "the answer that the model writes",
}
"""What counts as the answer to a commonsense question."""
_UNPARSEABLE = "unparseable"
"""Share of the written answers that could not be read, which stands beside the metrics."""


@dataclass(frozen=True)
class _Sets:
    """The reported sets of all tasks, and one metric on them.

    Args:
        records: The runs.
        labels: By task the labels of its sets, in the order of the task.
        metric: Name of the metric; None: of each run the one that is its score.
    """

    records: Records
    labels: Mapping[str, Sequence[str]]
    metric: str | None

    def value(self, run: Run, label: str) -> float | None:
        """Return a run's metric on a set; None where it has none."""
        found = run.result["reported"].get(label, {}).get(self.metric or run.result["metric"])
        return None if found is None else float(found)

    def average(self, run: Run) -> float | None:
        """Return the mean of a run over the sets of its task; None where one lacks."""
        values = [self.value(run, label) for label in self.labels[run.task]]
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if len(known) == len(values) and known else None

    def averages(self, method: str) -> Scores:
        """Return the average of every run of a method, by task and seed."""
        found = {(run.task, run.seed): self.average(run) for run in self.records.of(method)}
        return {key: value for key, value in found.items() if value is not None}


def sets_table(records: Records, baseline: str | None, metric: str | None = None) -> Table:
    """Return the table of the reported sets.

    Args:
        records: The runs.
        baseline: Method that the others are compared with; None: no comparison.
        metric: What is shown of every set, as `accuracy_normalised`; None: the metric that is the score.

    Raises:
        ConfigError: No run has the metric, or none has finished.
        CheckpointError: A result without its reported sets.
    """
    sets = _Sets(records, _labels(records), metric)
    _require_metric(sets)
    scored = [
        (_set_column(sets, task, label), _set_cells(sets, task, label))
        for task, labels in sets.labels.items()
        for label in labels
    ]
    scored.append((Column("average", ("average_mean", "average_std", "average_seeds")), _average_cells(sets)))
    comparison = None if baseline is None else Comparison(records, baseline, sets.averages)
    notes = [*_unparseable(sets), *stopped_early(records), *_examples(records), *common_notes(records)]
    return scored_table("sets", _caption(sets, comparison), records, scored, comparison, notes)


def _labels(records: Records) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {task: [] for task in records.tasks}
    for run in (run for task in records.tasks for run in records.of(task=task)):
        require_keys(run.files.result, run.result, ("reported",))
        require_keys(f"{run.files.result}, reported", run.result["reported"], ())
        for label, metrics in run.result["reported"].items():
            require_keys(f"{run.files.result}, reported.{label}", metrics, ())
        found[run.task] = list(dict.fromkeys([*found[run.task], *run.result["reported"]]))
    if not any(found.values()):
        raise bad_value("--kind", "sets", f"no run with a reported set has finished in {records.folder}")
    return found


def _require_metric(sets: _Sets) -> None:
    if sets.metric is None:
        return
    measured = [metrics for run in sets.records.runs for metrics in run.result["reported"].values()]
    known = dict.fromkeys(name for metrics in measured for name in metrics if name != _UNPARSEABLE)
    if sets.metric not in known:
        raise bad_value("--metric", sets.metric, f"no run has it; give one of {', '.join(known)}")


def _set_column(sets: _Sets, task: str, label: str) -> Column:
    """Return the column of a set, which bears the task's name only where there are several."""
    title = label if len(sets.labels) == 1 else f"{task}: {label}"
    return Column(title, tuple(f"{task}_{label}_{value}" for value in ("mean", "std", "seeds")))


def _set_cells(sets: _Sets, task: str, label: str) -> list[Cell]:
    def spread(method: str) -> Spread | None:
        values = [sets.value(run, label) for run in sets.records.of(method, task)]
        return Spread.of([value for value in values if value is not None])

    return _spread_cells(sets.records, spread)


def _average_cells(sets: _Sets) -> list[Cell]:
    """Return mean and deviation over seeds of the average over all tasks that a seed has."""

    def spread(method: str) -> Spread | None:
        by_seed: dict[int, list[float]] = {}
        for (_, seed), value in sets.averages(method).items():
            by_seed.setdefault(seed, []).append(value)
        # A seed that lacks a task is no average over all.
        return Spread.of([statistics.fmean(values) for values in by_seed.values() if len(values) == len(sets.labels)])

    return _spread_cells(sets.records, spread)


def _spread_cells(records: Records, spread_of: Callable[[str], Spread | None]) -> list[Cell]:
    cells: list[Cell] = []
    counts: list[int] = []
    for spread in map(spread_of, records.methods):
        text = spread_text(spread, points, len(records.seeds))
        cells.append(Cell(text, (spread.mean, spread.std, spread.count) if spread else (None, None, 0)))
        counts.append(spread.count if spread else 0)
    return mark_best(cells, counts)


def _unparseable(sets: _Sets) -> list[str]:
    """Return by method which share of the written answers could not be read, where answers were written."""
    notes = []
    for method in sets.records.methods:
        told, asked = [], False
        for task, labels in sets.labels.items():
            for label in labels:
                found = [run.result["reported"].get(label, {}) for run in sets.records.of(method, task)]
                shares = [float(metrics[_UNPARSEABLE]) for metrics in found if _UNPARSEABLE in metrics]
                asked = asked or bool(shares)
                if any(shares):
                    told.append(f"{points(statistics.fmean(shares))} % of {_set_column(sets, task, label).title}")
        if asked:
            notes.append(f"{method}: {listing(told) or 'none'}")
    return [f"Written answers that could not be read, and count as wrong: {'; '.join(notes)}."] if notes else []


def _examples(records: Records) -> list[str]:
    """Return what became of examples that did not fit, as the runs of a task tell it."""
    told = {
        task: dict.fromkeys(str(note) for run in records.of(task=task) for note in run.result.get("notes", ()))
        for task in records.tasks
    }
    return [f"{task}: {'; '.join(notes)}." for task, notes in told.items() if notes]


def _caption(sets: _Sets, comparison: Comparison | None) -> str:
    metrics = dict.fromkeys(sets.metric or str(run.result["metric"]) for run in sets.records.runs)
    asks = all(run.trial["task"].get("kind") == "commonsense" for run in sets.records.runs)
    shown = [f"{metric} ({_MEANING[metric]})" if asks and metric in _MEANING else metric for metric in metrics]
    tasks = " of a task, then over the tasks" if len(sets.labels) > 1 else ""
    sentences = [
        f"{seeds_sentence(sets.records)} Shown: {listing(shown)} of each set, in points; average: over the "
        f"sets{tasks}, each of equal weight.",
        protocol(sets.records),
        parameters_sentence(sets.records),
        comparison.sentence("Difference of the average") if comparison is not None else "",
    ]
    return " ".join(filter(None, sentences))
