"""The eight GLUE tasks of Table 2: their columns on the hub and in the original download, labels, and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .spec import Layout

HUB = "nyu-mll/glue"
"""Data set of the hub that has them all, each as a configuration named like the task."""


@dataclass(frozen=True)
class GlueTask:
    """One task of GLUE."""

    folder: str
    """Its folder in the original download."""
    metric: str
    """Its metric in Table 2."""
    label_names: tuple[str, ...] | None
    """Names of the classes, in the order in which the hub numbers them; None for a regression."""
    layouts: tuple[Layout, ...]
    """The hub's columns, then those of the original files if they differ."""
    reported: Mapping[str, str] = field(default_factory=lambda: {"validation": "validation"})
    """The splits whose labels are public, by label."""
    between: tuple[float, float] | None = None
    """The smallest and the largest number of a regression."""
    originals: Mapping[str, str] = field(default_factory=dict)
    """Names of original files by split, if they differ from the split's."""
    damaged_lines: bool = False
    """Whether the original training file has broken lines, which the hub leaves out too."""


_ENTAILMENT = ("entailment", "not_entailment")
_SENTENCE = Layout("sentence", None, "label")
_SENTENCES = Layout("sentence1", "sentence2", "label")
_QUESTIONS = Layout("question1", "question2", "label")
_PREMISE = Layout("premise", "hypothesis", "label")
_MRPC_FILES = {"train": "msr_paraphrase_train.txt", "test": "msr_paraphrase_test.txt"}
_MNLI_SPLITS = {"matched": "validation_matched", "mismatched": "validation_mismatched"}

GLUE: dict[str, GlueTask] = {
    # The original of CoLA has no header line: source, label, the author's own mark, sentence.
    "cola": GlueTask("CoLA", "mcc", ("unacceptable", "acceptable"), (_SENTENCE, Layout("#4", None, "#2"))),
    "sst2": GlueTask("SST-2", "accuracy", ("negative", "positive"), (_SENTENCE,)),
    "mrpc": GlueTask(
        "MRPC",
        "accuracy",
        ("not_equivalent", "equivalent"),
        (_SENTENCES, Layout("#1 String", "#2 String", "Quality")),
        originals=_MRPC_FILES,
    ),
    "stsb": GlueTask("STS-B", "pearson", None, (_SENTENCES, replace(_SENTENCES, label="score")), between=(0.0, 5.0)),
    "qqp": GlueTask(
        "QQP",
        "accuracy",
        ("not_duplicate", "duplicate"),
        (_QUESTIONS, replace(_QUESTIONS, label="is_duplicate")),
        damaged_lines=True,
    ),
    "mnli": GlueTask(
        "MNLI",
        "accuracy",
        ("entailment", "neutral", "contradiction"),
        (_PREMISE, replace(_SENTENCES, label="gold_label")),
        reported=_MNLI_SPLITS,
    ),
    "qnli": GlueTask("QNLI", "accuracy", _ENTAILMENT, (Layout("question", "sentence", "label"),)),
    "rte": GlueTask("RTE", "accuracy", _ENTAILMENT, (_SENTENCES,)),
}


def glue_task(name: str) -> GlueTask | None:
    """Return the GLUE task of a name in any spelling (`sst2`, `SST-2`), or None."""
    return GLUE.get(glue_key(name))


def glue_key(name: str) -> str:
    """Return a name in the spelling of the keys of `GLUE`."""
    return name.lower().replace("-", "").replace("_", "")
