"""Metrics over whole evaluation sets, from scikit-learn and scipy, and the one of them that is a task's score."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aroma.errors import DataError, NonFiniteError, bad_value

from .spec import TaskSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

METRICS = {
    "classification": ("accuracy", "f1", "macro_f1", "mcc"),
    "regression": ("pearson", "spearman"),
    "commonsense": ("accuracy", "accuracy_normalised", "generated"),
}
"""Metrics that can be the score of a task, by kind; 1 is perfect in all of them."""

CHOICE_METRIC = {"classification": "accuracy", "regression": "pearson"}
"""Metric that a checkpoint is chosen by, by kind, unless another is given."""


# The score -----------------------------------------------------------------------------------------------------------


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
        default: Metric of the task's data set, or None.
        label_names: Names of the classes; None for a regression.

    Raises:
        ConfigError: The metric does not exist, or not for this kind or number of classes.
    """
    metric = spec.metric or default or CHOICE_METRIC[kind]
    if metric not in METRICS[kind]:
        nearest = difflib.get_close_matches(metric, METRICS[kind], n=1, cutoff=0.0)[0]
        known = ", ".join(METRICS[kind])
        raise spec.bad("metric", metric, f"no metric of a {kind}; the nearest is {nearest!r} (known: {known})")
    if metric == "f1" and label_names is not None and len(label_names) != 2:
        raise spec.bad("metric", metric, f"it is for two classes, and the task has {len(label_names)}; give macro_f1")
    return metric


# Metrics of a set ----------------------------------------------------------------------------------------------------


def metrics_of(task: str, logits: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    """Return the metrics of a task; with two classes also `f1`, that of class 1.

    Args:
        task: `"classification"` or `"regression"`.
        logits: Shape (examples, classes), or (examples, 1) for a regression.
        labels: Shape (examples,).

    Raises:
        DataError: No examples.
        NonFiniteError: A logit is NaN or infinite: its argmax would look like a prediction.
    """
    _require_finite(logits)
    if task == "regression":
        return regression_metrics(logits.reshape(-1), labels)
    predicted = logits.argmax(axis=-1)
    metrics = classification_metrics(predicted, labels)
    return {**metrics, "f1": binary_f1(predicted, labels)} if logits.shape[-1] == 2 else metrics


def classification_metrics(predicted: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    """Return accuracy, macro-averaged F1 and Matthews' correlation coefficient.

    F1 is averaged over the classes that occur in `predicted` or `labels`, each with the same weight.

    Args:
        predicted: Class indices, shape (examples,).
        labels: True class indices, shape (examples,).

    Raises:
        DataError: No examples.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    _require_examples(labels)
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0.0)),
        "mcc": float(matthews_corrcoef(labels, predicted)),
    }


def binary_f1(predicted: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return F1 of class 1, the harmonic mean of its precision and recall; 0 if it neither occurs nor is predicted.

    Args:
        predicted: Class indices, 0 or 1, shape (examples,).
        labels: True class indices, shape (examples,).
    """
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, average="binary", pos_label=1, zero_division=0.0))


def regression_metrics(predicted: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation and the mean squared error.

    A correlation with a constant is undefined, and counts as 0.

    Args:
        predicted: Numbers, shape (examples,).
        labels: True numbers, shape (examples,).

    Raises:
        DataError: No examples.
    """
    from scipy.stats import pearsonr, spearmanr

    _require_examples(labels)
    predicted, labels = predicted.astype("float64"), labels.astype("float64")
    constant = len(labels) < 2 or predicted.min() == predicted.max() or labels.min() == labels.max()
    return {
        "pearson": 0.0 if constant else float(pearsonr(predicted, labels).statistic),
        "spearman": 0.0 if constant else float(spearmanr(predicted, labels).statistic),
        "mse": float(((predicted - labels) ** 2).mean()),
    }


def loss_of(task: str, logits: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the mean loss of an example: cross entropy in nats, or the squared error of a regression.

    It is the task's loss alone: a model's own loss may include a method's terms, as AdaLoRA's orthogonality.

    Args:
        task: `"classification"` or `"regression"`.
        logits: Shape (examples, classes), or (examples, 1) for a regression.
        labels: Shape (examples,).
    """
    from scipy.special import log_softmax

    _require_examples(labels)
    if task == "regression":
        return float(((logits.reshape(-1).astype("float64") - labels) ** 2).mean())
    log_probabilities = log_softmax(logits.astype("float64"), axis=-1)
    return float(-log_probabilities[range(len(labels)), labels].mean())


def trainer_metrics(task: str) -> Callable[[Any], dict[str, float]]:
    """Return `compute_metrics` for a Trainer, which calls it once an evaluation, with all examples."""
    return lambda prediction: metrics_of(task, prediction.predictions, prediction.label_ids)


def _require_examples(labels: NDArray[Any]) -> None:
    if len(labels) == 0:
        raise DataError("examples=0: a metric of no examples does not exist; give at least one")


def _require_finite(logits: NDArray[Any]) -> None:
    import numpy

    damaged = int((~numpy.isfinite(logits)).reshape(len(logits), -1).any(axis=1).sum())
    if damaged:
        raise NonFiniteError(
            f"logits: NaN or infinite in {damaged} of {len(logits)} examples; lower the learning rate, or check the "
            "model"
        )
