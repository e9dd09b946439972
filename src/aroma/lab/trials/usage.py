"""What a run costs: training time by epoch, wall and CPU time, peak memory."""

from __future__ import annotations

import math
import time
from typing import Any

from ..memory import peak_bytes


class Usage:
    """Counts from its making on; what earlier attempts of the same run had used up to its checkpoint is added.

    Attributes:
        epochs: Training time of each epoch begun, in seconds; the last need not be whole. Evaluations, checkpoints and
            the records of a trial do not count.
    """

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self._wall, self._cpu = time.monotonic(), time.process_time()
        self._earlier = {"wall_seconds": 0.0, "cpu_seconds": 0.0, "peak_memory_mib": 0.0}
        self._since = 0.0

    def begin(self) -> None:
        """Count training time from now on."""
        self._since = time.perf_counter()

    def end_step(self, epoch: float) -> None:
        """Add what has passed since `begin` to an epoch.

        Args:
            epoch: Epochs trained, fractions included, as the Trainer counts them.
        """
        now = time.perf_counter()
        index = math.ceil(epoch) - 1
        self.epochs += [0.0] * (index + 1 - len(self.epochs))
        self.epochs[index] += now - self._since
        self._since = now

    def total(self) -> dict[str, float]:
        """Return `wall_seconds`, `cpu_seconds` (all threads) and `peak_memory_mib` (resident) of the run so far."""
        return {
            "wall_seconds": self._earlier["wall_seconds"] + time.monotonic() - self._wall,
            "cpu_seconds": self._earlier["cpu_seconds"] + time.process_time() - self._cpu,
            "peak_memory_mib": max(self._earlier["peak_memory_mib"], peak_bytes() / 2**20),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what a later attempt has to add, JSON-able."""
        return {"epochs": self.epochs, "total": self.total()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Add what an earlier attempt had used when it wrote the checkpoint."""
        self.epochs, self._earlier = list(state["epochs"]), dict(state["total"])
