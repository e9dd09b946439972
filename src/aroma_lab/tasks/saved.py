"""Saved classifiers and regressions: their task, tokenizer and model, in plain PEFT, and their evaluation.

`aroma_task.json` says how the examples of `aroma train` are read. An adapter without one, as a Trainer's, is known by
its head and by what `aroma_state.json` tells of it; its columns have to be named.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm
from transformers import AutoConfig, DataCollatorWithPadding

from aroma.about import unnamed
from aroma.errors import CheckpointError, bad_value
from aroma.export import about_of, base_name_of, load_with_adapter
from aroma.files import own_file, read_json, read_tensors
from aroma.outputs import TOKENIZER_FILES
from aroma.saved import AdapterWeights, read_adapter
from aroma.state import STATE_FILE, read_config

from .classification import encode, load_tokenizer, logits_of
from .data import checked_examples
from .metrics import metrics_of
from .model import placed
from .sources import Row, fitting_columns, read_located
from .task import TASK_FILE, Task, read_task

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LONGEST = 512
"""Tokens of an example, where neither task nor model says it."""


class Evaluation(NamedTuple):
    """Number of examples, and metrics by name over all of them."""

    examples: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class SavedClassifier:
    """A classifier or regression that was saved.

    Args:
        task: How its examples are read, and what its outputs mean. `label_names` of one without names are numbers.
        base_model: Folder or hub name of the base model; None for the adapter's own.
    """

    folder: str
    task: Task
    base_model: str | None
    tokenizer: Any

    def answer(
        self, examples: Sequence[Row], batch_size: int = 32, on_batch: Callable[[int], None] = lambda done: None
    ) -> NDArray[Any]:
        """Return logits, shape (examples, outputs), of texts and their pairs, by plain PEFT, on an accelerator if any.

        Args:
            on_batch: Called after each batch with its number of examples.

        Raises:
            CheckpointError: The adapter is damaged.
            ConfigError: The base model cannot be loaded, or is another.
        """
        from datasets import Dataset

        texts = [{key: one[key] for key in ("text", "pair") if key in one} for one in examples]
        encoded = encode(Dataset.from_list(texts), self.tokenizer, self.task.max_length or _LONGEST)
        model = placed(load_with_adapter(self.folder, self.base_model))
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        return logits_of(model, encoded, DataCollatorWithPadding(self.tokenizer), batch_size, on_batch)


def open_classifier(
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    max_length: int | None = None,
    adapter: AdapterWeights | None = None,
) -> SavedClassifier:
    """Return a saved classifier or regression whose model is not loaded yet, so that its data can be looked at first.

    Args:
        base_model: Folder or hub name of the base model; None for the adapter's own.
        text, text_pair, label: Columns; None for those of the training, where `aroma_task.json` names them.
        max_length: Most tokens of an example; None for that of the training or, if unknown, as many as the model
            takes.
        adapter: The adapter, if it was read before; None: it is read, and must be plain LoRA.

    Raises:
        CheckpointError: The adapter is missing, damaged, or no classifier's; or nothing names its columns.
        ConfigError: There is no tokenizer, or the model takes fewer tokens than `max_length`.
    """
    adapter = adapter or read_adapter(folder)
    task = read_task(folder) or _task_of_head(adapter)
    given = {"text": text, "text_pair": text_pair, "label": label, "max_length": max_length}
    task = replace(task, **{name: value for name, value in given.items() if value})  # type: ignore[arg-type]
    if not task.text or not task.label:
        missing = " and ".join(
            option for option, column in (("--text", task.text), ("--label", task.label)) if not column
        )
        remedy = f"it has no {TASK_FILE}, as adapters that `aroma train` saves, so its columns are not known; name"
        raise bad_value("adapter", str(folder), f"{remedy} them with {missing}", CheckpointError)
    tokenizer = load_tokenizer(_tokenizer_source(adapter, base_model), task.max_length or 0)
    known = tokenizer.model_max_length
    task = replace(task, max_length=task.max_length or (known if known < 2**20 else _LONGEST))
    return SavedClassifier(str(folder), task, base_model, tokenizer)


def evaluate_adapter(
    folder: str | os.PathLike[str],
    data: str,
    *,
    batch_size: int = 32,
    progress: bool = False,
    **options: Any,
) -> Evaluation:
    """Evaluate a saved classifier or regression on all examples of a file, in plain PEFT, as its recipients will.

    Args:
        data: A CSV, TSV, JSONL or Parquet file, whose labels may be names or their indices.
        batch_size: Examples of one forward pass.
        progress: Whether a bar is shown.
        options: Those of `open_classifier`.

    Raises:
        AromaError: The adapter, its base model or the file cannot be used.
    """
    saved = open_classifier(folder, **options)
    rows = read_located("data", data)
    fitting_columns(rows, [saved.task.layout.columns()])
    examples = checked_examples(rows, saved.task)
    with tqdm(desc="evaluate", total=len(examples), disable=not progress) as bar:
        logits = saved.answer(examples, batch_size, bar.update)
    labels = np.array([one["labels"] for one in examples])
    return Evaluation(len(examples), metrics_of(saved.task.kind, logits, labels))


def known_by_base(folder: Path, base_model: str | None) -> AdapterWeights:
    """Return the head of a LoRA adapter of a classifier or regression, without its updates.

    Where nothing beside the adapter tells number, names and kind of its outputs, its head and its base model do.
    """
    state = read_json(own_file(folder, STATE_FILE)) if (folder / STATE_FILE).exists() else {}
    tensors = read_tensors(own_file(folder, "adapter_model.safetensors"))
    head = {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}
    adapter = AdapterWeights(folder, read_config(folder) | {"task_type": "SEQ_CLS"}, {}, head, state or None)
    base, about = AutoConfig.from_pretrained(base_name_of(adapter, base_model)), about_of(adapter)
    outputs, names = about["num_labels"] or base.num_labels, (*base.id2label.values(),)
    own = names if len(names) == outputs and [*names] != unnamed(outputs) else None
    found = {
        "labels": about["labels"] or own,
        "num_labels": outputs,
        "problem_type": about["problem_type"] or base.problem_type,
    }
    return replace(adapter, state={**state, "about": found})


def _task_of_head(adapter: AdapterWeights) -> Task:
    """Return the task of an adapter without `aroma_task.json`, but for its columns."""
    where, kind, about = str(adapter.folder), adapter.config.get("task_type"), about_of(adapter)
    named = str((adapter.config.get("auto_mapping") or {}).get("base_model_class"))
    outputs, problem = about["num_labels"], about["problem_type"]
    if kind != "SEQ_CLS" and not (kind is None and named.endswith("ForSequenceClassification")):
        remedy = f"its task_type is {kind}; give an adapter of a classifier or regression (SEQ_CLS), or of a language"
        raise bad_value("adapter", where, f"{remedy} model (CAUSAL_LM)", CheckpointError)
    if outputs is None:
        raise bad_value("adapter", where, "it holds no trained head, so its labels are not known", CheckpointError)
    is_regression = problem == "regression" or (outputs == 1 and problem is None)
    if problem == "multi_label_classification" or (is_regression and outputs != 1):
        remedy = "an example has several labels or numbers; ask its model in plain PEFT"
        raise bad_value("adapter", where, remedy, CheckpointError)
    if is_regression:
        return Task("regression")
    return Task("classification", tuple(about["labels"] or map(str, range(outputs))))


def _tokenizer_source(adapter: AdapterWeights, base_model: str | None) -> str:
    """Return where the tokenizer is: beside the adapter, else with the base model.

    Raises:
        ConfigError: The base model's folder holds none: transformers would make an empty one.
    """
    base = base_model or adapter.config.get("base_model_name_or_path") or ""
    for folder in (adapter.folder, Path(base or adapter.folder)):
        if any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
            return str(folder)
    if not base or os.path.isdir(base):
        remedy = f"neither it nor its base model {base!r} has a tokenizer; tokenizer.save_pretrained(folder) adds it"
        raise bad_value("adapter", str(adapter.folder), remedy)
    return base
