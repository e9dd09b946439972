"""What a classification or regression is: columns and labels, as `aroma_task.json` and GLUE have them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from aroma.errors import CheckpointError
from aroma.files import read_json, write_json
from aroma.outputs import TASK_FILE

from ..specs import ModelSpec


class Layout(NamedTuple):
    """Which columns mean what: text, second text (None: single texts), label or number (None: no labels)."""

    text: str
    text_pair: str | None
    label: str | None


def common_layouts(text: str | None, text_pair: str | None, label: str | None) -> list[Layout]:
    """Return columns by names in common use, pairs first, but for those that are given."""
    texts: list[tuple[str, str | None]] = [
        *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence")),
        *(("text1", "text2"), ("text", "text_pair"), ("text", None), ("sentence", None), ("review", None)),
    ]
    labels = ("label", "labels", "score") if label is None else (label,)
    chosen = texts if text is None else [(text, text_pair)]
    return [Layout(one, other, column) for one, other in chosen for column in labels]


@dataclass(frozen=True)
class Task:
    """What an adapter was trained for, so that others read their examples in the same way.

    Args:
        label_names: Names of the classes by index; None of a regression.
        text, text_pair, label: Columns of a classification or regression; label None: no labels.
        max_length: Most tokens of an example; None: not known.
        model: Of a language model, the pretrained model as it was loaded.
    """

    kind: Literal["classification", "regression", "causal_lm"]
    label_names: tuple[str, ...] | None = None
    text: str = ""
    text_pair: str | None = None
    label: str | None = ""
    max_length: int | None = None
    model: ModelSpec | None = None

    @property
    def layout(self) -> Layout:
        """Which columns mean what."""
        return Layout(self.text, self.text_pair, self.label)


def save_task(task: Task, adapter: str | os.PathLike[str]) -> None:
    """Write the task into the folder of an adapter, so that the folder alone can be evaluated."""
    write_json(Path(adapter) / TASK_FILE, asdict(task))


def read_task(adapter: str | os.PathLike[str]) -> Task | None:
    """Read the task of an adapter; None where it has none, as one that `aroma train` did not save.

    Raises:
        CheckpointError: It is damaged.
    """
    path = Path(adapter) / TASK_FILE
    if not path.exists():
        return None
    content = read_json(path)
    try:
        names, model = content.get("label_names"), content.get("model")
        content |= {"label_names": names and tuple(names), "model": model and ModelSpec(**model)}
        task = Task(**content)
        speaks = task.kind == "causal_lm"
        if speaks != (task.model is not None and isinstance(task.model.name, str)) or speaks == bool(task.text):
            raise TypeError(f"a {task.kind} has other keys")
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: edited ({error}); restore the file that was saved") from error
    return task


# GLUE ----------------------------------------------------------------------------------------------------------------

HUB = "nyu-mll/glue"
"""Data set of the hub that has them all, each as a configuration named like the task."""
_VALIDATION = {"validation": "validation"}


class GlueTask(NamedTuple):
    """One of the eight tasks of GLUE in Table 2, as the hub has it."""

    metric: str
    """Its metric in Table 2."""
    label_names: tuple[str, ...] | None
    """Names of the classes, in the order in which the hub numbers them; None for a regression."""
    layout: Layout
    """Its columns."""
    reported: Mapping[str, str] = _VALIDATION
    """The splits whose labels are public, by label."""


_ENTAILMENT = ("entailment", "not_entailment")
_SENTENCE = Layout("sentence", None, "label")
_SENTENCES = Layout("sentence1", "sentence2", "label")
_QUESTIONS = Layout("question1", "question2", "label")
_PREMISE = Layout("premise", "hypothesis", "label")
_MNLI_SPLITS = {"matched": "validation_matched", "mismatched": "validation_mismatched"}

GLUE: dict[str, GlueTask] = {
    "cola": GlueTask("mcc", ("unacceptable", "acceptable"), _SENTENCE),
    "sst2": GlueTask("accuracy", ("negative", "positive"), _SENTENCE),
    "mrpc": GlueTask("accuracy", ("not_equivalent", "equivalent"), _SENTENCES),
    "stsb": GlueTask("pearson", None, _SENTENCES),
    "qqp": GlueTask("accuracy", ("not_duplicate", "duplicate"), _QUESTIONS),
    "mnli": GlueTask("accuracy", ("entailment", "neutral", "contradiction"), _PREMISE, _MNLI_SPLITS),
    "qnli": GlueTask("accuracy", _ENTAILMENT, Layout("question", "sentence", "label")),
    "rte": GlueTask("accuracy", _ENTAILMENT, _SENTENCES),
}


def glue_key(name: str) -> str:
    """Return a name in the spelling of the keys of `GLUE`: `sst2` for `SST-2`."""
    return name.lower().replace("-", "").replace("_", "")
