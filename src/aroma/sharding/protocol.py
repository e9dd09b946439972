"""How the processes of a run hold its parameters: one protocol, which replicas, FSDP2 and ZeRO implement.

The other rooms ask `sharding_of` (a tensor) or `sharding_of_model` (a run) for the implementation, or call the
functions at the end of this file, which pick it tensor by tensor. None of them asks which one it is.

"A collective" marks what all ranks call, in the same order. "Whole" tensors are the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .. import compat
from ..errors import bad_value
from .fsdp2 import Fsdp2, Slice, sharding_modules
from .processes import is_engine, is_zero, replicas_of, unwrapped_optimizer
from .replicas import Factors, Measure, OptimizerState, Reduction, Replicas
from .zero import Partition, Zero, is_flattened, is_partitioned


class Handle(Protocol):
    """A hook that can be removed."""

    def remove(self) -> None:
        """Remove the hook; a second call does nothing."""


class Sharding(Protocol):
    """How parameters, and the optimizer's state for them, are spread over the processes.

    Attributes:
        has_flat_optimizer: Whether the optimizer steps flat tensors of many parameters. It then steps frozen pairs
            too, with gradients of zero, and may hold no state of a pair on this rank.
        steps_within_backward: Whether accelerate's `backward` takes the optimizer step, so that the Trainer announces
            it too late.
    """

    has_flat_optimizer: bool
    steps_within_backward: bool

    # Parameters ------------------------------------------------------------------------------------------------------

    def is_sharded(self, tensor: Tensor) -> bool:
        """Whether this process holds a part of `tensor` (any shape) only."""

    def own_entries(self, tensor: Tensor) -> Tensor:
        """Return this rank's part of `tensor` (any shape): plain, detached, and sharing its memory.

        Returns:
            Replicas: the tensor. FSDP2: its rows (own rows, …). ZeRO-3: a range of its entries, one-dimensional.
        """

    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return sharded `tensors` (any shapes) whole, bit for bit the same on all ranks: one collective."""

    def write(self, parameter: Tensor, values: Tensor) -> None:
        """Copy the whole `values` into `parameter`, of the same whole shape, in place; no collective."""

    def shard_like(self, values: Tensor, like: Tensor) -> Tensor:
        """Return the whole `values` sharded as `like`, of the same whole shape, is; no collective."""

    def matrix(self, weight: Tensor) -> Any:
        """Return what this rank holds of `weight` (m, n), to be transposed with `.T` and given to `measure`."""

    def measure(self, measure: Measure, W: Any, B: Tensor, A: Tensor) -> tuple[Tensor, Reduction | None]:
        """Measure what this rank holds of W, block by block; no collective.

        Args:
            measure: A sum over the entries of W.
            W: What `matrix` returned for a weight (m, n).
            B: Left factor (m, R), whole.
            A: Right factor (R, n), whole.

        Returns:
            A scalar tensor, and over which processes it is to be summed; None if it is the whole sum.
        """

    def device(self, parameter: Tensor) -> torch.device:
        """Return a device whose tensors the process group of `parameter` (any shape) can reduce."""

    # The model -------------------------------------------------------------------------------------------------------

    def must_gather(self, parameters: Iterable[Tensor]) -> bool:
        """Whether all ranks must take part in reading `parameters` (any shapes)."""

    def reshard(self, model: nn.Module) -> None:
        """Give back parameters of `model` that are whole for a while, so that every rank holds its shards."""

    def needs_all_gradients(self, parameters: Iterable[Tensor]) -> bool:
        """Whether every backward must reach all `parameters` (any shapes) that trained at the start, frozen or not."""

    def refuse(self, model: nn.Module, optimizer: Any) -> None:
        """Refuse the variants of this way of sharding that AROMA does not train under.

        Args:
            model: The model, wrapped or not, its parameters sharded.
            optimizer: The optimizer, wrapped or not.

        Raises:
            ConfigError: Naming the parameter, module, optimizer or option.
        """

    # The optimizer ---------------------------------------------------------------------------------------------------

    def not_held(self, optimizer: Any, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Return those of `parameters` (any shapes) that `optimizer` does not train."""

    def belongs(self, optimizer: Any, parameters: Iterable[Tensor]) -> None:
        """Remember that `optimizer` trains `parameters` (any shapes), where nothing else tells in a while."""

    def changed_at_rest(self, optimizer: Any, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Return those of `parameters` (any shapes) that `optimizer` changes though they get no gradient."""

    def optimizer_state(self, optimizer: Any, parameter: Tensor) -> OptimizerState:
        """Return what `optimizer` keeps for `parameter` (any shape): its moments, and this rank's entries of them."""

    def hook_step(self, optimizer: Any, before: Callable[..., None], after: Callable[..., None]) -> Handle:
        """Call `before` and `after` around every step that `optimizer` takes until the handle is removed.

        Args:
            optimizer: The optimizer, wrapped or not.
            before: Called with the optimizer and the positional and keyword arguments of `step`.
            after: Called likewise, once the parameters have been updated.
        """

    def base_optimizer(self, optimizer: Any) -> Any:
        """Return the torch optimizer that applies the updates; it has torch's hooks and the same rates.

        One step of `optimizer` may step it several times: hooks of it may change rates and restore them, no more.
        """


REPLICAS: Sharding = Replicas()
FSDP2: Sharding = Fsdp2()
ZERO: Sharding = Zero()


def sharding_of(tensor: Any, optimizer: Any = None) -> Sharding:
    """Return how a tensor (any shape), `Partition` or `Slice` is held, as `optimizer` has it where one is given."""
    if isinstance(tensor, Partition) or is_partitioned(tensor) or is_flattened(tensor):
        return ZERO
    if optimizer is not None and is_zero(unwrapped_optimizer(optimizer)):
        return ZERO
    return FSDP2 if isinstance(tensor, DTensor | Slice) else REPLICAS


def sharding_of_model(model: nn.Module, optimizer: Any = None) -> Sharding:
    """Return how the parameters of `model`, wrapped or not, are held when `optimizer` trains them."""
    if is_zero(unwrapped_optimizer(optimizer)) or is_engine(model):
        return ZERO
    if sharding_modules(model):
        return FSDP2
    return next((found for p in model.parameters() if (found := sharding_of(p)) is not REPLICAS), REPLICAS)


def refuse_sharding(model: nn.Module, optimizer: Any) -> None:
    """Refuse every way to distribute a model or its optimizer but DDP, FSDP2 by rows over all processes, and ZeRO.

    Raises:
        ConfigError: Naming the parameter, module, optimizer or option.
    """
    for sharding in (REPLICAS, FSDP2, ZERO):
        sharding.refuse(model, optimizer)


def refuse_missing_pairs(optimizer: Any, pairs: Iterable[tuple[str, Sequence[Tensor]]]) -> None:
    """Refuse an optimizer that lacks the pair of a module that trains.

    Args:
        optimizer: The optimizer, wrapped or not.
        pairs: Name of every module that trains, and its pair b (m, r), a (r, n).

    Raises:
        ConfigError: Naming the first such module.
    """
    named = [*pairs]
    parameters = [parameter for _, pair in named for parameter in pair]
    sharding = ZERO if is_zero(unwrapped_optimizer(optimizer)) else REPLICAS
    missing = {id(parameter) for parameter in sharding.not_held(optimizer, parameters)}
    for name, pair in named:
        if any(id(parameter) in missing for parameter in pair):
            raise bad_value(
                "optimizer",
                type(optimizer).__name__,
                f"it does not hold the trainable pair of {name!r}, so that module would never learn; make the "
                "optimizer after get_peft_model and, if you use it, fully_shard, over every parameter that requires a "
                "gradient; of several adapters, activate this one first (model.set_adapter)",
            )


def refuse_other_adapters(
    model: nn.Module,
    optimizer: Any,
    adapter_name: str,
    own: Sequence[Tensor],
    resting: Iterable[tuple[str, Tensor]],
) -> None:
    """Refuse a wrapper or an optimizer that was made while other adapters of the model were active.

    Args:
        model: The model, wrapped or not.
        optimizer: The optimizer, wrapped or not.
        adapter_name: The adapter that is to grow.
        own: Parameters (any shapes) of its pairs that train.
        resting: Parameters (any shapes) of the pairs of other adapters that do not train now, with the adapter's name.

    Raises:
        ConfigError: Naming the adapter that it was made for.
    """
    replicas = replicas_of(model)
    averaged = None if replicas is None else {*map(id, compat.averaged_by_ddp(replicas))}
    if averaged is not None and any(id(parameter) not in averaged for parameter in own):
        raise bad_value(
            "adapter_name",
            adapter_name,
            "DistributedDataParallel wrapped the model while this adapter rested, so it averages none of its "
            "gradients; call model.set_adapter first, and give each adapter a wrapper of its own",
        )
    named = [*resting]
    waited = averaged if replicas is not None and compat.waits_for_all(replicas) else None
    changed = {*map(id, ZERO.changed_at_rest(optimizer, [parameter for _, parameter in named]))}
    for name, parameter in named:
        if id(parameter) in (waited or ()):
            raise bad_value(
                "adapter_name",
                adapter_name,
                f"DistributedDataParallel wrapped the model while the adapter {name!r} was active, and waits for its "
                "gradients; call model.set_adapter first, and give each adapter a wrapper of its own",
            )
        if id(parameter) in changed:
            raise bad_value(
                "optimizer",
                type(unwrapped_optimizer(optimizer)).__name__,
                f"it holds the pairs of the adapter {name!r}, too, and would change them while they rest (decay, "
                "moments); call model.set_adapter before the optimizer is made, and give each adapter an engine of "
                "its own",
            )


def sharding_facts(model: nn.Module) -> dict[str, object]:
    """Return what all ranks must have equal of the way `model` is sharded, by name."""
    return {"fully_shard": len(sharding_modules(model))}


# Tensor by tensor ----------------------------------------------------------------------------------------------------


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of `tensor` (any shape) only."""
    return sharding_of(tensor).is_sharded(tensor)


def own_entries(tensor: Tensor) -> Tensor:
    """Return this rank's part of `tensor` (any shape); see `Sharding.own_entries`."""
    return sharding_of(tensor).own_entries(tensor)


def gathered(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return `tensors` (any shapes), the sharded ones whole; one collective if there are any."""
    sharded = [tensor for tensor in tensors if is_sharded(tensor)]
    if not sharded:
        return [*tensors]
    whole = iter(sharding_of(sharded[0]).gather(sharded))
    return [next(whole) if is_sharded(tensor) else tensor for tensor in tensors]


def write(parameter: Tensor, values: Tensor) -> None:
    """Copy the whole `values` into `parameter`, of the same whole shape, in place; no collective."""
    sharding_of(parameter).write(parameter, values)


def shard_like(values: Tensor, like: Tensor) -> Tensor:
    """Return the whole `values` sharded as `like`, of the same whole shape, is; no collective."""
    return sharding_of(like).shard_like(values, like)


def sharded_matrix(weight: Tensor) -> Any:
    """Return what this rank holds of `weight` (m, n), for `summed`; `.T` transposes it."""
    return sharding_of(weight).matrix(weight)


def summed(measure: Measure, weights: Sequence[Callable[[], Any]], factors: Sequence[Factors]) -> list[Tensor]:
    """Return `measure(W, B, A)` of every module: one collective if any W is sharded.

    Every rank measures what it holds of W, and the parts are summed.

    Args:
        measure: A sum over the entries of W.
        weights: Returns W (m, n) of every module, whole or as `sharded_matrix` gives it. It is called when the module
            is measured, so that copies, as of a quantised weight, exist one at a time.
        factors: B (m, R) and A (R, n) of every module, whole.

    Returns:
        A scalar tensor for every module.
    """
    values: list[Tensor] = []
    partial: list[tuple[int, Reduction]] = []
    for index, (weight, (B, A)) in enumerate(zip(weights, factors, strict=True)):
        value, reduction = _measured(measure, weight(), B, A)
        values.append(value)
        if reduction is not None:
            partial.append((index, reduction))
    if partial:
        device, group = partial[0][1]
        sums = torch.stack([values[index].to(device) for index, _ in partial])
        dist.all_reduce(sums, group=group)
        for (index, _), value in zip(partial, sums, strict=True):
            values[index] = value
    return values


def _measured(measure: Measure, W: Any, B: Tensor, A: Tensor) -> tuple[Tensor, Reduction | None]:
    """Return the measure of what this rank holds of W (m, n), with B (m, R) and A (R, n); W is freed on return."""
    return sharding_of(W).measure(measure, W, B, A)
