"""Which tasks were learnt at all. Of the others a table says nothing about methods: there is nothing to compare."""

from __future__ import annotations

import pandas as pd

from .formats import points, signed_points
from .statistics import CHANCE, margins

_FLOOR = "head_only"
"""Kind of the method that learns nothing but a head."""
_NOT_ABOVE = (_FLOOR, "pretrained")
"""Kinds that cannot show that a task was learnt."""


def not_learnt(frame: pd.DataFrame) -> dict[str, str]:
    """Return the tasks that no method has learnt, each with the sentence that says so.

    A task is learnt if any method scores clearly above head-only; `statistics.margins` defines it. Nothing can be told
    of a task without finished runs of head-only and of another method that share two seeds: it counts as learnt.

    Args:
        frame: Reported runs.
    """
    found = {}
    for task, of_task in frame.groupby("task", sort=False):
        means = of_task[of_task.kind == _FLOOR].groupby("method").score.mean()
        others = list(of_task.method[~of_task.kind.isin(_NOT_ABOVE)].unique())
        if means.empty or not others:
            continue
        floor = str(means.idxmax())
        above = margins(of_task, "score", floor, others, _step(of_task)).dropna(subset="needed")
        if len(above) and not (above.difference > above.needed).any():
            best = above.loc[[(above.difference / above.needed).idxmax()]].iloc[0]
            found[str(task)] = (
                f"{task}: NOT LEARNT: no method is clearly above {floor}, so nothing is said about methods there. "
                f"Nearest is {best.name}, {signed_points(best.difference)} points in {best.pairs:.0f} seeds, where "
                f"{points(best.needed)} would be clear (Student's t of the paired differences, {CHANCE:.0%} over all "
                "methods)."
            )
    return found


def _step(frame: pd.DataFrame) -> float:
    """Return the smallest difference of two scores: one example of those that are reported."""
    counts = frame.result.iloc[0]["examples"]
    reported = sum(count for split, count in counts.items() if split not in ("train", "held_out", "validation"))
    return 1.0 / int(reported or counts.get("validation") or counts["held_out"])
