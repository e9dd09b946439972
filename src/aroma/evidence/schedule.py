"""When checkups come, and which held-out batches each of them uses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch

from ..errors import bad_value
from .statistics import SIZES

SHARE = 0.12
"""Largest share of a run's optimizer steps that all checkups together cost."""
FORWARD = 1 / 3
"""What a forward costs, in training steps; backward and optimizer are the rest."""
FEWEST, WANTED = 8, 16
"""Batches without which nothing is decided, and batches that are made where the examples allow."""


def moments(at: Sequence[float], total_steps: int) -> list[int]:
    """Return the optimizer steps after which a run of `total_steps` has a checkup, ascending.

    Raises:
        ConfigError: A share `at` that is not above 0 and at most 1, none at all, or two checkups after one step.
    """
    shares: list[Any] = [at] if isinstance(at, Real) else [*at]
    if not shares or not all(isinstance(share, Real) and 0 < float(share) <= 1 for share in shares):
        raise bad_value("at", at, "give shares of the run, each above 0 and at most 1, such as (0.4, 0.6)")
    steps = sorted({round(float(share) * total_steps) for share in shares})
    if steps[0] < 1 or len(steps) < len(shares):
        raise bad_value("at", at, f"{total_steps} steps are too few for these checkups; train longer, or give fewer")
    return steps


def batches_each(total_steps: int, checkups: int, batches: int, cost: float) -> int:
    """Return how many batches each checkup uses, so that all together cost `SHARE` of the run at most.

    In a very short run the fewest batches that decide anything cost more than that.

    Args:
        total_steps: Planned optimizer steps.
        checkups: How many checkups share the run.
        batches: Held-out batches that there are.
        cost: A training step on one of them, in optimizer steps.
    """
    affordable = SHARE * total_steps / (checkups * (SIZES + 1) * FORWARD * cost)
    return max(FEWEST, min(batches, int(affordable)))


class HeldOut:
    """Held-out batches in a seeded order: each comes once before any comes a second time.

    Args:
        batches: A list of batches, or a DataLoader, which is read once.
        seed: Seed of the order.

    Raises:
        ConfigError: There are too few, or they cannot be iterated.
    """

    def __init__(self, batches: Iterable[Any], seed: int = 0) -> None:
        if isinstance(batches, str | bytes | dict) or not isinstance(batches, Iterable):
            raise bad_value("held_out", type(batches).__name__, "give a list of batches, or a DataLoader")
        self.batches, self.seed, self.taken = [*batches], seed, 0
        if len(self) < FEWEST:
            remedy = f"{FEWEST} are needed to tell savings from noise; hold out more examples, or make batches smaller"
            raise bad_value("held_out", f"{len(self)} batches", remedy)

    def __len__(self) -> int:
        return len(self.batches)

    def take(self, count: int) -> list[Any]:
        """Return the next `count` batches."""
        places = [divmod(place, len(self)) for place in range(self.taken, self.taken + count)]
        self.taken += count
        orders = {pass_: self._order(pass_) for pass_ in {pass_ for pass_, _ in places}}
        return [self.batches[orders[pass_][place]] for pass_, place in places]

    def _order(self, pass_: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + pass_)
        order: list[int] = torch.randperm(len(self), generator=generator).tolist()
        return order
