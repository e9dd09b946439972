"""Sequence classification and regression, as a job for the training loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..specs import ModelSpec, Recipe
from ..training.job import Objective, Prediction
from .data import Examples, load_splits
from .encode import check_positions, encode, load_tokenizer
from .metrics import CHOICE_METRIC, loss_of, metrics_of, trainer_metrics
from .model import load_classifier
from .task import Task, save_task

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class ClassifierJob:
    """See `Job`, whose methods it has.

    Args:
        model: The pretrained model.
        task: What the outputs mean.
        parts: Examples by split, `train` among them.
        tokenizer: The model's.
        choice: Metric that a checkpoint is chosen by; None for the task's.
    """

    model: ModelSpec
    task: Task
    parts: Mapping[str, Examples]
    tokenizer: Any
    choice: str | None = None

    @classmethod
    def make(
        cls, model: ModelSpec, task: Task, parts: Mapping[str, Examples], choice: str | None = None
    ) -> ClassifierJob:
        """Return the job, with the model's tokenizer.

        Raises:
            ConfigError: There is no such tokenizer, or the model takes fewer tokens than the task's `max_length`.
        """
        assert model.name is not None, "Recipe and Trial check it"
        tokenizer = load_tokenizer(model.name, task.max_length)
        check_positions(model.name, task.max_length)
        return cls(model, task, parts, tokenizer, choice)

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> ClassifierJob:
        """Read the examples of a recipe.

        Raises:
            ConfigError: See `make`.
            DataError: Data that cannot be used as described.
        """
        splits = load_splits(recipe.data)
        parts = {"train": splits.train, "validation": splits.validation}
        if splits.test is not None:
            parts["test"] = splits.test
        return cls.make(recipe.model, Task.of(recipe.data, splits.label_names), parts)

    @cached_property
    def objective(self) -> Objective:
        """What the Trainer makes of the encoded examples."""
        return classifier_objective(self.task.kind, self.tokenizer, self.choice)

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

    @property
    def notes(self) -> tuple[str, ...]:
        """Nothing: what is too long is cut, as everybody expects of a classifier."""
        return ()

    def load_model(self) -> Any:
        """Return the pretrained model with a fresh head."""
        return load_classifier(self.model, self.task.label_names, self.tokenizer.pad_token_id)

    def predict(self, trainer: Any, split: str) -> Prediction:
        """Return the metrics of a split, computed in one call, and its loss."""
        prediction = trainer.predict(self.eval_sets[split])
        metrics = metrics_of(self.task.kind, prediction.predictions, prediction.label_ids)
        return Prediction(metrics, loss_of(self.task.kind, prediction.predictions, prediction.label_ids))

    def describe(self, model: Any, adapter: Path) -> None:
        """Write tokenizer and task into the folder of an adapter."""
        self.tokenizer.save_pretrained(adapter)
        save_task(self.task, adapter)

    def _encode(self, split: str) -> Dataset:
        return encode(self.parts[split], self.tokenizer, self.task.max_length)


def classifier_objective(kind: str, tokenizer: Any, choice: str | None = None) -> Objective:
    """Return the objective of a sequence classification or regression.

    Args:
        kind: `"classification"` or `"regression"`.
        tokenizer: Pads the batches.
        choice: Metric that a checkpoint is chosen by; None for the kind's.
    """
    from transformers import DataCollatorWithPadding

    return Objective(
        DataCollatorWithPadding(tokenizer), tokenizer, trainer_metrics(kind), choice or CHOICE_METRIC[kind]
    )
