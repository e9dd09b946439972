"""Metrics over whole evaluation sets, from scikit-learn and scipy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aroma.errors import DataError, NonFiniteError

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHOICE_METRIC = {"classification": "accuracy", "regression": "pearson"}
"""The metric a checkpoint is chosen by, where one is chosen."""


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
    """Return F1 of class 1, the harmonic mean of its precision and recall; 0 where it is neither there nor predicted.

    Args:
        predicted: Class indices, 0 or 1, shape (examples,).
        labels: True class indices, shape (examples,).
    """
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, average="binary", pos_label=1, zero_division=0.0))


def regression_metrics(predicted: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation and the mean squared error.

    A correlation with a constant is not defined; it counts as 0.

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


def metrics_of(task: str, logits: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    """Return the metrics of a task; where there are two classes also `f1`, the one of class 1.

    Args:
        task: `"classification"` or `"regression"`.
        logits: Shape (examples, classes), or (examples, 1) for a regression.
        labels: Shape (examples,).

    Raises:
        DataError: No examples.
        NonFiniteError: A logit is NaN or infinite: a prediction made of it would look like one.
    """
    _require_finite(logits)
    if task == "regression":
        return regression_metrics(logits.reshape(-1), labels)
    predicted = logits.argmax(axis=-1)
    metrics = classification_metrics(predicted, labels)
    return {**metrics, "f1": binary_f1(predicted, labels)} if logits.shape[-1] == 2 else metrics


def loss_of(task: str, logits: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the mean loss of an example: cross entropy in nats, or the squared error of a regression.

    Of the task alone: what a model reports in evaluation may hold a method's own terms, as AdaLoRA's orthogonality.

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
    """Return `compute_metrics` for a Trainer; it is called once an evaluation, with all examples."""

    def compute(prediction: Any) -> dict[str, float]:
        return metrics_of(task, prediction.predictions, prediction.label_ids)

    return compute


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
