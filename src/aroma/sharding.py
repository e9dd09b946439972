"""How the processes of a run hold its parameters: whole on each, in shards of FSDP2, or as DeepSpeed's ZeRO does.

ZeRO-1 and ZeRO-2 keep every parameter whole on all ranks. ZeRO-3 keeps a range of its entries, counted row by row, on
each rank; a parameter is whole only while it is used. The base optimizer holds flat tensors: float32 copies of such
ranges of many parameters, one after the other. After a step ZeRO overwrites the parameters with them. So whatever is
written into a parameter is written into its range of the flat tensor too, and its moments are ranges of flat moments.

Nothing is imported from DeepSpeed; its objects are known by their attributes. (Its `safe_set_full_*` would not do:
they leave out parameters that need no gradient.) "A collective" marks what all ranks call, in the same order. "Whole"
tensors are the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from .distributed import is_distributed, is_engine, is_zero, unwrapped, unwrapped_optimizer
from .errors import bad_value

_ZERO_OPTIMIZERS = {"DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"}
"""Class names of the optimizers of ZeRO-1 and ZeRO-2, and of ZeRO-3."""
_OTHER_WAYS = {"FullyShardedDataParallel", "PipelineEngine", "ZeroRedundancyOptimizer"}
"""Unsupported ways to distribute a model, by class name, so that looking for them imports nothing."""


# Parameters ----------------------------------------------------------------------------------------------------------


def is_partitioned(tensor: Any) -> bool:
    """Whether ZeRO-3 shards a parameter (any shape)."""
    return hasattr(tensor, "ds_tensor")


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of `tensor` (any shape) only.

    ZeRO-3 may hold the whole for a while as well. That is never read, since it may have been rounded on its way.
    """
    return isinstance(tensor, DTensor) or is_partitioned(tensor)


@torch.no_grad()
def own_entries(tensor: Any) -> Tensor:
    """Return this rank's part of `tensor` (any shape): plain, detached, without padding, and sharing its memory.

    It is (own rows, …) of a DTensor (m, …), and one-dimensional of a parameter that ZeRO-3 shards.
    """
    own: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if is_partitioned(tensor):
        start, stop = _bounds(tensor)
        own = tensor.ds_tensor[: stop - start]
    return own.detach()


@torch.no_grad()
def gathered(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return `tensors` (any shapes), the sharded ones whole and bit for bit equal on all ranks: a collective each."""
    return [_gathered(tensor) if is_sharded(tensor) else tensor for tensor in tensors]


def _gathered(tensor: Any) -> Tensor:
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    own = tensor.ds_tensor.detach().to(tensor.device)  # padded to the same length on all ranks
    flat = own.new_empty(dist.get_world_size() * len(own))
    dist.all_gather_into_tensor(flat, own)
    whole: Tensor = flat[: tensor.ds_numel].view(tuple(tensor.ds_shape))
    return whole


@torch.no_grad()
def write(parameter: Any, values: Tensor) -> None:
    """Copy the whole `values` into `parameter`, of the same whole shape, and into its flat copy; no collective."""
    if isinstance(parameter, DTensor):
        own_entries(parameter).copy_(own_entries(shard_like(values, parameter)))
        return
    if is_partitioned(parameter):
        start, stop = _bounds(parameter)
        own_entries(parameter).copy_(values.reshape(-1)[start:stop])
    # ZeRO-3 leaves small parameters whole where they are used.
    if not is_partitioned(parameter) or parameter.ds_status.name == "AVAILABLE":
        parameter.data.copy_(values)
    if not is_flattened(parameter):
        return
    if is_partitioned(parameter):
        own = _own_range(parameter, parameter._z3_optimizer)
        assert own is not None, "ZeRO-3 gives every rank a range of every parameter"
        own.of(own.flat).copy_(own.pick(values))
    elif (mapping := parameter._hp_mapping) is not None:
        address = mapping.lp_fragment_address
        mapping.get_hp_fragment().data.copy_(values.reshape(-1)[address.start : address.start + address.numel])


@torch.no_grad()
def shard_like(values: Tensor, like: Tensor) -> Tensor:
    """Return the whole `values`, sharded as `like`, of the same whole shape, if it is a DTensor; no collective."""
    return _sharded(values.to(like.dtype), like) if isinstance(like, DTensor) else values


def _sharded(values: Tensor, like: DTensor) -> DTensor:
    """Return the whole `values` sharded as `like`, of the same whole shape: every rank keeps its own part."""
    mesh = like.device_mesh
    whole = DTensor.from_local(values.to(mesh.device_type), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=like.placements)


def is_flattened(tensor: Any) -> bool:
    """Whether the optimizer that trains a parameter (any shape) holds flat copies of it."""
    if is_partitioned(tensor):  # ZeRO-3 marks all parameters of the model, not only those that train
        optimizer = getattr(tensor, "_z3_optimizer", None)
        return optimizer is not None and optimizer.get_param_id(tensor) in optimizer.grad_position
    return hasattr(tensor, "_hp_mapping")


class _Range(NamedTuple):
    """Where this rank holds its entries of a parameter of `shape`, counted row by row.

    They are the entries from `start` to before `stop`, and begin at `offset` in `flat`, a flat tensor of the base
    optimizer.
    """

    shape: tuple[int, ...]
    start: int
    stop: int
    flat: Tensor
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        """Return the entries, shaped (stop - start,), in a tensor laid out as `self.flat`; they share its memory."""
        return flat.detach()[self.offset : self.offset + self.stop - self.start]

    def pick(self, whole: Tensor) -> Tensor:
        """Return the entries, (stop - start,), of a whole tensor of `shape`."""
        return whole.reshape(-1)[self.start : self.stop]


def _own_range(parameter: Any, optimizer: Any) -> _Range | None:
    """Return where this rank's entries of a flattened parameter (any shape) lie in `optimizer`, if it has any."""
    if is_partitioned(parameter):
        index, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat = optimizer.fp32_partitioned_groups_flat[index]
        return _Range(tuple(parameter.ds_shape), *_bounds(parameter), flat, offset)
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    own, position = mapping.lp_fragment_address, mapping.hp_fragment_address
    flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    return _Range(tuple(parameter.shape), own.start, own.start + own.numel, flat, position.start)


def _bounds(parameter: Any) -> tuple[int, int]:
    """Return the first entry that this rank holds, and one past its last; the padding does not count."""
    length = parameter.ds_tensor.numel()
    start = min(dist.get_rank() * length, parameter.ds_numel)
    return start, min(start + length, parameter.ds_numel)


# The optimizer's state -----------------------------------------------------------------------------------------------


class Entries(NamedTuple):
    """This rank's entries of one tensor, in its memory; `pick` maps a whole tensor of `shape` to the same entries."""

    values: Tensor
    shape: tuple[int, ...]
    pick: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer keeps for one parameter on this rank.

    Attributes:
        values: State by name, as the optimizer keeps it; empty before the first step.
        shape: Shape of the whole parameter.
        entries: Maps a tensor among `values` to this rank's entries of the parameter in it; None if unknown.
        is_flat: Whether the values are flat tensors that many parameters share.
        gradient: This rank's entries of a gradient that the optimizer holds apart from the parameter, if it does.
    """

    values: Mapping[str, Any]
    shape: tuple[int, ...]
    entries: Callable[[Tensor], Entries | None]
    is_flat: bool = False
    gradient: Tensor | None = None


def optimizer_state(optimizer: Any, parameter: Any) -> OptimizerState:
    """Return what `optimizer` keeps for `parameter` (any shape): its moments, and this rank's entries of them."""
    if not is_flattened(parameter):
        return OptimizerState(optimizer.state.get(parameter, {}), tuple(parameter.shape), _entries)
    inner = unwrapped_optimizer(optimizer)
    own = _own_range(parameter, inner)
    if own is None:
        # Nothing to reset, but a mask is drawn as on every other rank: later draws depend on it.
        shape, none = tuple(parameter.shape), parameter.new_zeros(0)
        entry = Entries(none, shape, lambda whole: whole.reshape(-1)[:0])
        return OptimizerState({"": none}, shape, lambda _: entry, is_flat=True)

    def entries(value: Tensor) -> Entries | None:
        """Return this rank's entries in a flat tensor; None if its shape is another."""
        if type(value) is not Tensor or not value.is_floating_point() or value.shape != own.flat.shape:
            return None
        return Entries(own.of(value), own.shape, own.pick)

    # If offloaded, it is the gradient of the last step that had one.
    gradient = None if own.flat.grad is None else own.of(own.flat.grad)
    state = inner.optimizer.state.get(own.flat, {})
    return OptimizerState(state, own.shape, entries, is_flat=True, gradient=gradient)


def _entries(value: Tensor) -> Entries | None:
    """Return a state tensor (any shape), sharded or plain, as entries; another subclass of Tensor may be packed."""
    if isinstance(value, DTensor):
        return Entries(own_entries(value), tuple(value.shape), lambda whole: _sharded(whole, value).to_local())
    if type(value) in (Tensor, nn.Parameter):
        return Entries(value.detach(), tuple(value.shape), lambda whole: whole)
    return None


# A run ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sharding:
    """How a model and the optimizer that trains it are spread over processes.

    `is_fsdp2`: whether `fully_shard` was applied to the model; `has_flat_optimizer`: whether the optimizer steps flat
    tensors of many parameters. It then steps frozen pairs too, and may hold no state of a pair on this rank.
    """

    is_fsdp2: bool = False
    has_flat_optimizer: bool = False

    def device(self, parameter: Tensor) -> torch.device:
        """Return a device whose tensors the process group of `parameter` (any shape) can reduce."""
        return torch.device(parameter.device_mesh.device_type if isinstance(parameter, DTensor) else parameter.device)

    def must_gather(self, parameters: Iterable[Tensor]) -> bool:
        """Whether reading `parameters` (any shapes) takes all ranks; FSDP2 may hold some whole for a while."""
        return self.is_fsdp2 or any(map(is_partitioned, parameters))

    def reshard(self, model: nn.Module) -> None:
        """Let every rank hold its shards again: after an evaluation FSDP2 keeps the root's parameters gathered."""
        for module in sharding_modules(model):
            module.reshard()

    def needs_all_gradients(self, parameters: Iterable[Tensor]) -> bool:
        """Whether every backward must reach all `parameters` (any shapes) that trained at the start, frozen or not.

        DistributedDataParallel waits for each, ZeRO-1 and ZeRO-2 fail without any, and the others take what comes.
        """
        return not self.must_gather(parameters) and (self.has_flat_optimizer or is_distributed())

    def hook_step(self, optimizer: Any, before: Callable[..., None], after: Callable[..., None]) -> ExitStack:
        """Call `before` and `after` around every step of `optimizer`, with what torch gives its hooks.

        Returns:
            What removes the hooks when it is closed.
        """
        inner, hooks = unwrapped_optimizer(optimizer), ExitStack()
        if not self.has_flat_optimizer:
            hooks.callback(inner.register_step_pre_hook(before).remove)
            hooks.callback(inner.register_step_post_hook(after).remove)
            return hooks
        step = inner.step

        def hooked_step(*args: Any, **kwargs: Any) -> Any:
            before(inner, args, kwargs)
            result = step(*args, **kwargs)
            after(inner, args, kwargs)
            return result

        inner.step = hooked_step  # optimizers of DeepSpeed have no hooks
        hooks.callback(setattr, inner, "step", step)
        return hooks

    def base_optimizer(self, optimizer: Any) -> Any:
        """Return the torch optimizer that applies the updates; it has torch's hooks and the same rates.

        One step of `optimizer` may step it several times: hooks of it may change rates and restore them, no more.
        """
        inner = unwrapped_optimizer(optimizer)
        return inner.optimizer if is_zero(inner) else inner


REPLICAS, FSDP2, ZERO = Sharding(), Sharding(is_fsdp2=True), Sharding(has_flat_optimizer=True)


def sharding_of_model(model: nn.Module, optimizer: Any = None) -> Sharding:
    """Return how the parameters of `model`, wrapped or not, are held when `optimizer` trains them."""
    if is_zero(unwrapped_optimizer(optimizer)) or is_engine(model):
        return ZERO
    if sharding_modules(model):
        return FSDP2
    for parameter in model.parameters():
        if is_partitioned(parameter) or is_flattened(parameter):
            return ZERO
        if isinstance(parameter, DTensor):
            return FSDP2
    return REPLICAS


def sharding_modules(model: nn.Module) -> list[Any]:
    """Return the modules of `model` that `fully_shard` was applied to; each is an `FSDPModule` too."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


# Refusals ------------------------------------------------------------------------------------------------------------


def refuse_sharding(model: nn.Module, optimizer: Any) -> None:
    """Refuse ways to distribute a model that would train it wrongly; docs/distributed.md lists the tested ones.

    Raises:
        ConfigError: Naming the parameter, module or optimizer.
    """
    inner = unwrapped_optimizer(optimizer)
    for part in (inner, *model.modules()):
        if names := {kind.__name__ for kind in type(part).__mro__} & _OTHER_WAYS:
            remedy = "AROMA trains in one process, and under DistributedDataParallel, FSDP2 (fully_shard) and ZeRO"
            raise bad_value("model" if isinstance(part, nn.Module) else "optimizer", names.pop(), remedy)
    is_wrapper = type(optimizer).__name__ == "DeepSpeedOptimizerWrapper"
    if type(inner).__name__ not in _ZERO_OPTIMIZERS and (is_zero(inner) or is_engine(model) or is_wrapper):
        remedy = "set zero_optimization.stage to 1, 2 or 3 (in bf16 2 or 3), and give engine.optimizer"
        raise bad_value("optimizer", type(inner).__name__, f"it is none that ZeRO shards; {remedy}")
    is_fsdp2 = bool(sharding_modules(model))
    for name, parameter in unwrapped(model).named_parameters():
        if is_fsdp2 and parameter.requires_grad and not isinstance(parameter, DTensor):
            remedy = "apply fully_shard to the whole model last, after its blocks, without ignored_params"
            raise bad_value("model", name, f"it trains, and fully_shard has left it out; {remedy}")
        if is_zero(inner) and ".lora_" in name and is_flattened(parameter) and parameter.dtype != torch.float32:
            remedy = "leave bf16 and fp16 out of the settings of DeepSpeed and the Trainer, or set torch_autocast"
            raise bad_value("dtype", parameter.dtype, f"{name} is not float32, so components round; {remedy}")
