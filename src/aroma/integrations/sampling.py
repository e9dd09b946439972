"""What trainers of TRL train on that sample their examples themselves: GRPO and RLOO."""

from __future__ import annotations

from typing import Any


class Samples:
    """Tells which batches of a trainer that samples its examples are new.

    It samples for `batches` batches at once, and trains on all of them `passes` times before it samples again. Only in
    the first pass are they something that the model has not been trained on.

    Args:
        batches: Batches that are sampled at once.
        passes: How often each is trained on.
    """

    def __init__(self, batches: int, passes: int) -> None:
        self._batches, self._passes = batches, passes
        self._taken = 0
        self._are_new = True

    @classmethod
    def of(cls, args: Any) -> Samples | None:
        """Return those of a trainer with these arguments; None where it trains on a data set."""
        batches, passes = getattr(args, "steps_per_generation", None), getattr(args, "num_iterations", None)
        return cls(batches, passes) if isinstance(batches, int) and isinstance(passes, int) else None

    def count(self) -> None:
        """Note that a batch was trained on."""
        self._are_new &= self._taken % (self._batches * self._passes) < self._batches
        self._taken += 1

    def are_new(self) -> bool:
        """Return whether all batches since the last call were."""
        were_new, self._are_new = self._are_new, True
        return were_new
