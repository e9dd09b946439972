"""Parameters whose optimizer DeepSpeed's ZeRO shards: which entries this rank holds, and how to write them.

ZeRO-1 and ZeRO-2 keep every parameter whole on all ranks. ZeRO-3 keeps a range of its entries, counted row by row, on
each rank; a parameter is whole only while it is used. The base optimizer holds flat tensors: float32 copies of such
ranges of many parameters, one after the other. After a step ZeRO overwrites the parameters with them. So whatever is
written into a parameter is written into its range of the flat tensor too, and its moments are ranges of flat moments.

Nothing is imported from DeepSpeed. Its parameters and optimizers are known by their attributes. (Its `safe_set_full_*`
would not do: they leave out parameters that need no gradient, and know the last engine of a model only.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import bad_value
from .parameters import Entries, OptimizerState, Sharding
from .processes import is_engine, is_zero, unwrapped, unwrapped_optimizer

_KNOWN = {"DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"}
"""Class names of the optimizers of ZeRO-1 and ZeRO-2, and of ZeRO-3."""

_REORDERING = ("round_robin_gradients", "zenflow", "params_in_nvme_and_cpu", "swap_optimizer")
"""Options with which flat copies lie elsewhere than DeepSpeed records, so that components would overwrite others."""


@dataclass(frozen=True)
class Range:
    """Where this rank holds its entries of a parameter, counted row by row.

    Attributes:
        shape: Shape of the whole parameter.
        start: First entry.
        stop: One past the last entry.
        flat: The tensor of the base optimizer that holds them, one-dimensional.
        offset: Where they begin in `flat`.
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


class Zero(Sharding):
    """ZeRO-1, -2 and -3; parameters without DeepSpeed's attributes are replicas."""

    has_flat_optimizer = True
    steps_within_backward = True

    # Parameters ------------------------------------------------------------------------------------------------------

    def is_sharded(self, tensor: Tensor) -> bool:
        """Whether ZeRO-3 shards `tensor` (any shape).

        It may hold the whole for a while as well. That is never read, since it may have been rounded on its way.
        """
        return is_partitioned(tensor)

    def own_entries(self, tensor: Any) -> Tensor:
        """Return this rank's range of `tensor` (any shape), one-dimensional, without padding; or the whole tensor."""
        if not is_partitioned(tensor):
            return super().own_entries(tensor)
        start, stop = _bounds(tensor)
        own: Tensor = tensor.ds_tensor.detach()[: stop - start]
        return own

    @torch.no_grad()
    def gather(self, tensor: Any) -> Tensor:
        """Return a parameter (any shape) that ZeRO-3 shards whole: a collective."""
        own = tensor.ds_tensor.detach().to(tensor.device)  # padded to the same length on all ranks
        flat = own.new_empty(dist.get_world_size() * len(own))
        dist.all_gather_into_tensor(flat, own)
        whole: Tensor = flat[: tensor.ds_numel].view(tuple(tensor.ds_shape))
        return whole

    @torch.no_grad()
    def write(self, parameter: Any, values: Tensor) -> None:
        """Copy `values` into `parameter`, of the same whole shape, and into its flat copy."""
        if is_partitioned(parameter):
            start, stop = _bounds(parameter)
            self.own_entries(parameter).copy_(values.reshape(-1)[start:stop])
        # ZeRO-3 leaves small parameters whole where they are used.
        if not is_partitioned(parameter) or parameter.ds_status.name == "AVAILABLE":
            parameter.data.copy_(values)
        if not is_flattened(parameter):
            return
        if is_partitioned(parameter):
            own = _own_range(parameter, _z3_optimizer(parameter))
            assert own is not None, "ZeRO-3 gives every rank a range of every parameter"
            own.of(own.flat).copy_(own.pick(values))
        elif (mapping := parameter._hp_mapping) is not None:
            address = mapping.lp_fragment_address
            mapping.get_hp_fragment().data.copy_(values.reshape(-1)[address.start : address.start + address.numel])

    # The model -------------------------------------------------------------------------------------------------------

    def must_gather(self, parameters: Iterable[Tensor]) -> bool:
        """Whether reading `parameters` (any shapes) takes all ranks: under ZeRO-3."""
        return any(map(is_partitioned, parameters))

    def needs_all_gradients(self, parameters: Iterable[Tensor]) -> bool:
        """Whether every backward must reach all `parameters` (any shapes): ZeRO-1 and ZeRO-2 fail without any."""
        return not self.must_gather(parameters)

    # The optimizer ---------------------------------------------------------------------------------------------------

    def not_held(self, optimizer: Any, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Return those of `parameters` (any shapes) that `optimizer` neither trains nor holds flat copies of."""
        return [parameter for parameter in super().not_held(optimizer, parameters) if not is_flattened(parameter)]

    def belongs(self, optimizer: Any, parameters: Iterable[Any]) -> None:
        """Remember that `optimizer` trains `parameters` (any shapes): ZeRO-3 says so of the last engine only."""
        inner = unwrapped_optimizer(optimizer)
        for parameter in filter(is_partitioned, parameters if is_zero(inner) else ()):
            parameter.aroma_optimizer = inner

    def steps(self, optimizer: Any, parameter: Any) -> bool:
        """Whether `optimizer` holds a flat copy of `parameter` (any shape): it steps them all, gradient or not."""
        inner = unwrapped_optimizer(optimizer)
        if is_partitioned(parameter):
            positions = getattr(inner, "grad_position", {})
            return bool(positions) and inner.get_param_id(parameter) in positions
        return any(parameter is one for group in getattr(inner, "bit16_groups", ()) for one in group)

    def optimizer_state(self, optimizer: Any, parameter: Any) -> OptimizerState:
        """Return the ranges of flat moments that `optimizer` keeps for `parameter` (any shape)."""
        if not is_flattened(parameter):
            return super().optimizer_state(optimizer, parameter)
        inner = unwrapped_optimizer(optimizer)
        own = _own_range(parameter, inner)
        if own is None:
            return OptimizerState({}, tuple(parameter.shape), lambda _: None, is_flat=True, is_elsewhere=True)
        held = own

        def entries(value: Tensor) -> Entries | None:
            """Return this rank's entries in a flat tensor; None if its shape is another."""
            if type(value) is not Tensor or not value.is_floating_point() or value.shape != held.flat.shape:
                return None
            return Entries(held.of(value), held.shape, held.pick)

        return OptimizerState(
            inner.optimizer.state.get(own.flat, {}),
            own.shape,
            entries,
            is_flat=True,
            # If offloaded, it is the gradient of the last step that had one.
            gradient=None if own.flat.grad is None else own.of(own.flat.grad),
        )

    def hook_step(self, optimizer: Any, before: Callable[..., None], after: Callable[..., None]) -> StepHooks:
        """Call `before` and `after` around every step of DeepSpeed's optimizer; see `StepHooks`."""
        return StepHooks(unwrapped_optimizer(optimizer), before, after)

    def base_optimizer(self, optimizer: Any) -> Any:
        """Return the torch optimizer of the flat tensors, which DeepSpeed steps once or several times a step."""
        inner = unwrapped_optimizer(optimizer)
        return inner.optimizer if is_zero(inner) else inner


def is_partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO-3 shards a parameter (any shape)."""
    return hasattr(tensor, "ds_tensor")


def is_flattened(tensor: Tensor) -> bool:
    """Whether the optimizer that trains a parameter (any shape) holds flat copies of it."""
    optimizer = _z3_optimizer(tensor)
    if optimizer is not None:  # ZeRO-3 marks all parameters of the model, not only those that train
        return optimizer.get_param_id(tensor) in optimizer.grad_position
    return hasattr(tensor, "_hp_mapping")


def _z3_optimizer(parameter: Any) -> Any:
    """Return the optimizer of ZeRO-3 that trains a parameter (any shape), or that marked it last; None without one.

    Every engine marks all parameters of its model, those of adapters that another engine trains, too.
    """
    return getattr(parameter, "aroma_optimizer", getattr(parameter, "_z3_optimizer", None))


def _own_range(parameter: Any, optimizer: Any) -> Range | None:
    """Return where this rank's entries of a flattened parameter (any shape) lie in `optimizer`, if it has any."""
    if is_partitioned(parameter):
        index, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start, stop = _bounds(parameter)
        return Range(tuple(parameter.ds_shape), start, stop, optimizer.fp32_partitioned_groups_flat[index], offset)
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return None
    own, position = mapping.lp_fragment_address, mapping.hp_fragment_address
    flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    return Range(tuple(parameter.shape), own.start, own.start + own.numel, flat, position.start)


def _bounds(parameter: Any) -> tuple[int, int]:
    """Return the first entry that this rank holds, and one past its last; the padding does not count."""
    length = parameter.ds_tensor.numel()
    start = min(dist.get_rank() * length, parameter.ds_numel)
    return start, min(start + length, parameter.ds_numel)


class StepHooks:
    """Calls around every step of an optimizer of DeepSpeed, which has no hooks: a wrapper of its method `step`.

    Args:
        before: Called before a step as torch calls its hooks: with the optimizer, and the arguments of `step`.
        after: Called after a step, likewise.
    """

    def __init__(self, optimizer: Any, before: Callable[..., None], after: Callable[..., None]) -> None:
        self._optimizer = optimizer
        self._own = vars(optimizer).get("step")  # None: the method of the class
        self._calls = True
        wrapped = optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            if not self._calls:
                return wrapped(*args, **kwargs)
            before(optimizer, args, kwargs)
            result = wrapped(*args, **kwargs)
            after(optimizer, args, kwargs)
            return result

        self._step = optimizer.step = step

    def remove(self) -> None:
        """Call nothing any more, and take the wrapper away unless another one lies around it."""
        self._calls = False
        if vars(self._optimizer).get("step") is not self._step:
            return
        if self._own is None:
            del self._optimizer.step
        else:
            self._optimizer.step = self._own


def refuse_zero(model: nn.Module, optimizer: Any) -> None:
    """Refuse what of DeepSpeed would train an adapter wrongly; do nothing without DeepSpeed.

    Raises:
        ConfigError: Naming the optimizer or option.
    """
    inner = unwrapped_optimizer(optimizer)
    kind, is_wrapper = type(inner).__name__, type(optimizer).__name__ == "DeepSpeedOptimizerWrapper"
    if kind not in _KNOWN and (is_zero(inner) or is_engine(model) or is_wrapper):
        remedy = "set zero_optimization.stage to 1, 2 or 3 (in bf16 2 or 3), and give engine.optimizer"
        raise bad_value("optimizer", kind, f"it is none that ZeRO shards; {remedy}")
    if not is_zero(inner):
        return
    for option in _REORDERING:
        if getattr(inner, option, False):
            raise bad_value(option, True, "flat copies then lie elsewhere than DeepSpeed records; leave it out")
    for name, parameter in unwrapped(model).named_parameters():
        if ".lora_" in name and is_flattened(parameter) and parameter.dtype != torch.float32:
            remedy = (
                "leave bf16 and fp16 out of DeepSpeed's configuration (the Trainer's: out of TrainingArguments) and "
                "load the base model in 16 bits, or set torch_autocast there"
            )
            raise bad_value("dtype", parameter.dtype, f"{name} is not float32, so components round; {remedy}")
