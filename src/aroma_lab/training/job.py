"""What is to be trained, apart from how: encoded examples, and what a Trainer makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainingArguments


@dataclass(frozen=True)
class Objective:
    """What differs between kinds of tasks inside the one training loop.

    Args:
        collator: Makes batches of encoded examples.
        processor: The tokenizer, which goes into the checkpoints.
        metrics: The Trainer's `compute_metrics`; None where the loss is all that is measured during training.
        choice: Metric that a checkpoint is chosen by, where one is, as the Trainer calls it without `eval_`.
        higher_is_better: Whether higher values of it are better.
        counts_items: Whether the loss of a step is the mean over all items of its micro-batches, as it is over the
            tokens of a language model; False: the mean of the micro-batches' means.
        evaluate: Evaluates a set in place of the Trainer: called with the model, the encoded examples and the batch
            size, it returns metrics by name, `loss` among them. None: the Trainer evaluates.
        trainer_class: A Trainer with `training.trainer.ExactResume` mixed in; None for transformers' own.
        arguments_class: Makes its arguments from those of `TrainingArguments`; None for `TrainingArguments`.
    """

    collator: Any
    processor: Any
    metrics: Callable[[Any], dict[str, float]] | None
    choice: str
    higher_is_better: bool = True
    counts_items: bool = False
    evaluate: Callable[[Any, Dataset, int], dict[str, float]] | None = None
    trainer_class: type[Any] | None = None
    arguments_class: Callable[..., TrainingArguments] | None = None


class Prediction(NamedTuple):
    """Metrics by name over a whole set, and the mean loss of an example or, of a language model, a learned token."""

    metrics: dict[str, float]
    loss: float


class Job:
    """A task ready for the one training loop; only a method and a training section are missing.

    Attributes:
        metric: Name of the metric that is the score.
        planted: Ranks of the right answer by module; None where it is unknown.
        notes: What a user should know of the examples: how many were cut or left out, and why.
        objective: What the Trainer makes of the encoded examples.
        train: The encoded training examples.
        eval_sets: The encoded examples of the other splits, the held-out ones first.
        evaluated: The splits that are evaluated at the end. The first is the held-out one, evaluated on the way, too.
        examples: Numbers of examples by split, of training too.
    """

    metric: str
    planted: Mapping[str, int] | None = None
    notes: tuple[str, ...] = ()
    objective: Any
    train: Any
    eval_sets: Any
    evaluated: Any
    examples: Any

    def load_model(self) -> Any:
        """Return the pretrained model; its head, if it has one, is drawn from the global random numbers."""
        raise NotImplementedError

    def predict(self, trainer: Any, split: str) -> Prediction:
        """Return metrics and loss over the whole of a split."""
        raise NotImplementedError

    def guess(self, split: str) -> dict[str, float]:
        """Return the metrics of a split for a constant answer; empty where there is none."""
        return {}

    def describe(self, model: Any, adapter: Path) -> None:
        """Write the tokenizer, and what the outputs of `model` mean, into the folder of its adapter."""
