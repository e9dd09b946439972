"""What the processes that train one model agree on, and refuse together.

Functions with a `device` are collectives: every rank calls them, in the same order. One process agrees with itself,
bit for bit. The steps between checks call none of them, except the first step.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import compat, errors
from .errors import AromaError, ConfigError, bad_value

_DRIFT = 1e-3
"""Relative difference of a norm between replicas that rounding cannot explain: DDP keeps them equal bit for bit."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK_ELEMENTS = 2**22
"""A checksum sums at most this many elements of a parameter, as int64, at a time."""
_MESSAGE_BYTES = 4096


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


def agree(
    names: Sequence[str], norms: Sequence[float], values: Sequence[float | None], device: torch.device
) -> tuple[list[float], list[float | None]]:
    """Return norms, and values derived from them, that are the same on all ranks: the largest of any rank.

    Replicas are equal, so the largest is every rank's own number unless something is wrong. NaN on one rank becomes
    infinity on all, so that all stop together, and replicas that drifted apart are noticed.

    Args:
        names: What the norms are of.
        norms: Norms of parameters; NaN and infinity become infinity.
        values: Further numbers; None must be None on all ranks.
        device: A device whose tensors the process group can reduce.

    Raises:
        ConfigError: The norms of the ranks differ by more than rounding.
    """
    if not is_distributed() or not norms:
        return [*norms], [*values]
    own = [*norms, *(0.0 if value is None else value for value in values)]
    finite = [number if -torch.inf < number < torch.inf else torch.inf for number in own]
    sent = torch.tensor([finite, [-number for number in finite]], dtype=torch.float64, device=device)
    dist.all_reduce(sent, dist.ReduceOp.MAX)
    agreed, smallest = sent[0].tolist(), (-sent[1]).tolist()
    for name, most, least in zip(names, agreed, smallest, strict=False):
        if most < torch.inf and most - least > _DRIFT * most:
            raise ConfigError(
                f"{name}: its norm is {least:.6g} on one rank and {most:.6g} on another, so the replicas drift apart; "
                "wrap the model in DistributedDataParallel with this adapter active, call the wrapper and not the "
                "model inside, and let every rank take the same optimizer steps"
            )
    derived = zip(values, agreed[len(norms) :], strict=True)
    return agreed[: len(norms)], [None if value is None else number for value, number in derived]


def of_first_rank(number: int, device: torch.device) -> int:
    """Return rank 0's `number`."""
    if not is_distributed():
        return number
    sent = torch.tensor([number], dtype=torch.int64, device=device)
    dist.broadcast(sent, src=0)
    return int(sent)


# Refusals ------------------------------------------------------------------------------------------------------------


@contextmanager
def refuse_together(device: torch.device) -> Iterator[None]:
    """Raise on every rank what one of them raises in the block, which must hold no collective and no such block.

    Raises:
        AromaError: Of the kind that the first failing rank raised.
    """
    error: AromaError | None = None
    try:
        yield
    except AromaError as caught:
        error = caught
    size = world_size()
    first = rank() if error is not None else size
    if is_distributed():
        failed = torch.tensor([first], dtype=torch.int64, device=device)
        dist.all_reduce(failed, dist.ReduceOp.MIN)
        first = int(failed)
    if first == size:
        return
    text = f"{type(error).__name__}\n{error}".encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    sent = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    if is_distributed():
        dist.broadcast(sent, src=first)
    if error is not None:
        raise error
    kind, message = bytes(sent.tolist()).rstrip(b"\0").decode(errors="replace").split("\n", 1)
    raise getattr(errors, kind, ConfigError)(f"rank {first}: {message}")


def require_equal_replicas(
    facts: Mapping[str, object], tensors: Iterable[tuple[str, Tensor]], device: torch.device
) -> None:
    """Refuse to train replicas that differ, on every rank.

    Args:
        facts: What must be equal, by name; the names are the same on all ranks. Values are compared by their `repr`.
        tensors: Tensors (any shapes) that must be equal bit for bit, by name.
        device: A device whose tensors the process group can reduce.

    Raises:
        ConfigError: Naming the first fact or tensor that differs.
    """
    if not is_distributed():
        return
    named = dict(tensors)
    facts = {**facts, "model": [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in named.items()]}
    remedy = "it differs between the ranks; give every rank the same model and arguments"
    differing = _differing([_number_of(repr(value)) for value in facts.values()], device)
    if differing is not None:
        name, value = list(facts.items())[differing]
        raise bad_value(name, f"{len(value)} of them" if isinstance(value, list) else value, remedy)
    differing = _differing([_checksum(tensor) for tensor in named.values()], device)
    if differing is not None:
        raise bad_value("model", list(named)[differing], remedy)


def _number_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def _checksum(tensor: Tensor) -> Tensor:
    """Return the sum of the bits of `tensor` (any shape) as integers: exact, whatever the order and the device."""
    flat = tensor.detach().reshape(-1)
    bits = (torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat).view(_INTEGERS[flat.element_size()])
    return torch.stack([block.sum(dtype=torch.int64) for block in torch.split(bits, _BLOCK_ELEMENTS)]).sum()


def _differing(numbers: Sequence[int | Tensor], device: torch.device) -> int | None:
    """Return the index of the first number (or scalar tensor) that is not the same on all ranks."""
    if not numbers:
        return None
    own = torch.stack([torch.as_tensor(number, dtype=torch.int64).to(device) for number in numbers])
    # Complemented, not negated, because the least integer has no negative.
    sent = torch.stack([own, ~own])
    dist.all_reduce(sent, dist.ReduceOp.MAX)
    indices = (sent[0] != ~sent[1]).nonzero()
    return int(indices[0]) if len(indices) else None
