"""Parameters that FSDP2 (`torch.distributed.fsdp.fully_shard`) shards: every rank holds a block of rows, a `DTensor`.

Pairs are small, so checks gather them, all of them in one collective. Base weights never leave their ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from ..errors import bad_value
from .processes import world_size
from .replicas import Entries, Measure, Reduction, Replicas

_ALIGNMENT = 16
"""A tensor of any dtype may begin at a multiple of this many bytes."""


@dataclass(frozen=True)
class Slice:
    """What this rank holds of one matrix (m, n) that is a part of a parameter: some rows, or none.

    Attributes:
        values: The rows, (own rows, n).
        start: Number of the first.
        transposed: Whether the matrix that is meant is the transpose.
        reduction: Over which processes a measure of it is summed.
    """

    values: Tensor
    start: int
    transposed: bool
    reduction: Reduction

    @property
    def T(self) -> Slice:
        """The transpose."""
        return Slice(self.values, self.start, not self.transposed, self.reduction)


class Fsdp2(Replicas):
    """Rows over all processes; tensors that are not DTensors, such as finished components, are replicas."""

    # Parameters ------------------------------------------------------------------------------------------------------

    def is_sharded(self, tensor: Tensor) -> bool:
        """Whether `tensor` (any shape) is a DTensor."""
        return isinstance(tensor, DTensor)

    @torch.no_grad()
    def own_entries(self, tensor: Tensor) -> Tensor:
        """Return this rank's rows of `tensor` (m, …) as a plain tensor (own rows, …) that shares its memory."""
        return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()

    @torch.no_grad()
    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return DTensors (any shapes) whole, bit for bit the same on all ranks.

        Their bytes are summed, and every byte comes from one rank alone. So one collective does for all dtypes, and it
        needs no more memory than the result.
        """
        sharded: Sequence[Any] = tensors
        sizes = [tensor.numel() * tensor.element_size() for tensor in sharded]
        mesh = sharded[0].device_mesh
        flat = torch.zeros(sum(map(_aligned, sizes)), dtype=torch.uint8, device=mesh.device_type)
        pieces = torch.split(flat, [*map(_aligned, sizes)])
        whole = [
            piece[:size].view(tensor.dtype).view(tensor.shape)
            for piece, size, tensor in zip(pieces, sizes, sharded, strict=True)
        ]
        for part, tensor in zip(whole, sharded, strict=True):
            part[_own_slice(tensor)] = self.own_entries(tensor).to(part.device)
        dist.all_reduce(flat, group=mesh.get_group())
        return whole

    @torch.no_grad()
    def write(self, parameter: Tensor, values: Tensor) -> None:
        """Copy this rank's rows of `values` (m, …) into `parameter`, of the same whole shape."""
        own = values[_own_slice(parameter)] if isinstance(parameter, DTensor) else values
        self.own_entries(parameter).copy_(own)

    def shard_like(self, values: Tensor, like: Tensor) -> Tensor:
        """Return the whole `values` (m, …) as a DTensor that is sharded as `like` (m, …)."""
        if not isinstance(like, DTensor):
            return values
        own = values[_own_slice(like)].to(self.own_entries(like)).contiguous()
        sharded: Tensor = DTensor.from_local(
            own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        return sharded

    def measure(self, measure: Measure, W: Any, B: Tensor, A: Tensor) -> tuple[Tensor, Reduction | None]:
        """Measure this rank's rows of W (m, n) with the same rows of B (m, R); of a transposed W, columns of A (R, n).

        Returns:
            A scalar tensor, and over which processes it is to be summed.
        """
        if isinstance(W, Slice):
            own = slice(W.start, W.start + len(W.values))
            if W.transposed:
                return measure(W.values.T, B, A[:, own]), W.reduction
            return measure(W.values, B[own], A), W.reduction
        if not isinstance(W, DTensor):
            return measure(W, B, A), None
        own = _own_slice(W)
        by_rows = _sharded_dimension(W) == 0
        value = measure(self.own_entries(W), B[own] if by_rows else B, A if by_rows else A[:, own])
        return value, (torch.device(W.device_mesh.device_type), W.device_mesh.get_group())

    def device(self, parameter: Tensor) -> torch.device:
        """Return the device of the mesh: shards of `parameter` (any shape) may be offloaded to the CPU."""
        if isinstance(parameter, DTensor):
            return torch.device(parameter.device_mesh.device_type)
        return parameter.device

    # The model -------------------------------------------------------------------------------------------------------

    def must_gather(self, parameters: Iterable[Tensor]) -> bool:
        """Whether reading `parameters` (any shapes) takes all ranks: always, though FSDP2 may hold some whole now."""
        return True

    def reshard(self, model: nn.Module) -> None:
        """Let every rank hold its shards again: after an evaluation the root's parameters are still gathered."""
        for module in sharding_modules(model):
            module.reshard()

    def needs_all_gradients(self, parameters: Iterable[Tensor]) -> bool:
        """Whether every backward must reach all `parameters` (any shapes): no, FSDP2 reduces those that it reaches."""
        return False

    def refuse(self, model: nn.Module, optimizer: Any) -> None:
        """Refuse DTensors that are not sharded by `fully_shard`, by rows, over all processes.

        Raises:
            ConfigError: Naming the first parameter that is sharded otherwise, or that trains and is not sharded while
                others are.
        """
        managed = {id(p) for module in sharding_modules(model) for p in module.parameters()}
        left_out = None
        for name, parameter in model.named_parameters():
            if isinstance(parameter, DTensor):
                _refuse_other_layout(name, parameter, id(parameter) in managed)
            elif parameter.requires_grad and left_out is None:
                left_out = name
        if managed and left_out is not None:
            raise bad_value(
                "model",
                left_out,
                "it trains, and fully_shard has left it out, so every rank would train its own; apply fully_shard to "
                "the whole model last, after its blocks, without ignored_params that train",
            )

    # The optimizer ---------------------------------------------------------------------------------------------------

    def _entries(self, value: Tensor, parameter: Tensor) -> Entries | None:
        """Return a state tensor as entries: a DTensor sharded as `parameter` (m, …) is, or a plain tensor."""
        if not isinstance(value, DTensor):
            return super()._entries(value, parameter)
        if not isinstance(parameter, DTensor) or _layout(value) != _layout(parameter):
            return None
        own = _own_slice(value)
        return Entries(self.own_entries(value), tuple(value.shape), lambda whole: whole[own])


def sharded_slice(stack: Any, index: int) -> Slice:
    """Return what this rank holds of one matrix of a DTensor (E, m, n)."""
    own, values = _own_slice(stack), stack.to_local().detach()
    held = values[index - own.start] if own.start <= index < own.stop else values.new_empty(0, stack.shape[2])
    return Slice(held, 0, False, _reduction(stack))


def sharded_rows(weight: Any, start: int, stop: int) -> Slice:
    """Return what this rank holds of the rows `start` to `stop` of a DTensor (m, n)."""
    own, values = _own_slice(weight), weight.to_local().detach()
    first, last = max(start, own.start), min(stop, own.stop)
    held = values[first - own.start : last - own.start] if first < last else values[:0]
    return Slice(held, max(first - start, 0), False, _reduction(weight))


def sharded_columns(weight: Any, start: int, stop: int) -> Slice:
    """Return what this rank holds of the columns `start` to `stop` of a DTensor (m, n)."""
    return Slice(weight.to_local().detach()[:, start:stop], _own_slice(weight).start, False, _reduction(weight))


def _reduction(tensor: Any) -> Reduction:
    mesh = tensor.device_mesh
    return torch.device(mesh.device_type), mesh.get_group()


def sharding_modules(model: nn.Module) -> list[Any]:
    """Return the modules of `model` that `fully_shard` was applied to; each is an `FSDPModule` too."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _refuse_other_layout(name: str, parameter: DTensor, managed: bool) -> None:
    mesh, processes = parameter.device_mesh, world_size()
    local = parameter.to_local().detach()
    if not managed:
        why = "a DTensor that fully_shard does not manage (tensor parallelism, distribute_tensor)"
    elif mesh.ndim != 1:
        why = "sharded over a mesh of several dimensions (hybrid sharding, tensor parallelism with FSDP)"
    elif parameter.placements != (Shard(0),):
        why = "not sharded by rows (a shard_placement_fn of fully_shard)"
    elif mesh.size() != processes:
        why = f"sharded over {mesh.size()} of {processes} processes"
    elif type(local) is not Tensor:
        why = f"a {type(local).__name__}, whose rows are no rows of the weight"
    else:
        return
    raise bad_value(
        "model",
        f"{name}: {parameter.placements} over a mesh of shape {tuple(mesh.shape)}",
        f"it is {why}, and AROMA trains models that fully_shard shards by rows over one mesh of all processes; "
        "call fully_shard(module) with no mesh, or with a mesh of one dimension",
    )


def _layout(tensor: DTensor) -> tuple[Any, ...]:
    """Return what is equal for two DTensors (any shapes) that have the same rows on every rank."""
    return tensor.shape, tensor.device_mesh, tensor.placements


def _own_slice(tensor: Any) -> slice:
    """Return which part of the sharded dimension of a DTensor this rank holds; the last ranks may hold none."""
    length = tensor.shape[_sharded_dimension(tensor)]
    most = -(-length // tensor.device_mesh.size())
    start = min(tensor.device_mesh.get_local_rank() * most, length)
    return slice(start, min(start + most, length))


def _sharded_dimension(tensor: Any) -> int:
    (placement,) = tensor.placements
    assert isinstance(placement, Shard), "Fsdp2.refuse lets no other placement pass"
    return placement.dim


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
