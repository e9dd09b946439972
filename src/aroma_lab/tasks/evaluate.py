"""A saved adapter against a file of examples, in plain PEFT: what whoever receives the adapter will see."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from aroma.errors import bad_value
from aroma.export import load_with_adapter

from ..progress import Phase, silent_phase
from .data import load_examples
from .encode import encode, load_tokenizer
from .metrics import metrics_of
from .task import load_task

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Args:
        examples: Number of examples, all of the file.
        metrics: Metrics by name, over all of them.
    """

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
    phase: Phase = silent_phase,
) -> Evaluation:
    """Evaluate an adapter that a recipe trained on all examples of a file.

    Args:
        folder: The adapter, with its `aroma_task.json`.
        data: A CSV, TSV, JSONL or Parquet file.
        base_model: Folder or hub name of the base model; the adapter's own by default.
        text: Column of the text; the one of the training by default.
        text_pair: Column of the second text; the one of the training by default.
        label: Column of the label; the one of the training by default.
        batch_size: Examples of one forward pass.
        phase: Announces the work.

    Raises:
        CheckpointError: The adapter is missing or damaged.
        ConfigError: The base model cannot be loaded.
        DataError: The file cannot be used.
    """
    if batch_size < 1:
        raise bad_value("batch_size", batch_size, "give 1 or more")
    task = load_task(folder)
    columns = replace(
        task.columns(), text=text or task.text, text_pair=text_pair or task.text_pair, label=label or task.label
    )
    examples = load_examples("data", data, columns, task.label_names)
    tokenizer = load_tokenizer(str(folder), task.max_length)
    model = load_with_adapter(folder, base_model)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    encoded = encode(examples, tokenizer, task.max_length)
    with phase("evaluate", len(examples)) as advance:
        logits = predict_logits(model, encoded, tokenizer, batch_size, advance)
    labels = torch.tensor(examples.labels).numpy()
    return Evaluation(len(examples), metrics_of(task.kind, logits, labels))


@torch.no_grad()
def predict_logits(
    model: Any, data: Dataset, tokenizer: Any, batch_size: int, on_batch: Callable[[int], None]
) -> NDArray[Any]:
    """Return a model's logits, shape (examples, outputs), in the order of `data`, in batches padded to their longest.

    Args:
        model: A sequence classifier; it runs where it is.
        data: Tokenized examples.
        tokenizer: Pads the batches.
        batch_size: Examples of one forward pass.
        on_batch: Called after each batch with its number of examples.
    """
    from torch.utils.data import DataLoader
    from transformers import DataCollatorWithPadding

    model.eval()
    batches = DataLoader(
        data.remove_columns("labels"),
        batch_size=batch_size,
        collate_fn=DataCollatorWithPadding(tokenizer),
    )
    logits = []
    for batch in batches:
        logits.append(model(**batch.to(model.device)).logits.float().cpu())
        on_batch(len(logits[-1]))
    return torch.cat(logits).numpy()
