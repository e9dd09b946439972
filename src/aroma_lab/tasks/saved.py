"""Saved classifiers and regressions in plain PEFT: their task, model and tokenizer, and their answers.

`aroma_task.json` says how the examples of `aroma train` are read. Of an adapter without one, as a Trainer's, the model
says what its outputs are, and columns have names in common use, or are named by the user.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from transformers import DataCollatorWithPadding

from aroma.about import about_model
from aroma.errors import CheckpointError, DataError, bad_value
from aroma.export import base_name_of, base_of, model_class_of
from aroma.files import own_file, read_json, read_tensors
from aroma.outputs import TOKENIZER_FILES
from aroma.saved import AdapterWeights
from aroma.state import STATE_FILE, WEIGHTS_NAME, read_config

from .classification import encode, load_tokenizer, logits_of
from .data import checked_examples
from .metrics import metrics_of
from .model import placed, with_adapter
from .sources import Located, Row, fitting_columns, read_located
from .task import Layout, Task, common_layouts, read_task

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LONGEST = 512
"""Tokens of an example, where neither task nor model says it."""


class Evaluation(NamedTuple):
    """Number of examples, and metrics by name over all of them."""

    examples: int
    metrics: dict[str, float]


class SavedClassifier(NamedTuple):
    """A classifier or regression with its adapter, on an accelerator if any, and examples for it.

    `task` says how examples are read and what outputs mean; `label_names` of one without names are numbers.
    `examples` have the columns of `checked_examples`. `note` says why labels that are there are not used.
    """

    model: Any
    tokenizer: Any
    task: Task
    examples: list[Row]
    note: str = ""

    def answer(self, batch_size: int = 32, progress: bool = False) -> NDArray[Any]:
        """Return the logits of the examples, shape (examples, outputs)."""
        from datasets import Dataset

        encoded = encode(Dataset.from_list(self.examples), self.tokenizer, self.task.max_length or _LONGEST)
        return logits_of(self.model, encoded, DataCollatorWithPadding(self.tokenizer), batch_size, progress)


def open_classifier(
    folder: str | os.PathLike[str],
    rows: list[Located],
    *,
    base_model: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    max_length: int | None = None,
    needs_labels: bool = True,
) -> SavedClassifier:
    """Load a saved classifier or regression in plain PEFT, and check examples for it.

    Args:
        rows: The examples; their labels may be names or indices.
        base_model: Folder or hub name of the base model; None for the adapter's own.
        text, text_pair, label: Columns; None for those of the training or, if unknown, `common_layouts`.
        max_length: Most tokens of an example; None for that of the training or, if unknown, as many as the model
            takes.
        needs_labels: If not, labels that are missing or mean nothing are left out, but for those of a `label` that is
            given; and the model may have several labels for an example, or none: an encoder, whose task has no names.

    Raises:
        CheckpointError: The adapter is missing or damaged.
        ConfigError: It is no classifier's, the base model cannot be loaded or is another, there is no tokenizer, or
            the model takes fewer tokens than `max_length`.
        DataError: A column is missing, or a row cannot be used.
    """
    path, config, known = Path(folder), read_config(folder), read_task(folder)
    is_encoder = not needs_labels and model_class_of(config).endswith("Model")
    if not is_encoder and not model_class_of(config).endswith("ForSequenceClassification"):
        remedy = "must be of a classifier or regression (SEQ_CLS), or of a causal language model (CAUSAL_LM)"
        raise bad_value(
            "task_type", config.get("task_type"), f"{path} {remedy}; for others, use plain PEFT or aroma.compress"
        )
    layouts = common_layouts(text, text_pair, label)
    if known is not None:
        layouts = [Layout(text or known.text, text_pair or known.text_pair, label or known.label)]
    if not needs_labels and label is None:
        layouts += [one._replace(label=None) for one in layouts]
    layout = layouts[fitting_columns(rows, layouts)]
    adapter = AdapterWeights(path, config, {}, {}, None) if is_encoder else _head_of(path, config)
    name = base_name_of(adapter, base_model)
    tokenizer = load_tokenizer(_tokenizer_source(path, name), max_length or (known and known.max_length) or 0)
    base = base_of(adapter, base_model)
    base.config.pad_token_id = tokenizer.pad_token_id  # of decoders, which pool at the last other token
    try:
        task = known or _task_of(base, path)
    except CheckpointError:
        if needs_labels or label is not None:
            raise
        task, layout = Task("classification"), layout._replace(label=None)
    if not needs_labels and all(row.get(layout.label or "") is None for _, row in rows):
        layout = layout._replace(label=label)
    task = replace(task, **layout._asdict())
    longest = tokenizer.model_max_length if tokenizer.model_max_length < 2**20 else _LONGEST
    task = replace(task, max_length=max_length or task.max_length or longest)
    note = ""
    try:
        examples = checked_examples(rows, task)
    except DataError as error:
        if needs_labels or label is not None:
            raise
        task, note = replace(task, label=None), f"labels are not used: {error}"
        examples = checked_examples(rows, task)
    return SavedClassifier(placed(with_adapter(base, path, name)), tokenizer, task, examples, note)


def evaluate_adapter(
    folder: str | os.PathLike[str], data: str, *, batch_size: int = 32, progress: bool = False, **options: Any
) -> Evaluation:
    """Evaluate a saved classifier or regression on all examples of a file, in plain PEFT, as its recipients will.

    Args:
        data: A CSV, TSV, JSONL or Parquet file.
        batch_size: Examples of one forward pass.
        progress: Whether a bar is shown.
        options: Those of `open_classifier`.

    Raises:
        AromaError: The adapter, its base model or the file cannot be used.
    """
    saved = open_classifier(folder, read_located("data", data), **options)
    logits, labels = saved.answer(batch_size, progress), np.array([one["labels"] for one in saved.examples])
    return Evaluation(len(labels), metrics_of(saved.task.kind, logits, labels))


def _head_of(folder: Path, config: dict[str, Any]) -> AdapterWeights:
    """Return the head of an adapter, without its updates: they may be of any kind that PEFT has."""
    tensors = read_tensors(own_file(folder, WEIGHTS_NAME))
    head = {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}
    state = read_json(own_file(folder, STATE_FILE)) if (folder / STATE_FILE).exists() else None
    return AdapterWeights(folder, config | {"task_type": "SEQ_CLS"}, {}, head, state)


def _task_of(model: Any, folder: Path) -> Task:
    """Return what the outputs of a model mean, without columns; CheckpointError unless an example has one label."""
    labels, outputs, problem = about_model(model, None).values()
    is_regression = problem == "regression" or (outputs == 1 and problem is None)
    if outputs is None or problem == "multi_label_classification" or (is_regression and outputs != 1):
        found = "no label" if outputs is None else "several labels or numbers"
        remedy = f"an example has {found}; ask its model in plain PEFT"
        raise bad_value("adapter", str(folder), remedy, CheckpointError)
    return Task("regression") if is_regression else Task("classification", (*(labels or map(str, range(outputs))),))


def _tokenizer_source(adapter: Path, base: str) -> str:
    """Return where the tokenizer is: beside the adapter, else with the base model.

    Raises:
        ConfigError: The base model's folder holds none: transformers would make an empty one.
    """
    for folder in (adapter, Path(base)):
        if any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
            return str(folder)
    if os.path.isdir(base):
        remedy = f"neither it nor its base model {base!r} has a tokenizer; tokenizer.save_pretrained(folder) adds it"
        raise bad_value("adapter", str(adapter), remedy)
    return base
