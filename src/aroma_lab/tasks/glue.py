"""The eight GLUE tasks of Table 2: their columns, labels and metrics, as the hub has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .task import Layout

HUB = "nyu-mll/glue"
"""Data set of the hub that has them all, each as a configuration named like the task."""


@dataclass(frozen=True)
class GlueTask:
    """One task of GLUE."""

    metric: str
    """Its metric in Table 2."""
    label_names: tuple[str, ...] | None
    """Names of the classes, in the order in which the hub numbers them; None for a regression."""
    layout: Layout
    """Its columns."""
    reported: Mapping[str, str] = field(default_factory=lambda: {"validation": "validation"})
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
