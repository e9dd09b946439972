"""The batches of a whole run: the same ones for every method, by the number of the step."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import torch
from torch import Tensor

from ..specs import Recipe
from ..tasks.classification import encode
from ..tasks.data import Splits
from .settings import BenchSettings
from .shapes import make_batch

Batch = dict[str, Tensor]


class Batches(Protocol):
    """The data of a run.

    Attributes:
        steps_per_epoch: Optimizer steps of one pass over the examples.
    """

    steps_per_epoch: int

    def at(self, step: int) -> list[Batch]:
        """Return what goes through the model in optimizer step `step`, counted from 1, one forward pass an item."""


class RandomBatches:
    """Random tokens of full length: what time depends on, and nothing to learn.

    Args:
        model: The model that will read them.
        settings: Batch, length, seed and device.
        examples: Examples of an epoch; its last batch is as much smaller as theirs would be.
    """

    def __init__(self, model: Any, settings: BenchSettings, examples: int) -> None:
        self._model = model
        self._settings = settings
        self._examples = examples
        self.steps_per_epoch = math.ceil(examples / settings.batch_size)

    def at(self, step: int) -> list[Batch]:
        """Return the one batch of optimizer step `step`."""
        earlier = (step - 1) % self.steps_per_epoch * self._settings.batch_size
        size = min(self._settings.batch_size, self._examples - earlier)
        seed = self._settings.seed * 1_000_003 + step
        return [make_batch(self._model, dataclasses.replace(self._settings, batch_size=size, seed=seed))]


class RecipeBatches:
    """The training examples of a recipe, in an order drawn anew for every epoch.

    Args:
        recipe: Batch size, accumulation, length and seed.
        splits: Its data.
        tokenizer: The model's tokenizer.
        device: Where the batches go.
    """

    def __init__(self, recipe: Recipe, splits: Splits, tokenizer: Any, device: str) -> None:
        from transformers import DataCollatorWithPadding

        self._data = encode(splits.train, tokenizer, recipe.data.max_length)
        self._collate = DataCollatorWithPadding(tokenizer)
        self._size = recipe.training.batch_size
        self._passes = recipe.training.gradient_accumulation_steps
        self._seed = recipe.training.seed
        self._device = device
        self._order: tuple[int, list[int]] = (0, [])
        self.steps_per_epoch = math.ceil(math.ceil(len(splits.train) / self._size) / self._passes)

    def at(self, step: int) -> list[Batch]:
        """Return the batches of optimizer step `step`; of one epoch in turn, or its order is drawn again."""
        epoch, number = divmod(step - 1, self.steps_per_epoch)
        order = self._order_of(epoch + 1)
        first = number * self._passes * self._size
        starts = range(first, min(first + self._passes * self._size, len(order)), self._size)
        return [self._batch(order[start : start + self._size]) for start in starts]

    def _order_of(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(len(self._data), generator=generator).tolist())
        return self._order[1]

    def _batch(self, rows: list[int]) -> Batch:
        return {name: value.to(self._device) for name, value in self._collate([self._data[i] for i in rows]).items()}
