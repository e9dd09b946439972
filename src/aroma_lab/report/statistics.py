"""Means, deviations, paired differences with their standard errors, and which tasks were learnt at all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t

from ..study.selection import first_of

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
    return *mean_of_means(by_task["mean"], by_task["sem"]), int(by_task["count"].sum())


def mean_of_means(means: pd.Series[float], errors: pd.Series[float]) -> tuple[float, float]:
    """Return the mean of independent means, and its standard error; NaN if there are none, or one is unknown."""
    error = np.sqrt((errors**2).sum(skipna=False)) / len(errors) if len(errors) else math.nan
    return float(means.mean(skipna=False)), float(error)


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
                *over_best, pairs = paired_difference(scores.loc[[task]], method, str(best.name))
                *over_chosen, _ = paired_difference(scores.loc[[task]], method, chosen.get(task))
                row = _compared(of_task.loc[method], best, over_best, over_chosen)
                rows.append({"task": task, **row, "pairs": pairs, "chosen": chosen.get(task)})
    rows = [row for row in rows if row["pairs"]]
    found = pd.DataFrame(rows, columns=_REGRET)
    over_tasks = (_average_row(found, cells, scores, method, fixed) for method in growing)
    return pd.DataFrame([*rows, *filter(None, over_tasks)], columns=_REGRET)


def _best(cells: pd.DataFrame) -> Any:
    """Return the cell with the best mean, of those with the most seeds, which alone compare; None if there is none."""
    compared = cells[cells.seeds == cells.seeds.max()]
    ordered = compared.sort_values(["mean", "trained"], ascending=[False, True])
    return None if ordered.empty else ordered.iloc[0]


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
    *over_best, _ = paired_difference(scores.loc[list(own.task)], method, str(best.name))
    over_chosen = mean_of_means(own.chosen_difference, own.chosen_error)
    return {"task": AVERAGE, **_compared(means.loc[method], best, over_best, over_chosen)}


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
