"""Parameters that every process holds whole: one process, and DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import bad_value
from .processes import is_distributed, unwrapped_optimizer

Factors: TypeAlias = tuple[Tensor, Tensor]
"""Left and right factor of a low-rank matrix, (m, R) and (R, n)."""

Measure: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps W (m, n), B (m, R) and A (R, n) to a scalar tensor that is a sum over the entries of W."""

Reduction: TypeAlias = tuple[torch.device, Any]
"""The device and the process group over which the parts of a measure are summed."""

_REMEDY = (
    "AROMA trains in one process, under DistributedDataParallel, under FSDP2 (torch.distributed.fsdp.fully_shard) and "
    "under DeepSpeed's ZeRO: launch with one of these"
)

_OTHER_WAYS = {
    "FlatParameter": "a parameter of FSDP1, which has no shape of its own",
    "FullyShardedDataParallel": "a module of FSDP1, which flattens the pairs of many modules into one parameter",
    "PipelineEngine": "an engine of DeepSpeed whose stages are on different ranks",
    "ZeroRedundancyOptimizer": "an optimizer that keeps a share of its state on every rank",
}
"""Unsupported ways to distribute a model, by class name, so that looking for them imports nothing."""


@dataclass(frozen=True)
class Entries:
    """This rank's entries of one tensor.

    Attributes:
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


class Replicas:
    """Every process holds everything, so most of the protocol does nothing; see `Sharding` for its methods."""

    has_flat_optimizer = False
    steps_within_backward = False

    # Parameters ------------------------------------------------------------------------------------------------------

    def is_sharded(self, tensor: Tensor) -> bool:
        """Whether this process holds a part of `tensor` (any shape) only: never here."""
        return False

    def own_entries(self, tensor: Tensor) -> Tensor:
        """Return `tensor` (any shape), detached."""
        return tensor.detach()

    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return `tensors` (any shapes) as they are."""
        return [*tensors]

    @torch.no_grad()
    def write(self, parameter: Tensor, values: Tensor) -> None:
        """Copy `values` into `parameter`, of the same shape."""
        parameter.detach().copy_(values)

    def shard_like(self, values: Tensor, like: Tensor) -> Tensor:
        """Return `values` (any shape) as they are."""
        return values

    def matrix(self, weight: Tensor) -> Any:
        """Return `weight` (m, n), detached."""
        return weight.detach()

    def measure(self, measure: Measure, W: Any, B: Tensor, A: Tensor) -> tuple[Tensor, Reduction | None]:
        """Return `measure(W, B, A)` of the whole W (m, n), B (m, R) and A (R, n); nothing is left to sum."""
        return measure(W, B, A), None

    def device(self, parameter: Tensor) -> torch.device:
        """Return the device of `parameter` (any shape)."""
        return parameter.device

    # The model -------------------------------------------------------------------------------------------------------

    def must_gather(self, parameters: Iterable[Tensor]) -> bool:
        """Whether reading `parameters` (any shapes) takes all ranks: never here."""
        return False

    def reshard(self, model: nn.Module) -> None:
        """Do nothing: there are no shards."""

    def needs_all_gradients(self, parameters: Iterable[Tensor]) -> bool:
        """Whether every backward must reach all `parameters` (any shapes): DistributedDataParallel waits for each."""
        return is_distributed()

    def refuse(self, model: nn.Module, optimizer: Any) -> None:
        """Refuse every way to distribute a model or an optimizer that AROMA does not know.

        Raises:
            ConfigError: Naming the class of the parameter, module or optimizer.
        """
        inner = unwrapped_optimizer(optimizer)
        for part in (optimizer, inner, *model.modules(), *model.parameters()):
            for kind in type(part).__mro__:
                if kind.__name__ in _OTHER_WAYS:
                    raise bad_value(
                        "optimizer" if part is optimizer or part is inner else "model",
                        kind.__name__,
                        f"it is {_OTHER_WAYS[kind.__name__]}. {_REMEDY}",
                    )

    # The optimizer ---------------------------------------------------------------------------------------------------

    def not_held(self, optimizer: Any, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Return those of `parameters` (any shapes) that `optimizer` does not train."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return [parameter for parameter in parameters if id(parameter) not in held]

    def belongs(self, optimizer: Any, parameters: Iterable[Tensor]) -> None:
        """Do nothing: a torch optimizer lists the `parameters` (any shapes) that it trains."""

    def changed_at_rest(self, optimizer: Any, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Return those of `parameters` (any shapes) that `optimizer` changes without a gradient: none."""
        return []

    def optimizer_state(self, optimizer: Any, parameter: Tensor) -> OptimizerState:
        """Return what `optimizer` keeps for `parameter` (any shape)."""
        values = optimizer.state.get(parameter, {})
        return OptimizerState(values, tuple(parameter.shape), lambda value: self._entries(value, parameter))

    def hook_step(self, optimizer: Any, before: Callable[..., None], after: Callable[..., None]) -> Any:
        """Register torch's hooks around `optimizer.step()` and return one handle of both."""
        inner = unwrapped_optimizer(optimizer)
        return Handles(inner.register_step_pre_hook(before), inner.register_step_post_hook(after))

    def base_optimizer(self, optimizer: Any) -> Any:
        """Return the torch optimizer that `optimizer` is, or wraps."""
        return unwrapped_optimizer(optimizer)

    def _entries(self, value: Tensor, parameter: Tensor) -> Entries | None:
        """Return a plain `value` (any shape) as entries; a subclass of Tensor may be packed."""
        if type(value) not in (Tensor, nn.Parameter):
            return None
        return Entries(value.detach(), tuple(value.shape), lambda whole: whole)
