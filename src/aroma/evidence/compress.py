"""Compressing a LoRA adapter that has finished, from any trainer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .checkup import Checkup, Loss, check, model_loss
from .checkups import listed, require_standard_errors
from .compact import compact
from .schedule import Effort, HeldOut
from .updates import Updates


@dataclass(frozen=True)
class Compression:
    """What became of a compressed adapter.

    Args:
        checkup: What was asked, and what it said.
        ranks: Rank of each adapted weight afterwards, by its name.
        parameters_before: Parameters of the adapter's factors.
        parameters: The same afterwards.
    """

    checkup: Checkup
    ranks: dict[str, int]
    parameters_before: int
    parameters: int


def compress(
    model: nn.Module, held_out: Iterable[Any], *, standard_errors: float = 0.0, loss: Loss | None = None
) -> Compression:
    """Keep the directions of a finished LoRA adapter that save loss on held-out batches, and make it compact.

    .. code-block:: python

        model = PeftModel.from_pretrained(base, "adapter")
        print(compress(model, held_out_batches).checkup)
        model.save_pretrained("smaller")

    Args:
        model: A model with an active LoRA adapter of PEFT, in one process.
        held_out: Batches of examples that it was not trained on: a list, or a DataLoader, which is read once. All of
            them are asked, ten times each.
        standard_errors: How many standard errors of held-out loss a smaller adapter may cost; 0 keeps the least loss.
        loss: Loss of a model and a batch; that which the model returns by default.

    Raises:
        ConfigError: No LoRA adapter, too few batches, a sharded model, or a value out of range.
    """
    require_standard_errors(standard_errors)
    updates, batches = Updates(model), HeldOut(listed(held_out))
    before = _parameters(updates)
    found = check(updates, batches, loss or model_loss, Effort(len(batches), len(batches)), standard_errors, 0)
    ranks = compact(model)
    return Compression(found, ranks, before, _parameters(Updates(model)))


def _parameters(updates: Updates) -> int:
    return sum(parameter.numel() for update in updates.each for parameter in update.pair)
