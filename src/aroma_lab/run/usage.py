"""What a run costs: training time by epoch, wall and CPU time, peak memory."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from .memory import peak_bytes, peak_gpu_bytes


class Usage:
    """Counts from its making on; what earlier attempts of the same run had used up to its checkpoint is added.

    Attributes:
        epochs: Training time of each epoch begun, in seconds; the last need not be whole. Evaluations, checkpoints and
            the records of a trial do not count.
    """

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self._wall, self._cpu = time.monotonic(), time.process_time()
        self._earlier: dict[str, float] = {
            "wall_seconds": 0.0,
            "cpu_seconds": 0.0,
            "peak_memory_mib": 0.0,
            "peak_gpu_memory_mib": 0.0,
        }
        self._since = 0.0

    def begin(self) -> None:
        """Count training time from now on."""
        self._since = _now()

    def end_step(self, epoch: float) -> None:
        """Add what has passed since `begin` to an epoch.

        Args:
            epoch: Epochs trained, fractions included, as the Trainer counts them.
        """
        now = _now()
        index = math.ceil(epoch) - 1
        self.epochs += [0.0] * (index + 1 - len(self.epochs))
        self.epochs[index] += now - self._since
        self._since = now

    def total(self) -> dict[str, float]:
        """Return what the run has cost so far.

        `wall_seconds`, `cpu_seconds` (all threads), `peak_memory_mib` (resident), and `peak_gpu_memory_mib` (allocated
        by PyTorch, 0 without a GPU).
        """
        return {
            "wall_seconds": self._earlier["wall_seconds"] + time.monotonic() - self._wall,
            "cpu_seconds": self._earlier["cpu_seconds"] + time.process_time() - self._cpu,
            "peak_memory_mib": max(self._earlier["peak_memory_mib"], peak_bytes() / 2**20),
            "peak_gpu_memory_mib": max(self._earlier["peak_gpu_memory_mib"], peak_gpu_bytes() / 2**20),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what a later attempt has to add, JSON-able."""
        return {"epochs": self.epochs, "total": self.total()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Add what an earlier attempt had used when it wrote the checkpoint."""
        self.epochs, self._earlier = list(state["epochs"]), dict(state["total"])


def _now() -> float:
    """Return the time, in seconds, when all that was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
