"""The job of a task whose right answer is made: everything follows from a seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..training.job import Job, Prediction

if TYPE_CHECKING:
    from datasets import Dataset

Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]
"""Makes a batch of rows."""


@dataclass(frozen=True)
class MadeJob(Job):
    """A made base model that learns a right answer; see `Job`.

    Args:
        load: Returns the base model, a new one at every call.
        measured: Called with model, rows and batch size, returns metrics and loss.
    """

    metric: str
    evaluated: tuple[str, ...]
    load: Callable[[], Any]
    collator: Collate
    rows: Mapping[str, Dataset]
    measured: Callable[[Any, Dataset, int], Prediction]
    planted: Mapping[str, int] | None = None
    tokenizer: Any = None
    counts_items: bool = False

    @property
    def examples(self) -> dict[str, int]:
        """Numbers of examples by split."""
        return {split: len(some) for split, some in self.rows.items()}

    def load_model(self) -> Any:
        """Return the base; a new one at every call."""
        return self.load()

    def measure(self, model: Any, rows: Dataset, batch_size: int) -> Prediction:
        """Return metrics and loss over rows."""
        return self.measured(model, rows, batch_size)
