"""Several examples a row, each attending to itself only: positions restart, and transformers masks accordingly."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aroma.errors import bad_value

if TYPE_CHECKING:
    from datasets import Dataset

_LEAKAGE = 0.1
"""A packed example may differ from itself alone by rounding, but by no such share of what a neighbour would do."""


def pack(data: Dataset, max_length: int) -> Dataset:
    """Put examples together into rows: the longest first, each where it leaves the least room.

    Args:
        data: Rows of `encode_conversations`, none over the limit.
        max_length: Most tokens of a row.

    Returns:
        Rows with `input_ids`, `labels`, `position_ids` (restarting at 0 with every example) and `length`.
    """
    from datasets import Dataset

    examples = list(data)
    packed = []
    for indices in pack_lengths([len(example["input_ids"]) for example in examples], max_length):
        parts = [examples[index] for index in indices]
        lengths = [len(part["input_ids"]) for part in parts]
        packed.append(
            {
                "input_ids": list(chain.from_iterable(part["input_ids"] for part in parts)),
                "labels": list(chain.from_iterable(part["labels"] for part in parts)),
                "position_ids": list(chain.from_iterable(map(range, lengths))),
                "length": sum(lengths),
            }
        )
    return Dataset.from_list(packed)


def pack_lengths(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Return rows of indices by best fit decreasing, the same for the same lengths.

    Args:
        lengths: Tokens of each example, each at most `most`.
        most: Most tokens of a row.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # room and index of every row that has some, sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        place = bisect_left(rooms, (length, -1))
        if place < len(rooms):
            room, row = rooms.pop(place)
        else:
            room, row = most, len(rows)
            rows.append([])
        rows[row].append(index)
        if room > length:
            insort(rooms, (room - length, row))
    return rows


@torch.no_grad()
def require_packing_works(model: Any) -> None:
    """Try two short sequences, in one row and alone; the model is left as it was.

    Args:
        model: A causal language model.

    Raises:
        ConfigError: What an example gives depends on its neighbours in the row.
    """
    words = model.get_input_embeddings().num_embeddings
    first, second = ((7 * torch.arange(5) + 1) % words, (5 * torch.arange(7) + 2) % words)
    row = torch.cat([first, second])
    positions = torch.cat([torch.arange(len(first)), torch.arange(len(second))])
    training = model.training
    model.eval()
    try:
        alone = torch.cat([_logits(model, first), _logits(model, second)])
        together, mixed = _logits(model, row, positions), _logits(model, row)
    finally:
        model.train(training)
    leaked, whole = ((other - alone).abs().mean().item() for other in (together, mixed))
    if not leaked <= _LEAKAGE * whole:
        raise bad_value(
            "language.packing",
            True,
            f"{type(model).__name__} lets examples of one row see each other (their logits change by {leaked:.3g}); "
            "set language.packing to false",
        )


def _logits(model: Any, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    """Return the logits of one row, shape (tokens, words)."""
    inputs = {"input_ids": tokens[None].to(model.device)}
    if positions is not None:
        inputs["position_ids"] = positions[None].to(model.device)
    logits: Tensor = model(**inputs, use_cache=False).logits[0].float()
    return logits
