"""Examples that are held out of training, so that they can decide."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch.utils.data import IterableDataset, Subset

from ..errors import bad_value, is_whole


def hold_out(dataset: Any, share: float = 0.1, seed: int = 0) -> tuple[Any, Any]:
    """Split a data set into one to train on and one that decides, at random.

    .. code-block:: python

        train, held_out = hold_out(dataset)

    Args:
        dataset: A `datasets.Dataset`, or any data set with a length and items by index.
        share: Share of the examples that is held out, in (0, 1).
        seed: Seed of the choice.

    Returns:
        What to train on, and the held-out examples.

    Raises:
        ConfigError: A share that leaves one of them empty, a seed that is none, several splits, or a stream.
    """
    # A stream may have a length, and inherits a __getitem__ that fails; the items of pandas are columns.
    has_rows = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and not hasattr(dataset, "iloc")
    if not has_rows or isinstance(dataset, Mapping | IterableDataset | str):
        remedy = "it has no examples by index; give one split of a datasets.Dataset, a list or a torch Dataset"
        raise bad_value("dataset", type(dataset).__name__, remedy)
    is_share = isinstance(share, Real) and 0 < share < 1
    held = round(len(dataset) * float(share)) if is_share else 0
    if not is_whole(seed, 0, 2**63):
        raise bad_value("seed", seed, "give a whole number, 0 or more")
    if not 0 < held < len(dataset):
        remedy = "give a share like 0.1" if len(dataset) >= 10 else "there are too few to hold any out"
        raise bad_value("share", share, f"of {len(dataset)} examples it leaves one part empty; {remedy}")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(int(seed))).tolist()
    return rows_of(dataset, sorted(order[held:])), rows_of(dataset, sorted(order[:held]))


def rows_of(dataset: Any, rows: list[int]) -> Any:
    """Return a part of a data set."""
    return dataset.select(rows) if hasattr(dataset, "select_columns") else Subset(dataset, rows)
