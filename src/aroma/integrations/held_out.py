"""Held-out examples: they train nothing. They end the trial, and decide growth once all others have been seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from itertools import chain, islice
from numbers import Real
from typing import Any

import torch
from accelerate.utils import send_to_device
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from .. import compat
from ..algorithm.budget import QUESTIONS
from ..algorithm.duels import flips_to_birth
from ..errors import AromaError, bad_value
from ..evaluation import evaluating, require_loss
from ..sharding import refuse_together, sharding_of_model, world_size
from ..tuner.state import is_whole
from .overlap import require_indexed, rows_of

Loss = Callable[[nn.Module, Any], Tensor]
"""Maps a model and a batch to a scalar loss."""


class HeldOutDataset:
    """Batches of a data set, in a random order that depends on a seed alone; each process has its own.

    A batch has as many micro-batches as an optimizer step accumulates. It has fewer where the examples would not do
    for the batches that end the trial, and fewer examples where there would not be batches enough for a birth.

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
        least = max(flips_to_birth(significance), QUESTIONS[0])
        if len(dataset) < least * batch_size * world_size():
            self._batch_size = batch_size = max(len(dataset) // (least * world_size()), 1)
        together = batch_size * world_size()
        self._micro_batches = max(min(len(dataset) // (together * questions), accumulated), 1)
        together *= self._micro_batches
        self.count = len(dataset) // together
        require_enough(self.count, "growth_dataset", f"{len(dataset)} examples", significance)

    def losses(self, model: nn.Module, number: int) -> Iterator[Tensor]:
        """Yield the scalar losses of this process's batch `number`; after the last batch comes another order."""
        for micro_batch in range(self._micro_batches):
            yield loss_of(self._loss, model, self._micro_batch(number, micro_batch))

    def require_loss(self, model: nn.Module, device: torch.device) -> None:
        """Find out now, not at the end of the trial, whether a batch has a loss; see `_require_loss_of`."""
        with refuse_together(device):
            first = self._first()
        _require_loss_of("growth_dataset", self._loss, model, first, device)

    def _first(self) -> Any:
        """Return the first batch; raise `ConfigError` where the collator fails on it."""
        try:
            return self._micro_batch(0, 0)
        except _FAILURES as error:
            if should_reduce_batch_size(error):
                raise
            remedy = f"no batch can be made of them {_told(error)}; prepare them as the training set is"
            raise bad_value("growth_dataset", f"{len(self._dataset)} examples", remedy) from error

    def _micro_batch(self, number: int, micro_batch: int) -> Any:
        round_, place = divmod(number, self.count)
        generator = torch.Generator().manual_seed(self._seed + round_)
        order = torch.randperm(len(self._dataset), generator=generator)
        start = ((place * world_size() + self._rank) * self._micro_batches + micro_batch) * self._batch_size
        rows = order[start : start + self._batch_size].tolist()
        return self._collate([self._dataset[row] for row in rows])


_MOST_KEPT = 256
"""Batches of an iterator that come again when it ends: all of a held-out set, and not all of an endless stream."""


class HeldOutBatches:
    """Batches from an iterable of a plain loop, which begin anew when they end.

    Those of an iterator, as of a generator, are kept for that, the first 256 of them.

    What it draws, as a DataLoader that shuffles does, comes from a stream of its own: a resumed run sees the same
    batches, and a training draws the same random numbers with them and without.

    Args:
        batches: The batches of this process.
        loss: See `Loss`; by default what the model returns as its loss.
        rank: Number of this process.
        significance: α.
        questions: Batches that end the trial. As many are taken of an iterator now, to know whether it has fewer.

    Raises:
        ConfigError: Too few batches.
    """

    def __init__(
        self, batches: Iterable[Any], loss: Loss | None, rank: int, significance: float, questions: int
    ) -> None:
        self._batches = batches
        self._loss = loss or model_loss
        self._iterator: Iterator[Any] | None = None
        self._kept: list[Any] = []
        self._taken = 0
        self._random = torch.Generator().manual_seed(rank).get_state()
        if isinstance(batches, str | bytes | Mapping) or not isinstance(batches, Iterable):
            remedy = "it is no iterable of batches; give a list of batches or a DataLoader"
            raise bad_value("growth_batches", type(batches).__name__, remedy)
        self.count = _length_of(batches)
        if self.count is None:
            if world_size() > 1:
                remedy = (
                    "without a length a process could run out of them before the others; give a list or a DataLoader"
                )
                raise bad_value("growth_batches", type(batches).__name__, remedy)
            wanted = max(questions, flips_to_birth(significance))
            with self._drawing():
                first = [*islice(iterator := iter(batches), wanted)]
            self._iterator = chain(first, iterator)
            self.count = len(first) if len(first) < wanted else None
        if self.count is not None:
            require_enough(self.count, "growth_batches", f"{self.count} batches", significance, "make batches smaller")

    def require_loss(self, model: nn.Module, device: torch.device) -> None:
        """Find out now, not at the end of the trial, whether a batch has a loss; see `_require_loss_of`."""
        with self._drawing(keep=False):
            first = next(iterator := self._running())
        if self._iterator is not None:
            self._iterator = chain([first], iterator)
        _require_loss_of("growth_batches", self._loss, model, first, device)

    def _running(self) -> Iterator[Any]:
        return iter(self._batches) if self._iterator is None else self._iterator

    @contextmanager
    def _drawing(self, *, keep: bool = True) -> Iterator[None]:
        """Draw random numbers from the stream of its own; without `keep` the same ones come again."""
        with torch.random.fork_rng([]):
            torch.set_rng_state(self._random)
            yield
            if keep:
                self._random = torch.get_rng_state()

    def losses(self, model: nn.Module, number: int) -> Iterator[Tensor]:
        """Yield the scalar loss of batch `number`, which is one micro-batch; those before it are passed over.

        Raises:
            ConfigError: The batches have ended, and say that they can be iterated again, but give none.
        """
        with self._drawing():
            while self._taken < number:
                self._next()
            batch = self._next()
        yield loss_of(self._loss, model, batch)

    def _next(self) -> Any:
        self._taken += 1
        ended = object()
        self._iterator = self._running()
        batch = next(self._iterator, ended)
        if batch is ended:
            if isinstance(self._batches, Iterator):
                self._batches = self._kept
            self._iterator = iter(self._batches)
            batch = next(self._iterator, ended)
        elif isinstance(self._batches, Iterator) and len(self._kept) < _MOST_KEPT:
            self._kept.append(batch)
        if batch is ended:
            raise bad_value(
                "growth_batches", "exhausted", "give a list or a DataLoader, which can be iterated again when it ends"
            )
        return batch


def _length_of(batches: Iterable[Any]) -> int | None:
    """Return the number of batches; None for an iterator, and for a DataLoader of a stream."""
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:
        return None


_FAILURES = (TypeError, ValueError, LookupError, AttributeError, RuntimeError)
"""What a model, a loss or a collator raises of examples that it was not made for."""


def _told(error: Exception) -> str:
    return f"({type(error).__name__}: {str(error)[:200]})"


def _require_loss_of(field: str, loss: Loss, model: nn.Module, batch: Any, device: torch.device) -> None:
    """Raise where a held-out batch has no loss that gradients can be asked of; all ranks call this together.

    Under ZeRO-3 the end of the trial finds out. Of several processes labels vouch for the loss of a model.

    Raises:
        ConfigError: The model computes none or fails, or `growth_loss` fails or returns something else.
    """
    if sharding_of_model(model).remembers_forwards:
        return
    is_labelled = isinstance(batch, Mapping) and any("label" in name for name in batch)
    if loss is model_loss and is_labelled and world_size() > 1:
        return
    error: AromaError | None = None
    try:
        with torch.enable_grad(), evaluating(model):
            require_loss(loss_of(loss, model, batch))
    except AromaError as raised:
        error = raised
    except _FAILURES as raised:
        if should_reduce_batch_size(raised):  # out of memory; accelerate tries smaller batches then, if it is asked to
            raise
        said = _told(raised)
        if loss is model_loss:
            remedy = f"{type(model).__name__} fails on a batch of them {said}; prepare them as the "
            remedy += "training set is, or give growth_loss="
            error = bad_value(field, type(batch).__name__, remedy)
        else:
            remedy = "give a function of the model and such a batch that returns the training loss"
            name = getattr(loss, "__name__", type(loss).__name__)
            error = bad_value("growth_loss", name, f"it fails on a held-out batch {said}; {remedy}")
        error.__cause__ = raised
    with refuse_together(device):
        if error is not None:
            raise error


def refuse_unread(examples: str, given: Mapping[str, Any], *, has_slots: bool) -> None:
    """Refuse what is given and not read: by the paper's rule all, by growth by evidence a loss without `examples`.

    Args:
        examples: Name of the argument that holds the held-out examples.
        given: Values of the arguments that only growth by evidence reads, by name; None where not given.
        has_slots: Whether evidence decides.

    Raises:
        ConfigError: Naming the first.
    """
    names = [name for name, value in given.items() if value is not None]
    if names and not has_slots:
        raise bad_value(names[0], "given", "only growth='evidence' reads it; set that in AromaConfig, or leave it out")
    if "growth_loss" in names and examples not in names:
        raise bad_value("growth_loss", "given", f"it is that of {examples}, which is missing; give both")


def require_enough(batches: int, field: str, said: str, significance: float, *remedies: str) -> None:
    """Refuse fewer held-out batches than a birth takes.

    Raises:
        ConfigError: Naming `field`, what was `said` of it, and `remedies` beside those that always help.
    """
    least = flips_to_birth(significance)
    if batches < least:
        remedy = ", ".join(["hold out more", *remedies])
        needed = f"it takes {least} batches to reach significance={significance}"
        raise bad_value(field, said, f"{needed}; {remedy}, or raise significance")


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
        ConfigError: A share that leaves one of them empty, a seed that is none, several splits, or a stream.
    """
    require_indexed("dataset", dataset)
    is_share = isinstance(share, Real) and 0 < share < 1
    held = round(len(dataset) * float(share)) if is_share else 0
    if not is_whole(seed, 0, 2**63):
        raise bad_value("seed", seed, "give a whole number, 0 or more")
    if not 0 < held < len(dataset):
        remedy = "give a share like 0.1" if len(dataset) >= 10 else "there are too few to hold any out"
        raise bad_value("share", share, f"of {len(dataset)} examples it leaves one part empty; {remedy}")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(int(seed))).tolist()
    train, growth = sorted(order[held:]), sorted(order[:held])
    return rows_of(dataset, train), rows_of(dataset, growth)


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
            f"{type(model).__name__} returns no loss for a held-out batch; give the examples labels, or growth_loss=, "
            "a function of the model and a batch that returns the training loss",
        )
    return loss


def loss_of(loss: Loss, model: nn.Module, batch: Any) -> Tensor:
    """Return the scalar loss of a batch, which is moved to where the model computes."""
    # Weights that are offloaded are on the meta device, and their hooks bring inputs to where they compute.
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    with compat.without_metrics(loss):
        return loss(model, send_to_device(batch, device))
