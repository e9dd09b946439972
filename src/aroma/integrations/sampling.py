"""What trainers of TRL train on that sample their examples themselves: GRPO and RLOO."""

from __future__ import annotations

import math
from typing import Any


class Samples:
    """Tells on which optimizer steps a trainer that samples its examples trains on new ones.

    It samples for `batches` batches at once, and trains on all of them `passes` times before it samples again. A batch
    is new if no earlier optimizer step has trained on it.

    Args:
        batches: Batches that are sampled at once.
        passes: How often each is trained on.
    """

    def __init__(self, batches: int, passes: int) -> None:
        self._batches, self._passes = batches, passes
        self._taken = self._begun = 0
        self._are_new = True

    @classmethod
    def of(cls, args: Any) -> Samples | None:
        """Return those of a trainer with these arguments; None where it trains on a data set."""
        batches, passes = getattr(args, "steps_per_generation", None), getattr(args, "num_iterations", None)
        return cls(batches, passes) if isinstance(batches, int) and isinstance(passes, int) else None

    def count(self) -> None:
        """Note that a batch was trained on."""
        round_ = self._batches * self._passes
        first = self._taken // round_ * round_ + self._taken % self._batches
        self._are_new &= first >= self._begun
        self._taken += 1

    def end_step(self) -> bool:
        """Note the end of an optimizer step, and return whether all its batches were new."""
        were_new, self._are_new, self._begun = self._are_new, True, self._taken
        return were_new

    def share_new(self, accumulated: int) -> float:
        """Return the share of the optimizer steps, of so many batches each, that train on new ones."""
        steps = math.lcm(self._batches * self._passes, accumulated) // accumulated
        other = Samples(self._batches, self._passes)
        found = []
        for _ in range(steps):
            for _ in range(accumulated):
                other.count()
            found.append(other.end_step())
        return sum(found) / steps
