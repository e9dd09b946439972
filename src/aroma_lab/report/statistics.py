"""Means, deviations, paired differences with their standard errors, and which tasks were learnt at all."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import t

CHANCE = 0.05
"""Chance that a task on which every method is as good as head-only counts as learnt all the same."""


def spread(frame: pd.DataFrame, value: str, methods: Sequence[str]) -> pd.DataFrame:
    """Return mean, sample standard deviation (n − 1) and number of a column's values, a row for each method.

    Mean and deviation are NaN where there are no values, the deviation also for a single one.
    """
    numbers = pd.to_numeric(frame[value]).groupby(frame["method"]).agg(["mean", "std", "count"])
    found = numbers.reindex(list(methods))
    return found.assign(count=found["count"].fillna(0).astype(int))


def paired_difference(scores: pd.DataFrame, method: str, other: str | None) -> tuple[float, float, int]:
    """Return how much more a method's runs score than another's of the same task and seed.

    Args:
        scores: A row for each task and seed, a column for each method.
        method: The method.
        other: What it is compared with.

    Returns:
        Mean over the tasks of the mean over seeds; its standard error, of the seeds alone, since tasks are taken as
        given (NaN where a task has a single pair); number of pairs. NaN without a pair.
    """
    if method not in scores or other not in scores:
        return math.nan, math.nan, 0
    by_task = scores[method].sub(scores[other]).dropna().groupby("task").agg(["mean", "sem", "count"])
    error = (by_task["sem"] ** 2).sum(skipna=False) ** 0.5 / max(1, len(by_task))
    return float(by_task["mean"].mean()), float(error) if len(by_task) else math.nan, int(by_task["count"].sum())


def not_learnt(frame: pd.DataFrame) -> dict[str, str]:
    """Return the tasks that no method has learnt, each with the sentence that says so.

    With d the n differences of a method to head-only in runs of the same seed, s their sample standard deviation, and
    k the number of methods that have two such pairs or more, a method is clearly above head-only if the t statistic
    mean(d) √n / max(s, step) has a p-value below `CHANCE` / k. So the chance that any of k methods is, although none
    is better, is `CHANCE` at most. A deviation below the step between two possible scores is luck of a few seeds, so
    the step stands in for it. A task without two such pairs counts as learnt.

    Args:
        frame: Reported runs.
    """
    found = {}
    for task, of_task in frame.groupby("task", sort=False):
        means = of_task[of_task.kind == "head_only"].groupby("method").score.mean()
        others = list(of_task.method[~of_task.kind.isin(("head_only", "pretrained"))].unique())
        if means.empty or not others:
            continue
        floor = str(means.idxmax())
        scores = of_task.pivot_table(index="seed", columns="method", values="score", dropna=False)
        differences = scores[others].sub(scores[floor], axis="index")
        differences = differences.loc[:, differences.count() > 1]
        pairs = differences.count()
        error = differences.std().clip(lower=_step(of_task)) / np.sqrt(pairs)
        p = pd.Series(t.sf(differences.mean() / error, pairs - 1), index=pairs.index)
        if len(p) and not (p < CHANCE / len(p)).any():
            best = p.idxmin()
            found[str(task)] = (
                f"{task}: NOT LEARNT: no method is clearly above {floor}, so nothing is said about methods there. "
                f"Nearest is {best}, {100 * differences[best].mean():+.2f} points in {pairs[best]} seeds, p = "
                f"{p[best]:.3f} (Student's t of the paired differences), where {CHANCE / len(p):.3f} would be clear."
            )
    return found


def _step(frame: pd.DataFrame) -> float:
    """Return the smallest difference of two scores: one example of those that are reported."""
    counts = frame.result.iloc[0]["examples"]
    reported = sum(count for split, count in counts.items() if split not in ("train", "held_out", "validation"))
    return 1.0 / int(reported or counts.get("validation") or counts["held_out"])
