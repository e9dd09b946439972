"""Means, deviations, and paired differences with their bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import bootstrap, t

RESAMPLES = 10_000
"""Resamples of a bootstrap."""
CONFIDENCE = 0.95
"""Confidence level of an interval."""
FEW_SEEDS = 10
"""With fewer seeds than this an interval is too narrow, and tables say so."""

CHANCE = 0.05
"""Chance that a task on which every method is as good as head-only counts as learnt all the same."""


def spread(frame: pd.DataFrame, value: str, methods: Sequence[str]) -> pd.DataFrame:
    """Return mean, sample standard deviation (n − 1) and number of a column's values, a row for each method.

    Mean and deviation are NaN where there are no values, the deviation also for a single one.
    """
    numbers = pd.to_numeric(frame[value]).groupby(frame["method"]).agg(["mean", "std", "count"])
    found = numbers.reindex(list(methods))
    return found.assign(count=found["count"].fillna(0).astype(int))


def paired_differences(frame: pd.DataFrame, value: str, baseline: str, methods: Sequence[str]) -> pd.DataFrame:
    """Return how much more each method scores than the baseline, in runs of the same task and seed.

    The interval is the percentile bootstrap's. The seeds of each task are drawn with replacement, task by task, and a
    pair stays a pair. Tasks are taken as given: the interval says nothing about tasks that were not run.

    Args:
        frame: Runs with their `task`, `method` and `seed`.
        value: Column that is compared.
        baseline: Method that the others are compared with.
        methods: Rows of the answer.

    Returns:
        By method `difference` (mean over tasks of the mean over seeds; NaN without a pair), `low` and `high` (NaN
        where a task has a single pair, which tells nothing of the spread), `pairs`, and as `single` the tasks that
        have one pair.
    """
    runs = frame.dropna(subset=[value]).sort_values("seed", kind="stable")
    base = runs[runs.method == baseline].set_index(["task", "seed"])[value].rename("base")
    pairs = runs.join(base, on=["task", "seed"], how="inner")
    pairs = pairs.assign(difference=pairs[value] - pairs.base)
    rows = {}
    for method, of_method in pairs.groupby("method", sort=False):
        samples = of_method.groupby("task", sort=False)["difference"].apply(np.asarray)
        single = ", ".join(str(task) for task, sample in samples.items() if len(sample) == 1)
        low, high = (np.nan, np.nan) if single else _interval(list(samples))
        rows[method] = (samples.map(np.mean).mean(), low, high, len(of_method), single)
    columns = ["difference", "low", "high", "pairs", "single"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).reindex(list(methods))


def margins(frame: pd.DataFrame, value: str, floor: str, methods: Sequence[str], step: float) -> pd.DataFrame:
    """Return how far methods lie above a floor on one task, and how far each has to, to be clearly above it.

    With d the n differences of a method to the floor in runs of the same seed, s their sample standard deviation, and
    k the number of methods that have two such pairs or more, a method is clearly above the floor if

        mean(d) > q · max(s, step) / √n,

    q the quantile 1 − `CHANCE` / k of Student's t with n − 1 degrees of freedom. So the chance that any of k methods
    is, although none is better than the floor, is `CHANCE` at most. A deviation below the step between two possible
    scores is luck of a few seeds, so the step stands in for it.

    Args:
        frame: Runs of one task with their `method` and `seed`.
        value: Column that is compared.
        floor: Method that they have to be above.
        methods: Rows of the answer.
        step: Smallest difference of two scores.

    Returns:
        By method `difference` (NaN without a pair), `needed` (NaN with fewer than two pairs) and `pairs`.
    """
    scores = frame.pivot_table(index="seed", columns="method", values=value, dropna=False)
    differences = scores.reindex(columns=list(methods)).sub(scores[floor], axis="index")
    pairs = differences.count()
    compared = max(int((pairs > 1).sum()), 1)
    error: pd.Series[float] = differences.std().clip(lower=step) / np.sqrt(pairs)
    quantile = t.ppf(1 - CHANCE / compared, (pairs - 1).where(pairs > 1))
    return pd.DataFrame({"difference": differences.mean(), "needed": error * quantile, "pairs": pairs})


def regrets(frame: pd.DataFrame, growing: Sequence[str], fixed: Sequence[str]) -> pd.DataFrame:
    """Return how methods that find their ranks fare against the best of the fixed ranks, task by task.

    The best is the one with the highest mean reported score, the smaller one of equals: nobody could have known it.
    Its own luck counts for it, so a regret is rather too large than too small.

    Args:
        frame: Runs with their `task`, `method`, `seed`, `score` and `trained_rank`.
        growing: Methods that find their ranks.
        fixed: Methods with fixed ranks.

    Returns:
        A row for each task and growing method that has runs of a seed in common with the best: `task`, `method`,
        `best`, `trained` and `best_trained` (mean trained ranks), `difference` (mean over the seeds in common),
        `error` (its standard error, NaN for a single seed), `pairs`, and `met`: whether the score is at most one
        standard error below, at no more trained parameters.
    """
    rows = []
    for task, of_task in frame.groupby("task", sort=False):
        means = of_task[of_task.method.isin(fixed)].groupby("method")[["score", "trained_rank"]].mean()
        if means.empty:
            continue
        means = means.sort_values(["score", "trained_rank"], ascending=[False, True])
        best, best_trained = str(means.index[0]), float(means.trained_rank.iloc[0])
        scores = of_task.pivot_table(index="seed", columns="method", values="score")
        for method in growing:
            if method not in scores:
                continue
            found = scores[method].sub(scores[best]).dropna()
            if len(found):
                trained = float(of_task[of_task.method == method].trained_rank.mean())
                error = float(found.std() / np.sqrt(len(found)))
                met = bool(found.mean() >= -error and trained <= best_trained)
                rows.append((task, method, best, trained, best_trained, float(found.mean()), error, len(found), met))
    columns = ["task", "method", "best", "trained", "best_trained", "difference", "error", "pairs", "met"]
    return pd.DataFrame(rows, columns=columns)


def _interval(samples: Sequence[np.ndarray[Any, Any]]) -> tuple[float, float]:
    def mean_of_sample_means(*drawn: Any, axis: int) -> Any:
        return np.mean([np.mean(sample, axis=axis) for sample in drawn], axis=0)

    found = bootstrap(
        samples,
        mean_of_sample_means,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
