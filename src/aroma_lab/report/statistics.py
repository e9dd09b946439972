"""Means, deviations, and paired differences with their bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import bootstrap, t

from ..study.selection import first_of, preference
from .runs import Run, rows_of

RESAMPLES = 10_000
CONFIDENCE = 0.95
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


def regrets(
    frame: pd.DataFrame, growing: Sequence[str], fixed: Sequence[str], chosen: Mapping[str, str]
) -> pd.DataFrame:
    """Return how methods that find their ranks fare against fixed ranks, task by task.

    They are compared with two of them. The *best* has the highest mean reported score, and is the smaller one of
    equals: nobody could have known it, and its own luck counts for it, so that a regret is rather too large than too
    small. The *chosen* one is what a person finds who tries all of them on held-out examples; see `chosen_by_trying`.

    Args:
        frame: Runs with their `task`, `method`, `seed`, `score` and `trained_rank`.
        growing: Methods that find their ranks.
        fixed: Methods with fixed ranks.
        chosen: The chosen one of each task, where there is one.

    Returns:
        A row for each task and growing method that has runs of a seed in common with the best: `task`, `method`,
        `trained` (mean trained rank), `best`, `best_trained`, `difference` (mean over the seeds in common), `error`
        (its standard error, NaN for a single seed), `pairs`, and `met`: whether the score is at most one standard
        error below, at no more trained parameters. Then `chosen` (None where there is none), `chosen_difference`,
        `chosen_error`.
    """
    rows = []
    for task, of_task in frame.groupby("task", sort=False):
        by_method = of_task[of_task.method.isin(fixed)].groupby("method")
        means, counts = by_method[["score", "trained_rank"]].mean(), by_method.size()
        if means.empty:
            continue
        # A mean over the seeds that survived is not comparable with one over all.
        means = means[counts == counts.max()]
        means = means.sort_values(["score", "trained_rank"], ascending=[False, True])
        best, best_trained = str(means.index[0]), float(means.trained_rank.iloc[0])
        scores = of_task.pivot_table(index="seed", columns="method", values="score")
        for method in growing:
            difference, error, pairs = _mean_difference(scores, method, best)
            if pairs:
                trained = float(of_task[of_task.method == method].trained_rank.mean())
                met = _is_met(difference, error, trained, best_trained)
                tried = chosen.get(str(task))
                over_tried = _mean_difference(scores, method, tried)[:2]
                own = (task, method, trained)
                rows.append((*own, best, best_trained, difference, error, pairs, met, tried, *over_tried))
    columns = ["task", "method", "trained", "best", "best_trained", "difference", "error", "pairs", "met"]
    return pd.DataFrame(rows, columns=[*columns, "chosen", "chosen_difference", "chosen_error"])


def chosen_by_trying(selecting: pd.DataFrame, methods: Sequence[str], by: str) -> dict[str, str]:
    """Return the method of each task that its runs on held-out training examples prefer.

    The best settings win, as `selection.preference` orders them, by their mean over seeds; of equal ones those of the
    first of `methods`. A task on which one of them was not tried has none.

    Args:
        selecting: Runs that chose settings, with their `task`, `method`, `score` and `result`.
        by: `Selection.by`.
    """

    def preferred(runs: Sequence[Run]) -> tuple[float, float]:
        losses = [run.result.get("held_out_loss", math.inf) for run in runs]
        return preference(fmean(run.score for run in runs), fmean(losses), by)

    found = {}
    tried = selecting[selecting.method.isin(methods)]
    for task, of_task in tried.groupby("task", sort=False):
        if {*of_task.method} == {*methods}:
            in_order = sorted(rows_of(of_task), key=lambda run: (methods.index(run.method), first_of(run.name)))
            settings = [[*runs] for _, runs in groupby(in_order, key=lambda run: first_of(run.name))]
            found[str(task)] = max(settings, key=preferred)[0].method
    return found


def averages(frame: pd.DataFrame, regret: pd.DataFrame, method: str, fixed: Sequence[str]) -> dict[str, Any] | None:
    """Return how a method that finds its ranks fares on the average of its tasks, against any one fixed rank.

    Args:
        frame: Runs, as in `regrets`.
        regret: What `regrets` returned.
        fixed: Methods with fixed ranks; those that have not run on all of the tasks do not compete.

    Returns:
        `mean`, `trained` and `count` (fewest runs of a task) of the method; `best` (the fixed rank with the highest
        average), `best_mean` and `best_count`; `met`, as in `regrets`; `difference` and `error` (of the
        mean over tasks: tasks are taken as given, seeds are drawn); `chosen_difference` and `chosen_error`, likewise
        against what was chosen on each task, NaN where one has none. None with fewer than two tasks.
    """
    own = regret[regret.method == method]
    by_task = frame[frame.task.isin(own.task)].groupby(["method", "task"])
    means = by_task[["score", "trained_rank"]].mean().groupby("method").agg(["mean", "count"])
    runs = by_task.size().groupby("method").min()
    complete = means[means["score", "count"] == len(own)]
    others = complete[complete.index.isin(fixed)]
    others = others[runs[others.index] == runs[others.index].max()]
    if len(own) < 2 or others.empty:
        return None
    best = str(others["score", "mean"].idxmax())
    differences = []
    for task in own.task:
        scores = frame[frame.task == task].pivot_table(index="seed", columns="method", values="score")
        differences.append(_mean_difference(scores, method, best)[:2])
    difference, error = _mean_of_means(differences)
    chosen, chosen_error = _mean_of_means(list(zip(own.chosen_difference, own.chosen_error, strict=True)))
    trained, best_trained = (float(complete["trained_rank", "mean"][one]) for one in (method, best))
    return {
        "mean": float(complete["score", "mean"][method]),
        "count": int(runs[method]),
        "trained": trained,
        "best": best,
        "best_mean": float(others["score", "mean"][best]),
        "best_count": int(runs[best]),
        "met": _is_met(difference, error, trained, best_trained),
        "difference": difference,
        "error": error,
        "chosen_difference": chosen,
        "chosen_error": chosen_error,
    }


def _is_met(difference: float, error: float, trained: float, best_trained: float) -> bool:
    """Return whether a score is at most one standard error below the best one, at no more trained parameters."""
    return difference >= -error and trained <= best_trained


def _mean_difference(scores: pd.DataFrame, method: str, other: str | None) -> tuple[float, float, int]:
    """Return the mean difference of two columns of `scores`, its standard error and the seeds in common."""
    if method not in scores or other not in scores:
        return math.nan, math.nan, 0
    found = scores[method].sub(scores[other]).dropna()
    return float(found.mean()), float(found.std() / np.sqrt(max(len(found), 1))), len(found)


def _mean_of_means(found: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the mean of independent means, and its standard error."""
    differences, errors = np.array(found).T
    return float(differences.mean()), float(np.sqrt((errors**2).sum()) / len(errors))


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
