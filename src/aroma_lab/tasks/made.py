"""The job of a task whose right answer is made: everything follows from a seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from ..training.job import Job, Objective, Prediction

if TYPE_CHECKING:
    from datasets import Dataset

Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]
"""Makes a batch of rows."""


class Made(NamedTuple):
    """What a made task trains and is measured on.

    Args:
        load: Returns the base model, a new one at every call.
        collate: Makes a batch of rows.
        parts: Rows by split; the columns of some are no arguments of the model, and make the batch.
        evaluate: Called with model, rows and batch size, returns metrics by name, `loss` among them.
    """

    load: Callable[[], PreTrainedModel]
    collate: Collate
    parts: Mapping[str, Dataset]
    evaluate: Callable[[Any, Dataset, int], dict[str, float]]


@dataclass(frozen=True)
class MadeJob(Job):
    """A made base model that learns a right answer.

    Args:
        examples: Numbers of examples by split.
        evaluated: The splits that are evaluated, the held-out one first.
        metric: Name of the metric that is the score.
        make: Makes models and examples; called once, when they are needed.
        planted: Planted rank by module; None where no ranks are planted.
        tokenizer: The model's, if it has one.
        counts_items: See `Objective`.
    """

    examples: dict[str, int]
    evaluated: tuple[str, ...]
    metric: str
    make: Callable[[], Made]
    planted: Mapping[str, int] | None = None
    tokenizer: Any = None
    counts_items: bool = False

    @cached_property
    def _made(self) -> Made:
        return self.make()

    @cached_property
    def objective(self) -> Objective:
        """Batches and metrics for the Trainer."""
        return Objective(
            self._made.collate,
            self.tokenizer,
            None,
            f"{self.evaluated[0]}_{self.metric}",
            counts_items=self.counts_items,
            evaluate=self._made.evaluate,
            arguments_class=partial(TrainingArguments, remove_unused_columns=False),
        )

    @property
    def train(self) -> Dataset:
        """The training rows."""
        return self._made.parts["train"]

    @property
    def eval_sets(self) -> dict[str, Dataset]:
        """The rows of the splits that are evaluated."""
        return {split: self._made.parts[split] for split in self.evaluated}

    def load_model(self) -> Any:
        """Return the base; a new one at every call."""
        return self._made.load()

    def predict(self, trainer: Any, split: str) -> Prediction:
        """Return metrics and loss over a whole split."""
        rows, batch_size = self._made.parts[split], trainer.args.per_device_eval_batch_size
        measured = self._made.evaluate(trainer.model, rows, batch_size)
        return Prediction({name: value for name, value in measured.items() if name != "loss"}, measured["loss"])
