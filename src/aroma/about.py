"""What an adapter's tensors do not say of a classifier: number, names and meaning of its outputs.

It is saved in `aroma_state.json`, whose checksum vouches for it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

LABELLED_TASKS = ("SEQ_CLS", "TOKEN_CLS")
"""PEFT's task types whose models have a head with an output for each label."""


@dataclass(frozen=True)
class About:
    """The outputs of a model.

    Args:
        labels: Names of a classifier's outputs by index; None where it has none, or none but LABEL_0, LABEL_1, ….
        num_labels: Number of outputs of a classifier or regression; None for another model.
        problem_type: What the outputs mean, as transformers says it: "regression", "single_label_classification" or
            "multi_label_classification"; None if unknown.
    """

    labels: tuple[str, ...] | None = None
    num_labels: int | None = None
    problem_type: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {**asdict(self), "labels": None if self.labels is None else [*self.labels]}

    @classmethod
    def from_json(cls, value: Any) -> About:
        """Undo `as_json`; for a value that `is_about`."""
        labels = value["labels"]
        return cls(None if labels is None else tuple(labels), value["num_labels"], value["problem_type"])


def is_about(value: Any) -> bool:
    """Whether a JSON value has what `About.as_json` returns."""
    if not isinstance(value, dict) or not {"labels", "num_labels", "problem_type"} <= value.keys():
        return False
    labels, count = value["labels"], value["num_labels"]
    is_count = isinstance(count, int) and not isinstance(count, bool) and 0 < count < 2**24
    are_texts = isinstance(labels, list) and all(isinstance(text, str) for text in labels)
    return (
        (labels is None or (are_texts and len(labels) == count))
        and (count is None or is_count)
        and isinstance(value["problem_type"], str | None)
    )


def about_model(model: Any, task_type: str | None) -> About:
    """Return what a model of transformers, wrapped by PEFT or not, says of its outputs.

    Where PEFT's task type is None, the name of the model's class tells a classifier.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if task_type not in LABELLED_TASKS and (task_type is not None or "Classification" not in type(base).__name__):
        return About()
    config = getattr(base, "config", None)
    meaning = getattr(config, "problem_type", None)
    names = {int(index): str(name) for index, name in (getattr(config, "id2label", None) or {}).items()}
    if not names or {*names} != {*range(len(names))}:
        return About(problem_type=meaning)
    labels = tuple(names[index] for index in range(len(names)))
    return About(None if labels == unnamed(len(labels)) else labels, len(labels), meaning)


def unnamed(count: int) -> tuple[str, ...]:
    """Return the names that transformers gives outputs that have none."""
    return tuple(f"LABEL_{index}" for index in range(count))
