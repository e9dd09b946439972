"""Metrics against values worked out by hand, and over whole evaluation sets."""

import numpy as np
import pytest

from aroma.errors import DataError, NonFiniteError
from aroma_lab.specs import ModelSpec
from aroma_lab.tasks.classification import ClassifierJob, encode, load_tokenizer, predict_logits
from aroma_lab.tasks.metrics import loss_of, metrics_of, score
from aroma_lab.tasks.model import load_classifier
from aroma_lab.tasks.task import Task
from tiny_classifier import examples, save_tiny_bert


def classified(predicted, labels, classes=3):
    return metrics_of("classification", np.eye(classes)[predicted], np.array(labels))


def regressed(predicted, labels):
    return metrics_of("regression", np.array(predicted)[:, None], np.array(labels))


def test_accuracy_macro_f1_and_mcc_by_hand():
    # class 0: 2 hits, 1 miss, no false alarm: F1 = 4/5. class 1: 1 hit, 1 false alarm: 2/3. class 2: 1.
    metrics = classified([0, 1, 1, 0, 2], [0, 1, 0, 0, 2])
    assert metrics["accuracy"] == pytest.approx(4 / 5)
    assert metrics["macro_f1"] == pytest.approx((4 / 5 + 2 / 3 + 1) / 3)
    # 2 true positives, 1 false negative, 1 true negative, 1 false positive: (2·1 − 1·1) / √(3·3·2·2)
    binary = classified([1, 1, 0, 0, 1], [1, 1, 1, 0, 0], classes=2)
    assert binary["mcc"] == pytest.approx(1 / 6)
    # Gorodkin: (c·s − Σ t_k p_k) / √((s² − Σ p_k²)(s² − Σ t_k²)), c = 3 hits of s = 5, t = (2, 2, 1), p = (2, 1, 2)
    three = classified([0, 0, 1, 2, 2], [0, 1, 1, 0, 2])
    assert three["mcc"] == pytest.approx((3 * 5 - 8) / ((25 - 9) * (25 - 9)) ** 0.5)
    # a rare class counts as much as a common one
    metrics = classified([0] * 10, [0] * 9 + [1])
    assert metrics == {"accuracy": pytest.approx(0.9), "macro_f1": pytest.approx((18 / 19 + 0) / 2), "mcc": 0.0}


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


def test_correlations_and_error_by_hand():
    # deviations (−1, 0, 1) and (−4/3, −1/3, 5/3): 3 / √(2 · 42/9)
    metrics = regressed([1.0, 2.0, 3.0], [1.0, 2.0, 4.0])
    expected = {"pearson": 3 / (2 * 42 / 9) ** 0.5, "spearman": 1.0, "mse": 1 / 3}
    assert metrics == {name: pytest.approx(value) for name, value in expected.items()}
    ranked = regressed([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 100.0])
    assert ranked["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))
    for constant in (([2.0, 2.0], [1.0, 3.0]), ([1.0, 3.0], [2.0, 2.0]), ([1.0], [1.0])):
        assert regressed(*constant)["pearson"] == regressed(*constant)["spearman"] == 0.0


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


def test_a_trainer_computes_once_over_all_examples_the_last_short_batch_included(tmp_path):
    from transformers import Trainer, TrainingArguments

    base = str(save_tiny_bert(tmp_path / "model"))
    tokenizer = load_tokenizer(base, 8)
    data = encode(examples(["w1 w2"] * 7 + ["w9"] * 3, [0, 1] * 5), tokenizer, 8)
    task = Task("classification", ("a", "b"), "text", None, "label", 8)
    calls, objective = [], ClassifierJob(ModelSpec(base), task, {}, tokenizer).objective

    def counted(prediction):
        calls.append(len(prediction.label_ids))
        return objective.metrics(prediction)

    trainer = Trainer(
        model=load_classifier(base, ("a", "b"), 0),
        args=TrainingArguments(str(tmp_path / "out"), per_device_eval_batch_size=4, report_to="none"),
        data_collator=objective.collator,
        compute_metrics=counted,
    )
    logits = trainer.predict(data).predictions
    assert calls == [10]
    expected = (logits.argmax(axis=-1) == np.array([0, 1] * 5)).mean()
    assert trainer.evaluate(data)["eval_accuracy"] == pytest.approx(expected)


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
