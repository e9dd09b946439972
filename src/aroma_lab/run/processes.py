"""The processes that train one model: those that torchrun started, or this one alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from aroma.errors import bad_value
from aroma.sharding import processes_of_node, refuse_together, world_size

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of a launch, as this one sees them.

    Args:
        state: accelerate's.
    """

    state: Any

    @classmethod
    def join(cls) -> Processes:
        """Join the launch; each process has one device."""
        from accelerate import PartialState

        return cls(PartialState(cpu=not torch.accelerator.is_available()))

    @property
    def number(self) -> int:
        """How many there are."""
        return world_size()

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return bool(self.state.is_main_process)

    def together(self) -> AbstractContextManager[None]:
        """Return a context in which an error of one process is raised in all."""
        return refuse_together(self.state.device)

    def of_first(self, compute: Callable[[], T]) -> T:
        """Return what the first process computes, in every process; it is pickled between them."""
        if self.number == 1:
            return compute()
        from accelerate.utils import broadcast_object_list

        values = [compute() if self.is_first else None]
        broadcast_object_list(values)
        return cast(T, values[0])

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.state.wait_for_everyone()

    def leave(self) -> None:
        """Leave the process group, at the end."""
        self.state.destroy_process_group()


def require_as_many(checkpoint: str | None) -> None:
    """Refuse to go on from a checkpoint of another number of processes: its batches would be others.

    Args:
        checkpoint: A checkpoint of the Trainer, which saves the random numbers of every process of a machine in a file
            of its own; None for none.

    Raises:
        ConfigError: There were more of them, or fewer.
    """
    if checkpoint is None:
        return
    before, now = max(1, len([*Path(checkpoint).glob("rng_state_*.pth")])), processes_of_node()
    if before != now:
        raise bad_value(
            "--nproc-per-node",
            now,
            f"{checkpoint} is of {before} on this machine, and a step would have other examples; start {before}",
        )
