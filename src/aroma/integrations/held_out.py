"""Examples that are held out of training, so that they can decide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import IterableDataset, Subset

from ..errors import bad_value


def hold_out(dataset: Any, share: float = 0.1, seed: int = 0) -> tuple[Any, Any]:
    """Split a data set into a training set and a held-out set, at random.

    .. code-block:: python

        train, held_out = hold_out(dataset)

    Args:
        dataset: A `datasets.Dataset`, or any data set with a length and items by index.
        share: Share of the examples that is held out, in (0, 1).
        seed: Seed of the choice.

    Returns:
        The training examples, and the held-out ones.

    Raises:
        ConfigError: There are no examples by index, or the share leaves one part empty.
    """
    if isinstance(dataset, IterableDataset | Mapping) or not hasattr(dataset, "__len__"):
        remedy = "it has no examples by index; give one split of a datasets.Dataset, a list or a torch Dataset"
        raise bad_value("dataset", type(dataset).__name__, remedy)
    held = round(len(dataset) * share)
    if not 0 < held < len(dataset):
        raise bad_value("share", share, f"of {len(dataset)} examples it leaves one part empty; give a share like 0.1")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    return rows_of(dataset, sorted(order[held:])), rows_of(dataset, sorted(order[:held]))


def rows_of(dataset: Any, rows: list[int]) -> Any:
    """Return a part of a data set."""
    return dataset.select(rows) if hasattr(dataset, "select_columns") else Subset(dataset, rows)
