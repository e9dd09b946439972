"""Evaluation of a saved adapter on a file of examples, in plain PEFT, as its recipients will use it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from aroma.errors import bad_value
from aroma.export import load_with_adapter

from ..progress import Progress, no_progress
from .classification import encode, load_tokenizer, predict_logits
from .data import make_examples
from .metrics import metrics_of
from .sources import read_file
from .spec import Layout
from .task import load_task


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
    batch_size: int = 32,
    progress: Progress = no_progress,
) -> Evaluation:
    """Evaluate an adapter that a recipe trained on all examples of a file.

    Args:
        folder: The adapter, with its `aroma_task.json`.
        data: A CSV, TSV, JSONL or Parquet file.
        base_model: Folder or hub name of the base model; None for the adapter's own.
        text, text_pair, label: Columns of the file; None for those of the training.
        batch_size: Examples of one forward pass.
        progress: Shows how far the evaluation is.

    Raises:
        CheckpointError: The adapter is missing or damaged.
        ConfigError: The base model cannot be loaded.
        DataError: The file cannot be used.
    """
    if batch_size < 1:
        raise bad_value("batch_size", batch_size, "give 1 or more")
    task = load_task(folder)
    layout = Layout(text or task.text, text_pair or task.text_pair, label or task.label)
    examples = make_examples("data", layout, read_file("data", data, [layout.columns()])[1], task.label_names)
    tokenizer = load_tokenizer(str(folder), task.max_length)
    model = load_with_adapter(folder, base_model)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    encoded = encode(examples, tokenizer, task.max_length)
    with progress("evaluate", len(examples)) as advance:
        logits = predict_logits(model, encoded, tokenizer, batch_size, advance)
    labels = torch.tensor(list(examples["labels"])).numpy()
    return Evaluation(len(examples), metrics_of(task.kind, logits, labels))
