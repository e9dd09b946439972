"""One number out of a task's metrics."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from aroma.errors import bad_value

from .metrics import CHOICE_METRIC
from .metrics import metrics_of as task_metrics
from .spec import TaskSpec

__all__ = ["METRICS", "resolve_metric", "score", "task_metrics"]

METRICS = {
    "classification": ("accuracy", "f1", "macro_f1", "mcc"),
    "regression": ("pearson", "spearman"),
    "commonsense": ("accuracy", "accuracy_normalised", "generated"),
}
"""What can be the score of a task of a kind; 1 is perfect in all of them."""


def score(metric: str, by_split: Mapping[str, Mapping[str, float]]) -> float:
    """Return a task's score: its metric, averaged over splits of equal weight (MNLI: matched and mismatched).

    Args:
        metric: Name of the metric.
        by_split: Metrics by split and name, each over the whole split.

    Raises:
        ConfigError: No split, or one without the metric.
    """
    if not by_split:
        raise bad_value("metric", metric, "there is no split to score; evaluate one first")
    for split, metrics in by_split.items():
        if metric not in metrics:
            raise bad_value("metric", metric, f"{split} has only {', '.join(metrics)}")
    return sum(metrics[metric] for metrics in by_split.values()) / len(by_split)


def resolve_metric(spec: TaskSpec, kind: str, default: str | None, label_names: Sequence[str] | None) -> str:
    """Return the metric that scores a task.

    Args:
        spec: The task.
        kind: `"classification"` or `"regression"`.
        default: What the task's source says, or None.
        label_names: Names of the classes; None for a regression.

    Raises:
        ConfigError: A metric that does not exist, or not for this kind or number of classes.
    """
    metric = spec.metric or default or CHOICE_METRIC[kind]
    if metric not in METRICS[kind]:
        nearest = difflib.get_close_matches(metric, METRICS[kind], n=1, cutoff=0.0)[0]
        known = ", ".join(METRICS[kind])
        raise spec.bad("metric", metric, f"no metric of a {kind}; the nearest is {nearest!r} (known: {known})")
    if metric == "f1" and label_names is not None and len(label_names) != 2:
        raise spec.bad("metric", metric, f"it is for two classes, and the task has {len(label_names)}; give macro_f1")
    return metric
