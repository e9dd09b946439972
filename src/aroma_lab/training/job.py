"""What is to be trained, apart from how: a task whose examples are read, checked and encoded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .objective import Objective

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Prediction:
    """What a model says of a whole set.

    Args:
        metrics: Metrics by name, each over all examples of the set.
        loss: Mean loss, of an example or, of a language model, of a learned token.
    """

    metrics: dict[str, float]
    loss: float


class Job(Protocol):
    """A task ready for the one training loop; a method and a training section are all that lacks."""

    @property
    def objective(self) -> Objective:
        """What the Trainer makes of the encoded examples."""

    @property
    def train(self) -> Dataset:
        """The encoded training examples."""

    @property
    def watched(self) -> dict[str, Dataset]:
        """What may be evaluated on the way, by split."""

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
