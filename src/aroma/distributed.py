"""What the processes that train one model agree on, and refuse together.

Every rank calls the functions of the last two sections, in the same order. The steps between checks call none of
them, except the first step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import compat
from .errors import AromaError, ConfigError, shown_value

T = TypeVar("T")

_DRIFT = 1e-3
"""Relative difference of a norm between replicas that rounding cannot explain: DDP keeps them equal bit for bit."""


def world_size() -> int:
    """Return the number of processes that train together; 1 outside of a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process among those that train together; 0 outside of a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_distributed() -> bool:
    """Whether more than one process trains."""
    return world_size() > 1


def processes_of_node() -> int:
    """Return the number of processes on this machine, as torchrun says it; without torchrun, all of them."""
    return min(int(os.environ.get("LOCAL_WORLD_SIZE", world_size())), world_size())


# Wrappers ------------------------------------------------------------------------------------------------------------


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model that DistributedDataParallel, DeepSpeed or torch.compile wraps, or `model` itself."""
    if isinstance(model, DistributedDataParallel) or is_engine(model):
        return unwrapped(model.module)  # type: ignore[arg-type]
    inner = compat.compiled_module(model)
    return model if inner is None else unwrapped(inner)


def unwrapped_optimizer(optimizer: Any) -> Any:
    """Return the optimizer that accelerate wraps, or `optimizer` itself, which may be one of DeepSpeed."""
    return optimizer if is_zero(optimizer) else getattr(optimizer, "optimizer", optimizer)


def is_zero(optimizer: Any) -> bool:
    """Whether DeepSpeed made `optimizer`."""
    return any(kind.__name__ in ("ZeROOptimizer", "DeepSpeedOptimizer") for kind in type(optimizer).__mro__)


def is_engine(model: nn.Module) -> bool:
    """Whether `model` is an engine of DeepSpeed."""
    return any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__)


# Decisions -----------------------------------------------------------------------------------------------------------


def agree(names: Sequence[str], norms: Sequence[float], device: torch.device) -> list[float]:
    """Return norms, of parameters with these names, that are the same on all ranks: the largest of any rank.

    Replicas are equal, so the largest is every rank's own number unless something is wrong. NaN on one rank becomes
    infinity on all, so that all stop together. The process group can reduce tensors on `device`.

    Raises:
        ConfigError: The norms of the ranks differ by more than rounding.
    """
    if not is_distributed() or not norms:
        return [*norms]
    finite = [number if -torch.inf < number < torch.inf else torch.inf for number in norms]
    sent = torch.tensor([finite, [-number for number in finite]], dtype=torch.float64, device=device)
    dist.all_reduce(sent, dist.ReduceOp.MAX)
    agreed: list[float] = sent[0].tolist()
    for name, most, least in zip(names, agreed, (-sent[1]).tolist(), strict=True):
        if most < torch.inf and most - least > _DRIFT * most:
            raise ConfigError(
                f"{name}: its norm is {least:.6g} on one rank and {most:.6g} on another, so the replicas drift apart; "
                "wrap the model in DistributedDataParallel with this adapter active, call the wrapper and not the "
                "model inside, and let every rank take the same optimizer steps"
            )
    return agreed


def of_first_rank(value: T) -> T:
    """Return rank 0's `value`, which must be picklable; a collective."""
    sent = [value]
    if is_distributed():
        dist.broadcast_object_list(sent, src=0)
    return sent[0]


# Refusals ------------------------------------------------------------------------------------------------------------


@contextmanager
def refuse_together() -> Iterator[None]:
    """Raise on every rank what one of them raises in the block, which must hold no collective and no such block.

    Raises:
        AromaError: Of the kind that the first failing rank raised; its own error, of any kind, on a rank that failed.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    said = _of_all_ranks(None if error is None else _told(error))
    if error is not None:
        raise error
    for number, found in enumerate(said):
        if found is not None:
            kind, message = found
            raise kind(f"rank {number}: {message}")


def _told(error: Exception) -> tuple[type[AromaError], str]:
    """Return kind and message of the error that the other ranks raise."""
    if isinstance(error, AromaError):
        return type(error), str(error)
    return AromaError, f"{type(error).__name__}: {error}"


def require_equal(facts: Mapping[str, object]) -> None:
    """Raise ConfigError on every rank for the first of `facts`, by name, whose `repr` differs between the ranks."""
    own = {f"{name}={shown_value(value)}": repr(value) for name, value in facts.items()}
    for theirs in _of_all_ranks([*own.values()]):
        for said, mine, other in zip(own, own.values(), theirs, strict=True):
            if mine != other:
                raise ConfigError(
                    f"{said}: it differs between the ranks; give every rank the same model and arguments"
                )


def _of_all_ranks(own: Any) -> list[Any]:
    """Return what every rank gives, which must be picklable; a collective."""
    found = [own] * world_size()
    if is_distributed():
        dist.all_gather_object(found, own)
    return found
