"""The job of a task whose right answer is made: everything follows from a seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from ..training.job import Job, Prediction

if TYPE_CHECKING:
    from datasets import Dataset

Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]
"""Makes a batch of rows."""


class Made(NamedTuple):
    """What a made task trains and is measured on.

    Args:
        load: Returns the base model, a new one at every call.
        collate: Makes a batch of rows.
        rows: Rows by split; the columns of some are no arguments of the model, and make the batch.
        measure: Called with model, rows and batch size, returns metrics and loss.
    """

    load: Callable[[], PreTrainedModel]
    collate: Collate
    rows: Mapping[str, Dataset]
    measure: Callable[[Any, Dataset, int], Prediction]


@dataclass(frozen=True)
class MadeJob(Job):
    """A made base model that learns a right answer; see `Job`, and `make`, which is called once, when it is needed."""

    examples: dict[str, int]
    evaluated: tuple[str, ...]
    metric: str
    make: Callable[[], Made]
    planted: Mapping[str, int] | None = None
    tokenizer: Any = None
    counts_items: bool = False

    keeps_columns = True

    @cached_property
    def _made(self) -> Made:
        return self.make()

    @property
    def rows(self) -> Mapping[str, Dataset]:  # type: ignore[override]
        """The rows by split."""
        return self._made.rows

    @property
    def collator(self) -> Collate:  # type: ignore[override]
        """Makes batches of them."""
        return self._made.collate

    def load_model(self) -> Any:
        """Return the base; a new one at every call."""
        return self._made.load()

    def measure(self, model: Any, rows: Dataset, batch_size: int) -> Prediction:
        """Return metrics and loss over rows."""
        return self._made.measure(model, rows, batch_size)
