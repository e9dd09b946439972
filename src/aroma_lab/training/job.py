"""A job: the encoded examples of a task, their batches, and the metrics of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from datasets import Dataset


class Prediction(NamedTuple):
    """Metrics by name over a whole set, and the mean loss of an example or, of a language model, a learned token."""

    metrics: dict[str, float]
    loss: float


class Job:
    """A task ready for the one training loop; only a method and a training section are missing.

    Attributes:
        metric: Name of the metric that is the score.
        tokenizer: The model's, if it has one; it goes into the checkpoints.
        rows: Encoded examples by split, those of training as `train`.
        collator: Makes batches of them.
        evaluated: The splits that are evaluated at the end. The first is the held-out one, evaluated on the way, too.
        examples: Numbers of examples by split, of training too.
        chosen_by: Metric of the held-out examples that a checkpoint is chosen by, where one is; None: the score's.
        counts_items: Whether the loss of a step is the mean over all items of its micro-batches, as it is over the
            tokens of a language model; False: the mean of the micro-batches' means.
        trainer_class: A `training.trainer.MethodTrainer`; None for that one itself.
        arguments_class: Makes its arguments from those of `TrainingArguments`; None for `TrainingArguments`.
        planted: Ranks of the right answer by module; None where it is unknown.
        notes: What a user should know of the examples: how many were cut or left out, and why.
    """

    metric: Any
    tokenizer: Any = None
    rows: Any
    collator: Any
    evaluated: Any
    examples: Any
    chosen_by: str | None = None
    counts_items: Any = False
    trainer_class: Any = None
    arguments_class: Any = None
    planted: Mapping[str, int] | None = None
    notes: tuple[str, ...] = ()

    def load_model(self) -> Any:
        """Return the pretrained model; its head, if it has one, is drawn from the global random numbers."""
        raise NotImplementedError

    def measure(self, model: Any, rows: Dataset, batch_size: int) -> Prediction:
        """Return metrics and loss over whole encoded examples; the model is left in its mode."""
        raise NotImplementedError

    def predict(self, model: Any, split: str, batch_size: int) -> Prediction:
        """Return metrics and loss over the whole of a split, when the training is over."""
        return self.measure(model, self.rows[split], batch_size)

    def guess(self, split: str) -> dict[str, float]:
        """Return the metrics of a split for a constant answer; empty where there is none."""
        return {}

    def describe(self, adapter: Path) -> None:
        """Write the tokenizer, and what the model's outputs mean, into the folder of its adapter."""
