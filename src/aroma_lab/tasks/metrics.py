"""Metrics over whole evaluation sets, from scikit-learn and scipy, and the one of them that is a task's score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from aroma.errors import NonFiniteError, bad_value

from ..specs import TaskSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

METRICS = {
    "classification": ("accuracy", "f1", "macro_f1", "mcc"),
    "regression": ("pearson", "spearman"),
    "causal_lm": ("token_probability", "chrf"),
    "commonsense": ("accuracy",),
}
"""Metrics that can be the score of a task, by kind, the usual one first; 1 is perfect in all of them."""


def score(metric: str, by_split: Mapping[str, Mapping[str, float]]) -> float:
    """Return a task's score: its metric, averaged over splits of equal weight (MNLI: matched and mismatched)."""
    return sum(metrics[metric] for metrics in by_split.values()) / len(by_split)


def resolve_metric(
    spec: TaskSpec, kind: str, default: str | None = None, label_names: Sequence[str] | None = None
) -> str:
    """Return the metric that scores a task: its own, or `default` (of its data set), or that of its kind.

    Raises:
        ConfigError: The metric does not exist, or not for this kind or number of classes.
    """
    metric = spec.metric or default or METRICS[kind][0]
    if metric not in METRICS[kind]:
        raise bad_value("data.metric", metric, f"no metric of a {kind}; give one of {', '.join(METRICS[kind])}")
    if metric == "f1" and label_names is not None and len(label_names) != 2:
        raise bad_value("data.metric", metric, f"it is for two classes of {len(label_names)}; give macro_f1")
    return metric


def metrics_of(task: str, logits: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    """Return the metrics of a task over a whole set.

    Of a classification: accuracy, F1 averaged over the classes that are predicted or occur, each with the same weight
    (`macro_f1`), Matthews' correlation coefficient (`mcc`) and, with two classes, F1 of class 1 (`f1`). Of a
    regression: Pearson's and Spearman's correlation, which count as 0 with a constant, and the mean squared error.

    Args:
        task: `"classification"` or `"regression"`.
        logits: Shape (examples, classes), or (examples, 1) for a regression.
        labels: Class indices or numbers, shape (examples,).

    Raises:
        NonFiniteError: A logit is NaN or infinite: its argmax would look like a prediction.
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if damaged := int((~np.isfinite(logits)).reshape(len(logits), -1).any(axis=1).sum()):
        where = f"{damaged} of {len(logits)} examples"
        raise NonFiniteError(f"logits: NaN or infinite in {where}; lower the learning rate, or check the model")
    if task == "regression":
        numbers, labels = logits.reshape(-1).astype("float64"), labels.astype("float64")
        constant = len(labels) < 2 or np.ptp(numbers) == 0 or np.ptp(labels) == 0
        metrics = {
            "pearson": 0.0 if constant else pearsonr(numbers, labels).statistic,
            "spearman": 0.0 if constant else spearmanr(numbers, labels).statistic,
            "mse": ((numbers - labels) ** 2).mean(),
        }
    else:
        predicted = logits.argmax(axis=-1)
        metrics = {
            "accuracy": accuracy_score(labels, predicted),
            "macro_f1": f1_score(labels, predicted, average="macro", zero_division=0.0),
            "mcc": matthews_corrcoef(labels, predicted),
        }
        if logits.shape[-1] == 2:
            metrics["f1"] = f1_score(labels, predicted, average="binary", pos_label=1, zero_division=0.0)
    return {name: float(value) for name, value in metrics.items()}


def loss_of(task: str, logits: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the mean loss of an example: cross entropy in nats, or the squared error of a regression.

    It is the task's loss alone: a model's own loss may include a method's terms, as AdaLoRA's orthogonality. Arguments
    are those of `metrics_of`.
    """
    from scipy.special import log_softmax

    if task == "regression":
        return float(((logits.reshape(-1).astype("float64") - labels) ** 2).mean())
    log_probabilities = log_softmax(logits.astype("float64"), axis=-1)
    return float(-log_probabilities[range(len(labels)), labels].mean())
