"""Settings chosen on held-out training data, task by task and method by method."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aroma.files import read_json

from ..run.files import TrialFiles
from ..run.trial import Trial
from .expand import Chosen, make_trial
from .settings import Settings
from .spec import Grid, Selection


@dataclass(frozen=True, order=True)
class Outcome:
    """What a trial of a selection came to; the greatest is chosen.

    Args:
        score: Held-out score.
        gain: The held-out loss with its sign turned. It decides between equal scores, as the first steps on few
            examples often have them.
    """

    score: float
    gain: float

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Outcome:
        """Return the outcome that a `result.json` tells."""
        return cls(result["score"], -result["held_out_loss"])


@dataclass(frozen=True)
class Candidate:
    """A trial of a selection.

    Args:
        trial: What is run; its purpose is `"select"`.
        task: Name of the task.
        method: Label of the method.
        values: What it tries, by dotted key.
    """

    trial: Trial
    task: str
    method: str
    values: Settings


def candidates(grid: Grid) -> list[Candidate]:
    """Return what a grid's selection tries; nothing where it has none.

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
                settings={**selection.settings(task, method), **values},
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


def begun(grid: Grid, runs: Path) -> list[Candidate]:
    """Return the candidates of those tasks and methods of which any has a folder."""
    tried = candidates(grid)
    pairs = {(one.task, one.method) for one in tried if (runs / one.trial.name).exists()}
    return [one for one in tried if (one.task, one.method) in pairs]


def choose(tried: list[Candidate], outcomes: Mapping[str, Outcome]) -> dict[str, dict[str, Any]]:
    """Return the content of `selection.json`: by task and method what was chosen, and all that was tried.

    The highest score wins; of equal ones that with the lowest loss, then the first.

    Args:
        tried: All candidates.
        outcomes: By name of the trial; a failed one has none.

    Returns:
        `{task: {method: {"chosen": {key: value} or None, "tried": [[{key: value}, score or None], ...]}}}`.
    """
    selection: dict[str, dict[str, Any]] = {}
    finished: dict[tuple[str, str], list[tuple[Candidate, Outcome]]] = {}
    for candidate in tried:
        entry = selection.setdefault(candidate.task, {}).setdefault(candidate.method, {"chosen": None, "tried": []})
        outcome = outcomes.get(candidate.trial.name)
        entry["tried"].append([candidate.values, None if outcome is None else outcome.score])
        if outcome is not None:
            finished.setdefault((candidate.task, candidate.method), []).append((candidate, outcome))
    for (task, method), those in finished.items():
        selection[task][method]["chosen"] = max(those, key=lambda pair: pair[1])[0].values
    return selection


def chosen_settings(selection: Mapping[str, Mapping[str, Any]]) -> Chosen:
    """Return what a selection chose, without the pairs of task and method for which no trial has a score."""
    return {
        task: {method: entry["chosen"] for method, entry in methods.items() if entry["chosen"] is not None}
        for task, methods in selection.items()
    }


def selection_of(tried: list[Candidate], runs: Path) -> dict[str, dict[str, Any]]:
    """Return the content of `selection.json` from the results that lie in the folder of runs; see `choose`."""
    results = {candidate.trial.name: TrialFiles(runs / candidate.trial.name).result for candidate in tried}
    return choose(tried, {name: Outcome.of(read_json(path)) for name, path in results.items() if path.exists()})


def _combinations(selection: Selection) -> list[tuple[str, Settings]]:
    """Return the product of what is tried, each with the name of its folder."""
    products = [
        dict(zip(selection.over, values, strict=True)) for values in itertools.product(*selection.over.values())
    ]
    names = _distinct_names(list(selection.over))
    labels = [",".join(f"{names[key]}={_as_name(value)}" for key, value in values.items()) for values in products]
    if len(set(labels)) < len(labels):  # values that differ only in what no folder can be called
        labels = [f"{index}-{label}" for index, label in enumerate(labels)]
    return list(zip(labels, products, strict=True))


def _distinct_names(keys: list[str]) -> dict[str, str]:
    """Return the last part of every key, or the whole key where two would be called the same."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def _as_name(value: Any) -> str:
    return re.sub(r"[^\w.+-]+", "_", str(value))[:40]
