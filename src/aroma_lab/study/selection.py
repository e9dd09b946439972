"""Settings chosen on held-out training data, per task and method.

An optimum at the edge of what was tried says nothing about what lies beyond. `beyond` gives the next value, which
tables ask for and a selection with `widen` tries by itself, as it tries all values next to the best.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from aroma.errors import AromaError
from aroma.files import write_text

from ..run.trial import Trial
from .grid import OVER, Chosen, Grid, Settings, make_trial, overridden

FINALISTS = 2
"""How many of the best are run with further seeds, where `select.again` names some."""

_FURTHER = ",seed="
"""Stands in the name of a run between that of the first run of its settings and a further seed."""


class Candidate(NamedTuple):
    """A trial of a selection, whose purpose is `"select"`, and what it tries."""

    trial: Trial
    values: Settings

    @property
    def pair(self) -> tuple[str, str]:
        """Task and method."""
        return self.trial.task.name, self.trial.method


Outcome = tuple[float, float]
"""Score and loss."""
Outcomes = Mapping[str, Outcome]
"""By name of the trial, of those that have ended; a failed one has none."""


def candidates(grid: Grid) -> list[Candidate]:
    """Return what a grid's selection tries before it is widened; nothing for a grid without one.

    Raises:
        ConfigError: A value that cannot work.
    """
    if grid.select is None:
        return []
    return [
        candidate
        for task, method in itertools.product(grid.tasks, grid.methods)
        for candidate in _of_pair(grid, task, method, _points(tried_values(grid, task, method)))
    ]


def tried_values(grid: Grid, task: str, method: str) -> dict[str, list[Any]]:
    """Return the values that a grid's selection tries for a task and a method, by dotted key."""
    assert grid.select is not None, "candidates and widened check it"
    over: dict[str, Any] = {**grid.select.over, **overridden(grid.select.overrides, task, method, OVER)}
    return {key: values for key, values in over.items() if values is not None}


def widened(grid: Grid, tried: Sequence[Candidate], outcomes: Outcomes) -> list[Candidate]:
    """Return what a selection tries next because its best values are not compared yet with those next to them.

    For each task and method whose candidates have all ended, and each number, there are at most two more candidates:
    the chosen values, with this number replaced by the next smaller and the next larger one of those tried, or by the
    one `beyond` an edge. A key gets at most `select.widen` values more than the grid lists for it.
    """
    assert grid.select is not None, "nothing is tried without a selection"
    selection, found = choose(grid, tried, outcomes), []
    for task, methods in selection.items():
        for method, entry in methods.items():
            points = [values for values, _ in entry["tried"]]
            beside = _beside(points, entry["chosen"] or {}, tried_values(grid, task, method), grid.select.widen)
            for point in beside:
                with suppress(AromaError):  # no value lies beyond this one, as with a share of 1
                    found += _of_pair(grid, task, method, [point])
    return found


def finals(grid: Grid, tried: Sequence[Candidate], outcomes: Outcomes) -> list[Candidate]:
    """Return the runs of the best with the further seeds of `select.again` that are not among those `tried`.

    What is best by its mean so far may be another after them, and is due then. Where one combination of values alone
    has finished, there is nothing to decide.
    """
    select = grid.select
    assert select is not None, "nothing is tried without a selection"
    found: list[Candidate] = []
    for pair, runs in _by_values(tried, outcomes).items():
        ranked = _ranked(runs, select.by)
        best = ranked[:FINALISTS] if len(ranked) > 1 else []
        for seed, values in itertools.product(select.again, best):
            first = next(one.trial for one in tried if (one.pair, one.values) == (pair, values))
            training = replace(first.training, seed=seed)
            found.append(Candidate(replace(first, name=f"{first.name}{_FURTHER}{seed}", training=training), values))
    known = {one.trial.name for one in tried}
    return [one for one in found if one.trial.name not in known]


def first_of(name: str) -> str:
    """Return the name of the first run with the settings of a run of a selection, of any seed."""
    return name.partition(_FURTHER)[0]


def _by_values(
    tried: Sequence[Candidate], outcomes: Outcomes
) -> dict[tuple[str, str], list[tuple[Settings, Outcome | None]]]:
    """Return all values that were tried, with the mean of score and loss over seeds, by task and method.

    None where a run has failed: what fails with one seed is not to be chosen.
    """
    found: dict[tuple[str, str], list[tuple[Settings, list[Outcome | None]]]] = {}
    for one in tried:
        of_pair = found.setdefault(one.pair, [])
        runs = next((runs for same, runs in of_pair if same == one.values), None)
        if runs is None:
            of_pair.append((one.values, runs := []))
        runs.append(outcomes.get(one.trial.name))
    return {pair: [(values, _mean(runs)) for values, runs in of_pair] for pair, of_pair in found.items()}


def _mean(runs: Sequence[Outcome | None]) -> Outcome | None:
    ended = [run for run in runs if run is not None]
    if len(ended) < len(runs):
        return None
    return fmean(score for score, _ in ended), fmean(loss for _, loss in ended)


def _ranked(runs: Sequence[tuple[Settings, Outcome | None]], by: str) -> list[Settings]:
    """Return the values of `_by_values`, the best first, without those of which a run has failed."""
    ended = [(preference(mean[0], mean[1], by), values) for values, mean in runs if mean is not None]
    return [values for _, values in sorted(ended, key=itemgetter(0), reverse=True)]


def _beside(
    points: Sequence[Settings], chosen: Settings, listed: Mapping[str, Sequence[Any]], most: int
) -> list[Settings]:
    """Return what is next to the chosen values, one number apart, and is not among the `points` that were tried.

    Args:
        listed: The values of each key with which the selection began.
        most: How many more values than those a key may get.
    """
    found = []
    for key, value in chosen.items():
        numbers = _numbers(points, key)
        others = _next_to(numbers, value)
        further = beyond(numbers, value)
        if further is not None and len(set(numbers).difference(listed[key])) < most:
            others.append(further)
        found += [{**chosen, key: other} for other in others]
    return [point for point in found if point not in points]


def edges(tried: Sequence[Settings], chosen: Settings) -> dict[str, float]:
    """Return the chosen numbers that are the smallest or largest of those tried, each with the value `beyond` it."""
    found = {key: beyond(_numbers(tried, key), value) for key, value in chosen.items()}
    return {key: further for key, further in found.items() if further is not None}


def beyond(values: Sequence[float], value: float) -> float | None:
    """Return the number that continues ascending `values` beyond their edge `value`; None if it is no edge.

    Positive numbers go on by the quotient of the last two, others by their difference, to three digits; whole numbers
    stay whole, and none changes its sign. A single value has no neighbour to go on from, and is no edge.
    """
    if len(values) < 2 or value not in (values[0], values[-1]):
        return None
    last, inner = (values[0], values[1]) if value == values[0] else (values[-1], values[-2])
    further = float(f"{last * last / inner if values[0] > 0 else 2 * last - inner:.3g}")
    if all(isinstance(one, int) for one in values):
        further = round(further)
    changes_sign = further < 0 <= values[0] or further <= 0 < values[0]
    return None if changes_sign or further in values else further


def _numbers(tried: Sequence[Settings], key: str) -> list[Any]:
    """Return the numbers that were tried for a key, ascending; none for a key of which any value is no number."""
    values: list[Any] = [one.get(key) for one in tried]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return sorted({*values}) if numbers else []


def _next_to(numbers: Sequence[Any], value: Any) -> list[Any]:
    if value not in numbers:
        return []
    place = numbers.index(value)
    return [*numbers[max(place - 1, 0) : place], *numbers[place + 1 : place + 2]]


def _points(over: Mapping[str, Sequence[Any]]) -> list[Settings]:
    return [dict(zip(over, point, strict=True)) for point in itertools.product(*over.values())]


def _of_pair(grid: Grid, task: str, method: str, points: Sequence[Settings]) -> list[Candidate]:
    assert grid.select is not None, "its callers check it"
    training = {f"training.{key}": value for key, value in grid.select.training.items()}
    settings, found = training | overridden(grid.select.overrides, task, method), []
    for label, values in zip(_labels(points), points, strict=True):
        name = f"select/{task}/{method}/{label}"
        trial = make_trial(grid, task, method, grid.select.seed, name, settings | values, "select")
        found.append(Candidate(trial, values))
    return found


def choose(grid: Grid, tried: Sequence[Candidate], outcomes: Outcomes) -> dict[str, dict[str, Any]]:
    """Return the content of `selection.json`: what was chosen per task and method, and all that was tried.

    The best wins, as `preference` orders them; of equal ones the first. Of what was run with further seeds the means
    count.

    Returns:
        `{task: {method: {"chosen": {key: value} or None, "tried": [[{key: value}, score or loss or None], ...]}}}`.
    """
    by = "score" if grid.select is None else grid.select.by
    selection: dict[str, dict[str, Any]] = {}
    for (task, method), runs in _by_values(tried, outcomes).items():
        found = [[values, None if mean is None else mean[by == "loss"]] for values, mean in runs]
        chosen = next(iter(_ranked(runs, by)), None)
        selection.setdefault(task, {})[method] = {"chosen": chosen, "tried": found}
    return selection


def write_selection(path: Path, selection: Mapping[str, Mapping[str, Any]]) -> None:
    """Write what `choose` returned to `path` as JSON, atomically, with a line for each task and method."""
    tasks = []
    for task, methods in selection.items():
        lines = [f"  {json.dumps(method)}: {json.dumps(entry, allow_nan=False)}" for method, entry in methods.items()]
        tasks.append(f" {json.dumps(task)}: {{\n" + ",\n".join(lines) + "\n }")
    write_text(path, "{\n" + ",\n".join(tasks) + "\n}\n")


def preference(score: float, loss: float, by: str) -> tuple[float, float]:
    """Return what is largest for the best run of a selection.

    By score the highest wins; of equal ones, which are common after few steps on few examples, the lowest loss. By
    loss it is the other way round.
    """
    return (-loss, score) if by == "loss" else (score, -loss)


def chosen_settings(selection: Mapping[str, Mapping[str, Any]]) -> Chosen:
    """Return what a selection chose, without the pairs of task and method that have no finished trial."""
    return {
        task: {method: entry["chosen"] for method, entry in methods.items() if entry["chosen"] is not None}
        for task, methods in selection.items()
    }


def _labels(points: Sequence[Settings]) -> list[str]:
    """Return a folder name for each combination of values: `learning_rate=0.001,r=8`."""
    keys = list(points[0]) if points else []
    last = [key.rpartition(".")[2] for key in keys]
    names = [name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)]
    texts = [[re.sub(r"[^\w.+-]+", "_", str(value))[:40] for value in point.values()] for point in points]
    labels = [",".join(map("=".join, zip(names, values, strict=True))) or "as-given" for values in texts]
    if len(set(labels)) < len(labels):  # values that differ only in characters that a folder name cannot have
        labels = [f"{index}-{label}" for index, label in enumerate(labels)]
    return labels
