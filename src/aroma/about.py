"""What people want to know of an adapter and its tensors do not say: label names, data, settings, metrics.

It is saved in `aroma_state.json`, whose checksum vouches for it, and told in the model card.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

LABELLED_TASKS = ("SEQ_CLS", "TOKEN_CLS")
"""PEFT's task types whose models have a head with an output for each label."""

Fact = str | int | float | bool


@dataclass(frozen=True)
class Score:
    """Metrics of one set of examples.

    Args:
        set: Name of the set.
        examples: Number of its examples; None if unknown.
        values: Metrics by name.
        step: Optimizer step of the evaluation; None if unknown.
    """

    set: str
    examples: int | None
    values: Mapping[str, float]
    step: int | None = None


@dataclass(frozen=True)
class About:
    """What people want to know of an adapter.

    Args:
        labels: Names of a classifier's outputs by index; None where it has none, or none but LABEL_0, LABEL_1, ….
        num_labels: Number of outputs of a classifier or regression; None for another model.
        problem_type: What the outputs mean, as transformers says it: "regression", "single_label_classification" or
            "multi_label_classification"; None if unknown.
        architecture: `model_type` of the base model.
        base_licence: Licence that the base model's card names, where that was on this disk.
        tags: Tags of the model, such as "sft".
        data: What it was trained on, in words and numbers.
        settings: How it was trained, by name.
        scores: Metrics, one entry for each set of examples.
    """

    labels: tuple[str, ...] | None = None
    num_labels: int | None = None
    problem_type: str | None = None
    architecture: str | None = None
    base_licence: str | None = None
    tags: tuple[str, ...] = ()
    data: Mapping[str, Fact] = field(default_factory=dict)
    settings: Mapping[str, Fact] = field(default_factory=dict)
    scores: tuple[Score, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON has it. Numbers that are not finite are left out: JSON has none."""
        return {
            "labels": None if self.labels is None else [*self.labels],
            "num_labels": self.num_labels,
            "problem_type": self.problem_type,
            "architecture": self.architecture,
            "base_licence": self.base_licence,
            "tags": [*self.tags],
            "data": _facts(self.data),
            "settings": _facts(self.settings),
            "scores": [
                {"set": one.set, "examples": one.examples, "values": _facts(one.values), "step": one.step}
                for one in self.scores
            ],
        }

    @classmethod
    def from_json(cls, value: Any) -> About:
        """Undo `as_json`; for a value that `is_about`."""
        scores = tuple(Score(**one) for one in value["scores"])
        labels = None if value["labels"] is None else tuple(value["labels"])
        return cls(**{**value, "labels": labels, "tags": tuple(value["tags"]), "scores": scores})


def is_about(value: Any) -> bool:
    """Whether a JSON value is what `About.as_json` returns."""
    if not isinstance(value, dict) or value.keys() != About().as_json().keys():
        return False
    labels, scores = value["labels"], value["scores"]
    return (
        (labels is None or (_are_texts(labels) and len(labels) == value["num_labels"]))
        and (value["num_labels"] is None or _is_count(value["num_labels"]))
        and all(isinstance(value[name], str | None) for name in ("architecture", "problem_type", "base_licence"))
        and _are_texts(value["tags"])
        and _are_facts(value["data"])
        and _are_facts(value["settings"])
        and isinstance(scores, list)
        and all(map(_is_score, scores))
    )


def _is_score(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"set", "examples", "values", "step"}
        and isinstance(value["set"], str)
        and all(isinstance(value[name], int | None) for name in ("examples", "step"))
        and _are_facts(value["values"])
        and all(isinstance(number, int | float) for number in value["values"].values())
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**24


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _are_facts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(fact, str | int | float) for fact in value.values())


def _facts(values: Mapping[str, Any]) -> dict[str, Fact]:
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    }


def about_model(about: About, model: Any, task_type: str | None) -> About:
    """Return what is known, with what a model says of itself: labels, architecture, tags.

    Args:
        about: What is known.
        model: A model of transformers, wrapped by PEFT or not.
        task_type: PEFT's task type; where it is None, the name of the model's class tells a classifier.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(base, "config", None)
    classifies = task_type in LABELLED_TASKS or (task_type is None and "Classification" in type(base).__name__)
    names = getattr(config, "id2label", None) if classifies else None
    labels = None
    if names and {*map(int, names)} == {*range(len(names))}:
        by_index = {int(index): str(name) for index, name in names.items()}
        labels = tuple(by_index[index] for index in range(len(by_index)))
    return replace(
        about,
        labels=None if labels is None or labels == unnamed(len(labels)) else labels,
        num_labels=None if labels is None else len(labels),
        problem_type=_text(getattr(config, "problem_type", None)) if classifies else None,
        architecture=_text(getattr(config, "model_type", None)),
        base_licence=_licence_of(_text(getattr(base, "name_or_path", None))),
        tags=tuple(map(str, getattr(base, "model_tags", None) or ())),
    )


def _licence_of(base: str | None) -> str | None:
    """Return the licence that the card of a base model on this disk names; None if it is not there, or names none."""
    card = os.path.join(base or "", "README.md")
    if not base or not os.path.isfile(card):
        return None
    with open(card, encoding="utf-8", errors="replace") as stream:
        head = stream.read(20_000).split("\n---", 1)[0]
    found = re.search(r"^license: *[\"']?([\w.+-]+)", head, re.MULTILINE) if head.startswith("---") else None
    return None if found is None else found[1]


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def unnamed(count: int) -> tuple[str, ...]:
    """Return the names that transformers gives outputs that have none."""
    return tuple(f"LABEL_{index}" for index in range(count))
