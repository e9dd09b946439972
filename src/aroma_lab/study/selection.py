"""Settings chosen on held-out training data, per task and method."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..run.trial import Trial
from .grid import Chosen, Grid, Selection, Settings, make_trial, overridden


class Outcome(NamedTuple):
    """The result of a selection's trial; the greatest is chosen.

    Args:
        score: Held-out score.
        gain: Negative held-out loss. It decides between equal scores, which are common after few steps on few
            examples.
    """

    score: float
    gain: float


@dataclass(frozen=True)
class Candidate:
    """A trial of a selection.

    Args:
        trial: The trial; its purpose is `"select"`.
        task: Name of the task.
        method: Label of the method.
        values: What it tries, by dotted key.
    """

    trial: Trial
    task: str
    method: str
    values: Settings


def candidates(grid: Grid) -> list[Candidate]:
    """Return what a grid's selection tries; nothing for a grid without one.

    Raises:
        ConfigError: A value that cannot work.
    """
    if grid.select is None:
        return []
    selection, combinations = grid.select, _combinations(grid.select)
    return [
        Candidate(
            make_trial(
                grid,
                task,
                method,
                selection.seed,
                name=f"select/{task}/{method}/{label}",
                settings={**overridden(selection.training, selection.overrides, task, method), **values},
                purpose="select",
            ),
            task,
            method,
            values,
        )
        for task in grid.tasks
        for method in grid.methods
        for label, values in combinations
    ]


def choose(tried: Sequence[Candidate], outcomes: Mapping[str, Outcome]) -> dict[str, dict[str, Any]]:
    """Return the content of `selection.json`: what was chosen per task and method, and all that was tried.

    The highest score wins; of equal ones the lowest loss, then the first.

    Args:
        tried: The candidates.
        outcomes: By name of the trial; a failed one has none.

    Returns:
        `{task: {method: {"chosen": {key: value} or None, "tried": [[{key: value}, score or None], ...]}}}`.
    """
    selection: dict[str, dict[str, Any]] = {}
    best: dict[tuple[str, str], Outcome] = {}
    for one in tried:
        entry = selection.setdefault(one.task, {}).setdefault(one.method, {"chosen": None, "tried": []})
        outcome = outcomes.get(one.trial.name)
        entry["tried"].append([one.values, None if outcome is None else outcome.score])
        pair = (one.task, one.method)
        if outcome is not None and (pair not in best or outcome > best[pair]):
            best[pair], entry["chosen"] = outcome, one.values
    return selection


def chosen_settings(selection: Mapping[str, Mapping[str, Any]]) -> Chosen:
    """Return what a selection chose, without the pairs of task and method that have no finished trial."""
    return {
        task: {method: entry["chosen"] for method, entry in methods.items() if entry["chosen"] is not None}
        for task, methods in selection.items()
    }


def _combinations(selection: Selection) -> list[tuple[str, Settings]]:
    """Return the product of what is tried, each with the name of its folder."""
    products = [
        dict(zip(selection.over, values, strict=True)) for values in itertools.product(*selection.over.values())
    ]
    names = _distinct_names(list(selection.over))
    labels = [",".join(f"{names[key]}={_as_name(value)}" for key, value in values.items()) for values in products]
    if len(set(labels)) < len(labels):  # values that differ only in characters that a folder name cannot have
        labels = [f"{index}-{label}" for index, label in enumerate(labels)]
    return list(zip(labels, products, strict=True))


def _distinct_names(keys: list[str]) -> dict[str, str]:
    """Return the last part of every key, or the whole key where two last parts are equal."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def _as_name(value: Any) -> str:
    return re.sub(r"[^\w.+-]+", "_", str(value))[:40]
