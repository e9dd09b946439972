"""Held-out examples: they train nothing. They end the trial, and decide growth once all others have been seen."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from .. import compat
from ..algorithm.evidence import flips_to_birth
from ..errors import bad_value
from ..evaluation import evaluating
from ..sharding import world_size

Loss = Callable[[nn.Module, Any], Tensor]
"""Maps a model and a batch to a scalar loss."""

_MOST_ROWS = 50_000
"""Most rows of the training set, and of the held-out ones, that are compared."""


class HeldOutDataset:
    """Batches of a data set, in a random order that depends on a seed alone; each process has its own.

    A batch has as many micro-batches as an optimizer step accumulates. It has fewer where the examples would not do
    for the batches that end the trial.

    Args:
        dataset: The examples, by index.
        batch_size: Examples of a micro-batch of one process.
        accumulated: Micro-batches of an optimizer step.
        questions: Batches that end the trial.
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
        accumulated: int,
        questions: int,
        collate: Callable[[list[Any]], Any],
        seed: int,
        rank: int,
        loss: Loss | None,
        significance: float,
    ) -> None:
        self._dataset, self._collate, self._seed, self._rank = dataset, collate, seed, rank
        self._batch_size = batch_size
        self._loss = loss or model_loss
        together = batch_size * world_size()
        self._micro_batches = max(min(len(dataset) // (together * questions), accumulated), 1)
        together *= self._micro_batches
        self.count = len(dataset) // together
        said = f"{len(dataset)} examples, {self.count} batches of {together}"
        require_enough(self.count, "growth_dataset", said, significance)

    def losses(self, model: nn.Module, number: int) -> Iterator[Tensor]:
        """Yield the scalar losses of this process's batch `number`; after the last batch comes another order."""
        for micro_batch in range(self._micro_batches):
            yield loss_of(self._loss, model, self._micro_batch(number, micro_batch))

    def require_loss(self, model: nn.Module) -> None:
        """Find out now, not at the end of the trial, that `model` computes no loss of a batch without labels.

        Raises:
            ConfigError: It does not, and no loss was given.
        """
        batch = self._micro_batch(0, 0)
        if self._loss is not model_loss or (isinstance(batch, Mapping) and any("label" in name for name in batch)):
            return
        with torch.no_grad(), evaluating(model):
            loss_of(self._loss, model, batch)

    def _micro_batch(self, number: int, micro_batch: int) -> Any:
        round_, place = divmod(number, self.count)
        generator = torch.Generator().manual_seed(self._seed + round_)
        order = torch.randperm(len(self._dataset), generator=generator)
        start = ((place * world_size() + self._rank) * self._micro_batches + micro_batch) * self._batch_size
        rows = order[start : start + self._batch_size].tolist()
        return self._collate([self._dataset[row] for row in rows])


class HeldOutBatches:
    """Batches from an iterable of a plain loop; one that can be iterated again begins anew when it ends.

    What it draws, as a DataLoader that shuffles does, comes from a stream of its own: a resumed run sees the same
    batches, and a training draws the same random numbers with them and without.

    Args:
        batches: The batches of this process.
        loss: See `Loss`; by default what the model returns as its loss.
        rank: Number of this process.
        significance: α.

    Raises:
        ConfigError: Too few batches.
    """

    def __init__(self, batches: Iterable[Any], loss: Loss | None, rank: int, significance: float) -> None:
        self._batches = batches
        self.count = len(batches) if isinstance(batches, Sized) else None
        self._loss = loss or model_loss
        self._iterator: Iterator[Any] | None = None
        self._taken = 0
        self._random = torch.Generator().manual_seed(rank).get_state()
        if self.count is not None:
            require_enough(self.count, "growth_batches", f"{self.count} batches", significance)

    def losses(self, model: nn.Module, number: int) -> Iterator[Tensor]:
        """Yield the scalar loss of batch `number`, which is one micro-batch; those before it are passed over.

        Raises:
            ConfigError: The batches have ended, and cannot be iterated again.
        """
        with torch.random.fork_rng([]):
            torch.set_rng_state(self._random)
            while self._taken < number:
                self._next()
            batch = self._next()
            self._random = torch.get_rng_state()
        yield loss_of(self._loss, model, batch)

    def _next(self) -> Any:
        self._taken += 1
        ended = object()
        self._iterator = iter(self._batches) if self._iterator is None else self._iterator
        batch = next(self._iterator, ended)
        if batch is ended:
            self._iterator = iter(self._batches)
            batch = next(self._iterator, ended)
        if batch is ended:
            raise bad_value(
                "growth_batches", "exhausted", "give a list or a DataLoader, which can be iterated again when it ends"
            )
        return batch


def require_enough(batches: int, field: str, said: str, significance: float) -> None:
    """Refuse fewer held-out batches than a birth takes.

    Raises:
        ConfigError: Naming `field` and what was `said` of it.
    """
    least = flips_to_birth(significance)
    if batches < least:
        raise bad_value(
            field,
            said,
            f"it takes {least} batches to reach significance={significance}; hold out more, make batches smaller, or "
            "raise significance",
        )


def hold_out(dataset: Any, share: float = 0.1, seed: int = 0) -> tuple[Any, Any]:
    """Split a data set into one to train on and one that decides growth, at random.

    .. code-block:: python

        train, growth = hold_out(dataset)
        Trainer(model=model, train_dataset=train, callbacks=[AromaCallback(growth_dataset=growth)], ...).train()

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
    return _rows_of(dataset, train), _rows_of(dataset, growth)


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
            "and a batch that returns the training loss (for TRL's trainers of preferences and rewards, "
            "callback.growth_loss = trainer.compute_loss)",
        )
    return loss


def with_columns_of(training: Any, held_out: Any) -> Any:
    """Return held-out examples with the columns of the training set, from which the Trainer drops what no model reads.

    Raises:
        ConfigError: They lack one.
    """
    kept, own = (getattr(dataset, "column_names", None) for dataset in (training, held_out))
    if not isinstance(kept, list) or not isinstance(own, list):
        return held_out
    missing = [name for name in kept if name not in own]
    if missing:
        raise bad_value(
            "growth_dataset",
            f"columns {', '.join(own)}",
            f"the training set has {', '.join(missing)}; prepare both in the same way. SFTTrainer prepares what it is "
            "given: give it these examples as eval_dataset, and set callback.growth_dataset = trainer.eval_dataset",
        )
    return held_out.select_columns(kept)


def without_trained(held_out: Any, training: Any) -> Any:
    """Return the held-out examples that are not trained on: of the others all looks steep that is learnt by heart.

    Data sets have examples twice, and a split by chance parts some of them. The first 50,000 rows are compared.

    Raises:
        ConfigError: There are none, both sets are the same, or they share more than half of the held-out examples.

    Warns:
        UserWarning: They share fewer, which are left out.
    """
    if not len(held_out):
        raise bad_value("growth_dataset", "empty", "hold out some examples, as aroma.hold_out does")
    shared = {} if held_out is training else _shared_rows(held_out, training)
    if not shared and held_out is not training:
        return held_out
    row, trained = next(iter(shared.items()), (0, 0))
    said = f"its row {row} is row {trained} of the training set" if shared else "it is the training set"
    if held_out is training or 2 * len(shared) > len(held_out):
        raise bad_value(
            "growth_dataset",
            f"{len(held_out)} examples",
            f"{said}; growth must be decided on examples that are not trained on: split them first, "
            "train, growth = aroma.hold_out(dataset)",
        )
    warnings.warn(
        f"growth_dataset: {len(shared)} of {len(held_out)} examples are trained on, too ({said}). They are left out",
        stacklevel=2,
    )
    return _rows_of(held_out, [row for row in range(len(held_out)) if row not in shared])


def _shared_rows(held_out: Any, training: Any) -> dict[int, int]:
    """Return which row of the training set each shared row of the held-out examples is."""
    if not hasattr(training, "__getitem__") or not hasattr(training, "__len__"):
        return {}
    known = {_digest(training[row]): row for row in reversed(range(min(len(training), _MOST_ROWS)))}
    found = {row: known.get(_digest(held_out[row])) for row in range(min(len(held_out), _MOST_ROWS))}
    return {row: trained for row, trained in found.items() if trained is not None}


def _rows_of(dataset: Any, rows: list[int]) -> Any:
    return dataset.select(rows) if hasattr(dataset, "select") else torch.utils.data.Subset(dataset, rows)


def _digest(example: Any) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    _feed(digest, example)
    return digest.digest()


def _feed(digest: Any, value: Any) -> None:
    """Feed an example, so that lists, arrays and tensors of the same numbers are alike."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float().numpy() if value.is_floating_point() else value.numpy()
    elif isinstance(value, Sequence) and value and isinstance(value[0], int | float):
        value = np.asarray(value)
    if isinstance(value, Mapping):
        for key in sorted(value):
            digest.update(f"{key}:".encode())
            _feed(digest, value[key])
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for item in value:
            digest.update(b",")
            _feed(digest, item)
    elif isinstance(value, np.ndarray | np.number) and value.dtype.kind in "biuf":
        digest.update(np.asarray(value, dtype=np.float32 if value.dtype.kind == "f" else np.int64).tobytes())
    elif isinstance(value, int | float):
        _feed(digest, np.asarray(value))
    else:
        digest.update(repr(value).encode())


def loss_of(loss: Loss, model: nn.Module, batch: Any) -> Tensor:
    """Return the scalar loss of a batch, which is moved to where the model computes."""
    # Weights that are offloaded are on the meta device, and their hooks bring inputs to where they compute.
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    with compat.without_metrics(loss):
        return loss(model, send_to_device(batch, device))
