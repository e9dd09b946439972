"""Metrics against values worked out by hand, and over whole evaluation sets."""

import numpy as np
import pytest

from aroma.errors import DataError, NonFiniteError
from aroma_lab.tasks.classification import encode, load_tokenizer, predict_logits
from aroma_lab.tasks.metrics import loss_of, metrics_of, score
from aroma_lab.tasks.model import load_classifier
from tiny_classifier import examples, save_tiny_bert


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
    for measure in (metrics_of, loss_of):
        with pytest.raises(DataError, match=r"examples=0: .*give at least one"):
            measure("regression", np.zeros((0, 1)), np.array([]))


def test_a_score_is_the_mean_over_splits_of_equal_weight():
    # 7 matched examples, 4 right; 3 mismatched, 3 right: sets count alike, whatever their sizes
    by_split = {
        "matched": classified([0, 1, 2, 0, 0, 0, 1], [0, 1, 2, 0, 1, 2, 0]),
        "mismatched": classified([0], [0]),
    }
    assert score("accuracy", by_split) == pytest.approx((4 / 7 + 1) / 2)


@pytest.mark.parametrize("batch_size", [3, 64])
def test_every_example_is_predicted_exactly_once_in_its_place_whatever_the_batch(tmp_path, batch_size):
    base = str(save_tiny_bert(tmp_path / "model"))
    tokenizer = load_tokenizer(base, 8)
    texts = [f"w{number}" if number % 2 else f"w{number} w1 w2" for number in range(10)]
    data = encode(examples(texts, [0, 1] * 5), tokenizer, 8)
    model = load_classifier(base, ("a", "b"), 0)
    seen, sizes = [], []
    model.register_forward_pre_hook(
        lambda _, args, inputs: seen.extend(inputs["input_ids"][:, 1].tolist()), with_kwargs=True
    )
    logits = predict_logits(model, data, tokenizer, batch_size, sizes.append)
    assert seen == [ids[1] for ids in data["input_ids"]]
    assert len(set(seen)) == 10
    assert sum(sizes) == 10
    alone = predict_logits(model, data, tokenizer, 1, lambda _: None)
    np.testing.assert_allclose(logits, alone, atol=1e-5)
    labels = np.array([0, 1] * 5)
    hits = [int(row.argmax() == label) for row, label in zip(alone, labels, strict=True)]
    assert metrics_of("classification", logits, labels)["accuracy"] == pytest.approx(sum(hits) / 10)
