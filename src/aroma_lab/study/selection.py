"""Settings chosen on held-out training data, per task and method.

An optimum at the edge of the tried values says nothing about values beyond it. `beyond` gives the next value, which
tables ask for and a selection with `widen` tries by itself, as it tries all values next to the best.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from statistics import fmean
from typing import Any, NamedTuple

from aroma.errors import AromaError

from ..run.trial import Trial
from .grid import Grid, Selection, Settings, make_trial, overridden
from .trials import Ended

_FURTHER = ",seed="
"""Stands in the name of a run between that of the first run of its settings and a further seed."""


class Candidate(NamedTuple):
    """A trial of a selection, whose purpose is `"select"`, and what it tries."""

    trial: Trial
    values: Settings


class Selected(NamedTuple):
    """How far the selection of one task and method is."""

    tried: list[Candidate]
    """What has run or is due."""
    chosen: Settings | None
    """The best so far; None if nothing has finished."""
    is_final: bool
    """Whether nothing more is due."""
    entry: dict[str, Any]
    """For `selection.json`: `{"chosen": {key: value} | None, "tried": [[{key: value}, score | loss | None], ...]}`."""


def select(grid: Grid, task: str, method: str, ended: Callable[[str], Ended | None]) -> Selected:
    """Return what a grid's selection has tried for a task and a method, and what it tries next.

    Candidates of the lists come first, then values next to the best (`widen`), then further seeds of the best.

    Args:
        ended: Returns how the trial of a name ended; None if it has not.

    Raises:
        ConfigError: A listed value that cannot work.
    """
    rule = grid.select
    assert rule is not None, "its callers check it"
    over = rule.over | overridden(rule.overrides, task, method)["over"]
    listed = {key: values for key, values in over.items() if values is not None}
    points = [dict(zip(listed, point, strict=True)) for point in itertools.product(*listed.values())]
    tried = _candidates(grid, rule, task, method, points)
    while True:
        is_over = all(ended(one.trial.name) for one in tried)  # first: others may end a trial meanwhile
        means = _means(tried, ended)
        finished = [(preference(mean.score, mean.loss, rule.by), values) for values, mean in means if mean]
        ranked = [values for _, values in sorted(finished, key=lambda one: one[0], reverse=True)]
        further: list[Candidate] = []
        if is_over and ranked:
            for point in _beside([values for values, _ in means], ranked[0], listed, rule.widen):
                with suppress(AromaError):  # no value lies beyond this one, as with a share of 1
                    further += _candidates(grid, rule, task, method, [point])
            further = further or _finals(rule, tried, ranked)
        if not further:
            scores = [[values, mean and (mean.loss if rule.by == "loss" else mean.score)] for values, mean in means]
            chosen = ranked[0] if ranked else None
            return Selected(tried, chosen, is_over, {"chosen": chosen, "tried": scores})
        tried += further


def _candidates(grid: Grid, rule: Selection, task: str, method: str, points: Sequence[Settings]) -> list[Candidate]:
    """Return the trials of combinations of values."""
    training = {f"training.{key}": value for key, value in rule.training.items()}
    settings = training | overridden(rule.overrides, task, method)
    named = zip(_labels(points), points, strict=True)
    names = [(f"select/{task}/{method}/{label}", values) for label, values in named]
    return [Candidate(make_trial(grid, task, method, rule.seed, name, settings | v, "select"), v) for name, v in names]


def _labels(points: Sequence[Settings]) -> list[str]:
    """Return a folder name for each combination of values: `learning_rate=0.001,r=8`."""
    names = [key.rpartition(".")[2] for key in points[0]]
    texts = [[re.sub(r"[^\w.+-]+", "_", str(value))[:40] for value in point.values()] for point in points]
    labels = [",".join(map("=".join, zip(names, values, strict=True))) or "as-given" for values in texts]
    if len(set(labels)) < len(labels):  # values that differ only in what a folder name cannot hold
        labels = [f"{index}-{label}" for index, label in enumerate(labels)]
    return labels


def _means(tried: Sequence[Candidate], ended: Callable[[str], Ended | None]) -> list[tuple[Settings, Ended | None]]:
    """Return all values that were tried, with the mean over seeds; None where a run has not finished."""
    points = [one.values for one in tried]
    found = []
    for values in (point for index, point in enumerate(points) if point not in points[:index]):
        runs = [ended(one.trial.name) for one in tried if one.values == values]
        whole = [run for run in runs if run is not None and run.failure is None]
        mean = Ended(fmean(run.score for run in whole), fmean(run.loss for run in whole)) if whole else None
        found.append((values, mean if len(whole) == len(runs) else None))
    return found


def _beside(
    points: Sequence[Settings], chosen: Settings, listed: Mapping[str, Sequence[Any]], most: int
) -> Iterator[Settings]:
    """Yield the untried neighbours of the chosen values, one number apart.

    A key gets at most so many more values than those with which the selection began, which are `listed`.
    """
    for key, value in chosen.items():
        numbers = _numbers(points, key)
        if value not in numbers:
            continue
        place = numbers.index(value)
        others = [*numbers[max(place - 1, 0) : place], *numbers[place + 1 : place + 2]]
        further = beyond(numbers, value)
        if further is not None and len({*numbers}.difference(listed[key])) < most:
            others.append(further)
        yield from (point for other in others if (point := {**chosen, key: other}) not in points)


def _finals(rule: Selection, tried: Sequence[Candidate], ranked: Sequence[Settings]) -> list[Candidate]:
    """Return the runs of the two best with the further seeds of `select.again` that are not among those `tried`."""
    names, found = {one.trial.name for one in tried}, []
    for seed, values in itertools.product(rule.again, ranked[:2] if len(ranked) > 1 else []):
        first = next(one.trial for one in tried if one.values == values)
        name, training = f"{first.name}{_FURTHER}{seed}", replace(first.training, seed=seed)
        if name not in names:
            found.append(Candidate(replace(first, name=name, training=training), values))
    return found


def preference(score: float, loss: float, by: str) -> tuple[float, float]:
    """Return a key that is largest for the best run: the score, then the lower loss; by loss the other way round."""
    return (-loss, score) if by == "loss" else (score, -loss)


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
