"""What is to be trained, apart from how: encoded examples, and what a Trainer makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainingArguments


@dataclass(frozen=True)
class TrainerKind:
    """Whose training loop, as TRL's in place of transformers'.

    Args:
        trainer_class: A Trainer with `training.trainer.ExactResume` mixed in; None for transformers' own.
        arguments_class: Makes its arguments from those of `TrainingArguments`; None for `TrainingArguments`.
    """

    trainer_class: type[Any] | None = None
    arguments_class: Callable[..., TrainingArguments] | None = None


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
        trainer: Whose training loop.
    """

    collator: Any
    processor: Any
    metrics: Callable[[Any], dict[str, float]] | None
    choice: str
    higher_is_better: bool = True
    counts_items: bool = False
    evaluate: Callable[[Any, Dataset, int], dict[str, float]] | None = None
    trainer: TrainerKind = field(default_factory=TrainerKind)


class Prediction(NamedTuple):
    """Metrics by name over a whole set, and the mean loss of an example or, of a language model, a learned token."""

    metrics: dict[str, float]
    loss: float


class Job(Protocol):
    """A task ready for the one training loop; only a method and a training section are missing."""

    @property
    def objective(self) -> Objective:
        """What the Trainer makes of the encoded examples."""

    @property
    def train(self) -> Dataset:
        """The encoded training examples."""

    @property
    def eval_sets(self) -> dict[str, Dataset]:
        """What may be evaluated during training, by split."""

    @property
    def evaluated(self) -> tuple[str, ...]:
        """The splits that are evaluated at the end."""

    @property
    def examples(self) -> dict[str, int]:
        """Numbers of examples by split, of training too."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the examples: how many were cut or left out, and why."""

    def load_model(self) -> Any:
        """Return the pretrained model; its head, if it has one, is drawn from the global random numbers."""

    def predict(self, trainer: Any, split: str) -> Prediction:
        """Return metrics and loss over the whole of a split."""

    def describe(self, model: Any, adapter: Path) -> None:
        """Write the tokenizer, and what the outputs of `model` mean, into the folder of its adapter."""
