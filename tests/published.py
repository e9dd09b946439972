"""The committed results and the pages that show them, for the tests that hold one to the other."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aroma_lab.report.formats import signed_points
from aroma_lab.report.runs import Runs, read_runs

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "lab"
RANKS = [f"lora-r{rank}" for rank in (1, 2, 4, 8, 16)]
GROWN = ("planted-nets", "planted-minilm", "minilm-six")


def page_of(name: str) -> str:
    """Return a page of the documentation as one line, with single spaces."""
    return " ".join((ROOT / "docs" / name).read_text(encoding="utf-8").split())


@cache
def runs_of(folder: Path) -> Runs:
    return read_runs(folder)


def runs_of_images(name: str) -> pd.DataFrame:
    """Return the runs of twenty splits of `digits` or `mnist` that chose nothing, by method and seed."""
    runs = json.loads((ROOT / "results" / "vision" / f"{name}.json").read_text(encoding="utf-8"))["runs"]
    return pd.DataFrame(runs).set_index(["method", "seed"])


SHIPPED = "shipped"


@cache
def of_evidence(name: str) -> pd.DataFrame:
    """Return task, seed, score, trained_rank and ranks of the runs by the rule as it was shipped, or as was tried.

    As shipped it asked sixteen questions; on real text it is at the rates of what was tried beside it.
    """
    if name == SHIPPED:
        then = of_evidence("sixteen-questions")
        return pd.concat([then[then.task != "bbc-news"], of_evidence("rates-before")])
    rows: list[dict[str, Any]] = []
    for runs in json.loads((RESULTS / "tried" / f"{name}.json").read_text(encoding="utf-8"))["runs"]:
        # Most files have one row for all seeds of a task, and lists of what differs between them.
        own = {column: values for column, values in runs.items() if isinstance(values, list)}
        each = zip(*own.values(), strict=True) if isinstance(runs.get("seed"), list) else []
        rows += [runs | dict(zip(own, values, strict=True)) for values in each] or [runs]
    return pd.DataFrame(rows)


def with_sixteen_questions() -> pd.DataFrame:
    """Return score, trained_rank and ranks by task and seed of the rule then, at the rates of `without_floor`."""
    columns = ["score", "trained_rank", "ranks"]
    then = of_evidence("sixteen-questions").set_index(["task", "seed"])[columns]
    return pd.concat([then, without_floor().loc[["trec", "banking77", "sst2"], columns]])


def without_floor() -> pd.DataFrame:
    """Return score, trained_rank, ranks and spearman by task and seed of the rule before the floor."""
    return of_evidence("no-floor").set_index(["task", "seed"])


def with_short_memory() -> pd.DataFrame:
    """Return what `without_floor` does, of the rule before directions remembered longer."""
    return of_evidence("short-memory").set_index(["task", "seed"]).sort_index()


def with_short_rows() -> pd.DataFrame:
    """Return score, trained_rank, spearman and grew by task and seed of the rule before rows became longer."""
    return each_seed_of("longer-rows").loc["before"]


def not_again() -> pd.DataFrame:
    """Return what `with_short_rows` does, of the rule before it asked about what it drops."""
    return each_seed_of("not-again").loc["before"]


def not_early() -> pd.DataFrame:
    """Return what `not_again` does, of nets before there was an early squeeze, and score and parameters of images."""
    return each_seed_of("not-early").loc["before"]


def not_doubted() -> pd.DataFrame:
    """Return score, trained_rank and average_rank of text before what is undecided stayed where nothing is known."""
    return each_seed_of("nothing-is-known").loc["before"]


def at_half_the_length() -> pd.DataFrame:
    """Return score and trained_rank by method, task and seed of text at rates that runs of half the length chose."""
    return each_seed_of("half-the-length")


def by_one_run() -> pd.DataFrame:
    """Return what `at_half_the_length` does, at rates that one run each chose, where three runs choose others."""
    return each_seed_of("one-run")


def not_so_small() -> pd.DataFrame:
    """Return what `not_early` does, of the rule before small ones went early; of twenty splits of images."""
    return each_seed_of("not-so-small").loc["before"]


def not_undecided() -> pd.DataFrame:
    """Return what `not_early` does, of the rule before what is undecided stayed when the trial ends."""
    return each_seed_of("not-undecided").loc["before"]


def not_squeezed() -> pd.DataFrame:
    """Return what `not_again` does, and the largest rank, of the tables before the last squeeze; memory has none."""
    return each_seed_of("not-squeezed").loc["before"]


def with_eight_slots() -> pd.DataFrame:
    """Return score, trained_rank and average_rank by task and seed of the tables before there were sixteen slots."""
    return each_seed_of("eight-slots").loc["before"]


def each_seed_of(name: str) -> pd.DataFrame:
    """Return what was tried by variant, task and seed."""
    return of_evidence(name).set_index(["of", "task", "seed"]).sort_index()


def gained(task: str, before: str, after: str = SHIPPED) -> str:
    """Return the paired difference between two rules, ± its standard error, in points."""
    old, new = (of_evidence(name).set_index(["task", "seed"]).score[task] for name in (before, after))
    return in_points(new - old)


def over_tasks(difference: pd.Series) -> tuple[float, float]:
    """Return the mean over tasks of a difference by task and seed, and its standard error."""
    by_task = difference.groupby("task")
    return float(by_task.mean().mean()), float((by_task.sem() ** 2).sum() ** 0.5 / by_task.ngroups)


def in_points(difference: pd.Series) -> str:
    """Return the mean of differences of scores, ± its standard error, in points; what rounds to zero has no sign."""
    found = difference.dropna().astype(float)
    return f"{signed_points(found.mean())} ± {100 * found.sem():.2f}"


def grown(name: str) -> int:
    """Return how many of the matrices for which nothing is planted have a component at the end."""
    found = of_evidence(name)
    return sum(rank > 0 for of_run in found[found.task == "nothing"].ranks for rank in of_run)


def scores_of(name: str) -> pd.Series:
    """Return the mean score of every task, in points."""
    scores: pd.Series = 100 * of_evidence(name).groupby("task").score.mean()
    return scores


def lora_error(scores: pd.Series, size: float) -> float:
    """Return what LoRA leaves unexplained at a rank between two of the grid: on the line that joins them in log-log.

    Args:
        scores: Mean score by method, with some of the ranks.
        size: Components of a matrix.
    """
    ranks = [method for method in RANKS if method in scores]
    errors = [math.log(1 - scores[method]) for method in ranks]
    return math.exp(np.interp(math.log(size), [math.log(int(method[6:])) for method in ranks], errors))
