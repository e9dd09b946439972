"""Settings chosen on held-out training data, per task and method."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..run.trial import Trial
from .grid import Chosen, Grid, Settings, make_trial, overridden


class Candidate(NamedTuple):
    """A trial of a selection, whose purpose is `"select"`, and what it tries."""

    trial: Trial
    values: Settings


def candidates(grid: Grid) -> list[Candidate]:
    """Return what a grid's selection tries; nothing for a grid without one.

    Raises:
        ConfigError: A value that cannot work.
    """
    if grid.select is None:
        return []
    keys, products = list(grid.select.over), list(itertools.product(*grid.select.over.values()))
    training = {f"training.{key}": value for key, value in grid.select.training.items()}
    found = []
    for task, method in itertools.product(grid.tasks, grid.methods):
        settings = training | overridden(grid.select.overrides, task, method)
        for label, point in zip(_labels(keys, products), products, strict=True):
            values, name = dict(zip(keys, point, strict=True)), f"select/{task}/{method}/{label}"
            trial = make_trial(grid, task, method, grid.select.seed, name, settings | values, "select")
            found.append(Candidate(trial, values))
    return found


def choose(tried: Sequence[Candidate], outcomes: Mapping[str, tuple[float, float]]) -> dict[str, dict[str, Any]]:
    """Return the content of `selection.json`: what was chosen per task and method, and all that was tried.

    The highest score wins; of equal ones, which are common after few steps on few examples, the lowest loss, then the
    first.

    Args:
        tried: The candidates.
        outcomes: Score and negative loss, by name of the trial; a failed one has none.

    Returns:
        `{task: {method: {"chosen": {key: value} or None, "tried": [[{key: value}, score or None], ...]}}}`.
    """
    selection: dict[str, dict[str, Any]] = {}
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for trial, values in tried:
        pair, outcome = (trial.task.name, trial.method), outcomes.get(trial.name)
        entry = selection.setdefault(pair[0], {}).setdefault(pair[1], {"chosen": None, "tried": []})
        entry["tried"].append([values, None if outcome is None else outcome[0]])
        if outcome is not None and (pair not in best or outcome > best[pair]):
            best[pair], entry["chosen"] = outcome, values
    return selection


def chosen_settings(selection: Mapping[str, Mapping[str, Any]]) -> Chosen:
    """Return what a selection chose, without the pairs of task and method that have no finished trial."""
    return {
        task: {method: entry["chosen"] for method, entry in methods.items() if entry["chosen"] is not None}
        for task, methods in selection.items()
    }


def _labels(keys: Sequence[str], products: Sequence[Sequence[Any]]) -> list[str]:
    """Return a folder name for each combination of values: `learning_rate=0.001,r=8`."""
    last = [key.rpartition(".")[2] for key in keys]
    names = [name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)]
    texts = [[re.sub(r"[^\w.+-]+", "_", str(value))[:40] for value in point] for point in products]
    labels = [",".join(map("=".join, zip(names, values, strict=True))) for values in texts]
    if len(set(labels)) < len(labels):  # values that differ only in characters that a folder name cannot have
        labels = [f"{index}-{label}" for index, label in enumerate(labels)]
    return labels
