"""Several processes: replicas (DDP), FSDP2 and DeepSpeed's ZeRO.

The other rooms ask `sharding_of_model` (a run) how parameters are held, or call the functions here, which find it out
tensor by tensor. None of them asks which way it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import bad_value
from .parameters import Entries, Factors, Fsdp2, OptimizerState, Sharding, sharding_modules
from .processes import (
    agree,
    is_distributed,
    is_engine,
    is_zero,
    of_first_rank,
    processes_of_node,
    rank,
    refuse_changed_processes,
    refuse_together,
    require_equal_replicas,
    unwrapped,
    unwrapped_optimizer,
    world_size,
)
from .zero import StepHooks, Zero, is_flattened, is_partitioned, refuse_zero

__all__ = [
    "REPLICAS",
    "ZERO",
    "Entries",
    "Factors",
    "OptimizerState",
    "Sharding",
    "StepHooks",
    "agree",
    "gathered",
    "is_distributed",
    "is_partitioned",
    "is_sharded",
    "of_first_rank",
    "own_entries",
    "processes_of_node",
    "rank",
    "refuse_changed_processes",
    "refuse_missing_pairs",
    "refuse_sharding",
    "refuse_together",
    "require_equal_replicas",
    "shard_like",
    "sharding_facts",
    "sharding_modules",
    "sharding_of",
    "sharding_of_model",
    "unwrapped",
    "unwrapped_optimizer",
    "world_size",
    "write",
]

REPLICAS, FSDP2, ZERO = Sharding(), Fsdp2(), Zero()

_OTHER_WAYS = {"FullyShardedDataParallel", "PipelineEngine", "ZeroRedundancyOptimizer"}
"""Unsupported ways to distribute a model, by class name, so that looking for them imports nothing."""


def sharding_of(tensor: Any, optimizer: Any = None) -> Sharding:
    """Return how a tensor (any shape) is held, as `optimizer` has it where one is given."""
    if is_partitioned(tensor) or is_flattened(tensor) or is_zero(unwrapped_optimizer(optimizer)):
        return ZERO
    return FSDP2 if isinstance(tensor, DTensor) else REPLICAS


def sharding_of_model(model: nn.Module, optimizer: Any = None) -> Sharding:
    """Return how the parameters of `model`, wrapped or not, are held when `optimizer` trains them."""
    if is_zero(unwrapped_optimizer(optimizer)) or is_engine(model):
        return ZERO
    if sharding_modules(model):
        return FSDP2
    return next((found for p in model.parameters() if (found := sharding_of(p)) is not REPLICAS), REPLICAS)


def refuse_sharding(model: nn.Module, optimizer: Any) -> None:
    """Refuse ways to distribute a model that would train it wrongly; docs/distributed.md says what was run.

    Raises:
        ConfigError: Naming the parameter, module, optimizer or option.
    """
    for part in (unwrapped_optimizer(optimizer), *model.modules()):
        if names := {kind.__name__ for kind in type(part).__mro__} & _OTHER_WAYS:
            remedy = "AROMA trains in one process, and under DistributedDataParallel, FSDP2 (fully_shard) and ZeRO"
            raise bad_value("model" if isinstance(part, nn.Module) else "optimizer", names.pop(), remedy)
    if sharding_modules(model):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                remedy = "apply fully_shard to the whole model last, after its blocks, without ignored_params"
                raise bad_value("model", name, f"it trains, and fully_shard has left it out; {remedy}")
    refuse_zero(model, optimizer)


def refuse_missing_pairs(optimizer: Any, pairs: Iterable[tuple[str, Sequence[Tensor]]]) -> None:
    """Refuse an optimizer that lacks the pair of a module that trains.

    Args:
        optimizer: The optimizer, wrapped or not.
        pairs: Name of every module that trains, and its pair b (m, r), a (r, n).

    Raises:
        ConfigError: Naming the first such module.
    """
    sharding = ZERO if is_zero(unwrapped_optimizer(optimizer)) else REPLICAS
    for name, pair in pairs:
        if sharding.not_held(optimizer, pair):
            raise bad_value(
                "optimizer",
                type(optimizer).__name__,
                f"it does not hold the trainable pair of {name!r}, so that module would never learn; make the "
                "optimizer after get_peft_model and, if you use it, fully_shard, over every parameter that requires a "
                "gradient; of several adapters, activate this one first (model.set_adapter)",
            )


def sharding_facts(model: nn.Module) -> dict[str, object]:
    """Return what all ranks must have equal of the way `model` is sharded, by name."""
    return {"fully_shard": len(sharding_modules(model))}


# Tensor by tensor ----------------------------------------------------------------------------------------------------


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of `tensor` (any shape) only."""
    return sharding_of(tensor).is_sharded(tensor)


def own_entries(tensor: Tensor) -> Tensor:
    """Return this rank's part of `tensor` (any shape): plain, detached, and sharing its memory."""
    return sharding_of(tensor).own_entries(tensor)


def gathered(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return `tensors` (any shapes), the sharded ones whole: one collective for each of these."""
    return [sharding_of(tensor).gather(tensor) if is_sharded(tensor) else tensor for tensor in tensors]


def write(parameter: Tensor, values: Tensor) -> None:
    """Copy the whole `values` into `parameter`, of the same whole shape, in place; no collective."""
    sharding_of(parameter).write(parameter, values)


def shard_like(values: Tensor, like: Tensor) -> Tensor:
    """Return the whole `values` sharded as `like`, of the same whole shape, is; no collective."""
    return sharding_of(like).shard_like(values, like)
