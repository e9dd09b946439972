"""Labels of a classifier, saved in `aroma_state.json`: an adapter's tensors do not hold them.

`labels`: names of its outputs by index; None where they are LABEL_0, LABEL_1, …. `num_labels`: their number; None for
another model. `problem_type`: what they mean, as transformers says it, such as "regression"; None if unknown.
"""

from __future__ import annotations

from typing import Any

LABELLED_TASKS = ("SEQ_CLS", "TOKEN_CLS")
"""PEFT's task types whose models have a head with an output for each label."""

UNKNOWN: dict[str, Any] = {"labels": None, "num_labels": None, "problem_type": None}


def about_model(model: Any, task_type: str | None) -> dict[str, Any]:
    """Return `labels`, `num_labels` and `problem_type` of a model of transformers, wrapped by PEFT or not; JSON-able.

    Where PEFT's task type is None, a model is a classifier if "Classification" is in the name of its class.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if task_type not in LABELLED_TASKS and (task_type is not None or "Classification" not in type(base).__name__):
        return UNKNOWN
    config = getattr(base, "config", None)
    about = {**UNKNOWN, "problem_type": getattr(config, "problem_type", None)}
    names = {int(index): str(name) for index, name in (getattr(config, "id2label", None) or {}).items()}
    if names and {*names} == {*range(len(names))}:
        labels = [names[index] for index in range(len(names))]
        about |= {"labels": None if labels == unnamed(len(labels)) else labels, "num_labels": len(labels)}
    return about


def unnamed(count: int) -> list[str]:
    """Return the names that transformers gives outputs that have none."""
    return [f"LABEL_{index}" for index in range(count)]
