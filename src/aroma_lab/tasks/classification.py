"""Sequence classification and regression: encoding, prediction, and the job for the training loop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding

from aroma.errors import bad_value

from ..methods.head import TrainPooler
from ..specs import ModelSpec, TaskSpec
from ..training.job import Job, Prediction
from .data import load_task
from .metrics import loss_of, metrics_of
from .model import load_classifier, loading
from .task import save_task

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray


def load_tokenizer(name: str, max_length: int) -> Any:
    """Return the tokenizer of a model, with a padding token; ConfigError if the model takes fewer tokens."""
    from transformers import AutoTokenizer

    with loading(name, "its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(name)
    if max_length > tokenizer.model_max_length:
        raise bad_value("data.max_length", max_length, f"{name} takes at most {tokenizer.model_max_length} tokens")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token will do
    return tokenizer


def check_positions(name: str, max_length: int) -> None:
    """Raise ConfigError if examples are longer than a model's positions, which its tokenizer does not always know."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name)
    positions = getattr(config, "max_position_embeddings", None) or 0
    if "roberta" in config.model_type or config.model_type == "camembert":
        positions -= config.pad_token_id + 1  # their positions begin behind the padding's
    if 0 < positions < max_length:  # XLNet has −1: no limit
        raise bad_value("data.max_length", max_length, f"{name} takes at most {positions} tokens")


def encode(examples: Dataset, tokenizer: Any, max_length: int) -> Dataset:
    """Return the model's inputs and `labels`, cut to `max_length` tokens and not padded."""

    def tokenize(batch: dict[str, Any]) -> Any:
        return tokenizer(batch["text"], batch.get("pair"), truncation=True, max_length=max_length)

    texts = [name for name in examples.column_names if name != "labels"]
    return examples.map(tokenize, batched=True, remove_columns=texts, keep_in_memory=True, load_from_cache_file=False)


@torch.no_grad()
def logits_of(model: Any, rows: Dataset, collate: Any, batch_size: int, progress: bool = False) -> NDArray[Any]:
    """Return the logits, shape (examples, outputs), of encoded rows; those of similar lengths are batched together.

    Args:
        model: It runs where it is, and is left in its mode.
        progress: Whether a bar of the batches is shown.
    """
    lengths, was_training = [len(ids) for ids in rows["input_ids"]], model.training
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    model.eval()
    batches, logits = DataLoader(rows, batch_size, sampler=order, collate_fn=collate), []
    for batch in tqdm(batches, "evaluate", disable=not progress):
        batch.pop("labels", None)
        logits.append(model(**batch.to(model.device)).logits.float().cpu())
    model.train(was_training)
    found = torch.cat(logits).numpy()
    found[order] = found.copy()
    return found


def constant_metrics(kind: str, learned: NDArray[Any], expected: NDArray[Any]) -> dict[str, float]:
    """Return the metrics, on labels `expected`, of the commonest label of `learned`, or of a regression's mean."""
    if kind == "regression":
        answers = np.full((len(expected), 1), learned.astype("float64").mean())
    else:
        counts = np.bincount(learned, minlength=int(expected.max()) + 1)
        answers = np.tile(counts, (len(expected), 1))
    return metrics_of(kind, answers, expected)


class ClassifierJob(Job):
    """A classification or regression for the training loop.

    Args:
        train_pooler: Whether the encoder's pooler trains with the head; see `TrainSpec`.
        reported: Whether the reported splits are read.

    Raises:
        AromaError: Examples that cannot be used, or a model that takes fewer tokens.
    """

    def __init__(
        self, spec: TaskSpec, model: ModelSpec, train_pooler: TrainPooler = "auto", *, reported: bool = True
    ) -> None:
        self.model, self.train_pooler = model, train_pooler
        self.task, self.metric, self.parts = load_task(spec, reported=reported)
        self.tokenizer = load_tokenizer(str(model.name), spec.max_length)
        check_positions(str(model.name), spec.max_length)
        self.collator = DataCollatorWithPadding(self.tokenizer)
        self.rows = {split: encode(part, self.tokenizer, spec.max_length) for split, part in self.parts.items()}
        self.evaluated = tuple(split for split in self.parts if split != "train")
        self.examples = {split: len(part) for split, part in self.parts.items()}

    def load_model(self) -> Any:
        """Return the pretrained model with a fresh head."""
        return load_classifier(self.model, self.task.label_names, self.tokenizer.pad_token_id, self.train_pooler)

    def measure(self, model: Any, rows: Dataset, batch_size: int) -> Prediction:
        """Return the metrics of whole examples, computed in one call, and the mean loss of the task alone."""
        logits, labels = logits_of(model, rows, self.collator, batch_size), np.array(rows["labels"])
        return Prediction(metrics_of(self.task.kind, logits, labels), loss_of(self.task.kind, logits, labels))

    def guess(self, split: str) -> dict[str, float]:
        """Return the metrics of a split for a constant answer: the training set's commonest label, or its mean."""
        learned, expected = (np.array(self.parts[name]["labels"]) for name in ("train", split))
        return constant_metrics(self.task.kind, learned, expected)

    def describe(self, adapter: Path) -> None:
        """Write tokenizer and task into the folder of an adapter."""
        self.tokenizer.save_pretrained(adapter)
        save_task(self.task, adapter)
