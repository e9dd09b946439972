"""Parameters that FSDP2 (`torch.distributed.fsdp.fully_shard`) or ZeRO-3 has shared out: read, written and measured.

Under FSDP2 every rank holds a block of rows of each parameter, a `DTensor`; for ZeRO see there. The pairs are small,
so checks gather them, all of them in one collective; base weights never leave their ranks. Functions that say "a
collective" are called by all ranks, in the same order; of tensors that are not sharded all of this does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from ..errors import bad_value
from . import zero
from .zero import Partition

Factors = tuple[Tensor, Tensor]
"""Left and right factor, (m, R) and (R, n)."""

_ALIGNMENT = 16
"""Bytes at a multiple of which a tensor of any dtype may begin."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of `tensor` only.

    Under ZeRO-3 it may hold the whole for a while as well, which is never read: it may have been rounded on its way.
    """
    return isinstance(tensor, DTensor) or zero.is_partitioned(tensor)


def layout(tensor: Tensor) -> tuple[Any, ...]:
    """Return how a sharded tensor is shared out: two that are equal in this have the same rows on every rank."""
    assert isinstance(tensor, DTensor)
    return tensor.shape, tensor.device_mesh, tensor.placements


def local(tensor: Tensor) -> Tensor:
    """Return the part of `tensor` that this process holds: detached, plain, and sharing its memory."""
    with torch.no_grad():
        return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def own_rows(tensor: Tensor) -> slice:
    """Return which entries of the sharded dimension this process holds; the last ranks may hold none."""
    assert isinstance(tensor, DTensor)
    length = tensor.shape[_sharded_dimension(tensor)]
    most = -(-length // tensor.device_mesh.size())
    start = min(tensor.device_mesh.get_local_rank() * most, length)
    return slice(start, min(start + most, length))


def communicating_device(parameter: Tensor) -> torch.device:
    """Return a device that the process group can reduce tensors of: not the CPU that shards may be offloaded to."""
    return torch.device(parameter.device_mesh.device_type) if isinstance(parameter, DTensor) else parameter.device


@torch.no_grad()
def write(target: Tensor, values: Tensor) -> None:
    """Put `values`, the same whole tensor on all ranks, into `target`, in place; no collective."""
    if zero.is_partitioned(target) or zero.is_flattened(target):
        zero.write(target, values)
        return
    local(target).copy_(values[own_rows(target)] if isinstance(target, DTensor) else values)


def shared_out(values: Tensor, like: Tensor) -> Tensor:
    """Return `values`, the same whole tensor on all ranks, sharded as `like` is; no collective."""
    if not isinstance(like, DTensor):
        return values
    own = values[own_rows(like)].to(local(like)).contiguous()
    return DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@torch.no_grad()
def gathered(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return `tensors` with the sharded ones whole, bit for bit the same on all ranks: a collective if there are any.

    Their bytes are summed, and every byte comes from one rank alone: one collective whatever the dtypes, and no more
    memory than the result.
    """
    sharded = [tensor for tensor in tensors if is_sharded(tensor)]
    if not sharded:
        return [*tensors]
    found = iter(_gathered_rows(sharded) if isinstance(sharded[0], DTensor) else zero.gathered(sharded))
    return [next(found) if is_sharded(tensor) else tensor for tensor in tensors]


def _gathered_rows(sharded: Sequence[Any]) -> list[Tensor]:
    """Return tensors of FSDP2's whole."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in sharded]
    mesh = sharded[0].device_mesh
    flat = torch.zeros(sum(map(_aligned, sizes)), dtype=torch.uint8, device=mesh.device_type)
    pieces = flat.split([*map(_aligned, sizes)])
    whole = [
        piece[:size].view(tensor.dtype).view(tensor.shape)
        for piece, size, tensor in zip(pieces, sizes, sharded, strict=True)
    ]
    for part, tensor in zip(whole, sharded, strict=True):
        part[own_rows(tensor)] = local(tensor).to(part.device)
    dist.all_reduce(flat, group=mesh.get_group())
    return whole


def summed(
    measure: Callable[[Tensor, Tensor, Tensor], Tensor],
    weights: Sequence[Callable[[], Tensor | Partition]],
    factors: Sequence[Factors],
) -> list[Tensor]:
    """Return `measure(W, B, A)`, a sum over the entries of W, of every module: a collective if any W is sharded.

    Every rank measures the rows (of Conv1D, columns) of W that it holds, with the same rows of B (columns of A); under
    ZeRO-3 the rectangles that its entries make up.

    Args:
        measure: Maps W, or a block of it, and the factors to a scalar tensor.
        weights: W (m, n) of every module, by call.
        factors: B (m, R) and A (R, n) of every module, whole.
    """
    values: list[Tensor] = []
    sharded: list[tuple[int, torch.device, Any]] = []
    for index, (weight, (B, A)) in enumerate(zip(weights, factors, strict=True)):
        # In a function: of copies, as of a quantised weight, one is there at a time.
        value, where = _measured(measure, weight(), B, A)
        values.append(value)
        if where is not None:
            sharded.append((index, *where))
    if sharded:
        _, device, group = sharded[0]
        sums = torch.stack([values[index].to(device) for index, *_ in sharded])
        dist.all_reduce(sums, group=group)
        for (index, *_), value in zip(sharded, sums, strict=True):
            values[index] = value
    return values


def _measured_blocks(
    measure: Callable[[Tensor, Tensor, Tensor], Tensor], W: Partition, B: Tensor, A: Tensor
) -> Tensor:
    """Return the measure of what this rank holds of W under ZeRO-3, on the device of the factors."""
    parts = [measure(block.to(B.device), B[rows], A[:, columns]) for block, rows, columns in W.blocks()]
    return torch.stack(parts).sum() if parts else measure(*(tensor.new_zeros(0, 0) for tensor in (B, B, A)))


def _measured(
    measure: Callable[[Tensor, Tensor, Tensor], Tensor], W: Tensor | Partition, B: Tensor, A: Tensor
) -> tuple[Tensor, tuple[torch.device, Any] | None]:
    """Return the measure of what this rank holds of W, and the device and group over which that is to be summed."""
    if isinstance(W, Partition):
        value = _measured_blocks(measure, W, B, A)
        return value, (value.device, None)
    if not isinstance(W, DTensor):
        return measure(W, B, A), None
    rows = own_rows(W)
    by_rows = _sharded_dimension(W) == 0
    value = measure(local(W), B[rows] if by_rows else B, A if by_rows else A[:, rows])
    return value, (torch.device(W.device_mesh.device_type), W.device_mesh.get_group())


# The model -----------------------------------------------------------------------------------------------------------


def sharding_modules(model: nn.Module) -> list[Any]:
    """Return the modules that `fully_shard` was applied to: each is an `FSDPModule` too."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(modules: Iterable[FSDPModule]) -> None:
    """Let every rank hold its own shards again: after an evaluation the root's parameters are still gathered."""
    for module in modules:
        module.reshard()


def refuse_other_shards(model: nn.Module, processes: int) -> None:
    """Refuse every way of sharing out parameters but `fully_shard` over all processes by rows.

    Args:
        model: The model, its parameters in the sharded state.
        processes: Number of processes that train together.

    Raises:
        ConfigError: Naming the first parameter that is sharded otherwise, or that trains and is not sharded while
            others are.
    """
    managed = {id(p) for module in sharding_modules(model) for p in module.parameters()}
    left_out = None
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            _refuse_other_layout(name, parameter, id(parameter) in managed, processes)
        elif parameter.requires_grad and left_out is None:
            left_out = name
    if managed and left_out is not None:
        raise bad_value(
            "model",
            left_out,
            "it trains, and fully_shard has left it out, so every rank would train its own; apply fully_shard to the "
            "whole model last, after its blocks, without ignored_params that train",
        )


def _refuse_other_layout(name: str, parameter: DTensor, managed: bool, processes: int) -> None:
    mesh, found = parameter.device_mesh, f"{name}: {parameter.placements} over a mesh of shape"
    if not managed:
        why = "a DTensor that fully_shard does not manage (tensor parallelism, distribute_tensor)"
    elif mesh.ndim != 1:
        why = "sharded over a mesh of several dimensions (hybrid sharding, tensor parallelism with FSDP)"
    elif parameter.placements != (Shard(0),):
        why = "not sharded by rows (a shard_placement_fn of fully_shard)"
    elif mesh.size() != processes:
        why = f"sharded over {mesh.size()} of {processes} processes"
    elif type(local(parameter)) is not Tensor:
        why = f"a {type(local(parameter)).__name__}, whose rows are no rows of the weight"
    else:
        return
    raise bad_value(
        "model",
        f"{found} {tuple(mesh.shape)}",
        f"it is {why}, and AROMA trains models that fully_shard shares out by rows over one mesh of all processes; "
        "call fully_shard(module) with no mesh, or with a mesh of one dimension",
    )


def _sharded_dimension(tensor: DTensor) -> int:
    (placement,) = tensor.placements
    assert isinstance(placement, Shard), "refuse_other_shards lets nothing else pass"
    return placement.dim


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
