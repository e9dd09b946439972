"""How the processes of a run hold its parameters: whole on each (`Sharding`), or in shards of FSDP2 (`Fsdp2`).

"A collective" marks what all ranks call, in the same order. "Whole" tensors are the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from .processes import is_distributed, unwrapped_optimizer

Factors: TypeAlias = tuple[Tensor, Tensor]
"""Left and right factor of a low-rank matrix, (m, R) and (R, n)."""


class Entries(NamedTuple):
    """This rank's entries of one tensor.

    Args:
        values: The entries. They share the tensor's memory, so writing to them writes to the tensor.
        shape: Shape of the whole tensor.
        pick: Maps a whole tensor of `shape` to its entries at the positions of `values`, shaped as `values`.
    """

    values: Tensor
    shape: tuple[int, ...]
    pick: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer keeps for one parameter on this rank.

    Attributes:
        values: State by name, as the optimizer keeps it; empty before the first step.
        shape: Shape of the whole parameter.
        entries: Maps a tensor among `values` to this rank's entries of the parameter in it; None if its layout is
            unknown.
        is_flat: Whether the values are flat tensors that many parameters share.
        is_elsewhere: Whether this rank holds no entry of the parameter.
        gradient: This rank's entries of a gradient that the optimizer holds apart from the parameter, if it does.
    """

    values: Mapping[str, Any]
    shape: tuple[int, ...]
    entries: Callable[[Tensor], Entries | None]
    is_flat: bool = False
    is_elsewhere: bool = False
    gradient: Tensor | None = None


class Handles:
    """Several hooks as one handle.

    Args:
        handles: Handles with a method `remove`.
    """

    def __init__(self, *handles: Any) -> None:
        self._handles = [*handles]

    def remove(self) -> None:
        """Remove all hooks; a second call does nothing."""
        while self._handles:
            self._handles.pop().remove()


class Sharding:
    """How parameters, and the optimizer's state for them, are spread over processes: here every one holds them whole.

    Attributes:
        has_flat_optimizer: Whether the optimizer steps flat tensors of many parameters. It then steps frozen pairs
            too, with gradients of zero, and may hold no state of a pair on this rank.
        steps_within_backward: Whether accelerate's `backward` takes the optimizer step, so that the Trainer announces
            it too late.
    """

    has_flat_optimizer = False
    steps_within_backward = False

    # Parameters ------------------------------------------------------------------------------------------------------

    def is_sharded(self, tensor: Tensor) -> bool:
        """Whether this process holds a part of `tensor` (any shape) only."""
        return False

    def own_entries(self, tensor: Tensor) -> Tensor:
        """Return this rank's part of `tensor` (any shape): plain, detached, and sharing its memory."""
        return tensor.detach()

    def gather(self, tensor: Tensor) -> Tensor:
        """Return a sharded `tensor` (any shape) whole, bit for bit the same on all ranks: a collective."""
        return tensor

    @torch.no_grad()
    def write(self, parameter: Tensor, values: Tensor) -> None:
        """Copy the whole `values` into `parameter`, of the same whole shape, in place; no collective."""
        parameter.detach().copy_(values)

    def shard_like(self, values: Tensor, like: Tensor) -> Tensor:
        """Return the whole `values` sharded as `like`, of the same whole shape, is; no collective."""
        return values

    def device(self, parameter: Tensor) -> torch.device:
        """Return a device whose tensors the process group of `parameter` (any shape) can reduce."""
        return parameter.device

    # The model -------------------------------------------------------------------------------------------------------

    def must_gather(self, parameters: Iterable[Tensor]) -> bool:
        """Whether all ranks must take part in reading `parameters` (any shapes)."""
        return False

    def reshard(self, model: nn.Module) -> None:
        """Give back parameters of `model` that are whole for a while, so that every rank holds its shards."""

    def needs_all_gradients(self, parameters: Iterable[Tensor]) -> bool:
        """Whether every backward must reach all `parameters` (any shapes) that trained at the start, frozen or not."""
        return is_distributed()  # DistributedDataParallel waits for each

    # The optimizer ---------------------------------------------------------------------------------------------------

    def not_held(self, optimizer: Any, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Return those of `parameters` (any shapes) that `optimizer` does not train."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return [parameter for parameter in parameters if id(parameter) not in held]

    def belongs(self, optimizer: Any, parameters: Iterable[Tensor]) -> None:
        """Remember that `optimizer` trains `parameters` (any shapes), where nothing else tells."""

    def optimizer_state(self, optimizer: Any, parameter: Tensor) -> OptimizerState:
        """Return what `optimizer` keeps for `parameter` (any shape): its moments, and this rank's entries of them."""
        return OptimizerState(optimizer.state.get(parameter, {}), tuple(parameter.shape), self._entries)

    def hook_step(self, optimizer: Any, before: Callable[..., None], after: Callable[..., None]) -> Any:
        """Call `before` and `after` around every step of `optimizer`, with what torch gives its hooks.

        Returns:
            A handle with a method `remove`.
        """
        inner = unwrapped_optimizer(optimizer)
        return Handles(inner.register_step_pre_hook(before), inner.register_step_post_hook(after))

    def base_optimizer(self, optimizer: Any) -> Any:
        """Return the torch optimizer that applies the updates; it has torch's hooks and the same rates.

        One step of `optimizer` may step it several times: hooks of it may change rates and restore them, no more.
        """
        return unwrapped_optimizer(optimizer)

    def _entries(self, value: Tensor) -> Entries | None:
        """Return a plain `value` (any shape) as entries; a subclass of Tensor may be packed."""
        if type(value) not in (Tensor, nn.Parameter):
            return None
        return Entries(value.detach(), tuple(value.shape), lambda whole: whole)


class Fsdp2(Sharding):
    """Shards of `fully_shard`; tensors that are no DTensors, such as finished components, are whole."""

    def is_sharded(self, tensor: Tensor) -> bool:
        """Whether `tensor` (any shape) is a DTensor."""
        return isinstance(tensor, DTensor)

    @torch.no_grad()
    def own_entries(self, tensor: Tensor) -> Tensor:
        """Return this rank's rows of `tensor` (m, …) as a plain tensor (own rows, …) that shares its memory."""
        return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()

    @torch.no_grad()
    def gather(self, tensor: Any) -> Tensor:
        """Return a DTensor (any shape) whole: a collective."""
        whole: Tensor = tensor.full_tensor()
        return whole

    @torch.no_grad()
    def write(self, parameter: Tensor, values: Tensor) -> None:
        """Copy this rank's part of `values` into `parameter`, of the same whole shape."""
        self.own_entries(parameter).copy_(self.own_entries(self.shard_like(values, parameter)))

    @torch.no_grad()
    def shard_like(self, values: Tensor, like: Tensor) -> Tensor:
        """Return the whole `values` as a DTensor that is sharded as `like`, of the same whole shape, is."""
        return _sharded(values.to(like.dtype), like) if isinstance(like, DTensor) else values

    def device(self, parameter: Tensor) -> torch.device:
        """Return the device of the mesh of `parameter` (any shape)."""
        mesh = parameter.device_mesh.device_type if isinstance(parameter, DTensor) else parameter.device
        return torch.device(mesh)

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

    def _entries(self, value: Tensor) -> Entries | None:
        """Return a state tensor (any shape), sharded or plain, as entries."""
        if not isinstance(value, DTensor):
            return super()._entries(value)
        return Entries(self.own_entries(value), tuple(value.shape), lambda whole: _sharded(whole, value).to_local())


def _sharded(values: Tensor, like: DTensor) -> DTensor:
    """Return the whole `values` sharded as `like`, of the same whole shape, is: every rank keeps its own part."""
    mesh = like.device_mesh
    whole = DTensor.from_local(values.to(mesh.device_type), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=like.placements)


def sharding_modules(model: nn.Module) -> list[Any]:
    """Return the modules of `model` that `fully_shard` was applied to; each is an `FSDPModule` too."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
