"""Held-out examples: they train nothing, and decide growth once the training examples have all been seen."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..algorithm.evidence import flips_to_birth
from ..errors import bad_value
from ..sharding import world_size

Loss = Callable[[nn.Module, Any], Tensor]
"""Maps a model and a batch to a scalar loss."""

_MOST_ROWS = 50_000
"""Most rows of the training set that are compared with the held-out ones."""


class HeldOutDataset:
    """Batches of a data set, in a random order that depends on a seed alone; each process has its own.

    Args:
        dataset: The examples, by index.
        batch_size: Examples of a batch of one process.
        collate: Makes a batch of a list of examples.
        seed: Seed of the order.
        rank: Number of this process.
        loss: See `Loss`; by default what the model returns as its loss.
        significance: α: fewer batches than a birth takes could never decide.

    Raises:
        ConfigError: Too few examples.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        collate: Callable[[list[Any]], Any],
        seed: int,
        rank: int,
        loss: Loss | None,
        significance: float,
    ) -> None:
        self._dataset, self._collate, self._seed, self._rank = dataset, collate, seed, rank
        self._batch_size = batch_size
        self._loss = loss or model_loss
        least = flips_to_birth(significance)
        together = batch_size * world_size()
        if len(dataset) < least * together:
            raise bad_value(
                "growth_dataset",
                f"{len(dataset)} examples",
                f"it takes {least} batches to reach significance={significance}, so {least * together} examples in "
                f"batches of {together}; hold out more, or raise significance",
            )
        self._batches = len(dataset) // together

    def loss(self, model: nn.Module, number: int) -> Tensor:
        """Return the scalar loss of this process's batch `number`; after the last batch comes another order."""
        round_, place = divmod(number, self._batches)
        generator = torch.Generator().manual_seed(self._seed + round_)
        order = torch.randperm(len(self._dataset), generator=generator)
        start = (place * world_size() + self._rank) * self._batch_size
        rows = order[start : start + self._batch_size].tolist()
        return _loss_of(self._loss, model, self._collate([self._dataset[row] for row in rows]))


class HeldOutBatches:
    """Batches from an iterable of a plain loop; one that can be iterated again begins anew when it ends.

    Args:
        batches: The batches of this process.
        loss: See `Loss`; by default what the model returns as its loss.
    """

    def __init__(self, batches: Iterable[Any], loss: Loss | None) -> None:
        self._batches = batches
        self._loss = loss or model_loss
        self._iterator: Iterator[Any] = iter(batches)
        self._taken = 0

    def loss(self, model: nn.Module, number: int) -> Tensor:
        """Return the scalar loss of batch `number`; those before it are passed over.

        Raises:
            ConfigError: The batches have ended, and cannot be iterated again.
        """
        while self._taken < number:
            self._next()
        return _loss_of(self._loss, model, self._next())

    def _next(self) -> Any:
        self._taken += 1
        ended = object()
        batch = next(self._iterator, ended)
        if batch is ended:
            self._iterator = iter(self._batches)
            batch = next(self._iterator, ended)
        if batch is ended:
            raise bad_value(
                "growth_batches", "exhausted", "give a list or a DataLoader, which can be iterated again when it ends"
            )
        return batch


def hold_out(dataset: Any, share: float = 0.1, seed: int = 0) -> tuple[Any, Any]:
    """Split a data set into one to train on and one that decides growth, at random.

    Args:
        dataset: A `datasets.Dataset`, or any data set with a length and items by index.
        share: Share of the examples that is held out, in (0, 1).
        seed: Seed of the choice.

    Returns:
        What to train on, and the held-out examples, for `AromaCallback(growth_dataset=...)`.

    Raises:
        ConfigError: A share that leaves one of them empty.
    """
    held = round(len(dataset) * share) if 0 < share < 1 else 0
    if not 0 < held < len(dataset):
        raise bad_value("share", share, f"of {len(dataset)} examples it leaves one part empty; give a share like 0.1")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    train, growth = sorted(order[held:]), sorted(order[:held])
    if hasattr(dataset, "select"):
        return dataset.select(train), dataset.select(growth)
    return torch.utils.data.Subset(dataset, train), torch.utils.data.Subset(dataset, growth)


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss that `model` computes of `batch`, a mapping with labels.

    Raises:
        ConfigError: It computes none.
    """
    output = model(**batch) if isinstance(batch, Mapping) else model(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise bad_value(
            "growth_loss",
            None,
            f"{type(model).__name__} returns no loss for a held-out batch; give growth_loss=, a function of the model "
            "and a batch that returns the training loss",
        )
    return loss


def refuse_overlap(held_out: Any, training: Any) -> None:
    """Refuse held-out examples that are trained on: of them everything looks steep that is learnt by heart.

    Raises:
        ConfigError: Both are the same, or have a row in common among the first 50,000.
    """
    if not len(held_out):
        raise bad_value("growth_dataset", "empty", "hold out some examples, as aroma.hold_out does")
    shared = "it is the training set" if held_out is training else _shared_row(held_out, training)
    if shared:
        raise bad_value(
            "growth_dataset",
            f"{len(held_out)} examples",
            f"{shared}; growth must be decided on examples that are not trained on: split them first, "
            "train, growth = aroma.hold_out(dataset)",
        )


def _shared_row(held_out: Any, training: Any) -> str | None:
    if not hasattr(training, "__getitem__") or not hasattr(training, "__len__"):
        return None
    known = {_digest(held_out[row]): row for row in range(min(len(held_out), _MOST_ROWS))}
    for row in range(min(len(training), _MOST_ROWS)):
        found = known.get(_digest(training[row]))
        if found is not None:
            return f"its row {found} is row {row} of the training set"
    return None


def _digest(example: Any) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    _feed(digest, example)
    return digest.digest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for key in sorted(value):
            digest.update(str(key).encode())
            _feed(digest, value[key])
    elif isinstance(value, Tensor):
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for item in value:
            _feed(digest, item)
    else:
        digest.update(repr(value).encode())


def _loss_of(loss: Loss, model: nn.Module, batch: Any) -> Tensor:
    parameter = next(model.parameters())
    with _without_dropout(model):
        found = loss(model, send_to_device(batch, parameter.device))
    if found.numel() != 1 or not math.isfinite(float(found.detach())):
        raise bad_value("growth_loss", found.detach(), "it must return one finite number")
    return found.reshape(())


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluate the model as in an evaluation, but with gradients: no dropout, and no random number is drawn."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
