"""The processes that train one model: those that torchrun started, or this one alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from aroma.errors import bad_value
from aroma.sharding import processes_of_node

T = TypeVar("T")


def join() -> PartialState:
    """Join the launch of torchrun, if there is one; each process has one device."""
    return PartialState(cpu=not torch.accelerator.is_available())


def of_first(processes: PartialState, compute: Callable[[], T]) -> T:
    """Return what the first process computes, in every process; it is pickled between them."""
    values = [compute() if processes.is_main_process else None]
    if processes.num_processes > 1:
        broadcast_object_list(values)
    return cast(T, values[0])


def require_as_many(checkpoint: str | None) -> None:
    """Raise ConfigError for a checkpoint of another number of processes: its batches would be others."""
    if checkpoint is None:
        return
    # The Trainer saves the random numbers of every process of a machine in a file of its own.
    before, now = max(1, len([*Path(checkpoint).glob("rng_state_*.pth")])), processes_of_node()
    if before != now:
        remedy = f"{checkpoint} is of {before} on this machine, and a step would have other examples; start {before}"
        raise bad_value("--nproc-per-node", now, remedy)
