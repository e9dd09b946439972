"""Means, deviations, paired differences with their bootstrap intervals, and which tasks were learnt at all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import bootstrap, t

from ..study.selection import first_of

RESAMPLES = 10_000
CONFIDENCE = 0.95
CHANCE = 0.05
"""Chance that a task on which every method is as good as head-only counts as learnt all the same."""
AVERAGE = "average"
"""The task of a row of `regrets` that is of all tasks."""
_REGRET = [
    *("method", "task", "mean", "std", "seeds", "trained", "best", "best_mean", "best_std", "best_seeds"),
    *("difference", "error", "pairs", "met", "chosen", "chosen_difference", "chosen_error"),
]


def spread(frame: pd.DataFrame, value: str, methods: Sequence[str]) -> pd.DataFrame:
    """Return mean, sample standard deviation (n − 1) and number of a column's values, a row for each method.

    Mean and deviation are NaN where there are no values, the deviation also for a single one.
    """
    numbers = pd.to_numeric(frame[value]).groupby(frame["method"]).agg(["mean", "std", "count"])
    found = numbers.reindex(list(methods))
    return found.assign(count=found["count"].fillna(0).astype(int))


def paired_differences(frame: pd.DataFrame, value: str, baseline: str, methods: Sequence[str]) -> pd.DataFrame:
    """Return how much more each method's runs score than the baseline's of the same task and seed.

    The interval is the percentile bootstrap's: the seeds of each task are drawn with replacement, and a pair stays a
    pair. Tasks are taken as given, so it says nothing about tasks that were not run.

    Args:
        frame: Runs with their `task`, `method` and `seed`.
        value: Column that is compared.
        baseline: Method that the others are compared with.
        methods: Rows of the answer.

    Returns:
        By method `difference` (mean over tasks of the mean over seeds), `low` and `high` (NaN where a task has a
        single pair), and `pairs`.
    """
    runs = frame.dropna(subset=[value]).sort_values("seed", kind="stable")
    base = runs[runs.method == baseline].set_index(["task", "seed"])[value].rename("base")
    pairs = runs.join(base, on=["task", "seed"], how="inner")
    pairs = pairs.assign(difference=pairs[value] - pairs.base)
    rows = {}
    for method, of_method in pairs.groupby("method", sort=False):
        samples = of_method.groupby("task", sort=False)["difference"].apply(np.asarray)
        has_interval = samples.map(len).min() > 1
        low, high = _interval(list(samples)) if has_interval else (np.nan, np.nan)
        rows[method] = (samples.map(np.mean).mean(), low, high, len(of_method))
    columns = ["difference", "low", "high", "pairs"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).reindex(list(methods))


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


def regrets(
    frame: pd.DataFrame,
    tasks: Sequence[str],
    growing: Sequence[str],
    fixed: Sequence[str],
    chosen: Mapping[str, str],
) -> pd.DataFrame:
    """Return how methods that find their ranks fare against fixed ranks, task by task and on average.

    The *best* fixed rank has the highest mean reported score, and is the smaller one of equals: nobody could have
    known it, so that a regret is rather too large than too small. The *chosen* one is that of `chosen_by_trying`.

    Args:
        frame: Runs with their `task`, `method`, `seed`, `score` and `trained_rank`.
        tasks: The tasks, in the order of the rows.
        growing: Methods that find their ranks.
        fixed: Methods with fixed ranks.
        chosen: The chosen one of each task, where there is one.

    Returns:
        A row for each task and growing method with a seed in common with the best, and one for the `AVERAGE` of each
        method's tasks, against the one fixed rank with the highest average. `difference` and `error` are mean and
        standard error over the seeds in common; `met` says whether the score is at most one standard error below, at
        no more trained parameters.
    """
    runs = frame.assign(trained_rank=pd.to_numeric(frame.trained_rank)).groupby(["task", "method"])
    cells = runs.agg(
        mean=("score", "mean"), std=("score", "std"), seeds=("score", "size"), trained=("trained_rank", "mean")
    )
    scores = frame.pivot_table(index=["task", "seed"], columns="method", values="score")
    rows = []
    for task in [task for task in tasks if task in cells.index]:
        of_task = cells.loc[task]
        best = _best(of_task[of_task.index.isin(fixed)])
        for method in growing:
            if best is not None and method in of_task.index:
                *over_best, pairs = _difference(scores.loc[task], method, str(best.name))
                over_chosen = _difference(scores.loc[task], method, chosen.get(task))[:2]
                row = _compared(of_task.loc[method], best, over_best, over_chosen)
                rows.append({"task": task, **row, "pairs": pairs, "chosen": chosen.get(task)})
    rows = [row for row in rows if row["pairs"]]
    found = pd.DataFrame(rows, columns=_REGRET)
    over_tasks = [row for method in growing if (row := _average_row(found, cells, scores, method, fixed))]
    return pd.DataFrame([*rows, *over_tasks], columns=_REGRET)


def _best(cells: pd.DataFrame) -> Any:
    """Return the cell with the best mean, of those with the most seeds, which alone compare; None if there is none."""
    compared = cells[cells.seeds == cells.seeds.max()]
    ordered = compared.sort_values(["mean", "trained"], ascending=[False, True])
    return None if ordered.empty else ordered.iloc[0]


def _difference(scores: pd.DataFrame, method: str, other: str | None) -> tuple[float, float, int]:
    """Return the mean difference of two columns of `scores`, its standard error and the seeds in common."""
    if method not in scores or other not in scores:
        return math.nan, math.nan, 0
    found = scores[method].sub(scores[other]).dropna()
    return float(found.mean()), float(found.sem()), len(found)


def _compared(own: Any, best: Any, over_best: Sequence[float], over_chosen: Sequence[float]) -> dict[str, Any]:
    difference, error = over_best
    return {
        **{"method": own.name, "mean": own["mean"], "std": own.get("std"), "seeds": int(own.seeds)},
        **{"best": best.name, "best_mean": best["mean"], "best_std": best.get("std"), "best_seeds": int(best.seeds)},
        **{"trained": own.trained, "difference": difference, "error": error},
        "met": bool(difference >= -error and own.trained <= best.trained),
        **dict(zip(("chosen_difference", "chosen_error"), over_chosen, strict=True)),
    }


def _average_row(
    found: pd.DataFrame, cells: pd.DataFrame, scores: pd.DataFrame, method: str, fixed: Sequence[str]
) -> dict[str, Any] | None:
    """Return the row of a method's tasks, taken as given; None with fewer than two of them."""
    own = found[found.method == method]
    of_tasks = cells[cells.index.get_level_values("task").isin(own.task)].reset_index("task")
    grouped = of_tasks.groupby("method")
    means = grouped.agg({"mean": "mean", "seeds": "min", "trained": "mean"})[grouped.size() == len(own)]
    best = _best(means[means.index.isin(fixed)])
    if len(own) < 2 or best is None:
        return None
    over_best = _mean_of_means([_difference(scores.loc[task], method, str(best.name))[:2] for task in own.task])
    over_chosen = _mean_of_means(list(zip(own.chosen_difference, own.chosen_error, strict=True)))
    return {"task": AVERAGE, **_compared(means.loc[method], best, over_best, over_chosen)}


def _mean_of_means(found: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the mean of independent means, and its standard error."""
    differences, errors = np.array(found).T
    return float(differences.mean()), float(np.sqrt((errors**2).sum()) / len(errors))


def chosen_by_trying(selecting: pd.DataFrame, methods: Sequence[str], by: str) -> dict[str, str]:
    """Return the method of each task that its runs on held-out training examples prefer.

    The best settings win by their mean score over seeds, or by their mean loss; the other decides between equals, then
    the order of `methods`. A task on which one of them was not tried has none.

    Args:
        selecting: Runs that chose settings, with their `task`, `method`, `score` and `result`.
        by: `"score"` or `"loss"`.
    """
    tried = selecting[selecting.method.isin(methods)]
    loss = -tried.result.map(lambda result: result.get("held_out_loss", np.inf)).astype(float)
    tried = tried.assign(loss=loss, settings=tried.name.map(first_of), place=tried.method.map([*methods].index))
    means = tried.groupby(["task", "place", "settings"])[["score", "loss"]].mean().reset_index()
    order = ["score", "loss"] if by == "score" else ["loss", "score"]
    ranked = means.sort_values([*order, "place"], ascending=[False, False, True], kind="stable")
    complete = means.groupby("task").place.nunique() == len(methods)
    return {
        str(task): methods[of_task.place.iloc[0]]
        for task, of_task in ranked.groupby("task", sort=False)
        if complete[task]
    }
