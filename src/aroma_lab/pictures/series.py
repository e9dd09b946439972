"""Curves of several seeds put together: mean, lowest and highest at every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..report.records import Run
from ..tasks.metrics import score
from .runs import history_of

Points = Sequence[tuple[float, float]]
"""(step, value) pairs, steps ascending."""


@dataclass(frozen=True)
class Band:
    """Mean over seeds, and what lies between the lowest and the highest.

    Args:
        steps: Optimizer steps.
        mean: At each of them.
        low: The lowest.
        high: The highest.
    """

    steps: NDArray[Any]
    mean: NDArray[Any]
    low: NDArray[Any]
    high: NDArray[Any]


def band_of_steps(curves: Sequence[Points], end: int, also: Sequence[float] = ()) -> Band:
    """Return the band of step functions: a value holds from its step on, also beyond the end of its run.

    Args:
        curves: One of each run, from step 0.
        end: Last step of the longest run.
        also: Further steps at which the band is wanted.
    """
    steps = np.unique([*(step for points in curves for step, _ in points if step <= end), *also, end])
    return _band(steps, [_held(points, steps) for points in curves])


def band_of_points(curves: Sequence[Points]) -> Band:
    """Return the band of measured values, read in between on straight lines; the last one holds for a run that ended.

    It begins where all runs have been measured.
    """
    steps = np.unique([step for points in curves for step, _ in points])
    steps = steps[steps >= max(points[0][0] for points in curves)]
    values = [np.interp(steps, *np.array(points, dtype=float).T) for points in curves]
    return _band(steps, values)


def score_points(run: Run) -> list[tuple[float, float]]:
    """Return the run's score on the reported examples by step, ×100; the last one is the result's."""
    reported = run.result["reported"]
    by_step: dict[int, dict[str, dict[str, float]]] = {}
    for evaluation in history_of(run)["evaluations"]:
        if evaluation["split"] in reported:
            by_step.setdefault(evaluation["step"], {})[evaluation["split"]] = evaluation
    points = {
        step: 100 * score(run.result["metric"], by_split)
        for step, by_split in by_step.items()
        if len(by_split) == len(reported)
    }
    points[run.result["steps"]] = 100 * run.result["score"]
    return sorted((float(step), value) for step, value in points.items())


def _held(points: Points, steps: NDArray[Any]) -> NDArray[Any]:
    changes, values = np.array(points, dtype=float).T
    return np.asarray(values[np.searchsorted(changes, steps, side="right") - 1])


def _band(steps: NDArray[Any], values: Sequence[NDArray[Any]]) -> Band:
    stacked = np.stack(values)
    return Band(steps, stacked.mean(axis=0), stacked.min(axis=0), stacked.max(axis=0))
