"""Evaluation of a saved adapter on a file of examples, in plain PEFT, as its recipients will use it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from aroma.errors import bad_value

from ..progress import Progress, no_progress
from .classification import encode, predict_logits
from .data import make_examples, named_labels
from .metrics import metrics_of
from .saved import open_classifier
from .sources import read_file
from .spec import Layout


@dataclass(frozen=True)
class Evaluation:
    """Number of examples, and metrics by name over all of them."""

    examples: int
    metrics: dict[str, float]


def evaluate_adapter(
    folder: str | os.PathLike[str],
    data: str,
    *,
    base_model: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    max_length: int | None = None,
    batch_size: int = 32,
    progress: Progress = no_progress,
) -> Evaluation:
    """Evaluate a classifier or regression on all examples of a file; other arguments are those of `open_classifier`.

    Args:
        data: A CSV, TSV, JSONL or Parquet file, whose labels may be names or their indices.
        batch_size: Examples of one forward pass.
        progress: Shows how far the evaluation is.

    Raises:
        AromaError: The adapter, its base model or the file cannot be used.
    """
    saved = open_classifier(
        folder, base_model=base_model, text=text, text_pair=text_pair, label=label, max_length=max_length
    )
    task = saved.task
    if saved.is_multi_label:
        raise bad_value("adapter", str(folder), "an example has several labels, which no metric here counts")
    layout = Layout(task.text, task.text_pair, task.label)
    columns = read_file("data", data, [layout.columns()])[1]
    columns[task.label] = named_labels(columns[task.label], task.label_names)
    examples = make_examples("data", layout, columns, task.label_names)
    model = saved.load()
    encoded = encode(examples, saved.tokenizer, task.max_length)
    with progress("evaluate", len(examples)) as advance:
        logits = predict_logits(model, encoded, saved.tokenizer, batch_size, advance)
    labels = torch.tensor(list(examples["labels"])).numpy()
    return Evaluation(len(examples), metrics_of(task.kind, logits, labels))
