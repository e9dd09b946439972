"""Metrics against values worked out by hand, and over whole evaluation sets."""

import numpy as np
import pytest

from aroma.errors import NonFiniteError
from aroma_lab.tasks.metrics import loss_of, metrics_of, score


def classified(predicted, labels, classes=3):
    return metrics_of("classification", np.eye(classes)[predicted], np.array(labels))


def regressed(predicted, labels):
    return metrics_of("regression", np.array(predicted)[:, None], np.array(labels))


def test_f1_is_that_of_the_second_of_two_classes():
    # class 1: 2 hits, 1 false alarm, 2 misses: precision 2/3, recall 1/2
    predicted, labels = np.array([1, 1, 1, 0, 0, 0]), np.array([1, 1, 0, 1, 1, 0])
    two = classified(predicted, labels, classes=2)
    assert set(two) == {"accuracy", "macro_f1", "mcc", "f1"}
    assert two["f1"] == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    # the other class: 1 hit, 2 + 1 errors
    assert classified(1 - predicted, 1 - labels, classes=2)["f1"] == pytest.approx(2 / (2 + 3))
    assert classified([0, 0], [0, 0], classes=2)["f1"] == 0.0
    assert "f1" not in classified(predicted, labels)


@pytest.mark.parametrize("damage", [np.nan, np.inf])
def test_a_diverged_model_is_not_scored(damage):
    logits = np.array([[0.0, 1.0], [damage, 1.0], [1.0, 0.0]])
    with pytest.raises(NonFiniteError, match=r"logits: NaN or infinite in 1 of 3 examples"):
        metrics_of("classification", logits, np.array([1, 1, 0]))
    with pytest.raises(NonFiniteError, match=r"in 1 of 3"):
        metrics_of("regression", logits[:, :1], np.array([1.0, 1.0, 0.0]))


def test_losses_are_those_of_the_task_alone():
    # Odds of 3 to 1, rightly and wrongly used: the mean of ln(4/3) and ln 4.
    logits = np.array([[np.log(3), 0.0], [np.log(3), 0.0]])
    assert loss_of("classification", logits, np.array([0, 1])) == pytest.approx((np.log(4 / 3) + np.log(4)) / 2)
    assert loss_of("regression", np.array([[1.0], [4.0]]), np.array([2.0, 1.0])) == pytest.approx(5.0)


def test_a_score_is_the_mean_over_splits_of_equal_weight():
    # 7 matched examples, 4 right; 3 mismatched, 3 right: sets count alike, whatever their sizes
    by_split = {
        "matched": classified([0, 1, 2, 0, 0, 0, 1], [0, 1, 2, 0, 1, 2, 0]),
        "mismatched": classified([0], [0]),
    }
    assert score("accuracy", by_split) == pytest.approx((4 / 7 + 1) / 2)
