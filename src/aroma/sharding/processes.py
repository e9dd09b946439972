"""What the processes that train one model (DistributedDataParallel, FSDP2) must agree on.

Functions with a `device` are collectives: every rank calls them, in the same order. A process alone agrees with
itself, bit for bit. No step calls one, but the first under ZeRO: a check calls one, and a few are called at the start.
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

from .. import errors
from ..errors import AromaError, ConfigError, bad_value
from .fsdp2 import refuse_other_shards
from .zero import is_zero, refuse_other_zero

_DRIFT = 1e-3
"""Relative difference of a norm between replicas that no rounding explains: DDP keeps them equal bit for bit."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_BLOCK_ELEMENTS = 2**22
"""Most elements of a parameter that are summed, as int64, at a time."""

_MESSAGE_BYTES = 4096

_REMEDY = (
    "AROMA trains in one process, under DistributedDataParallel, under FSDP2 (torch.distributed.fsdp.fully_shard) and "
    "under DeepSpeed's ZeRO: launch with one of these"
)

_SHARDED = {
    "FlatParameter": "a parameter of FSDP1, which has no shape of its own",
    "FullyShardedDataParallel": "a module of FSDP1, which flattens the pairs of many modules into one parameter",
    "PipelineEngine": "an engine of DeepSpeed whose stages are on different ranks",
    "ZeroRedundancyOptimizer": "an optimizer that keeps a share of its state on every rank",
}
"""Classes by name, so that nothing is imported to look for them."""


def world_size() -> int:
    """Return the number of processes that train together; 1 outside of a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_distributed() -> bool:
    """Whether more than one process trains."""
    return world_size() > 1


def processes_of_node() -> int:
    """Return the number of processes on this machine, as torchrun says it; without torchrun, all of them."""
    return min(int(os.environ.get("LOCAL_WORLD_SIZE", world_size())), world_size())


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model that DistributedDataParallel, DeepSpeed or torch.compile wraps, or `model` itself."""
    while True:
        if isinstance(model, DistributedDataParallel) or _is_engine(model):
            model = model.module  # type: ignore[assignment]
        elif "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            return model


def unwrapped_optimizer(optimizer: Any) -> Any:
    """Return the optimizer that accelerate wraps, or `optimizer` itself; the one that DeepSpeed wraps is its own."""
    return optimizer if is_zero(optimizer) else getattr(optimizer, "optimizer", optimizer)


def base_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer that takes the steps, within accelerate's wrapper and DeepSpeed's."""
    inner = unwrapped_optimizer(optimizer)
    base: torch.optim.Optimizer = inner.optimizer if is_zero(inner) else inner
    return base


def _is_engine(model: nn.Module) -> bool:
    return any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__)


# Decisions -----------------------------------------------------------------------------------------------------------


def agree(
    names: Sequence[str], norms: Sequence[float], values: Sequence[float | None], device: torch.device
) -> tuple[list[float], list[float | None]]:
    """Return norms, and values derived from them, that are the same on all ranks: the largest of any rank.

    Replicas are equal, so this is every rank's own number, except where something is wrong: a rank with NaN makes it
    infinite everywhere, so that all ranks stop together, and replicas that drifted apart are noticed.

    Args:
        names: What the norms are of.
        norms: Norms of parameters; NaN and infinity become infinity.
        values: Further numbers; None, where it is one, on all ranks.
        device: A device that the process group can reduce tensors of.

    Raises:
        ConfigError: The norms of the ranks differ by more than rounding.
    """
    if not is_distributed() or not norms:
        return [*norms], [*values]
    own = [*norms, *(0.0 if value is None else value for value in values)]
    finite = [number if -torch.inf < number < torch.inf else torch.inf for number in own]
    largest, smallest = _extremes(torch.tensor(finite, dtype=torch.float64), device)
    for name, most, least in zip(names, largest.tolist(), smallest.tolist(), strict=False):
        if most < torch.inf and most - least > _DRIFT * most:
            raise ConfigError(
                f"{name}: its norm is {least:.6g} on one rank and {most:.6g} on another, so the replicas drift apart; "
                "wrap the model in DistributedDataParallel (or let accelerate or the Trainer do it) before "
                "training, call it and not the model inside, and let every rank take the same optimizer steps"
            )
    agreed = largest.tolist()
    derived = zip(values, agreed[len(norms) :], strict=True)
    return agreed[: len(norms)], [None if value is None else number for value, number in derived]


def of_first_rank(number: int, device: torch.device) -> int:
    """Return rank 0's `number`."""
    if not is_distributed():
        return number
    sent = torch.tensor([number], dtype=torch.int64, device=device)
    dist.broadcast(sent, src=0)
    return int(sent)


@contextmanager
def refuse_together(device: torch.device) -> Iterator[None]:
    """Let every rank raise what one of them raises in the block, which must hold no collective and no such block."""
    error: AromaError | None = None
    try:
        yield
    except AromaError as caught:
        if not is_distributed():
            raise
        error = caught
    if is_distributed():
        _raise_first(error, device)


def _raise_first(error: AromaError | None, device: torch.device) -> None:
    rank, size = dist.get_rank(), world_size()
    failed = torch.tensor([size if error is None else rank], dtype=torch.int64, device=device)
    dist.all_reduce(failed, dist.ReduceOp.MIN)
    first = int(failed)
    if first == size:
        return
    text = f"{type(error).__name__}\n{error}".encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    sent = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    dist.broadcast(sent, src=first)
    if error is not None:
        raise error
    kind, message = bytes(sent.tolist()).rstrip(b"\0").decode(errors="replace").split("\n", 1)
    raise getattr(errors, kind, ConfigError)(f"rank {first}: {message}")


# Replicas ------------------------------------------------------------------------------------------------------------


def require_equal_replicas(
    facts: Mapping[str, object], tensors: Iterable[tuple[str, Tensor]], device: torch.device
) -> None:
    """Refuse to train replicas that differ, on every rank.

    Args:
        facts: What must be equal, by name; the names are the same on all ranks. Values are compared by their `repr`.
        tensors: Tensors that must be equal bit for bit, by name.
        device: A device that the process group can reduce tensors of.

    Raises:
        ConfigError: Naming the first fact or tensor that differs.
    """
    if not is_distributed():
        return
    named = [*tensors]
    facts = {**facts, "model": [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in named]}
    differing = _differing([_number_of(repr(value)) for value in facts.values()], device)
    if differing is not None:
        name, value = list(facts.items())[differing]
        shown = f"{len(value)} of them" if isinstance(value, list) else value
        raise bad_value(name, shown, "it differs between the ranks; give every rank the same model and arguments")
    differing = _differing([_checksum(tensor) for _, tensor in named], device)
    if differing is not None:
        raise bad_value(
            "model",
            named[differing][0],
            "it differs between the ranks, so they would train different models; load the same weights on every rank "
            "and wrap the model in DistributedDataParallel before the controller is made",
        )


def refuse_sharding(model: nn.Module, optimizer: Any) -> None:
    """Refuse every way of sharing a model or its optimizer out but FSDP2 with rows over all processes, and ZeRO.

    Raises:
        ConfigError: A parameter, module or optimizer that is sharded otherwise.
    """
    inner = unwrapped_optimizer(optimizer)
    for part in (optimizer, inner, *model.modules(), *model.parameters()):
        for kind in type(part).__mro__:
            if kind.__name__ in _SHARDED:
                raise bad_value(
                    "optimizer" if part is optimizer or part is inner else "model",
                    kind.__name__,
                    f"it is {_SHARDED[kind.__name__]}. {_REMEDY}",
                )
    refuse_other_shards(model, world_size())
    if is_zero(inner):
        refuse_other_zero(unwrapped(model), inner, world_size())
    elif _is_engine(model) or type(optimizer).__name__ == "DeepSpeedOptimizerWrapper":
        raise bad_value(
            "optimizer",
            type(inner).__name__,
            "the model is an engine of DeepSpeed, and this is no optimizer that it shares out: give engine.optimizer, "
            "and set zero_optimization.stage to 1, 2 or 3",
        )


def _number_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def _checksum(tensor: Tensor) -> Tensor:
    """Return the sum of the bits of `tensor` as integers: exact, whatever the order and the device."""
    flat = tensor.detach().reshape(-1)
    bits = (torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat).view(_INTEGERS[flat.element_size()])
    return torch.stack([block.sum(dtype=torch.int64) for block in bits.split(_BLOCK_ELEMENTS)]).sum()


def _differing(numbers: Sequence[int | Tensor], device: torch.device) -> int | None:
    """Return the place of the first number that is not the same on all ranks."""
    if not numbers:
        return None
    own = torch.stack([torch.as_tensor(number, dtype=torch.int64).to(device) for number in numbers])
    largest, smallest = _extremes(own, device)
    places = (largest != smallest).nonzero()
    return int(places[0]) if len(places) else None


def _extremes(numbers: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the largest and the smallest of every number over all ranks, in one collective."""
    # Of integers the complement: the least of them has no negative.
    mirrored = -numbers if numbers.is_floating_point() else ~numbers
    sent = torch.stack([numbers, mirrored]).to(device)
    dist.all_reduce(sent, dist.ReduceOp.MAX)
    return sent[0], -sent[1] if numbers.is_floating_point() else ~sent[1]
