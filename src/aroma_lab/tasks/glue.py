"""The eight GLUE tasks of Table 2: their columns on the hub and in the original download, labels, and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
    layouts: tuple[Layout, ...]
    """The hub's columns, then those of the original files if they differ."""
    label_names: tuple[str, ...] | None
    """Names of the classes, in the order in which the hub numbers them; None for a regression."""
    reported: Mapping[str, str] = field(default_factory=lambda: {"validation": "validation"})
    """The splits whose labels are public, by label."""
    between: tuple[float, float] | None = None
    """The smallest and the largest number of a regression."""
    originals: Mapping[str, str] = field(default_factory=dict)
    """Names of original files by split, if they differ from the split's."""
    damaged_lines: bool = False
    """Whether the original training file has broken lines, which the hub leaves out too."""


_ENTAILMENT = ("entailment", "not_entailment")

GLUE: dict[str, GlueTask] = {
    "cola": GlueTask(
        folder="CoLA",
        metric="mcc",
        # The original has no header line: source, label, the author's own mark, sentence.
        layouts=(Layout("sentence", None, "label"), Layout("#4", None, "#2")),
        label_names=("unacceptable", "acceptable"),
    ),
    "sst2": GlueTask("SST-2", "accuracy", (Layout("sentence", None, "label"),), ("negative", "positive")),
    "mrpc": GlueTask(
        folder="MRPC",
        metric="accuracy",
        layouts=(Layout("sentence1", "sentence2", "label"), Layout("#1 String", "#2 String", "Quality")),
        label_names=("not_equivalent", "equivalent"),
        originals={"train": "msr_paraphrase_train.txt", "test": "msr_paraphrase_test.txt"},
    ),
    "stsb": GlueTask(
        folder="STS-B",
        metric="pearson",
        layouts=(Layout("sentence1", "sentence2", "label"), Layout("sentence1", "sentence2", "score")),
        label_names=None,
        between=(0.0, 5.0),
    ),
    "qqp": GlueTask(
        folder="QQP",
        metric="accuracy",
        layouts=(Layout("question1", "question2", "label"), Layout("question1", "question2", "is_duplicate")),
        label_names=("not_duplicate", "duplicate"),
        damaged_lines=True,
    ),
    "mnli": GlueTask(
        folder="MNLI",
        metric="accuracy",
        layouts=(Layout("premise", "hypothesis", "label"), Layout("sentence1", "sentence2", "gold_label")),
        label_names=("entailment", "neutral", "contradiction"),
        reported={"matched": "validation_matched", "mismatched": "validation_mismatched"},
    ),
    "qnli": GlueTask("QNLI", "accuracy", (Layout("question", "sentence", "label"),), _ENTAILMENT),
    "rte": GlueTask("RTE", "accuracy", (Layout("sentence1", "sentence2", "label"),), _ENTAILMENT),
}
"""The tasks of Table 2 by name."""


def glue_task(name: str) -> GlueTask | None:
    """Return the GLUE task of a name in any spelling (`sst2`, `SST-2`), or None."""
    return GLUE.get(glue_key(name))


def glue_key(name: str) -> str:
    """Return a name in the spelling of the keys of `GLUE`."""
    return name.lower().replace("-", "").replace("_", "")
