"""Which steps of a long run are measured, and in which order the methods take them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def draw_steps(steps: int, steps_per_epoch: int, every: int, seed: int) -> dict[int, int]:
    """Draw one step of every `every` steps of an epoch.

    At random, not at a fixed distance: what a method does every ten steps would else be met always or never.

    Args:
        steps: Optimizer steps of the run.
        steps_per_epoch: Optimizer steps of an epoch; no block of steps reaches into the next one.
        every: Length of a block.
        seed: Seed of the draw.

    Returns:
        By the number of a drawn step, the length of the block that it stands for; the lengths add up to `steps`.
    """
    generator = random.Random(seed)
    drawn = {}
    for epoch in range(1, steps + 1, steps_per_epoch):
        end = min(epoch + steps_per_epoch, steps + 1)
        for first in range(epoch, end, every):
            behind = min(first + every, end)
            drawn[generator.randrange(first, behind)] = behind - first
    return drawn


def turn_order(arms: Sequence[T], turn: int) -> list[T]:
    """Return `arms` rotated by one place more every turn, so that none is always the first."""
    start = turn % len(arms)
    return [*arms[start:], *arms[:start]]
