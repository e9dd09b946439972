"""Sequence classification and regression: encoding, prediction, and the job for the training loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import DataCollatorWithPadding

from aroma.errors import bad_value

from ..methods.head import TrainPooler
from ..specs import HELD_OUT, ModelSpec, TaskSpec
from ..training.job import Job, Objective, Prediction
from .data import load_task
from .metrics import loss_of, metrics_of
from .model import load_classifier
from .task import Task, save_task

if TYPE_CHECKING:
    from datasets import Dataset


def load_tokenizer(name: str, max_length: int) -> Any:
    """Return the tokenizer of a model, with a padding token; ConfigError if the model takes fewer tokens."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise bad_value("model.name", name, f"its tokenizer cannot be loaded ({reason}); check the name") from error
    if max_length > tokenizer.model_max_length:
        raise bad_value("data.max_length", max_length, f"{name} takes at most {tokenizer.model_max_length} tokens")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token will do
    return tokenizer


def check_positions(name: str, max_length: int) -> None:
    """Raise ConfigError if examples are longer than a model's positions, which its tokenizer does not always know."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or positions < 0:  # XLNet has −1: no limit
        return
    if "roberta" in config.model_type or config.model_type == "camembert":
        positions -= config.pad_token_id + 1  # their positions begin behind the padding's
    if max_length > positions:
        raise bad_value("data.max_length", max_length, f"{name} takes at most {positions} tokens")


def encode(examples: Dataset, tokenizer: Any, max_length: int) -> Dataset:
    """Return the model's inputs and `labels`, cut to `max_length` tokens and not padded."""

    def tokenize(batch: dict[str, Any]) -> Any:
        return tokenizer(batch["text"], batch.get("pair"), truncation=True, max_length=max_length)

    texts = [name for name in examples.column_names if name != "labels"]
    return examples.map(tokenize, batched=True, remove_columns=texts, keep_in_memory=True, load_from_cache_file=False)


@dataclass(frozen=True)
class ClassifierJob(Job):
    """A classification or regression for the training loop.

    Args:
        task: What the outputs mean.
        metric: Name of the metric that is the score.
        parts: Examples by split: `train`, held out, reported.
        tokenizer: The model's.
        train_pooler: Whether the encoder's pooler trains with the head; see `TrainSpec`.
    """

    model: ModelSpec
    task: Task
    metric: str
    parts: Mapping[str, Dataset]
    tokenizer: Any
    train_pooler: TrainPooler = "auto"

    @classmethod
    def of(
        cls, spec: TaskSpec, model: ModelSpec, train_pooler: TrainPooler = "auto", *, reported: bool = True
    ) -> ClassifierJob:
        """Return the job of a task; AromaError if its examples cannot be used, or the model takes fewer tokens."""
        assert model.name is not None, "Recipe and Trial check it"
        data = load_task(spec, reported=reported)
        tokenizer = load_tokenizer(model.name, spec.max_length)
        check_positions(model.name, spec.max_length)
        return cls(model, *data, tokenizer, train_pooler)

    @cached_property
    def objective(self) -> Objective:
        """Batches, loss and metrics for the Trainer."""

        def metrics(prediction: Any) -> dict[str, float]:
            return metrics_of(self.task.kind, prediction.predictions, prediction.label_ids)

        return Objective(DataCollatorWithPadding(self.tokenizer), self.tokenizer, metrics, f"{HELD_OUT}_{self.metric}")

    @cached_property
    def train(self) -> Dataset:
        """The encoded training examples."""
        return self._encode("train")

    @cached_property
    def eval_sets(self) -> dict[str, Dataset]:
        """All other splits, encoded."""
        return {split: self._encode(split) for split in self.evaluated}

    @property
    def evaluated(self) -> tuple[str, ...]:
        """All splits but that of training."""
        return tuple(split for split in self.parts if split != "train")

    @property
    def examples(self) -> dict[str, int]:
        """Numbers of examples by split."""
        return {split: len(part) for split, part in self.parts.items()}

    def load_model(self) -> Any:
        """Return the pretrained model with a fresh head."""
        return load_classifier(self.model, self.task.label_names, self.tokenizer.pad_token_id, self.train_pooler)

    def predict(self, trainer: Any, split: str) -> Prediction:
        """Return the metrics of a whole split, computed in one call, and its loss."""
        prediction = trainer.predict(self.eval_sets[split])
        values = (self.task.kind, prediction.predictions, prediction.label_ids)
        return Prediction(metrics_of(*values), loss_of(*values))

    def guess(self, split: str) -> dict[str, float]:
        """Return the metrics of a split for a constant answer: the training set's commonest label, or its mean."""
        learned, expected = (np.array(self.parts[name]["labels"]) for name in ("train", split))
        if self.task.kind == "regression":
            answers = np.full((len(expected), 1), learned.astype("float64").mean())
        else:
            answers = np.tile(np.bincount(learned, minlength=len(self.task.label_names or ())), (len(expected), 1))
        return metrics_of(self.task.kind, answers, expected)

    def describe(self, model: Any, adapter: Path) -> None:
        """Write tokenizer and task into the folder of an adapter."""
        self.tokenizer.save_pretrained(adapter)
        save_task(self.task, adapter)

    def _encode(self, split: str) -> Dataset:
        return encode(self.parts[split], self.tokenizer, self.task.max_length)
